"""Which tensors of a file are the two factors of a layer, by the names that libraries give them."""

from __future__ import annotations

import re
from collections.abc import Collection
from dataclasses import dataclass

from sdsopt.errors import AdapterError
from sdsopt.pairs import Skipped

# What stands for A and for B: PEFT, kohya and LyCORIS, diffusers (three generations).
_FACTORS = {
    "lora_embedding_A": "lora_embedding_B",
    "lora_A": "lora_B",
    "lora_down": "lora_up",
    "lora.down": "lora.up",
    "lora_linear_layer.down": "lora_linear_layer.up",
}
_PARTNERS = _FACTORS | {B: A for A, B in _FACTORS.items()}

# `layer.lora_A.weight`; a whole model's state dict has the adapter's name in it, a bare Parameter no `weight`.
# Diffusers once wrote `to_q_lora.down` for `to_q.lora.down`.
_FACTOR = re.compile(
    rf"(?:(?P<layer>.+)[._])?(?<![^._])(?P<side>{'|'.join(map(re.escape, _PARTNERS))})"
    r"(?P<adapter>\.(?!weight$|bias$)[^.]+)?(?P<end>\.weight)?"
)

# A tensor of such a name makes its layer something else than B·A.
_OTHERS = {
    "lora_mid": "a Tucker decomposition: lora_mid stands between lora_up and lora_down",
    "lora_diag": "KaSA puts a trained diagonal between B and A",
    "hada_": "LoHa is not a plain product B·A",
    "lokr_": "LoKr is not a plain product B·A",
    "oft_": "OFT is not a plain product B·A",
    "vera_lambda": "VeRA is not a plain product B·A",
    "ia3_l": "(IA)³ is not a plain product B·A",
    "diff": "a whole weight, which has no factors",
}
_OTHER = re.compile(r"(?:(?P<layer>.+)\.)?(?P<kind>lora_mid|lora_diag|hada_|lokr_|oft_|vera_lambda|ia3_l|diff$)\w*.*")


@dataclass(frozen=True)
class FactorNames:
    """The tensors of one LoRA layer.

    Attributes:
        layer: The layer's name: what the tensors' names have in common.
        adapter: The adapter's name, where the tensors' names hold it, else "".
        A: The name of A.
        B: The name of B.
        E: The name of AdaLoRA's diagonal between them.
    """

    layer: str
    adapter: str
    A: str
    B: str
    E: str | None


def find_factors(names: Collection[str], where: str) -> tuple[list[FactorNames], list[Skipped]]:
    """Finds the LoRA layers among the tensors of a file.

    Args:
        names: The tensors' names.
        where: Where they are from, for the error's message.

    Returns:
        The layers, and what resembles one but is not B·A, each in the order of `names`.

    Raises:
        AdapterError: A factor has no partner.
    """
    others = {match["layer"] or "": _OTHERS[match["kind"]] for name in names if (match := _OTHER.fullmatch(name))}
    found: list[FactorNames] = []
    for name in names:
        match = _FACTOR.fullmatch(name)
        if match is None or (match["layer"] or "") in others:
            continue
        side = match["side"]
        start, end = name[: match.start("side")], name[match.end("side") :]
        partner = f"{start}{_PARTNERS[side]}{end}"
        if partner not in names:
            raise AdapterError(f"{where} holds {name!r} without its partner {partner!r}; fetch the file again")
        if side in _FACTORS:
            diagonal = f"{start}lora_E{end}" if side == "lora_A" else ""
            layer, adapter = match["layer"] or "", (match["adapter"] or "").removeprefix(".")
            found.append(FactorNames(layer, adapter, name, partner, diagonal if diagonal in names else None))
    return found, [Skipped(layer, reason) for layer, reason in others.items()]
