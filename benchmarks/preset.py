"""Which setting to recommend, and what it buys over tuned LoRA. The study of docs/preset.md.

python benchmarks/preset.py explore digits OUT/digits [NAME …]  # candidates at their best rates, few seeds; resumes
python benchmarks/preset.py confirm digits OUT/digits           # the chosen ones on seeds that chose nothing
python benchmarks/preset.py figure OUT                          # docs/img/preset.png, of what `confirm` left in OUT

The other studies are `language` and `language-32` (rank 32). On one core, `confirm` takes about 10 minutes each, and
`explore` half a minute for each candidate.
"""

from __future__ import annotations

import itertools
import math
import random
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from matplotlib.figure import Figure
from torch import nn
from torch.optim import Optimizer

from sdsopt import Correction, Factors, GramPower, KeepNorm, LearningRates, PairTensors, find_pairs
from sdsopt.compare import Cell, DigitsTask, Inner, LanguageTask, Method, Record, Run, Task
from sdsopt.compare.records import final_loss
from sdsopt.compare.store import JsonLines
from sdsopt.compare.summary import difference, gap_closed, make_stat
from sdsopt.compare.sweep import sweep_fingerprint
from sdsopt.compare.train import train
from sdsopt.corrections import make_correction
from sdsopt.corrections.lora_muon import LoRAMuon
from sdsopt.corrections.wrapping import Wrapping

STEPS = 150
SHORT = 105  # 70 % of the steps, with a schedule of that length
WITHIN = 1.10


@dataclass(frozen=True)
class Study:
    """A task at a rank.

    Attributes:
        make_task: The task.
        rank: The adapters' rank.
        explored: Seeds that choose.
        fresh: Seeds that confirm.
        ranged: Those of them that the range of rates is measured on.
        frozen: What is confirmed, at the rates that `explore` found, as powers of √2.
        curves: For which of these the range of rates is measured; `lora` first.
    """

    make_task: Callable[[], Task]
    rank: int
    explored: Sequence[int]
    fresh: Sequence[int]
    ranged: Sequence[int]
    frozen: Mapping[str, int]
    curves: Sequence[str]


LANGUAGE = partial(LanguageTask, length=64, width=64, layers=2)  # a third of the default's cost
MUON = "lora-muon, Nesterov 0.95"
PLAIN_MUON = "lora, Muon"  # tells what of the gain is Muon's
STUDIES = {
    "digits": Study(
        DigitsTask,
        8,
        range(4),
        range(200, 212),
        range(200, 208),
        {"lora": 6, "full": 3, MUON: 12, "sds-split": 4, "sds": 6, PLAIN_MUON: 7},
        ("lora", MUON, "sds-split", PLAIN_MUON),
    ),
    "language": Study(
        LANGUAGE,
        8,
        range(2),
        range(200, 210),
        range(200, 202),
        {"lora": 8, "full": 5, MUON: 11, "sds-split": 6},
        ("lora", MUON),
    ),
    "language-32": Study(
        LANGUAGE,
        32,
        range(2),
        range(200, 210),
        range(200, 203),
        {"lora": 6, "full": 5, MUON: 10, PLAIN_MUON: 8},
        ("lora", MUON, PLAIN_MUON),
    ),
}


def rate(k: int) -> float:
    """The learning rates of all methods: 0.001 and whole powers of √2 around it."""
    return float(f"{1e-3 * 2 ** (k / 2):.3g}")


# --- inner optimizers ---


class Both(Optimizer):
    """One optimizer for the matrices, another for the head: else the head's would differ with the matrices'."""

    def __init__(self, parts: Sequence[Optimizer]) -> None:
        super().__init__([group for part in parts for group in part.param_groups], {})
        self.parts = parts

    def step(self, closure: Any = None) -> None:
        del closure
        for part in self.parts:
            part.step()


