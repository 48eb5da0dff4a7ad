"""Is one method better than another? A paired bootstrap over seeds."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from sdsopt.extras import extra

MIN_SEEDS = 5
"""Below this no verdict is given: of 4 seeds all agree by luck in one case of eight."""

_CONFIDENCE = 0.95
_RESAMPLES = 9999


@dataclass(frozen=True)
class Difference:
    """A method's final loss minus the baseline's, each at its own best learning rate, seed by seed.

    Attributes:
        mean: Mean over the seeds; below 0 the method is better.
        low: Lower end of the 95 % interval.
        high: Upper end.
        by_seed: The differences themselves.
    """

    mean: float
    low: float
    high: float
    by_seed: tuple[float, ...]

    @property
    def verdict(self) -> str:
        """One of "better", "worse", "no difference" (the interval holds 0) and "too few seeds"."""
        if len(self.by_seed) < MIN_SEEDS:
            return "too few seeds"
        if self.low <= 0 <= self.high:
            return "no difference"
        return "better" if self.high < 0 else "worse"


def paired_difference(method: Sequence[float], baseline: Sequence[float]) -> Difference | None:
    """Compares losses of the same seeds.

    A seed gives every method the same fresh parameters and batches, so what is common to both cancels. The interval is
    the percentile bootstrap of the mean difference (Efron and Tibshirani 1993, ch. 13); it takes the choice of the
    learning rate as given.

    Args:
        method: One loss for each seed.
        baseline: The baseline's, in the same order.

    Returns:
        The difference; None where a seed diverged or there is only one.
    """
    differences = [one - other for one, other in zip(method, baseline, strict=True)]
    if len(differences) < 2 or not all(map(math.isfinite, differences)):
        return None
    mean = math.fsum(differences) / len(differences)
    if min(differences) == max(differences):
        return Difference(mean, mean, mean, tuple(differences))
    with extra("demo"):
        import numpy as np
        from scipy.stats import bootstrap
    # A generator of its own: the same records always give the same interval.
    interval = bootstrap(
        (differences,),
        np.mean,
        n_resamples=_RESAMPLES,
        confidence_level=_CONFIDENCE,
        method="percentile",
        rng=np.random.default_rng(0),
    ).confidence_interval
    return Difference(mean, float(interval.low), float(interval.high), tuple(differences))
