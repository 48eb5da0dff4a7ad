"""The corrections by name. A new one is one line here."""

from __future__ import annotations

from collections.abc import Callable

from sdsopt.corrections.altlora import AltLoRA
from sdsopt.corrections.base import Correction
from sdsopt.corrections.gram_power import GramPower
from sdsopt.corrections.lora_fa import LoRAFA
from sdsopt.corrections.lora_muon import LoRAMuon
from sdsopt.corrections.lora_pro import LoRAPro
from sdsopt.corrections.matrix_moment import MatrixMoment
from sdsopt.corrections.reflora import RefLoRA
from sdsopt.corrections.track_basis import TrackBasis
from sdsopt.errors import UnknownCorrectionError

_FACTORIES: dict[str, Callable[[], Correction]] = {
    "lora": lambda: GramPower(0.0),
    "sds": lambda: GramPower(0.5),
    "sds-split": lambda: GramPower(0.5, update_exponent=0.5),
    "scaled": lambda: GramPower(1.0),
    "lora-pro": LoRAPro,
    "reflora": RefLoRA,
    "lora-fa": LoRAFA,
    "lora-muon": LoRAMuon,
    "altlora": AltLoRA,
    "lora-rite": lambda: TrackBasis(GramPower(0.5, update_exponent=0.5)),
    "lora-rite-matrix": MatrixMoment,
}


def available_corrections() -> tuple[str, ...]:
    """Returns the registered names."""
    return tuple(_FACTORIES)


def register_correction(name: str, factory: Callable[[], Correction]) -> None:
    """Makes a correction known by a name, for `SDSPreconditioner(..., correction=name)` and `sdsopt compare`.

    Args:
        name: The name; registering it again with the same factory is allowed.
        factory: Called without arguments for a new `Correction`; the class itself, most often.

    Raises:
        TypeError: The factory cannot be called; a `Correction` itself, perhaps.
        ValueError: Another factory already has that name.
    """
    if not callable(factory):
        raise TypeError(
            f"the correction {name!r} needs a factory, to be called for a new Correction each time, and "
            f"{type(factory).__name__} is not callable; register the class, or lambda: {type(factory).__name__}(…)"
        )
    if _FACTORIES.get(name, factory) is not factory:
        raise ValueError(f"the correction {name!r} is already registered; choose another name")
    _FACTORIES[name] = factory


def make_correction(correction: str | Correction) -> Correction:
    """Returns the correction of that name, or the given correction itself.

    Raises:
        UnknownCorrectionError: No correction has that name.
        TypeError: The argument is neither a name nor a `Correction`.
    """
    if isinstance(correction, Correction):
        return correction
    if not isinstance(correction, str):  # pyright: ignore[reportUnnecessaryIsInstance]
        raise TypeError(f"correction must be a name or a Correction instance, got {correction!r}")
    if correction not in _FACTORIES:
        raise UnknownCorrectionError(f"unknown correction {correction!r}; known: {', '.join(_FACTORIES)}")
    return _FACTORIES[correction]()