def with_head(build: Callable[[list[dict[str, Any]]], Optimizer], groups: Iterable[dict[str, Any]]) -> Optimizer:
    swept, *head = groups
    return Both([build([swept]), adamw(head)]) if head else build([swept])


def adamw(groups: Iterable[dict[str, Any]], betas: tuple[float, float] = (0.9, 0.999)) -> Optimizer:
    return torch.optim.AdamW(groups, betas=betas, weight_decay=0.0)


HEAD_LR = 3e-3
INNERS = {
    "adamw": Inner("adamw", adamw, HEAD_LR),
    "adamw-95": Inner("adamw-95", partial(adamw, betas=(0.9, 0.95)), HEAD_LR),
    "sgd": Inner("sgd", partial(with_head, partial(torch.optim.SGD, momentum=0.9)), HEAD_LR),
    "nesterov": Inner("nesterov", partial(with_head, partial(torch.optim.SGD, momentum=0.95, nesterov=True)), HEAD_LR),
    "muon": Inner("muon", partial(with_head, partial(torch.optim.Muon, weight_decay=0.0)), HEAD_LR),
}

# --- candidates ---


def faster_B(model: nn.Module, optimizer: Optimizer, steps: int, ratio: float) -> None:
    """LoRA+. Not by lora_plus_groups, which would give the head another rate too."""
    B = {id(pair.B) for pair in find_pairs(model)}
    group = optimizer.param_groups[0]
    ours = [parameter for parameter in group["params"] if id(parameter) in B]
    group["params"] = [parameter for parameter in group["params"] if id(parameter) not in B]
    optimizer.add_param_group({"params": ours, "lr": ratio * group["lr"]})


@dataclass(frozen=True)
class MapAfter(Wrapping):
    """A start policy instead of the cap: the first steps are made as they are, with corrected gradients."""

    steps: int

    @property
    def uses_step(self) -> bool:
        return True

    def precondition(self, factors: Factors, gradients: PairTensors) -> PairTensors:
        return self.correction.precondition(factors, gradients)

    def postcondition(self, factors: Factors, updates: PairTensors, rates: LearningRates) -> PairTensors:
        return updates if factors.step < self.steps else super().postcondition(factors, updates, rates)


def split(cap: float | None = 0.1, p: float = 0.5, q: float = 0.5) -> GramPower:
    return GramPower(p, update_exponent=q, max_update_ratio=cap)


SDS = GramPower(0.5)


@dataclass(frozen=True)
class Candidate:
    """What is tried, and about where its best rate lies."""

    guess: float
    correction: Correction | None = None
    inner: str = "adamw"
    damping: float = 1e-6
    ratio: float = 1.0
    adapts: bool = True

    def method(self, name: str) -> Method:
        ratio = None if self.ratio == 1 else partial(faster_B, ratio=self.ratio)
        return Method(name, self.adapts, self.correction, ratio, damping=self.damping)


