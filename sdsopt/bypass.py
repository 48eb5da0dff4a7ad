"""Noticing that another optimizer steps in the wrapper's place."""

from __future__ import annotations

import weakref
from typing import Any

from torch.optim.optimizer import Optimizer, register_optimizer_step_post_hook

from sdsopt.errors import UnsupportedOptimizerError


class BypassWatch:
    """Raises when an optimizer that took over the wrapper's param groups has stepped without it.

    DeepSpeed with `offload_optimizer` builds an optimizer of its own from the groups of the given one, which is then
    never called again (through Accelerate and the Hugging Face Trainer). An optimizer around the wrapper shares the
    groups too, but steps it.

    Args:
        wrapper: The wrapper.
        inner: The optimizer in it, which may step by itself.
    """

    def __init__(self, wrapper: Optimizer, inner: Optimizer) -> None:
        self._steps = 0
        self._steps_seen = 0
        # Weak, since torch keeps hooks for all optimizers for ever.
        watch, known = weakref.ref(self), (weakref.ref(wrapper), weakref.ref(inner))

        def after_step(optimizer: Optimizer, args: Any, kwargs: Any) -> None:
            del args, kwargs
            this, of = watch(), known[0]()
            if this is not None and of is not None and all(optimizer is not one() for one in known):
                this._after(optimizer, of)

        weakref.finalize(self, register_optimizer_step_post_hook(after_step).remove)

    def count(self) -> None:
        """Counts a step of the wrapper."""
        self._steps += 1

    def _after(self, optimizer: Optimizer, wrapper: Optimizer) -> None:
        own = {id(group) for group in wrapper.param_groups}
        if not any(id(group) in own for group in optimizer.param_groups):
            return
        if self._steps == self._steps_seen:
            raise UnsupportedOptimizerError(
                f"{type(optimizer).__name__} took over the param groups of {type(wrapper).__name__} and has stepped "
                "without it, on uncorrected gradients. DeepSpeed does so with offload_optimizer. Leave the optimizer "
                "bare there, and call sdsopt.attach(model) after deepspeed.initialize (or accelerator.prepare)."
            )
        self._steps_seen = self._steps
