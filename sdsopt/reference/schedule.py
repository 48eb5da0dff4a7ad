"""When to split and when to refresh."""

from __future__ import annotations

from typing import Any

from torch import nn
from torch.optim import Optimizer

from sdsopt.reference.sds_linear import SDSLinear


class SDSSchedule:
    """Drives all `SDSLinear` of a model: warm-up as plain LoRA, the split, and refreshes that become rarer.

    The steps after the warm-up fall into equal phases; in phase p the bases are refreshed after every p-th of these
    steps. Call `step` after each step that the optimizer took, and save `state_dict` with the model's and the
    optimizer's: a run that is resumed from the three goes on bit for bit.

    Args:
        model: A model that holds `SDSLinear` layers.
        optimizer: The optimizer of their factors; at the split it forgets what it remembers of them.
        total_steps: The length of the run.
        warmup_steps: Steps of plain LoRA; the paper takes 10.
        phases: The paper takes 5.

    Raises:
        ValueError: The model has no `SDSLinear`, the run is no longer than its warm-up, or a number is not positive.
    """

    def __init__(
        self, model: nn.Module, optimizer: Optimizer, total_steps: int, *, warmup_steps: int = 10, phases: int = 5
    ) -> None:
        self.layers = [module for module in model.modules() if isinstance(module, SDSLinear)]
        if not self.layers:
            raise ValueError("the model has no SDSLinear layer; call sdsopt.reference.convert(model) first")
        if warmup_steps < 1 or phases < 1:
            raise ValueError(f"warmup_steps and phases must be at least 1, got {warmup_steps} and {phases}")
        if total_steps <= warmup_steps:
            raise ValueError(f"a run of {total_steps} steps has no step after its warm-up of {warmup_steps}")
        self.optimizer = optimizer
        self.total_steps = total_steps
        self.warmup_steps = warmup_steps
        self.phases = phases
        self.steps = 0

    def step(self) -> None:
        """Counts a step of the optimizer, and splits or refreshes where its time has come."""
        self.steps += 1
        if self.steps == self.warmup_steps:
            self._split()
        elif self.refreshes_after(self.steps):
            for layer in self.layers:
                layer.refresh()

    def refreshes_after(self, step: int) -> bool:
        """Tells whether the bases are refreshed after that many steps of the run."""
        since = step - self.warmup_steps  # 1 for the first step after the split
        length = self.total_steps - self.warmup_steps
        phase = min((since - 1) * self.phases // length, self.phases - 1) + 1
        return since > 0 and since % phase == 0

    def state_dict(self) -> dict[str, int]:
        """Returns the number of steps so far."""
        return {"steps": self.steps}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Goes on from that number of steps."""
        self.steps = int(state_dict["steps"])

    def _split(self) -> None:
        for layer in self.layers:
            layer.split()
            for factor in (layer.A, layer.B):
                # Popped, not zeroed: the optimizer makes it anew, as in its first step.
                self.optimizer.state.pop(factor, None)
