"""TRL's SFTTrainer on a tiny chat data set.

Run it: `pip install 'sdsopt[peft]' trl`, then `python examples/trl_sft.py`. It needs neither data nor a download: the
tokenizer is made here.
"""

from __future__ import annotations

from tempfile import TemporaryDirectory

import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from trl import SFTConfig, SFTTrainer  # pyright: ignore[reportPrivateImportUsage]

from sdsopt.integrations.transformers import SDSOptimizerFactory

WORDS = ["one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten"]


def build_tokenizer() -> PreTrainedTokenizerFast:
    vocabulary = {word: index for index, word in enumerate(["<pad>", "<eos>", "<unk>", *WORDS])}
    tokenizer = Tokenizer(WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = Whitespace()  # pyright: ignore[reportAttributeAccessIssue]
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>")


def build_data() -> Dataset:
    """Counting on from any number."""
    starts = range(len(WORDS) - 3)
    return Dataset.from_list(
        [{"prompt": WORDS[start], "completion": " " + " ".join(WORDS[start + 1 :])} for start in starts] * 6
    )


def build_trainer(folder: str, correction: str, steps: int) -> SFTTrainer:
    torch.manual_seed(0)
    tokenizer = build_tokenizer()
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4
    )
    model = get_peft_model(LlamaForCausalLM(config), LoraConfig(r=8, target_modules="all-linear"))
    args = SFTConfig(
        folder,
        max_steps=steps,
        per_device_train_batch_size=4,
        learning_rate=1e-2,
        logging_steps=10,
        report_to="none",
        use_cpu=not torch.cuda.is_available(),
    )
    data = build_data()
    # docs: trainer
    trainer = SFTTrainer(
        model,
        args,
        train_dataset=data,
        processing_class=tokenizer,
        optimizer_cls_and_kwargs=(SDSOptimizerFactory, {"training_args": args, "correction": correction}),  # pyright: ignore[reportArgumentType]
    )
    # docs: end
    return trainer


def main(correction: str = "sds", steps: int = 30) -> list[float]:
    with TemporaryDirectory() as folder:
        trainer = build_trainer(folder, correction, steps)
        trainer.train()
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


if __name__ == "__main__":
    main()
