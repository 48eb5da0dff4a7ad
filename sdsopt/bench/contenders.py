"""What is measured beside what. A new contender is one class here and one entry in `contenders_for`."""

from __future__ import annotations

import contextlib
import importlib.util
from abc import ABC, abstractmethod
from collections.abc import Generator
from typing import Any, final

import torch
from torch.optim import AdamW, Optimizer

from sdsopt.bench.adapter import Adapter
from sdsopt.errors import NativeBuildError
from sdsopt.hooks import attach
from sdsopt.linalg import use_native_products
from sdsopt.optimizer import SDSPreconditioner

_LR = 1e-6  # the parameters hardly move from round to round
_NEVER = 10**9  # in the course of a benchmark

ADAMW = "AdamW"
BACKWARD = "backward"


class Contender(ABC):
    """Something to time on an adapter whose gradients are fresh.

    Attributes:
        name: Its name in the table.
        baseline: The contender whose time is subtracted, to leave the correction's own.
        foreign: Whether it is other people's code, which may fail on what is measured.
        frees_gradients: Whether a run starts with new gradients, so that its peak memory says nothing of a correction.
    """

    name: str
    baseline: str = ADAMW
    foreign: bool = False
    frees_gradients: bool = False

    @contextlib.contextmanager
    def ready(self) -> Generator[None]:
        """Sets up what a round needs; not timed."""
        yield

    @abstractmethod
    def run(self) -> None:
        """What is timed."""

    def state_bytes(self) -> int:
        """The bytes of optimizer state that its first run allocates, which are not the correction's."""
        return 0


class _OfOptimizer(Contender):
    """What times an optimizer's step, however that is made ready."""

    def __init__(self, name: str, optimizer: Optimizer) -> None:
        self.name = name
        self._optimizer = optimizer

    def run(self) -> None:
        self._optimizer.step()


@final
class Step(_OfOptimizer):
    """An optimizer's step."""

    def __init__(self, name: str, optimizer: Optimizer, *, own_state: bool = True, foreign: bool = False) -> None:
        super().__init__(name, optimizer)
        self.foreign = foreign
        self._own_state = own_state

    def state_bytes(self) -> int:
        return sum(t.numel() * t.element_size() for t in self.state_tensors()) if self._own_state else 0

    def state_tensors(self) -> list[torch.Tensor]:
        """The optimizer's state."""
        states: Any = getattr(self._optimizer, "state", {})  # not every optimizer of other people has one
        return [t for state in states.values() for t in state.values() if isinstance(t, torch.Tensor)]


@final
class ReusingStep(_OfOptimizer):
    """A step with the roots of the one before."""

    @contextlib.contextmanager
    def ready(self) -> Generator[None]:
        # The other contenders have moved the factors, so this one computes its roots.
        self._optimizer.step()
        yield


@final
class CompiledStep(_OfOptimizer):
    """A step with the products that are compiled for this CPU."""

    @contextlib.contextmanager
    def ready(self) -> Generator[None]:
        use_native_products()
        try:
            yield
        finally:
            use_native_products(False)


@final
class Backward(Contender):
    """Backward alone, of gradients that are there already."""

    name = BACKWARD
    baseline = BACKWARD
    frees_gradients = True

    def __init__(self, adapter: Adapter) -> None:
        self._adapter = adapter

    def run(self) -> None:
        self._adapter.backward()


@final
class Hooks(Contender):
    """Backward with the hooks of `sdsopt.attach`."""

    name = "attach, sds"
    baseline = BACKWARD
    frees_gradients = True

    def __init__(self, adapter: Adapter) -> None:
        self._adapter = adapter

    @contextlib.contextmanager
    def ready(self) -> Generator[None]:
        # Only for the round, since the other contenders share the parameters.
        with attach(self._adapter):
            yield

    def run(self) -> None:
        self._adapter.backward()


@final
class PairBySVD(Contender):
    """The formula as it stands in the paper, in a loop: an SVD of every factor, then AdamW."""

    name = "SVD of each factor"

    def __init__(self, adapter: Adapter, optimizer: Optimizer) -> None:
        self._adapter = adapter
        self._optimizer = optimizer

    @torch.no_grad()
    def run(self) -> None:
        for layer in self._adapter.layers:
            A, B = (getattr(layer, name)["default"].weight for name in ("lora_A", "lora_B"))
            corrected_A, corrected_B = _inverse_root(B) @ A.grad.float(), B.grad.float() @ _inverse_root(A.mT)
            A.grad.copy_(corrected_A)
            B.grad.copy_(corrected_B)
        self._optimizer.step()


def _inverse_root(factor: torch.Tensor) -> torch.Tensor:
    _, singular_values, right = torch.linalg.svd(factor.float(), full_matrices=False)
    return (right.mT / singular_values) @ right  # (r, r)


def contenders_for(adapter: Adapter, *, peers: bool) -> tuple[list[Contender], dict[str, str]]:
    """Builds the contenders, and says why one is left out.

    Args:
        adapter: What they work on; they share its parameters and, where they can, one AdamW.
        peers: Whether to measure other implementations.
    """
    adamw = AdamW(adapter.parameters(), lr=_LR, fused=True)
    contenders: list[Contender] = [Step(ADAMW, adamw), Backward(adapter)]
    for correction in ("sds", "sds-split", "scaled"):
        contenders.append(Step(correction, SDSPreconditioner(adamw, adapter, correction), own_state=False))
    reusing = SDSPreconditioner(adamw, adapter, "sds", update_every=_NEVER)
    contenders += [ReusingStep("sds, roots reused", reusing), Hooks(adapter)]
    skipped: dict[str, str] = {}
    if next(adapter.parameters()).device.type == "cpu":
        compiled = [CompiledStep(f"{c}, compiled", SDSPreconditioner(adamw, adapter, c)) for c in ("sds", "sds-split")]
        try:
            with compiled[0].ready():
                contenders += compiled
        except NativeBuildError as error:
            skipped["compiled"] = str(error)
    if not peers:
        return contenders, skipped
    if any(hasattr(layer, "num_experts") for layer in adapter.layers):
        # r·e columns as one matrix: another formula, and hours of it.
        return contenders, {"peers": "they take a stack of experts for one pair of rank r·e"}
    contenders.append(PairBySVD(adapter, adamw))
    for name, package, build in _PEERS:
        if importlib.util.find_spec(package) is None:
            skipped[name] = f"{package} is not installed"
        else:
            contenders.append(Step(name, build(adapter), foreign=True))
    return contenders, skipped


def _riemannian(adapter: Any) -> Optimizer:
    from peft.optimizers import create_riemannian_optimizer

    return create_riemannian_optimizer(adapter, AdamW, lr=_LR, fused=True)


def _lora_rite(adapter: Adapter) -> Optimizer:
    from pytorch_optimizer.optimizer.lora_rite import LoRARite

    return LoRARite(adapter.parameters(), lr=_LR)


def _lora_pro(adapter: Adapter) -> Optimizer:
    from lora_pro import LoRAProAdamW  # pyright: ignore[reportMissingImports]

    # Its default mode forms m x n matrices; this is the one for long factors, with its faster solver.
    return LoRAProAdamW(adapter, lr=_LR, lorapro_mode="efficient", efficient_solver="eig")


_PEERS = (
    ("peft riemannian", "peft", _riemannian),
    ("LoRA-RITE", "pytorch_optimizer", _lora_rite),
    ("lora-pro-adamw", "lora_pro", _lora_pro),
)
