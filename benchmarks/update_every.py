"""What old roots cost in accuracy: the digits task with `update_every`. The table of docs/performance.md.

python benchmarks/update_every.py          # about a quarter of an hour on one core
"""

from __future__ import annotations

from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from statistics import fmean, stdev
from typing import cast

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from sdsopt import SDSPreconditioner, find_pairs
from sdsopt.compare import DigitsTask
from sdsopt.compare.grid import Run
from sdsopt.compare.methods import make_inner, make_method
from sdsopt.compare.records import final_loss
from sdsopt.compare.train import train
from sdsopt.linalg import SVDInverseRoot

_STEPS = 150
_SEEDS = (0, 1, 2, 3, 4, 5, 6, 7)
_RATES = {"sds": 0.008, "sds-split": 0.004}  # those that docs/moment-transport.md found with fresh roots
_FORMING = _STEPS // 4  # first B grows from zero, and any roots of it are soon old


@dataclass
class Errors:
    """‖gA - gA with fresh roots‖ / ‖gA with fresh roots‖ of all pairs, step by step."""

    found: list[list[float]] = field(default_factory=list)

    @contextmanager
    def watch(self, model: nn.Module, optimizer: Optimizer) -> Generator[None]:
        wrapper = cast("SDSPreconditioner", optimizer)
        exact: list[Tensor] = []

        def before(*_: object) -> None:
            exact[:] = [_corrected(pair.B, pair.A.grad, wrapper.correction) for pair in find_pairs(model)]

        def inside(*_: object) -> None:
            used = [pair.A.grad for pair in find_pairs(model)]
            errors = [(gA - g).norm() / g.norm() for gA, g in zip(used, exact, strict=True) if gA is not None]
            self.found.append(torch.stack(errors).tolist())

        handles = [wrapper.register_step_pre_hook(before), wrapper.inner.register_step_pre_hook(inside)]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()


@torch.no_grad()
def _corrected(B: Tensor, gradient: Tensor | None, correction: object) -> Tensor:
    assert gradient is not None
    exponent: float = correction.exponent  # pyright: ignore  # a GramPower
    [root], _ = SVDInverseRoot().compute(SVDInverseRoot().reduce(B[None]), (exponent,), 1e-6)
    return root[0] @ gradient.double()


def main() -> None:
    task = DigitsTask()
    task.prepare()
    print("| | k | error in gA, median and 90 % | final train loss | minus that of k = 1 |")
    print("|---|---:|---:|---:|---:|")
    for name, rate in _RATES.items():
        fresh: list[float] = []
        for k in (1, 2, 5, 10, 20):
            errors, losses = Errors(), list[float]()
            method = replace(make_method(name), update_every=k)
            for seed in _SEEDS:
                run = Run(method, make_inner("adamw"), rate, seed, 8, _STEPS)
                seen = len(errors.found)
                losses.append(final_loss(train(task, run, "", errors.watch)))
                del errors.found[seen : seen + _FORMING]
            fresh = fresh or losses
            all_of_them = torch.tensor(errors.found).flatten()
            median, ninety = torch.quantile(all_of_them, torch.tensor([0.5, 0.9])).tolist()
            minus = [loss - of_fresh for loss, of_fresh in zip(losses, fresh, strict=True)]
            difference = "" if k == 1 else f"{fmean(minus):+.4f} ± {stdev(minus):.4f}"
            loss = f"{fmean(losses):.4f} ± {stdev(losses):.3f}"
            print(f"| `{name}` | {k} | {median:.1%}, {ninety:.1%} | {loss} | {difference} |", flush=True)


if __name__ == "__main__":
    main()
