"""From pairs to corrected gradients. The only part that reads or writes `.grad`."""

from sdsopt.engine.backward import BackwardEngine, hook_of
from sdsopt.engine.recipe import Recipe
from sdsopt.engine.step import StepEngine

__all__ = ["BackwardEngine", "Recipe", "StepEngine", "hook_of"]
