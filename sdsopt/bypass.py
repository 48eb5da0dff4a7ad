"""Noticing that another optimizer steps in the wrapper's place."""

from __future__ import annotations

import weakref
from typing import Any

from torch.optim.optimizer import Optimizer, register_optimizer_step_post_hook

from sdsopt.errors import UnsupportedOptimizerError


class BypassWatch:
    """Raises when an optimizer that took over the wrapper's param groups has stepped, and the wrapper never has.

    DeepSpeed with `offload_optimizer` builds an optimizer of its own from the groups of the given one, which is then
    never called again (through Accelerate and the Hugging Face Trainer). Optimizers around the wrapper, and inside it,
    share the groups too; with these it steps.

    Args:
        wrapper: The wrapper.
        inner: The optimizer in it, which may step by itself.
    """

    def __init__(self, wrapper: Optimizer, inner: Optimizer) -> None:
        self.has_stepped = False
        # Weak, since torch keeps hooks for all optimizers for ever.
        watch, known = weakref.ref(self), (weakref.ref(wrapper), weakref.ref(inner))

        def after_step(optimizer: Optimizer, args: Any, kwargs: Any) -> None:
            del args, kwargs
            this, of = watch(), known[0]()
            if this is None or of is None or this.has_stepped or any(optimizer is one() for one in known):
                return
            own = {id(group) for group in of.param_groups}
            if any(id(group) in own for group in optimizer.param_groups):
                raise UnsupportedOptimizerError(
                    f"{type(optimizer).__name__} took over the param groups of {type(of).__name__} and has stepped "
                    "without it, on uncorrected gradients. DeepSpeed does so with offload_optimizer. Leave the "
                    "optimizer bare there, and call sdsopt.attach(model) after deepspeed.initialize (or "
                    "accelerator.prepare)."
                )

        weakref.finalize(self, register_optimizer_step_post_hook(after_step).remove)
