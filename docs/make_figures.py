"""Draws the figures of the documentation: `python docs/make_figures.py`, about a minute."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure

from sdsopt import SDSPreconditioner, find_pairs

DOCS = Path(__file__).parent
sys.path.insert(0, str(DOCS.parent / "examples"))
example: Any = importlib.import_module("ill_conditioned")

STYLE: dict[str, dict[str, Any]] = {
    "lora": {"color": "#0072B2", "marker": "o"},
    "sds": {"color": "#D55E00", "marker": "^"},
    "sds-split": {"color": "#009E73", "marker": "D", "linestyle": "-."},
    "scaled": {"color": "#CC79A7", "marker": "v", "linestyle": ":"},
}


def gains(correction: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns the singular values of a B, and how strongly G's component along each reaches A; measured, not drawn."""
    singular_values = torch.logspace(0, -2, 12, dtype=torch.float64)
    B, A = torch.linalg.qr(torch.randn(40, 12, dtype=torch.float64)).Q * singular_values, torch.eye(12).double()
    model, _ = example.problem(1.0)
    pair = find_pairs(model)[0]
    pair.B.data, pair.A.data = B, A
    pair.B.requires_grad_(False)
    pair.A.grad = B.T @ (B / singular_values)  # G has a component of size 1 along each direction of B
    seen: list[torch.Tensor] = []

    class Recorder(torch.optim.SGD):
        def step(self, closure: Any = None) -> None:  # pyright: ignore[reportIncompatibleMethodOverride]
            assert pair.A.grad is not None
            seen.append(pair.A.grad.clone())

    SDSPreconditioner(Recorder([pair.A], lr=0.0), model, correction).step()
    return singular_values, torch.linalg.vector_norm(seen[0], dim=1)


def what_is_undone() -> Figure:
    figure = Figure(figsize=(6.2, 3.4), layout="constrained", dpi=150)
    panel = figure.subplots()
    for correction in ("lora", "sds", "scaled"):
        singular_values, gain = gains(correction)
        panel.loglog(singular_values, gain, markersize=5, label=correction, **STYLE[correction])
    panel.set(xlabel="singular value of B along a direction", ylabel="gain of G's component\nalong that direction")
    panel.set_title("What of the full gradient G reaches A", loc="left", fontsize=11)
    panel.invert_xaxis()
    panel.legend(frameon=False)
    return figure


def ill_conditioned() -> Figure:
    figure = Figure(figsize=(6.2, 3.6), layout="constrained", dpi=150)
    panel = figure.subplots()
    for correction in example.CORRECTIONS:
        counts = [example.best_iterations(correction, condition) for condition in example.CONDITIONS]
        known = [(c, n) for c, n in zip(example.CONDITIONS, counts, strict=True) if n < example.LIMIT]
        panel.loglog(*zip(*known, strict=True), label=correction, **STYLE[correction])
        print(correction, counts)
    panel.set(xlabel="condition number of the solution", ylabel="SGD steps to a relative error of 1e-6")
    panel.set_title("60×50 factorization of rank 5, best of five learning rates", loc="left", fontsize=11)
    panel.legend(frameon=False)
    return figure


def main() -> None:
    torch.manual_seed(0)
    for name, draw in (("what-is-undone", what_is_undone), ("ill-conditioned", ill_conditioned)):
        figure = draw()
        for panel in figure.axes:
            panel.spines[["top", "right"]].set_visible(False)
            panel.grid(True, color="0.9", linewidth=0.8)
        figure.savefig(DOCS / "img" / f"{name}.png")


if __name__ == "__main__":
    main()
