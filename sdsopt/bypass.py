"""Noticing that another optimizer steps in the wrapper's place."""

from __future__ import annotations

import weakref

from torch.optim import Optimizer

from sdsopt.errors import UnsupportedOptimizerError
from sdsopt.every_step import AFTER_STEP


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
        self._wrapper, self._inner = weakref.ref(wrapper), weakref.ref(inner)
        AFTER_STEP.add(self._after_step)

    def _after_step(self, optimizer: Optimizer) -> None:
        wrapper = self._wrapper()
        if wrapper is None or self.has_stepped or optimizer is wrapper or optimizer is self._inner():
            return
        own = {id(group) for group in wrapper.param_groups}
        if any(id(group) in own for group in optimizer.param_groups):
            raise UnsupportedOptimizerError(
                f"{type(optimizer).__name__} took over the param groups of {type(wrapper).__name__} and has stepped "
                "without it, on uncorrected gradients. DeepSpeed does so with offload_optimizer. Leave the optimizer "
                "bare there, and call sdsopt.attach(model) after deepspeed.initialize (or accelerator.prepare)."
            )
