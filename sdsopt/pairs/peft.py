"""Hugging Face PEFT: `lora_A` and `lora_B` are dictionaries from adapter names to layers or parameters."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any, final

from torch import nn

from sdsopt.pairs.blocks import BlockView, Experts, Groups
from sdsopt.pairs.layout import Layout, Skipped
from sdsopt.pairs.pair import LoRAPair

# Variants whose update stays B·A in both factors: DoRA rescales it, aLoRA masks tokens, MiCA freezes B, VeLoRA
# compresses what A's gradient is computed from. Others are refused, so that a new one is never corrected by mistake.
_PLAIN_VARIANTS = frozenset(
    {
        "DoraLinearVariant",
        "DoraEmbeddingVariant",
        "DoraConv1dVariant",
        "DoraConv2dVariant",
        "DoraConv3dVariant",
        "ALoraLinearVariant",
        "MiCALinearVariant",
        "MiCAEmbeddingVariant",
        "VeloraLinearVariant",
    }
)

REFUSED_VARIANTS = {
    "ArrowLinearVariant": "Arrow routes each token through other adapters' factors",
    "BdLoraLinearVariant": "BD-LoRA stores one factor as a block-diagonal matrix",
    "KasaLinearVariant": "KaSA puts a trained diagonal between B and A",
    "MontecloraLinearVariant": "MonteCLoRA adds sampled noise to A, so gradients are not those of B·A",
    "QALoraLinearVariant": "QA-LoRA's A acts on pooled inputs",
}

_Dict = nn.ModuleDict | nn.ParameterDict


@final
class PeftLayout(Layout):
    """LoRA layers of PEFT, recognised by their attributes, so that subclasses and quantised layers count too."""

    def inspect(self, name: str, module: nn.Module) -> Iterator[LoRAPair | Skipped]:
        if _is_lora_layer(module):
            yield from _lora_layer(name, module)
        # Every PEFT layer class lists the attributes that hold its adapters' weights.
        elif hasattr(type(module), "adapter_layer_names"):
            yield from _other_tuner(name, module)
        else:
            yield from _prompts(name, module)


def _is_lora_layer(module: nn.Module) -> bool:
    return isinstance(_own(module, "lora_A"), _Dict) and isinstance(vars(module).get("scaling"), dict)


def _lora_layer(name: str, module: nn.Module) -> Iterator[LoRAPair | Skipped]:
    for adapter in _keys(module, "lora_A"):
        yield from _factors(name, module, adapter, embedding=False)
    for adapter in _keys(module, "lora_embedding_A"):
        yield from _factors(name, module, adapter, embedding=True)


def _factors(name: str, module: nn.Module, adapter: str, *, embedding: bool) -> Iterator[LoRAPair | Skipped]:
    full_name = f"{name}[{adapter}]"
    reason = _why_not_plain(module, adapter)
    if reason is not None:
        yield Skipped(full_name, reason)
        return
    if adapter in _keys(module, "lora_E"):
        # AdaLoRA: bare parameters, with trained singular values between them.
        paths = f"lora_A.{adapter}", f"lora_B.{adapter}"
        read_scaling = partial(_adalora_scaling, adapter=adapter)
        yield LoRAPair(full_name, module, adapter, *paths, Groups(), read_scaling, f"lora_E.{adapter}")
        return
    if embedding:
        path_A, path_B = f"lora_embedding_A.{adapter}", f"lora_embedding_B.{adapter}"
    else:
        path_A, path_B = f"lora_A.{adapter}.weight", f"lora_B.{adapter}.weight"
    read_scaling = partial(_scaling, adapter=adapter)
    yield LoRAPair(full_name, module, adapter, path_A, path_B, _block_view(module, adapter), read_scaling)
    if not embedding and getattr(_get(_own(module, "lora_B"), adapter), "bias", None) is not None:
        yield Skipped(f"{name}.lora_B.{adapter}.bias", "a bias beside B·A, which keeps its own gradient")


def _scaling(module: Any, adapter: str) -> float:
    return module.scaling[adapter]


def _adalora_scaling(module: Any, adapter: str) -> float:
    return module.scaling[adapter] / (float(module.ranknum[adapter]) + 1e-5)


def _why_not_plain(module: nn.Module, adapter: str) -> str | None:
    variant = _get(getattr(module, "lora_variant", None), adapter)
    if variant is not None:
        kind = type(variant).__name__
        if kind in REFUSED_VARIANTS:
            return REFUSED_VARIANTS[kind]
        if kind not in _PLAIN_VARIANTS:
            return f"sdsopt does not know PEFT's {kind}"
    # Megatron layers hold one factor's local shard as if it were the whole.
    if hasattr(module, "is_parallel_a"):
        return "Megatron tensor parallelism shards one factor as a plain tensor"
    return None


def _block_view(module: nn.Module, adapter: str) -> BlockView:
    # A ParamWrapper adapts a 3-D parameter, and says which one.
    if hasattr(module, "parameter_name") and hasattr(module, "num_experts"):
        experts: Any = module.num_experts
        return Experts(int(experts)) if experts > 1 else Groups()
    layer_B = _get(_own(module, "lora_B"), adapter)
    if isinstance(layer_B, nn.Conv1d | nn.Conv2d | nn.Conv3d):
        return Groups(layer_B.groups)
    return Groups()


def _other_tuner(name: str, module: nn.Module) -> Iterator[Skipped]:
    """Reports LoHa, LoKr, VeRA, (IA)³ and the like: each adapter once, with the attributes that hold it."""
    attributes: dict[str, list[str]] = {}
    for attribute in getattr(module, "adapter_layer_names", ()):
        # Layers in modules_to_save are trained in full: they do not resemble a pair.
        for adapter in _keys(module, attribute) if attribute != "modules_to_save" else ():
            attributes.setdefault(adapter, []).append(attribute)
    for adapter, names in attributes.items():
        yield Skipped(f"{name}[{adapter}]", f"{', '.join(names)}: PEFT weights that are not a plain product B·A")


def _prompts(name: str, module: nn.Module) -> Iterator[Skipped]:
    prefix = f"{name}." if name else ""
    for adapter in _keys(module, "prompt_encoder"):
        yield Skipped(f"{prefix}prompt_encoder[{adapter}]", "prompt learning trains embeddings, not a product B·A")


def _keys(module: nn.Module, attribute: str) -> list[str]:
    container = _own(module, attribute)
    return list(container.keys()) if isinstance(container, _Dict) else []


def _own(module: nn.Module, attribute: str) -> nn.Module | None:
    # Not getattr: FSDP1, torch.compile and PeftModel forward it to what they wrap, which would be found twice.
    return vars(module)["_modules"].get(attribute)


def _get(container: Any, key: str) -> object:
    return container[key] if container is not None and key in container else None