CANDIDATES: dict[str, Candidate] = {
    "full": Candidate(2e-3, adapts=False),
    "lora": Candidate(8e-3),
    "sds": Candidate(8e-3, SDS),
    "sds-split": Candidate(4e-3, split()),
    # The start policy.
    "sds-split, no cap": Candidate(2e-3, split(None)),
    "sds-split, cap 0.03": Candidate(4e-3, split(0.03)),
    "sds-split, cap 0.3": Candidate(4e-3, split(0.3)),
    "sds-split, cap 1": Candidate(4e-3, split(1.0)),
    "sds-split, after 15 steps of sds": Candidate(4e-3, MapAfter(split(None), 15)),
    # Lengths.
    "sds, norm kept": Candidate(8e-3, KeepNorm(SDS)),
    "sds-split, norm kept": Candidate(8e-3, KeepNorm(split())),
    # Damping, and lower powers.
    **{f"sds, δ = {d:g}": Candidate(8e-3, SDS, damping=d) for d in (1e-2, 1e-1, 3e-1)},
    **{f"sds-split, δ = {d:g}": Candidate(4e-3, split(), damping=d) for d in (1e-2, 1e-1, 3e-1)},
    "p = 1/4": Candidate(8e-3, GramPower(0.25)),
    "p = q = 1/4": Candidate(5.7e-3, split(p=0.25, q=0.25)),
    "p = 1/2, q = 1/4": Candidate(5.7e-3, split(q=0.25)),
    "p = 0, q = 1/2": Candidate(4e-3, split(p=0.0)),
    # B faster than A.
    "lora+, ratio 4": Candidate(4e-3, ratio=4.0),
    "lora+, ratio 16": Candidate(2e-3, ratio=16.0),
    "sds-split, ratio 4": Candidate(2e-3, split(), ratio=4.0),
    "sds-split, ratio 1/4": Candidate(8e-3, split(), ratio=0.25),
    # Other methods.
    "reflora": Candidate(8e-3, make_correction("reflora")),
    "lora-pro": Candidate(8e-3, make_correction("lora-pro")),
    "lora-muon": Candidate(3.2e-2, LoRAMuon(), inner="sgd"),
    "lora-muon, Nesterov 0.95": Candidate(3.2e-2, LoRAMuon(), inner="nesterov"),
    "lora-muon, δ = 0.01": Candidate(3.2e-2, LoRAMuon(damping=1e-2), inner="sgd"),
    "lora-muon, δ = 0.1": Candidate(3.2e-2, LoRAMuon(damping=1e-1), inner="sgd"),
    "lora-muon, AdamW": Candidate(3.2e-2, LoRAMuon()),
    "full, Muon": Candidate(1.6e-2, inner="muon", adapts=False),
    "lora, Muon": Candidate(3.2e-2, inner="muon"),
    # AdamW's second moments.
    "full, β2 = 0.95": Candidate(2e-3, inner="adamw-95", adapts=False),
    "lora, β2 = 0.95": Candidate(8e-3, inner="adamw-95"),
    "sds-split, β2 = 0.95": Candidate(4e-3, split(), inner="adamw-95"),
}


# --- runs ---


class Lab:
    """Runs of one task; what is on disk already is not run again."""

    def __init__(self, study: Study, out: str) -> None:
        self.study, self.task = study, study.make_task()
        self.task.prepare()
        self._fingerprint = sweep_fingerprint(self.task)
        self._store = JsonLines(Path(out) / "runs.jsonl")
        lines = (line for line in self._store.read() if line["fingerprint"] == self._fingerprint)
        self._records = {record.key: record for record in map(Record.from_json, lines)}

    def loss(self, name: str, k: int, seeds: Iterable[int]) -> float:
        return sum(map(final_loss, records := self.records(name, k, seeds))) / len(records)

    def records(self, name: str, k: int, seeds: Iterable[int], steps: int = STEPS) -> list[Record]:
        candidate = CANDIDATES[name]
        method = candidate.method(name)
        inner = INNERS[candidate.inner]
        return [self._record(Run(method, inner, rate(k), seed, self.study.rank, steps)) for seed in seeds]

    def _record(self, run: Run) -> Record:
        if run.key not in self._records:
            record = train(self.task, run, self._fingerprint)
            self._store.append(record.to_json())
            self._records[run.key] = record
        return self._records[run.key]


def search(lab: Lab, name: str, seeds: Iterable[int]) -> dict[int, float]:
    """Mean losses at the best rate, at √2 and 2 times it and their inverses: a factor of 2 first, then √2."""
    start = round(2 * math.log2(CANDIDATES[name].guess / 1e-3))
    losses: dict[int, float] = {}
    for stride in (2, 1):
        while True:
            best = min(losses, key=losses.__getitem__, default=start)
            missing = {best - stride, best, best + stride} - set(losses)
            if not missing:
                break
            losses |= {k: lab.loss(name, k, seeds) for k in sorted(missing)}
    return losses


