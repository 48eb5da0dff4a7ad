"""Hugging Face's Trainer, corrected in the optimizer or in backward.

Run it: `pip install 'sdsopt[peft]' 'transformers>=5.2' accelerate datasets`, then `python examples/hf_trainer.py`.
It needs neither data nor a download.
"""

from __future__ import annotations

from tempfile import TemporaryDirectory

import torch
from datasets import Dataset
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments

from sdsopt.integrations.transformers import SDSCallback, SDSOptimizerFactory


def build_model() -> PeftModel:
    config = LlamaConfig(
        vocab_size=64, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4
    )
    return get_peft_model(LlamaForCausalLM(config), LoraConfig(r=8, target_modules="all-linear"))


def main(correction: str = "sds", *, in_backward: bool = False, steps: int = 30) -> list[float]:
    torch.manual_seed(0)
    tokens = [i % 16 for i in range(64)]  # a pattern to learn
    data = Dataset.from_dict({"input_ids": [tokens] * 32, "labels": [tokens] * 32})
    with TemporaryDirectory() as folder:
        args = TrainingArguments(
            folder,
            max_steps=steps,
            per_device_train_batch_size=4,
            gradient_accumulation_steps=2,
            learning_rate=1e-2,
            lr_scheduler_type="cosine",
            max_grad_norm=1.0,
            logging_steps=10,
            report_to="none",
        )
        model = build_model()
        if in_backward:
            # docs: callback
            trainer = Trainer(model, args, train_dataset=data)
            SDSCallback(correction).add_to(trainer)
            # docs: end
        else:
            # docs: factory
            trainer = Trainer(
                model,
                args,
                train_dataset=data,
                optimizer_cls_and_kwargs=(SDSOptimizerFactory, {"training_args": args, "correction": correction}),  # pyright: ignore[reportArgumentType]
            )
            # docs: end
        trainer.train()
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


if __name__ == "__main__":
    main()
    main(in_backward=True)
