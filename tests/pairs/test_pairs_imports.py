"""`sdsopt.pairs` needs nothing but torch."""

from __future__ import annotations

import subprocess
import sys


def test_third_party_lora_libraries_are_not_imported() -> None:
    # An entry of None makes an import of that name fail.
    code = """
import sys
for name in ("peft", "transformers", "accelerate"):
    sys.modules[name] = None
import torch, sdsopt.pairs
print(len(sdsopt.pairs.find_pairs(torch.nn.Linear(2, 2))))
"""
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    assert run.stdout.strip() == "0"
