"""From pairs to corrected gradients. The only part that reads or writes `.grad`."""

from sdsopt.engine.backward import BackwardEngine, hook_of
from sdsopt.engine.measure import PairMeasurement, StepMeasurement, measure
from sdsopt.engine.recipe import Recipe
from sdsopt.engine.step import StepEngine

__all__ = ["BackwardEngine", "PairMeasurement", "Recipe", "StepEngine", "StepMeasurement", "hook_of", "measure"]
