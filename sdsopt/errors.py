"""The errors that sdsopt raises on bad input.

Each one is also the built-in exception a caller would expect there, so ``except ValueError`` works without
importing anything from sdsopt.
"""

from sdsopt.printable import printable


class SDSOptError(Exception):
    """Base class of every error that sdsopt raises on purpose."""


class AdapterError(SDSOptError, ValueError):
    """An adapter on disk cannot be read, or not be written where it should go. Nothing was written."""

    def __init__(self, message: str) -> None:
        super().__init__(printable(message))  # it quotes names that a file holds


class NoPairsError(SDSOptError, ValueError):
    """There is no LoRA pair to correct, or the optimizer owns none of them."""


class PairShapeError(SDSOptError, ValueError):
    """The two factors of a pair do not fit together."""


class StaleParametersError(SDSOptError, RuntimeError):
    """A pair's parameters were replaced in the model, while the optimizer still holds the old ones."""


class DoubleCorrectionError(SDSOptError, RuntimeError):
    """Two corrections would act on the same gradients."""


class UnsupportedCorrectionError(SDSOptError, ValueError):
    """The correction cannot be used in this mode."""


class InvalidCorrectionError(SDSOptError, TypeError):
    """A correction returned something else than it was given."""


class UnsupportedGradientError(SDSOptError, TypeError):
    """A gradient is of a kind that cannot be corrected, such as a sparse one."""


class UnsupportedLayerError(SDSOptError, TypeError):
    """A layer is not of the kind that this is defined for."""


class UnequalGradientsError(SDSOptError, RuntimeError):
    """A factor that is sharded over several processes has a gradient on some of them only."""


class UnsupportedOptimizerError(SDSOptError, TypeError):
    """The inner optimizer cannot be given corrected gradients."""


class TaskError(SDSOptError, ValueError):
    """A comparison cannot use the model or the data that it was given."""

    def __init__(self, message: str) -> None:
        super().__init__(printable(message))  # it quotes what files hold


class UnknownCorrectionError(SDSOptError, ValueError):
    """No correction of that name is registered."""


class NativeBuildError(SDSOptError, RuntimeError):
    """The native products could not be compiled."""


class MissingExtraError(SDSOptError, ImportError):
    """A package of an optional extra is not installed."""
