"""The inverse-root methods side by side, over ranks and batches: what the automatic choice rests on.

    python benchmarks/roots.py [cuda]

On a CPU it is the CPU time that counts, which other processes change least.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from statistics import median

import torch

from sdsopt.bench.machine import describe_machine
from sdsopt.linalg import make_inverse_root

_METHODS = ("eigh", "newton_schulz", "svd")
_ELEMENTS = 448 * 16 * 16  # matrices of a batch × r²: both factors of the 224 layers of Llama-3-8B at r = 16


def milliseconds(function: Callable[[], object], device: str, runs: int = 9) -> float:
    times: list[float] = []
    for _ in range(runs + 1):
        if device == "cuda":
            torch.cuda.synchronize()
        started = time.perf_counter() if device == "cuda" else time.process_time()
        function()
        if device == "cuda":
            torch.cuda.synchronize()
        times.append((time.perf_counter() if device == "cuda" else time.process_time()) - started)
    return 1e3 * median(times[1:])


@torch.no_grad()
def main() -> None:
    device = sys.argv[1] if len(sys.argv) > 1 else "cpu"
    print(", ".join(f"{name} {value}" for name, value in describe_machine(device).items()))
    print("\n| r | matrices |" + "".join(f" {method}, ms |" for method in _METHODS))
    print("|---:|---:|" + "---:|" * len(_METHODS))
    for rank in (4, 8, 16, 32, 64, 128, 256):
        for batch in sorted({8, max(8, min(448, 8 * _ELEMENTS // rank**2))}):
            factors = torch.randn(batch, 4 * rank, rank, dtype=torch.float64, device=device)
            line = f"| {rank} | {batch} |"
            for name in _METHODS:
                root = make_inverse_root(name)
                reduced = root.reduce(factors)
                time_ = milliseconds(lambda root=root, r=reduced: root.compute(r, [0.5], 1e-6), device)
                line += f" {time_:.2f} |"
            print(line)


if __name__ == "__main__":
    main()
