"""All contenders on one set of layers: a table with ratios."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from sdsopt.bench.adapter import Adapter
from sdsopt.bench.contenders import ADAMW, BACKWARD, contenders_for
from sdsopt.bench.settings import DTYPES, Settings
from sdsopt.bench.shapes import SHAPES, ModelShape
from sdsopt.bench.timing import Stopwatch, Timing, run_rounds

# Parameters, gradients twice, AdamW's two moments, and two copies in a step: as multiples of the parameters.
_COPIES = 7
# LoRA-RITE keeps four copies of its own, peft's optimizer two.
_COPIES_OF_PEERS = 6


@dataclass(frozen=True)
class Section:
    """The measurement of one model, rank and dtype.

    Attributes:
        model: What was measured.
        rank: r.
        dtype: Of parameters and gradients.
        blocks: How many of the model's blocks fitted into memory.
        all_blocks: How many it has.
        pairs: The number of LoRA pairs.
        parameter_bytes: The size of the LoRA parameters.
        timings: One for each contender that ran.
        skipped: Why others did not.
    """

    model: str
    rank: int
    dtype: str
    blocks: int
    all_blocks: int
    pairs: int
    parameter_bytes: int
    timings: tuple[Timing, ...]
    skipped: dict[str, str]

    @property
    def title(self) -> str:
        """Names the measurement and its size."""
        return (
            f"{self.model}, r = {self.rank}, {self.dtype}: {self.blocks} of {self.all_blocks} blocks, "
            f"{self.pairs} pairs, {self.parameter_bytes / 2**20:.0f} MiB of LoRA parameters"
        )

    def to_json(self) -> dict[str, Any]:
        """Returns plain JSON types, times in seconds."""
        return {**vars(self), "timings": [vars(timing) for timing in self.timings]}


def measure_sections(settings: Settings, on_start: Callable[[str], object]) -> list[Section]:
    """Measures every shape at every rank and dtype.

    Args:
        settings: What to measure.
        on_start: Told what is measured next.
    """
    sections: list[Section] = []
    for shape in settings.shapes:
        for rank in settings.ranks:
            for dtype in settings.dtypes:
                on_start(f"{shape}, r = {rank}, {dtype}")
                sections.append(measure(SHAPES[shape], rank, dtype, settings))
    return sections


def measure(model: ModelShape, rank: int, dtype: str, settings: Settings) -> Section:
    """Measures all contenders on as many blocks of a model as memory allows."""
    blocks = _blocks_that_fit(model, rank, dtype, settings)
    adapter = Adapter(model, blocks, rank, DTYPES[dtype], settings.device)
    contenders, skipped = contenders_for(adapter, peers=settings.peers)
    timings, failed = run_rounds(adapter, contenders, settings.rounds, Stopwatch(settings.device, settings.clock))
    return Section(
        model=model.title,
        rank=rank,
        dtype=dtype,
        blocks=blocks,
        all_blocks=model.blocks,
        pairs=adapter.num_pairs,
        parameter_bytes=adapter.num_bytes,
        timings=tuple(timings),
        skipped=skipped | failed,
    )


def _blocks_that_fit(model: ModelShape, rank: int, dtype: str, settings: Settings) -> int:
    copies = _COPIES + (_COPIES_OF_PEERS if settings.peers else 0)
    per_block = model.num_parameters(rank) * DTYPES[dtype].itemsize * copies
    return max(1, min(model.blocks, int(settings.memory * 2**30 / per_block)))


HEADINGS = ("step, ms", "correction, ms", "ratio to AdamW", "extra memory")


def cells(section: Section, timing: Timing) -> tuple[str, ...]:
    """Returns one contender's cells under `HEADINGS`; extra memory as a multiple of the LoRA parameters."""
    low, high = timing.quartiles
    is_baseline = timing.name in (ADAMW, BACKWARD)
    return (
        f"{_ms(timing.seconds)} [{_ms(low)}, {_ms(high)}]",
        "" if is_baseline else _ms(timing.correction),
        "" if timing.name == BACKWARD else f"{timing.ratio:.2f}",
        "" if timing.extra_bytes is None else f"{timing.extra_bytes / section.parameter_bytes:.2f} x",
    )


def shown(section: Section) -> Sequence[Timing]:
    """Returns the timings that the table shows: backward of given gradients is a mere help."""
    return [timing for timing in section.timings if timing.name != BACKWARD]


def _ms(seconds: float) -> str:
    milliseconds = 1e3 * seconds
    return f"{milliseconds:.3g}" if milliseconds < 100 else f"{milliseconds:.0f}"
