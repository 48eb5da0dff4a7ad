"""The embedded task: a small ViT that knows the digits 0–4 learns 5–9. Real data, and nothing to download."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import astuple, dataclass
from functools import cache
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sdsopt.compare.task import Task
from sdsopt.compare.tasks.adapters import adapt
from sdsopt.compare.tasks.prepared import ensure_prepared, prepared
from sdsopt.compare.train import reproducible
from sdsopt.extras import extra

if TYPE_CHECKING:
    from torch.nn import Parameter
    from transformers import ViTForImageClassification

_TARGETS = r".*\.layers?\.\d+\..*(q_proj|k_proj|v_proj|o_proj|fc1|fc2)"  # attention and MLP of every block
_HEAD = "classifier"


@dataclass(frozen=True)
class DigitsTask(Task):
    """Scikit-learn's 8×8 digits. The head is fresh, trainable and the same in every method, full fine-tuning too.

    Attributes:
        batch_size: Images per step.
        width: Hidden size of the ViT.
        layers: Its number of blocks.
        pretraining_steps: AdamW steps on the digits 0–4, before the first sweep; then cached.
    """

    batch_size: int = 32
    width: int = 64
    layers: int = 2
    pretraining_steps: int = 300

    @property
    def name(self) -> str:
        """The name that the command line knows it by."""
        return "digits"

    @property
    def fingerprint(self) -> str:
        """Covers what the pretrained weights and the data depend on."""
        text = f"digits 0-4 to 5-9, v1, {astuple(self)}, torch {torch.__version__}"
        return f"digits-{hashlib.sha256(text.encode()).hexdigest()[:12]}"

    def prepare(self) -> None:
        """Pretrains, unless the cache has the weights."""
        ensure_prepared(self)

    def build_model(self, rank: int | None) -> nn.Module:
        """Returns the pretrained ViT with a fresh head, and adapters on its attention and MLP matrices."""
        model = self._new_vit()  # first, so that a seed gives every method the same head
        model.load_state_dict(prepared(self), strict=False)
        return adapt(model, _TARGETS, rank, [_HEAD])

    def batches(self, seed: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Yields shuffled batches of the digits 5–9, epoch after epoch."""
        return _shuffled(_digits("new").train, self.batch_size, seed)

    def loss(self, model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        """Cross-entropy."""
        images, labels = batch
        return F.cross_entropy(model(pixel_values=images).logits, labels)

    def evaluate(self, model: nn.Module) -> float:
        """Accuracy on the held-out 40 % of the digits 5–9."""
        images, labels = _digits("new").held_out
        return (model(pixel_values=images).logits.argmax(-1) == labels).float().mean().item()

    def shared_parameters(self, model: nn.Module) -> list[Parameter]:
        """The head."""
        return [parameter for name, parameter in model.named_parameters() if _HEAD in name]

    def _new_vit(self) -> ViTForImageClassification:
        with extra("demo"):
            from transformers import ViTConfig, ViTForImageClassification
        config = ViTConfig(
            image_size=8,
            patch_size=2,
            num_channels=1,
            hidden_size=self.width,
            intermediate_size=2 * self.width,
            num_hidden_layers=self.layers,
            num_attention_heads=4,
            hidden_dropout_prob=0.0,
            attention_probs_dropout_prob=0.0,
            num_labels=5,  # pyright: ignore[reportCallIssue]  # an attribute of every config
        )
        return ViTForImageClassification(config)

    def make_tensors(self) -> dict[str, Tensor]:
        """Returns the weights without the head, after training on the digits 0–4."""
        with reproducible(seed=0):
            model = self._new_vit().train()
            optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
            batches = _shuffled(_digits("old").train, self.batch_size, seed=0)
            for _ in range(self.pretraining_steps):
                optimizer.zero_grad()
                self.loss(model, next(batches)).backward()
                optimizer.step()
        return {name: tensor for name, tensor in model.state_dict().items() if not name.startswith(_HEAD)}


@dataclass(frozen=True)
class _Split:
    train: tuple[Tensor, Tensor]  # images (k, 1, 8, 8) in [-1, 1], labels (k,) in 0–4
    held_out: tuple[Tensor, Tensor]


@cache
def _digits(which: str) -> _Split:
    with extra("demo"):
        from sklearn.datasets import load_digits
    images, labels = load_digits(return_X_y=True)
    first = {"old": 0, "new": 5}[which]
    x = torch.tensor(images, dtype=torch.float32).view(-1, 1, 8, 8) / 8 - 1
    y = torch.tensor(labels, dtype=torch.long) - first
    members = torch.nonzero((y >= 0) & (y < 5)).flatten()
    # One split for all seeds: what varies between runs is the method, not what it is tested on.
    members = members[torch.randperm(len(members), generator=torch.Generator().manual_seed(0))]
    cut = int(0.6 * len(members))
    return _Split(train=(x[members[:cut]], y[members[:cut]]), held_out=(x[members[cut:]], y[members[cut:]]))


def _shuffled(data: tuple[Tensor, Tensor], batch_size: int, seed: int) -> Iterator[tuple[Tensor, Tensor]]:
    images, labels = data
    generator = torch.Generator().manual_seed(seed)
    while True:
        order = torch.randperm(len(labels), generator=generator)
        for chosen in order[: len(order) // batch_size * batch_size].view(-1, batch_size):
            yield images[chosen], labels[chosen]
