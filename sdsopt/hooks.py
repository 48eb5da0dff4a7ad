"""Correction inside backward, for engines that own the optimizer."""

from __future__ import annotations

from collections.abc import Iterable
from types import TracebackType

from torch import nn

from sdsopt.corrections import Correction
from sdsopt.engine import BackwardEngine, Recipe, hook_of
from sdsopt.errors import DoubleCorrectionError, NoPairsError, UnsupportedCorrectionError
from sdsopt.linalg import InverseRoot
from sdsopt.pairs import LoRAPair, require_pairs


class Handle:
    """The hooks that `attach` put on a model. As a context manager, it removes them at the end."""

    def __init__(self, engine: BackwardEngine) -> None:
        self._engine = engine

    @property
    def correction(self) -> Correction:
        """The correction in use."""
        return self._engine.recipe.correction

    @property
    def pairs(self) -> tuple[LoRAPair, ...]:
        """The pairs known to the hooks, those of frozen adapters included."""
        return self._engine.pairs

    @property
    def num_factors(self) -> int:
        """The number of factors whose gradients are corrected."""
        return self._engine.num_factors

    def remove(self) -> None:
        """Takes all hooks off: gradients are raw again from the next backward pass on. May be called again."""
        self._engine.remove_hooks()

    def refresh(self) -> None:
        """Makes the next backward pass use the factors as they are then.

        Called for you by every optimizer's step and for every in-place change that torch sees. Only needed after
        writing to a factor's `.data` by hand in the middle of gradient accumulation.
        """
        self._engine.forget()

    def __enter__(self) -> Handle:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.remove()

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.correction}, {self.num_factors} factors of {len(self.pairs)} LoRA pairs)"


def attach(
    model: nn.Module | Iterable[LoRAPair],
    correction: str | Correction = "sds",
    *,
    damping: float = 1e-6,
    inverse_root: str | InverseRoot = "auto",
    max_workspace_bytes: int | None = None,
) -> Handle:
    r"""Corrects LoRA gradients as backward computes them, whatever optimizer steps on them.

    For engines that own the optimizer (DeepSpeed), and for those who want clipping to see corrected gradients.

    ```python
    with sdsopt.attach(model):
        trainer.train()
    ```

    A tensor hook on each trainable factor multiplies its gradient by a power of the *partner's* Gram matrix, at the
    weights that this backward pass began with. That is linear in the gradient, so it is exact under gradient
    accumulation, gradient checkpointing, loss scaling and DDP, and `.grad` holds the corrected gradient. Without
    clipping it equals `SDSPreconditioner`; with it, the corrected gradients are clipped and not the raw ones.

    Hooks belong to Parameters: attach after the last change to the model (adapters added, moved by
    `load_state_dict(assign=True)`, wrapped by an engine; with DeepSpeed ZeRO-3, after `deepspeed.initialize`). A
    trainable factor that was put in afterwards, and so has no hook, makes the next step of its optimizer raise.
    Attaching once more with the same options adds what is missing, and gives a handle to the same hooks.

    Args:
        model: The model that holds the LoRA layers, or the pairs themselves.
        correction: A name or a `Correction` that is `linear_per_factor`, such as "sds", "scaled", "reflora" and "lora".
        damping: Relative damping δ ≥ 0, as in `SDSPreconditioner`.
        inverse_root: Method for the roots, as in `SDSPreconditioner`.
        max_workspace_bytes: Bound on the memory to compute with at a time, or None, as in `SDSPreconditioner`.

    Returns:
        A handle with `remove()`, which is a context manager too.

    Raises:
        NoPairsError: The model has no LoRA pair, or none is trainable.
        PairShapeError: Two factors of a pair do not fit together, or are sharded.
        DoubleCorrectionError: Hooks with other options are on the model already.
        TypeError: An option is of another type, or `model` is neither a module nor a collection of pairs.
        UnknownCorrectionError: No correction has that name.
        UnsupportedCorrectionError: The correction needs the optimizer's update or more than one gradient at a time,
            or keeps a factor from stepping; or DeepSpeed ZeRO-3 keeps the factors in parts, and it needs whole ones.
        ValueError: `damping` is negative or not finite, `max_workspace_bytes` is not positive, or `inverse_root` is
            unknown.
    """
    recipe = Recipe.of(correction, damping, inverse_root, max_workspace_bytes=max_workspace_bytes)
    _require_linear(recipe.correction, correction)
    pairs = require_pairs(model)
    if not any(pair.trainable for pair in pairs):
        raise NoPairsError(
            f"both factors of all {len(pairs)} LoRA pairs are frozen (the first is {pairs[0].name}); there is no "
            "gradient to correct. Make the adapter trainable before attaching."
        )
    engine = _engine_on(pairs, recipe) or BackwardEngine(pairs, recipe)
    engine.add_pairs(pairs)
    engine.add_hooks()
    if isinstance(model, nn.Module):
        engine.look_in(model)
    return Handle(engine)


def _engine_on(pairs: Iterable[LoRAPair], recipe: Recipe) -> BackwardEngine | None:
    engines = {hook.engine for pair in pairs for factor in (pair.A, pair.B) if (hook := hook_of(factor)) is not None}
    if len(engines) > 1 or any(engine.recipe != recipe for engine in engines):
        present = ", ".join(str(engine.recipe.correction) for engine in engines)
        raise DoubleCorrectionError(
            f"gradients of this model are corrected in backward already, by {present}; remove() that first"
        )
    return engines.pop() if engines else None


def _require_linear(correction: Correction, asked: str | Correction) -> None:
    if correction.uses_updates:
        raise UnsupportedCorrectionError(
            f"{asked!r} maps the step that the optimizer takes, which backward hooks never see; "
            f"use SDSPreconditioner(optimizer, model, correction={asked!r}), or attach sds or scaled"
        )
    if correction.uses_step or correction.carries_moments or correction.rebalance_every is not None:
        raise UnsupportedCorrectionError(
            f"{asked!r} acts between the optimizer's steps (it takes turns, carries moments or rebalances), which "
            f"backward hooks never see; use SDSPreconditioner(optimizer, model, correction={asked!r}), or attach sds"
        )
    if not correction.linear_per_factor:
        raise UnsupportedCorrectionError(
            f"{asked!r} needs both gradients of a pair, or the whole accumulated gradient, or keeps a factor from "
            "stepping; a backward hook sees one gradient of one micro-batch, and no step. Use SDSPreconditioner. If "
            "your correction treats each gradient alone and linearly, let its linear_per_factor return True"
        )