def explore(study: str, out: str, *names: str) -> None:
    lab = Lab(STUDIES[study], out)
    for name in names or CANDIDATES:
        losses = search(lab, name, lab.study.explored)
        best = min(losses, key=losses.__getitem__)
        curve = ", ".join(f"{rate(k):g}: {losses[k]:.4f}" for k in sorted(losses))
        print(f"| {name} | {rate(best):g} | {losses[best]:.4f} | {curve} |", flush=True)


# --- confirmation ---


def confirm(name: str, out: str) -> None:
    """All that is claimed is measured here: on seeds that chose neither methods nor rates."""
    study = STUDIES[name]
    lab = Lab(study, out)
    frozen = {name: cell(lab.records(name, k, study.fresh)) for name, k in study.frozen.items()}
    lora, full = frozen["lora"], frozen["full"]
    print("| | rate | train loss | held out | minus `lora` | gap closed | 70 % of the steps, minus `lora` |")
    print("|---|---:|---:|---:|---|---:|---|")
    for name, at in frozen.items():
        closed = gap_closed(lora, full, at)
        shorter = "–"  # no use where all the steps are not enough
        if at.loss.mean < lora.loss.mean:
            shorter = against(cell(lab.records(name, study.frozen[name], study.fresh, SHORT)), lora)
        print(
            f"| {name} | {at.lr:g} | {at.loss.mean:.4f} ± {at.loss.std:.3f} | {100 * held_out(at):.1f} % | "
            f"{against(at, lora)} | {'–' if closed is None else f'{100 * closed[0]:.0f} ± {100 * closed[1]:.0f} %'} | "
            f"{shorter} |",
            flush=True,
        )
    curves = fresh_curves(lab)
    best = min(at.loss.mean for at in curves["lora"].values())
    print("| | best rate | its loss | range | times `lora`'s | range within 10 % of `lora`'s best | times `lora`'s |")
    print("|---|---:|---:|---:|---|---:|---|")
    for name, curve in curves.items():
        own = min(curve.values(), key=lambda at: at.loss.mean)
        widths = [_widths(curve, curves["lora"], limit) for limit in (None, WITHIN * best)]
        print(f"| {name} | {own.lr:g} | {own.loss.mean:.4f} | {' | '.join(widths)} |")


def fresh_curves(lab: Lab) -> dict[str, dict[int, Cell]]:
    """Rates from the frozen one outwards, until on both sides the loss has left both ranges."""
    curves: dict[str, dict[int, Cell]] = {}
    for name in lab.study.curves:
        cells: dict[int, Cell] = {}
        for direction in (1, -1):
            for k in itertools.count(lab.study.frozen[name], direction):
                cells[k] = cells.get(k) or cell(lab.records(name, k, lab.study.ranged))
                bests = [min(at.loss.mean for at in curve.values()) for curve in (cells, curves.get("lora", cells))]
                if cells[k].loss.mean > WITHIN * max(bests):
                    break
        curves[name] = dict(sorted(cells.items()))
    return curves


def cell(records: list[Record]) -> Cell:
    return Cell(records[0].lr, make_stat([final_loss(record) for record in records]), tuple(records))


def against(method: Cell, lora: Cell) -> str:
    found = difference(lora, method)
    return "–" if found is None else f"{found.mean:+.4f} [{found.low:+.4f}, {found.high:+.4f}], {found.verdict}"


def held_out(at: Cell) -> float:
    return fmean(record.accuracy or 0.0 for record in at.records)


