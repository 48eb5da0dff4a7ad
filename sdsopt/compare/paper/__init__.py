"""The paper's claims (SDS-LoRA, arXiv 2606.16454), measured on this machine: `sdsopt compare paper`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from sdsopt.compare.api import Comparison, compare
from sdsopt.compare.figures import to_svg
from sdsopt.compare.grid import Settings
from sdsopt.compare.observer import Observer
from sdsopt.compare.paper.claim import OUTCOMES, Claim, Finding, Outcome, lettered
from sdsopt.compare.paper.convergence import convergence_claim
from sdsopt.compare.paper.gradients import alignment_claim, effective_rank_claim, record_gradients
from sdsopt.compare.paper.losses import loss_claim
from sdsopt.compare.paper.markdown import make_paper_markdown
from sdsopt.compare.paper.report import make_paper_report
from sdsopt.compare.task import Task
from sdsopt.compare.tasks import DigitsTask, LanguageTask

__all__ = ["OUTCOMES", "TASKS", "Claim", "Finding", "Outcome", "Paper", "lettered", "reproduce"]

TASKS: Mapping[str, Task] = {
    "vision": DigitsTask(),
    # Smaller than `--task language`, to stay within a quarter of an hour.
    "language": LanguageTask(width=64, layers=2, length=64, pretraining_steps=500),
}

_SETTINGS = Settings(corrections=("lora", "sds", "sds-split"), inner=("adamw",), seeds=range(5))


@dataclass(frozen=True)
class Paper:
    """All claims.

    Attributes:
        claims: The claims, (a) to (d).
        directory: Where the report is.
    """

    claims: tuple[Claim, ...]
    directory: Path

    def save_report(self) -> list[Path]:
        """Writes `paper.html`, `paper.md` and each claim's figure as SVG; returns their paths, the report first."""
        figures = {claim.name: to_svg(claim.figure) for claim in self.claims}
        paths = [self.directory / "paper.html", self.directory / "paper.md"]
        paths[0].write_text(make_paper_report(self.claims, figures), encoding="utf8")
        paths[1].write_text(make_paper_markdown(self.claims), encoding="utf8")
        for name, svg in figures.items():
            paths.append(self.directory / f"paper-{name}.svg")
            paths[-1].write_bytes(svg)
        return paths


def reproduce(
    out: str | Path = "sdsopt-results",
    *,
    tasks: Mapping[str, Task] = TASKS,
    settings: Settings = _SETTINGS,
    jobs: int = 1,
    observer: Observer | None = None,
) -> Paper:
    """Measures the claims. The comparison's runs are kept in the folder, and not run again.

    Args:
        out: Folder of the results.
        tasks: By the names to show; each gets a folder of its own.
        settings: What is compared; must hold "lora", "sds" and "sds-split", and AdamW at one rank.
        jobs: Number of processes.
        observer: Hears of the progress; None stays silent.

    Returns:
        The claims with their verdicts, whatever these are.
    """
    observer = Observer() if observer is None else observer
    directory = Path(out)
    comparisons: dict[str, Comparison] = {
        name: compare(task, settings, out=directory / name, jobs=jobs, observer=observer)
        for name, task in tasks.items()
    }
    observer.stage("measuring gradients")
    courses = {
        name: record_gradients(
            task, _best_rate(comparisons[name]), settings.seeds, settings.ranks[0], settings.steps, jobs
        )
        for name, task in tasks.items()
    }
    observer.stage("counting steps over condition numbers")
    claims = (
        effective_rank_claim(courses),
        alignment_claim(courses),
        convergence_claim(settings.seeds, jobs),
        loss_claim(comparisons),
    )
    observer.closed()
    return Paper(claims, directory)


def _best_rate(comparison: Comparison) -> float:
    [best] = [row.best for row in comparison.rows if row.method == "lora"]
    if best is None:
        raise ValueError(
            f"{comparison.task}: plain LoRA diverged at every learning rate, so there is nothing to measure"
        )
    return best.lr
