"""Correction inside backward: a tensor hook on each factor."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import Parameter
from torch.optim import Optimizer

from sdsopt.corrections import PairTensors
from sdsopt.engine.batch import Batch
from sdsopt.engine.job import Job
from sdsopt.engine.recipe import Recipe
from sdsopt.engine.roots import compute_roots
from sdsopt.engine.zero3 import ForwardReader, is_partitioned
from sdsopt.errors import PairShapeError, StaleParametersError, UnsupportedCorrectionError
from sdsopt.every_step import BEFORE_STEP
from sdsopt.linalg import without_autocast, workspace
from sdsopt.pairs import LoRAPair, Note, find_pairs, live, read_note
from sdsopt.sharding import is_distributed

_ENGINE = "_sdsopt_backward"  # a note on layers
_HOOK = "_sdsopt_hook"  # a note on factors


@dataclass(frozen=True, eq=False)
class FactorHook:
    """Corrects the gradient of one factor before it is accumulated."""

    engine: BackwardEngine
    pair: LoRAPair
    side: str

    def __call__(self, gradient: Tensor) -> Tensor:
        return self.engine.correct(self.pair, self.side, gradient)


def hook_of(parameter: Parameter) -> FactorHook | None:
    """Returns the hook that corrects the parameter's gradients, if there is one."""
    # Not from `_backward_hooks`: inside torch.compile that looks empty.
    return read_note(parameter, _HOOK)


def is_hooked(parameter: Parameter) -> bool:
    """Tells whether the parameter's gradients are corrected in backward."""
    return hook_of(parameter) is not None


