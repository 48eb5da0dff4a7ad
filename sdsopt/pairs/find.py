"""Finds the LoRA pairs of a model."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator
from typing import cast

from torch import nn

from sdsopt.errors import NoPairsError, StaleParametersError
from sdsopt.pairs.kohya import KohyaLayout
from sdsopt.pairs.layout import Layout, Skipped
from sdsopt.pairs.litgpt import LitGPTLayout
from sdsopt.pairs.loralib import LoralibLayout
from sdsopt.pairs.nemo import NeMoLayout
from sdsopt.pairs.pair import WHY_NOT_WHOLE, LoRAPair
from sdsopt.pairs.pair_list import PairList
from sdsopt.pairs.peft import PeftLayout
from sdsopt.pairs.torchtune import TorchtuneLayout

# One entry for each library. The first layout that knows a module decides on it.
LAYOUTS: list[Layout] = [
    PeftLayout(),
    LitGPTLayout(),
    LoralibLayout(),
    TorchtuneLayout(),
    NeMoLayout(),
    KohyaLayout(),
]


_LEAF_NAMES = {"weight", "bias"}


def register_layout(layout: Layout) -> None:
    """Makes `find_pairs` know LoRA layers of your own. Layouts that were registered last are asked first.

    Args:
        layout: An instance; registering one of the same class again replaces it.

    Raises:
        TypeError: It is not a `Layout`.
    """
    if not isinstance(layout, Layout):  # pyright: ignore[reportUnnecessaryIsInstance]
        raise TypeError(f"register_layout needs an instance of a Layout subclass, got {layout!r}")
    LAYOUTS[:] = [layout, *(other for other in LAYOUTS if type(other) is not type(layout))]


def find_pairs(model: nn.Module, *, include_frozen: bool = False) -> PairList:
    """Finds every LoRA pair of a model, and says what is left alone and why.

    Args:
        model: The model with its LoRA layers, e.g. a ``PeftModel``.
        include_frozen: Whether to return pairs of which neither factor requires a gradient. Otherwise they are among
            the skipped. A pair with one frozen factor (LoRA-FA) is always returned.

    Returns:
        The pairs, in the order of ``model.named_modules()``; `PairList.skipped` holds the rest. Print it.

    Raises:
        TypeError: `model` is not a module.
    """
    if not isinstance(model, nn.Module):  # pyright: ignore[reportUnnecessaryIsInstance]
        raise TypeError(_no_model(type(model).__name__))
    pairs: list[LoRAPair] = []
    skipped: list[Skipped] = []
    for item in _inspect(model):
        if isinstance(item, Skipped):
            skipped.append(item)
        elif (reason := _why_left_out(item, include_frozen)) is not None:
            skipped.append(Skipped(item.name, reason))
        else:
            pairs.append(item)
    pairs, tied = _without_tied(pairs)
    return PairList(pairs, skipped + tied)


def require_pairs(model: nn.Module | Iterable[LoRAPair]) -> list[LoRAPair]:
    """Returns the pairs of a model, frozen ones included, or the given pairs themselves.

    Raises:
        NoPairsError: There is none.
        TypeError: `model` is neither a module nor a collection of pairs.
    """
    if isinstance(model, nn.Module):
        found = find_pairs(model, include_frozen=True)
        if not found:
            raise NoPairsError(
                f"found no LoRA pair to correct in {type(model).__name__}: {found}\n"
                "Add an adapter first (peft.get_peft_model), and pass the model that holds it."
            )
        return list(found)
    if not isinstance(model, Iterable):  # pyright: ignore[reportUnnecessaryIsInstance]
        raise TypeError(_no_model(type(model).__name__))
    pairs = list(model)
    strangers = [pair for pair in pairs if not isinstance(pair, LoRAPair)]  # pyright: ignore[reportUnnecessaryIsInstance]
    if strangers:
        raise TypeError(_no_model(f"{type(model).__name__} of {type(strangers[0]).__name__}"))
    if not pairs:
        raise NoPairsError("an empty collection of LoRA pairs was given; there is nothing to correct")
    return list({pair.address: pair for pair in pairs}.values())  # each once: a step must not be mapped twice


def _no_model(given: str) -> str:
    return (
        f"model must be the torch.nn.Module that holds the LoRA layers (such as a PeftModel), or the LoRAPairs of one, "
        f"not {given}. Pass the model itself, not its parameters or its state dict."
    )


def _inspect(model: nn.Module) -> Iterator[LoRAPair | Skipped]:
    modules = cast("Iterator[tuple[str, nn.Module]]", model.named_modules())  # torch leaves it untyped
    for name, module in modules:
        if _is_plain_leaf(module):
            continue
        for layout in LAYOUTS:
            items = list(layout.inspect(name, module))
            if items:
                yield from items
                break


def _is_plain_leaf(module: nn.Module) -> bool:
    """Tells whether a module is one of torch's own that holds a weight at most: most of a model's modules are."""
    own = vars(module)
    return (
        not own["_modules"]
        and own["_parameters"].keys() <= _LEAF_NAMES
        and type(module).__module__.startswith("torch.nn.modules.")
    )


def _why_left_out(pair: LoRAPair, include_frozen: bool) -> str | None:
    try:
        trainable = pair.trainable
    except StaleParametersError:
        # FSDP1 without use_orig_params leaves plain tensors, views of its flat parameter, in their place.
        return f"its factors are not parameters. {WHY_NOT_WHOLE}"
    return None if trainable or include_frozen else "both factors are frozen"


def _without_tied(pairs: list[LoRAPair]) -> tuple[list[LoRAPair], list[Skipped]]:
    """Keeps one of the pairs that have both Parameters in common, and none that share otherwise.

    A gradient that sums over uses with the same partner is still that of one product; over different partners it is
    not, and no partner's Gram matrix is the right one for it. Distinct Parameters on one memory have a gradient each,
    and an optimizer steps on that memory once for each of them.
    """
    unique: dict[tuple[int, int], LoRAPair] = {}
    skipped: list[Skipped] = []
    for pair in pairs:
        first = unique.setdefault((id(pair.A), id(pair.B)), pair)
        if first is not pair:
            skipped.append(Skipped(pair.name, f"shares both factors with {first.name}"))

    products = Counter(map(_memory, unique.values()))
    uses = Counter(address for pair in unique.values() for address in _memory(pair))
    kept: list[LoRAPair] = []
    for pair in unique.values():
        memory = _memory(pair)
        if products[memory] > 1:
            skipped.append(Skipped(pair.name, _ONE_MEMORY))
        elif any(uses[address] > 1 for address in memory):
            skipped.append(Skipped(pair.name, "shares a factor with another pair"))
        else:
            kept.append(pair)
    return kept, skipped


_ONE_MEMORY = (
    "other Parameters lie on the same memory as its factors, so that an optimizer would step there twice; assign the "
    "very same Parameters to both layers"
)


def _memory(pair: LoRAPair) -> tuple[int, int]:
    return _address(pair.A), _address(pair.B)


def _address(parameter: nn.Parameter) -> int:
    # PEFT's ensure_weight_tying makes distinct Parameters of one storage. Subclasses (DTensor) and the meta device
    # have no address to compare.
    address = parameter.data_ptr() if type(parameter) is nn.Parameter and parameter.numel() else 0
    return address or id(parameter)
