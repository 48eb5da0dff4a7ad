"""A byte-level language model that knows Python code learns English prose."""

from __future__ import annotations

import hashlib
import platform
from collections.abc import Iterator
from dataclasses import astuple, dataclass
from functools import cache
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from sdsopt.compare.task import Task
from sdsopt.compare.tasks.adapters import adapt
from sdsopt.compare.tasks.prepared import ensure_prepared, prepared
from sdsopt.compare.tasks.streams import next_token_accuracy, windows
from sdsopt.compare.tasks.texts import language_reference, python_sources
from sdsopt.compare.train import reproducible
from sdsopt.extras import extra

if TYPE_CHECKING:
    from transformers import LlamaForCausalLM

_TARGETS = r".*\.layers\.\d+\..*_proj"  # attention and MLP of every block
_HELD_OUT = 0.1


@dataclass(frozen=True)
class LanguageTask(Task):
    """A small Llama over bytes, pretrained on the standard library's sources, adapted to Python's `help()` topics.

    Both texts come with every Python; another Python version has other texts, and its results their own fingerprint.

    Attributes:
        batch_size: Sequences per step.
        length: Bytes per sequence.
        width: Hidden size.
        layers: Number of blocks.
        pretraining_steps: AdamW steps on the sources, before the first sweep; then cached.
    """

    batch_size: int = 16
    length: int = 96
    width: int = 96
    layers: int = 3
    pretraining_steps: int = 800

    @property
    def name(self) -> str:
        """The name that the command line knows it by."""
        return "language"

    @property
    def fingerprint(self) -> str:
        """Covers the texts, which come with Python, and what the pretrained weights depend on."""
        text = f"bytes, v1, {astuple(self)}, Python {platform.python_version()}, torch {torch.__version__}"
        return f"language-{hashlib.sha256(text.encode()).hexdigest()[:12]}"

    def prepare(self) -> None:
        """Pretrains, unless the cache has the weights."""
        ensure_prepared(self)

    def build_model(self, rank: int | None) -> nn.Module:
        """Returns the pretrained model with adapters on its attention and MLP matrices."""
        model = self._new_model()
        model.load_state_dict(prepared(self))
        return adapt(model, _TARGETS, rank)

    def batches(self, seed: int) -> Iterator[Tensor]:
        """Yields random windows of the prose, (batch_size, length)."""
        return windows(_prose()[0], self.length, self.batch_size, seed)

    def loss(self, model: nn.Module, batch: Tensor) -> Tensor:
        """Cross-entropy of the next byte, in nats."""
        return model(input_ids=batch, labels=batch).loss

    def evaluate(self, model: nn.Module) -> float:
        """Share of the next bytes of held-out prose that the model ranks first."""
        return next_token_accuracy(model, _prose()[1], self.length)

    def _new_model(self) -> LlamaForCausalLM:
        with extra("demo"):
            from transformers import LlamaConfig, LlamaForCausalLM
        config = LlamaConfig(
            vocab_size=256,
            hidden_size=self.width,
            intermediate_size=2 * self.width,
            num_hidden_layers=self.layers,
            num_attention_heads=4,
            max_position_embeddings=self.length,
            pad_token_id=0,
            bos_token_id=0,
            eos_token_id=0,
        )
        return LlamaForCausalLM(config)

    def make_tensors(self) -> dict[str, Tensor]:
        """Returns the weights after training on the sources."""
        with reproducible(seed=0):
            model = self._new_model().train()
            optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, weight_decay=0.1)
            schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, total_steps=self.pretraining_steps + 1)
            batches = windows(_tensor(python_sources()), self.length, self.batch_size, seed=0)
            for _ in range(self.pretraining_steps):
                optimizer.zero_grad()
                self.loss(model, next(batches)).backward()
                optimizer.step()
                schedule.step()
        return model.state_dict()


def _tensor(text: bytes) -> Tensor:
    return torch.frombuffer(bytearray(text), dtype=torch.uint8)


@cache
def _prose() -> tuple[Tensor, Tensor]:
    """The prose to train on, and its end, which is held out."""
    text = _tensor(language_reference())
    cut = int((1 - _HELD_OUT) * len(text))
    return text[:cut], text[cut:]
