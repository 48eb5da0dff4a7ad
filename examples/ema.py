"""An exponential moving average of the weights, beside a corrected optimizer.

Run it: `pip install 'sdsopt[peft]'`, then `python examples/ema.py`. It needs neither data nor a download.
"""

from __future__ import annotations

import torch
from peft import LoraConfig, get_peft_model
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from transformers import LlamaConfig, LlamaForCausalLM

from sdsopt import SDSPreconditioner


def main(correction: str = "sds", steps: int = 30) -> tuple[float, float]:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4
    )
    model = get_peft_model(LlamaForCausalLM(config), LoraConfig(r=8, target_modules="all-linear"))
    tokens = torch.arange(32).repeat(8, 2) % 16  # a pattern to learn
    batch = {"input_ids": tokens, "labels": tokens}
    batches = [batch] * steps
    # docs: train
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = SDSPreconditioner(torch.optim.AdamW(parameters, lr=1e-2), model, correction)
    averaged = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.9))
    for batch in batches:
        optimizer.zero_grad()
        model(**batch).loss.backward()
        optimizer.step()
        averaged.update_parameters(model)
    # docs: end
    with torch.no_grad():
        last, average = (net(**batch).loss.item() for net in (model, averaged))
    print(f"{correction}: loss {last:.3f}, with averaged weights {average:.3f}")
    return last, average


if __name__ == "__main__":
    main()
