"""Being told of the steps of all optimizers."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any, final

from torch.optim.optimizer import Optimizer, register_optimizer_step_post_hook, register_optimizer_step_pre_hook

Told = Callable[[Optimizer], None]


@final
class StepWatchers:
    """Methods that are called at each step of any optimizer, for as long as their objects live.

    torch goes through the hooks for all optimizers in a dictionary that must not change meanwhile, and the garbage
    collector may end an object just then. So torch gets a single hook, which stays.

    Args:
        register: torch's function that registers a hook for all optimizers.
    """

    def __init__(self, register: Callable[[Callable[[Optimizer, Any, Any], None]], object]) -> None:
        self._register = register
        self._is_registered = False
        self._methods: tuple[weakref.WeakMethod[Told], ...] = ()

    def add(self, method: Told) -> Callable[[], None]:
        """Adds a bound method, of which it keeps no more than a weak reference, and returns what removes it."""
        if not self._is_registered:
            self._register(self._tell)
            self._is_registered = True
        added = weakref.WeakMethod(method)
        self._methods = (*(each for each in self._methods if each() is not None), added)

        def remove() -> None:
            self._methods = tuple(each for each in self._methods if each is not added)

        return remove

    def _tell(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        del args, kwargs
        for each in self._methods:
            if (method := each()) is not None:
                method(optimizer)


BEFORE_STEP = StepWatchers(register_optimizer_step_pre_hook)
AFTER_STEP = StepWatchers(register_optimizer_step_post_hook)
