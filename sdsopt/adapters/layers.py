"""The LoRA layers of an adapter: which tensors, how they fall into blocks, and with which scaling."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from typing import Any, final

from sdsopt.adapters.config import AdapterConfig, LayerRule
from sdsopt.adapters.json_object import parse_object
from sdsopt.adapters.names import FactorNames, find_factors
from sdsopt.adapters.source import Source
from sdsopt.adapters.tensor_file import TensorInfo
from sdsopt.errors import AdapterError
from sdsopt.pairs import BlockView, Experts, Groups, Skipped

# A factor of 8 GB in float64; embeddings of half a million tokens at rank 2048 are smaller.
_MAX_ELEMENTS = 2**30

# The key of a safetensors header under which diffusers keeps the options of LoraConfig.
_DIFFUSERS_KEY = "lora_adapter_metadata"

_NO_SCALING = "neither a configuration nor an alpha says how B·A is scaled; 1 is assumed"


@final
@dataclass(frozen=True)
class AdapterLayer:
    """One LoRA layer of an adapter, by the names of its tensors.

    Attributes:
        name: The layer's name, with the adapter's in brackets where the file holds it.
        tensors: The names of its tensors.
        blocks: How the stored factors are seen as independent products.
        scaling: The factor in front of B·A, or of AdaLoRA's B·E·A.
        note: What had to be assumed, or "".
    """

    name: str
    tensors: FactorNames
    blocks: BlockView
    scaling: float
    note: str


def find_layers(source: Source) -> tuple[list[AdapterLayer], list[Skipped]]:
    """Finds the LoRA layers of an adapter.

    Returns:
        The layers, and what is no product B·A, with the reason.

    Raises:
        AdapterError: Factors do not fit together or to the configuration, or there is nothing of LoRA at all.
    """
    if source.config is not None and source.config.refused is not None:
        return [], [Skipped(source.path.name, source.config.refused)]
    owners = source.owners
    found, skipped = find_factors(owners, str(source.path))
    components = _components(source)
    layers: list[AdapterLayer] = []
    for names in found:
        A, B = (owners[name].tensors[name] for name in (names.A, names.B))
        name = f"{names.layer}[{names.adapter}]" if names.adapter else names.layer
        rule = _rule(source, components, names)
        if isinstance(rule, str):
            skipped.append(Skipped(name, rule))
            continue
        if names.E is not None and A.shape[:1] == (0,):
            skipped.append(Skipped(name, "AdaLoRA has pruned it to rank 0"))
            continue
        for tensor in (names.A, names.B, names.E):
            if tensor is not None:
                _check(f"{owners[tensor].path}: {tensor!r:.200}", owners[tensor].tensors[tensor])
        if names.E is not None and owners[names.E].tensors[names.E].shape != (A.shape[0], 1):
            raise AdapterError(f"{owners[names.E].path}: {names.E!r:.200} has not one number for each row of A")
        if prod(B.shape[2:]) != 1:
            skipped.append(Skipped(name, "B has a kernel of its own, so that the update is not a plain product B·A"))
        else:
            blocks = _blocks(f"{owners[names.A].path}: {names.layer!r:.200}", A, B, rule)
            layers.append(AdapterLayer(name, names, blocks, rule.scaling, rule.note))
    if not layers and not skipped:
        raise AdapterError(
            f"{source.path} holds {len(owners)} tensors, none of which is a LoRA factor (lora_A, lora_down, lora.down "
            "and their partners)"
        )
    return layers, skipped


def _rule(source: Source, components: Mapping[str, AdapterConfig], names: FactorNames) -> LayerRule | str:
    if source.config is not None:
        # PEFT wraps: what is below a base_layer was adapted under the name of the module around it.
        return source.config.rule_for(names.layer.removeprefix("base_model.model.").partition(".base_layer")[0])
    component, _, module = names.layer.partition(".")
    if component in components:
        return components[component].rule_for(module)
    owners = source.owners
    alpha = f"{names.layer}.alpha"
    if alpha not in owners:
        return LayerRule(None, 1.0, note=_NO_SCALING)  # what kohya and diffusers mean by it
    if prod(owners[alpha].tensors[alpha].shape) != 1:
        raise AdapterError(f"{owners[alpha].path}: {alpha!r:.200} is not a single number")
    stored = owners[alpha].read(alpha)
    value = math.nan if stored.is_complex() else float(stored)
    if not math.isfinite(value):
        raise AdapterError(f"{owners[alpha].path}: {alpha!r:.200} is {value}; the file is damaged")
    # As in kohya's loader, 0 stands for "none given".
    return LayerRule(None, value / owners[names.A].tensors[names.A].shape[0] if value else 1.0)


def _components(source: Source) -> dict[str, AdapterConfig]:
    """Returns the configurations that diffusers writes into the file: one for each component of the pipeline."""
    where = f"{_DIFFUSERS_KEY} in the header of {source.path}"
    parts: dict[str, dict[str, Any]] = {}
    for text in (file.metadata[_DIFFUSERS_KEY] for file in source.files if _DIFFUSERS_KEY in file.metadata):
        for key, value in parse_object(text.encode("utf-8", "surrogatepass"), where).items():
            component, _, option = key.partition(".")
            parts.setdefault(component, {})[option] = value
    return {component: AdapterConfig.parse(content, where) for component, content in parts.items()}


def _check(where: str, info: TensorInfo) -> None:
    if len(info.shape) < 2 or 0 in info.shape:
        raise AdapterError(f"{where} is no factor: its shape is {list(info.shape)}")
    if prod(info.shape) > _MAX_ELEMENTS:
        raise AdapterError(f"{where} of shape {list(info.shape)} is larger than any factor; do not trust this file")
    if info.dtype is None:
        raise AdapterError(f"{where} is not in float16, bfloat16, float32 or float64; convert the adapter first")


def _blocks(where: str, A: TensorInfo, B: TensorInfo, rule: LayerRule) -> BlockView:
    rows, columns = A.shape[0], prod(B.shape[1:])
    if rule.stacked and rule.rank is not None:
        view = Experts(rows // rule.rank) if rows > rule.rank else Groups()
    else:
        # Grouped convolutions: each group of B reads its own share of A's rows.
        view = Groups(rows // columns if len(A.shape) > 2 and rows > columns else 1)
    ranks = view.shape_A(A.shape)[1], view.shape_B(B.shape)[2]
    if ranks[0] != ranks[1] or not (view.divides_A(A.shape) and view.divides_B(B.shape)):
        raise AdapterError(
            f"{where}: the factors do not fit together: A is {list(A.shape)} and B is {list(B.shape)}, so that in "
            f"{view.num_blocks} block(s) their ranks are {ranks[0]} and {ranks[1]}; fetch the file again"
        )
    if rule.rank is not None and ranks[0] * (1 if rule.stacked else view.num_blocks) != rule.rank:
        raise AdapterError(
            f"{where}: the factors have rank {ranks[0]} and the configuration says {rule.rank}, so that PEFT cannot "
            "load them; the two files are not of one adapter"
        )
    return view