def _widths(method: dict[int, Cell], lora: dict[int, Cell], limit: float | None) -> str:
    """Both ranges, and their ratio with an interval from resampled seeds, the same for both."""
    seeds = range(len(next(iter(lora.values())).records))
    generator = random.Random(0)
    samples = [generator.choices(seeds, k=len(seeds)) for _ in range(2000)]
    ratios = sorted(lr_range(method, chosen, limit) / lr_range(lora, chosen, limit) for chosen in samples)
    low, high = ratios[len(ratios) // 40], ratios[-1 - len(ratios) // 40]
    width = lr_range(method, seeds, limit)
    return f"{width:.1f}× | {width / lr_range(lora, seeds, limit):.2f} [{low:.2f}, {high:.2f}]"


def lr_range(curve: dict[int, Cell], seeds: Sequence[int], limit: float | None = None) -> float:
    """Highest over lowest rate with a loss up to the limit, or within 10 % of the best.

    Each end lies between two rates of the grid, on a straight line.
    """
    losses = {k: fmean(final_loss(at.records[seed]) for seed in seeds) for k, at in curve.items()}
    best = min(losses, key=losses.__getitem__)
    limit = WITHIN * losses[best] if limit is None else limit
    return 2 ** (sum(_reach(losses, best, direction, limit) for direction in (1, -1)) / 2)


def _reach(losses: dict[int, float], best: int, direction: int, limit: float) -> float:
    k = best
    while losses.get(k + direction, math.inf) <= limit:
        k += direction
    beyond = losses.get(k + direction, math.inf)
    part = 0.0 if math.isinf(beyond) or losses[k] > limit else (limit - losses[k]) / (beyond - losses[k])
    return abs(k - best) + part


# --- figure ---

STYLE: dict[str, dict[str, Any]] = {
    "lora": {"color": "#0072B2", "marker": "o", "label": "lora, AdamW"},
    "sds-split": {"color": "#009E73", "marker": "D", "linestyle": "-.", "label": "sds-split, AdamW"},
    MUON: {"color": "#D55E00", "marker": "^", "label": "lora-muon, SGD with Nesterov momentum"},
    PLAIN_MUON: {"color": "#CC79A7", "marker": "s", "linestyle": "--", "label": "torch.optim.Muon on A and B"},
}


def figure(out: str) -> None:
    """Losses over the rates, each study's in OUT/study; runs what `confirm` has not."""
    drawn = Figure(figsize=(4.2 * len(STUDIES), 3.8), layout="constrained", dpi=150)
    for panel, (title, study) in zip(drawn.subplots(1, len(STUDIES)), STUDIES.items(), strict=True):
        lab = Lab(study, str(Path(out) / title))
        curves = fresh_curves(lab)
        for name, curve in curves.items():
            rates, cells = [at.lr for at in curve.values()], list(curve.values())
            panel.plot(rates, [at.loss.mean for at in cells], markersize=4, **STYLE[name])
            losses = [[final_loss(record) for record in at.records] for at in cells]
            color = STYLE[name]["color"]
            panel.fill_between(rates, list(map(min, losses)), list(map(max, losses)), color=color, alpha=0.12, lw=0)
        full = cell(lab.records("full", study.frozen["full"], study.ranged)).loss.mean
        panel.axhline(full, color="black", linestyle="--", linewidth=1, label="full fine-tuning, AdamW")
        best = min(at.loss.mean for at in curves["lora"].values())
        panel.axhline(WITHIN * best, color="0.6", linestyle=":", label="10 % above lora's best")
        panel.set(xscale="log", xlabel="learning rate", ylabel="final train loss")
        panel.set_ylim(top=1.2 * best)  # what diverges leaves the picture
        panel.set_title(f"{study.make_task().name}, rank {study.rank}", loc="left", fontsize=11)
        panel.spines[["top", "right"]].set_visible(False)
        panel.grid(color="0.9", linewidth=0.8)
    lines, names = drawn.axes[0].get_legend_handles_labels()
    drawn.legend(lines, names, loc="outside lower center", ncols=3, frameon=False, fontsize=9)
    drawn.savefig(Path(__file__).parents[1] / "docs" / "img" / "preset.png")


if __name__ == "__main__":
    {"explore": explore, "confirm": confirm, "figure": figure}[sys.argv[1]](*sys.argv[2:])
