"""What is measured of the adapters along a run, and how little of it, so that a run stays cheap."""

from __future__ import annotations

from collections.abc import Generator, Sequence
from contextlib import contextmanager
from statistics import median

import torch
from torch import Tensor

from sdsopt.corrections import Correction
from sdsopt.diagnostics import (
    FullGradients,
    is_linear_pair,
    median_condition_numbers,
    pair_spectra,
)
from sdsopt.engine import Recipe, measure
from sdsopt.pairs import LoRAPair

_KAPPA_POINTS = 20  # per run, evenly spaced
_ALIGNMENT_POINTS = 5
_ALIGNMENT_LAYERS = 8  # each takes one m×n matrix while its full gradient is captured


class Probe:
    """Measures the adapters before some of the steps. Changes nothing; without adapters it does nothing.

    Attributes:
        kappa_steps: Steps at which condition numbers were taken.
        kappas: κ(A) and κ(B) at these, medians over the pairs.
        alignment_steps: Steps at which the alignment with the full gradient was taken.
        alignments: Its median over up to eight linear layers, evenly spaced over the model.

    Args:
        pairs: The model's pairs.
        correction: What corrects their gradients; None for plain LoRA.
        damping: Its relative damping.
        steps: Length of the run.
    """

    def __init__(self, pairs: Sequence[LoRAPair], correction: Correction | None, damping: float, steps: int) -> None:
        self.kappa_steps: list[int] = []
        self.kappas: list[tuple[float | None, float | None]] = []
        self.alignment_steps: list[int] = []
        self.alignments: list[float] = []
        self._pairs = pairs
        linear = [pair for pair in pairs if is_linear_pair(pair)]
        count = min(_ALIGNMENT_LAYERS, len(linear))
        self._watched = [linear[i * len(linear) // count] for i in range(count)]
        self._recipes = {"": Recipe.of(correction or "lora", damping, "auto")}
        self._kappa_interval = max(1, steps // _KAPPA_POINTS)
        self._alignment_interval = max(1, steps // _ALIGNMENT_POINTS)

    @contextmanager
    def around(self, step: int) -> Generator[None]:
        """Goes around forward and backward of a step; the gradients must still be there at its end."""
        if self._pairs and step % self._kappa_interval == 0:
            self.kappa_steps.append(step)
            self.kappas.append(median_condition_numbers(self._pairs))
        if not self._watched or step % self._alignment_interval:
            yield
            return
        with FullGradients(self._watched, strict=False) as full:
            yield
            captured = [pair for pair in self._watched if pair in full.gradients]
            measured = measure(captured, self._recipes, full.gradients)
        cosines = [pair.steps[""].alignment for pair in measured.values()]
        known = [cosine for cosine in cosines if cosine is not None and cosine == cosine]
        if known:
            self.alignment_steps.append(step)
            self.alignments.append(median(known))

    def spectra(self) -> tuple[tuple[float, ...], tuple[float, ...], tuple[float, ...]]:
        """Returns the singular values of A, B and ΔW as they are now: of each position, the median over the pairs."""
        found: tuple[list[Tensor], list[Tensor], list[Tensor]] = ([], [], [])
        for pair in self._pairs:
            A, B = (factor.detach().cpu() for factor in (pair.split_A(pair.A), pair.split_B(pair.B)))
            spectra = pair_spectra(A, B)
            product = abs(pair.scaling) * spectra.product
            for values, into in zip((spectra.A, spectra.B, product), found, strict=True):
                into.extend(values[values.isfinite().all(-1)])  # (k,) for each block
        return _medians(found[0]), _medians(found[1]), _medians(found[2])


def _medians(spectra: Sequence[Tensor]) -> tuple[float, ...]:
    if not spectra:
        return ()
    # Pairs may differ in rank: a position's median is over those that reach it.
    padded = torch.nn.utils.rnn.pad_sequence(list(spectra), batch_first=True, padding_value=torch.nan)
    return tuple(torch.nanquantile(padded, 0.5, 0).tolist())