class BackwardEngine:
    """Corrects each factor's gradient by the partner's weights alone.

    A hook sees one gradient of one backward pass, and may see it before the partner's: so the correction must be
    linear in it and need nothing else. Then corrected gradients of several micro-batches, or of several processes,
    add up to the corrected sum.

    The roots are those of the weights at the first hook of a backward pass, for all pairs in one batch, and serve
    until a factor changes. They take 16·r² bytes for each pair and exponent.

    Args:
        pairs: The pairs to correct.
        recipe: The correction and how it is computed; its correction must be `linear_per_factor`.
    """

    def __init__(self, pairs: Sequence[LoRAPair], recipe: Recipe) -> None:
        self.pairs = tuple(pairs)
        self.recipe = recipe
        self._jobs: dict[LoRAPair, Job] = {}
        self._reader = ForwardReader(recipe)
        self._versions: list[tuple[int, int]] = []
        self._pass = -1
        self._lock = threading.RLock()  # backward runs one thread for each device
        self._removers = [BEFORE_STEP.add(self._before_step)]
        # Weak: an attached model and its parameters shall not live on in here.
        self._models = weakref.WeakSet[nn.Module]()
        self._seen = weakref.WeakValueDictionary[int, Parameter]()  # have stepped, with a hook or with no need of one

    @property
    def num_factors(self) -> int:
        """The number of factors that carry a hook."""
        return sum(is_hooked(factor) for _, *factors in self._live() for factor in factors)

    def add_hooks(self) -> None:
        """Puts a hook on every trainable factor that has none.

        Raises:
            PairShapeError: Two factors do not fit together, or are sharded.
            UnsupportedCorrectionError: DeepSpeed ZeRO-3 keeps factors in parts, and the correction needs whole ones.
        """
        trainable = [pair for pair in self.pairs if pair.trainable]
        for pair in trainable:
            pair.check()
            _require_plain(pair)
        for pair in trainable:
            if any(map(is_partitioned, (pair.A, pair.B))) and not any(map(is_hooked, (pair.A, pair.B))):
                self._removers += self._reader.watch(pair)
            for side, parameter in (("A", pair.A), ("B", pair.B)):
                if parameter.requires_grad and not is_hooked(parameter):
                    # The layer keeps the engine: parameters that replace the hooked ones must not go unnoticed.
                    vars(pair.module)[_ENGINE] = Note(self)
                    self._removers.append(_add_hook(parameter, FactorHook(self, pair, side)))

    def add_pairs(self, pairs: Iterable[LoRAPair]) -> None:
        """Takes over the pairs that are at addresses not known yet."""
        known = {pair.address for pair in self.pairs}
        self.pairs += tuple(pair for pair in pairs if pair.address not in known)

    def look_in(self, model: nn.Module) -> None:
        """Before each optimizer's step, looks in the model for factors that are new, and refuses to leave them raw."""
        self._models.add(model)
        self._seen.clear()

    def remove_hooks(self) -> None:
        """Takes all hooks off again; does nothing the second time."""
        for remove in self._removers:
            remove()
        self._removers.clear()
        for pair in self.pairs:
            vars(pair.module).pop(_ENGINE, None)
        self._jobs.clear()
        self.forget()

    def forget(self) -> None:
        """Makes the next backward pass compute the roots anew."""
        self._versions.clear()
        self._reader.forget()

    def correct(self, pair: LoRAPair, side: str, gradient: Tensor) -> Tensor:
        """Returns the corrected gradient of one factor, as a new tensor of the parameter's dtype."""
        with self._lock:
            job = self._job(pair, getattr(pair, side))
        one = PairTensors(gradient, None) if side == "A" else PairTensors(None, gradient)
        with without_autocast({gradient.device.type}), workspace(self.recipe.max_workspace_bytes):
            [corrected] = Batch([job]).precondition(self.recipe.correction, [one])
        found = getattr(corrected, side)
        if found is None:  # to autograd, a hook that returns None leaves the gradient as it is
            raise UnsupportedCorrectionError(
                f"{self.recipe.correction} kept factor {side} of {pair.name} from stepping, which a backward hook "
                "cannot do, and yet says it is linear_per_factor; use SDSPreconditioner, or freeze the factor instead"
            )
        return found

    def _job(self, pair: LoRAPair, parameter: Parameter) -> Job:
        current = torch._C._current_graph_task_id()  # pyright: ignore  # -1 outside of a backward pass
        if current == -1 or current != self._pass:
            self._pass = current
            # Optimizers that write through `.data` leave the version as it was: so a gradient that starts anew counts.
            if parameter.grad is None or self._versions != self._present_versions():
                self._compute()
        return self._jobs[pair]

    def _compute(self) -> None:
        jobs = {pair: self._reader.job(pair, A, B) for pair, A, B in self._live() if is_hooked(A) or is_hooked(B)}
        for job in jobs.values():
            job.pair.check()
        device_types = {job.A.device.type for job in jobs.values()}
        with torch.no_grad(), without_autocast(device_types), workspace(self.recipe.max_workspace_bytes):
            compute_roots(list(jobs.values()), self.recipe)
        self._jobs = jobs
        self._versions = self._present_versions()

    def _live(self) -> Iterator[tuple[LoRAPair, Parameter, Parameter]]:
        """The pairs that are still in the model, with their parameters."""
        return live(self.pairs)

    def _present_versions(self) -> list[tuple[int, int]]:
        diagonals = [E for pair, _, _ in self._live() if (E := pair.E) is not None]
        factors = [factor for _, *both in self._live() for factor in both]
        return [(id(parameter), parameter._version) for parameter in (*factors, *diagonals)]

    def _before_step(self, optimizer: Optimizer) -> None:
        self.forget()
        # Only what is new: to look through a model takes longer than many a step.
        new = {
            id(parameter): parameter
            for group in optimizer.param_groups
            for parameter in group["params"]
            if parameter.grad is not None and self._seen.get(id(parameter)) is not parameter
        }
        if not all(map(is_hooked, new.values())):
            self._require_hooked(new)
        self._seen.update(new)

    def _require_hooked(self, parameters: Mapping[int, Parameter]) -> None:
        """Refuses factors without a hook, those of adapters that were added since included."""
        found = [pair for model in self._models for pair in find_pairs(model, include_frozen=True)]
        for pair, A, B in (*self._live(), *((pair, pair.A, pair.B) for pair in found)):
            for side, factor in (("A", A), ("B", B)):
                if id(factor) in parameters and not is_hooked(factor):
                    raise StaleParametersError(
                        f"the gradient of factor {side} of {pair.name} was not corrected: the parameter was added, "
                        "replaced or made trainable after attach(model). Call attach(model) again, once the model is "
                        "as it shall be trained."
                    )


def _require_plain(pair: LoRAPair) -> None:
    if any(map(is_distributed, (pair.A, pair.B))):
        raise PairShapeError(
            f"the factors of {pair.name} are DTensors, sharded by FSDP2 or tensor parallelism, where hooks see parts "
            "of gradients or none. Use SDSPreconditioner(optimizer, model), which corrects sharded factors."
        )


def _add_hook(parameter: Parameter, hook: FactorHook) -> Callable[[], None]:
    """Puts the hook on the parameter, and returns what takes it off."""
    handle = parameter.register_hook(hook)
    setattr(parameter, _HOOK, Note(hook))
    hooked = weakref.ref(parameter)  # an adapter that was deleted shall not live on in here

    def remove() -> None:
        handle.remove()
        if (parameter := hooked()) is not None:
            vars(parameter).pop(_HOOK, None)

    return remove
