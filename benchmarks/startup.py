"""What `import sdsopt` adds to `import torch`, and how long 2,000 pairs take to find and to wrap.

    python benchmarks/startup.py

CPU time, which other processes do not change. The garbage collector runs before and not during a measurement: a full
collection after building a model of 24,000 modules takes longer than all of this, whoever triggers it.
"""

from __future__ import annotations

import gc
import subprocess
import sys
import time
from collections.abc import Callable
from statistics import median

import torch

import sdsopt

_IMPORT = """
import time, torch
started = time.process_time()
import sdsopt
print(time.process_time() - started)
"""


def import_seconds(runs: int = 5) -> float:
    """The median over fresh processes; the first one, which compiles, does not count."""
    times = [
        float(subprocess.run([sys.executable, "-c", _IMPORT], capture_output=True, text=True, check=True).stdout)
        for _ in range(runs + 1)
    ]
    return median(times[1:])


def adapted_model(layers: int = 286) -> torch.nn.Module:
    """A narrow Llama of 2,002 LoRA layers."""
    import peft
    import transformers

    config = transformers.LlamaConfig(
        vocab_size=32,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=layers,
        num_attention_heads=2,
        num_key_value_heads=2,
    )
    return peft.get_peft_model(transformers.LlamaModel(config), peft.LoraConfig(r=2, target_modules="all-linear"))


def seconds(function: Callable[[], object], runs: int = 5) -> float:
    times: list[float] = []
    for _ in range(runs):
        gc.collect()
        gc.disable()
        started = time.process_time()
        function()
        times.append(time.process_time() - started)
        gc.enable()
    return median(times)


def main() -> None:
    print(f"import sdsopt, over import torch: {import_seconds():.3f} s")
    model = adapted_model()
    print(f"{len(sdsopt.find_pairs(model))} pairs, {sum(1 for _ in model.modules())} modules")
    inner = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    print(f"find_pairs:        {seconds(lambda: sdsopt.find_pairs(model)):.3f} s")
    print(f"SDSPreconditioner: {seconds(lambda: sdsopt.SDSPreconditioner(inner, model)):.3f} s")
    print(f"attach, remove:    {seconds(lambda: sdsopt.attach(model).remove()):.3f} s")


if __name__ == "__main__":
    main()
