"""Adapters on disk, whole and damaged, and their merged updates computed without sdsopt."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from toy import factor

NAME = "adapter_model.safetensors"
CONFIG = {
    "peft_type": "LORA",
    "r": 4,
    "lora_alpha": 8,
    "base_model_name_or_path": "somewhere",
    "task_type": "CAUSAL_LM",
}


def pair(rows: int = 12, columns: int = 10, rank: int = 4, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Ill-conditioned, unbalanced factors in float32: A (r, n) and B (m, r)."""
    return 3 * factor(rank, columns, 20.0, seed).float(), factor(rows, rank, 5.0, seed + 100).float()


def peft_tensors(layers: int = 2, rank: int = 4) -> dict[str, Tensor]:
    tensors: dict[str, Tensor] = {}
    for i in range(layers):
        name = f"base_model.model.model.layers.{i}.self_attn.q_proj"
        tensors[f"{name}.lora_A.weight"], tensors[f"{name}.lora_B.weight"] = pair(rank=rank, seed=i)
    return tensors


def write_folder(
    folder: Path, tensors: Mapping[str, Tensor] | None = None, config: Mapping[str, Any] | None = None
) -> Path:
    """A PEFT adapter's folder, with a README beside it."""
    folder.mkdir(parents=True, exist_ok=True)
    save_file(dict(peft_tensors() if tensors is None else tensors), folder / NAME, metadata={"format": "pt"})
    (folder / "adapter_config.json").write_text(json.dumps(CONFIG if config is None else config))
    (folder / "README.md").write_text("# An adapter\n")
    return folder


def write_shards(folder: Path) -> Path:
    """The same in two files with an index. The factors of the first layer are in different ones."""
    write_folder(folder)
    tensors = load_file(folder / NAME)
    (folder / NAME).unlink()
    names = list(tensors)
    shards = {
        "adapter_model-00001-of-00002.safetensors": names[:1],
        "adapter_model-00002-of-00002.safetensors": names[1:],
    }
    for file, part in shards.items():
        save_file({name: tensors[name] for name in part}, folder / file, metadata={"format": "pt"})
    index = {
        "metadata": {"total_size": 1},
        "weight_map": {name: file for file, part in shards.items() for name in part},
    }
    (folder / f"{NAME}.index.json").write_text(json.dumps(index))
    return folder


def kohya_tensors() -> dict[str, Tensor]:
    """A linear layer, a convolution (LoCon), DoRA's scale, and layers that are no product B·A."""
    A, B = pair()
    down, up = pair(rows=6, columns=5 * 9, rank=3, seed=5)
    return {
        "lora_unet_down_blocks_0_to_q.lora_down.weight": A,
        "lora_unet_down_blocks_0_to_q.lora_up.weight": B,
        "lora_unet_down_blocks_0_to_q.alpha": torch.tensor(2.0),
        "lora_unet_down_blocks_0_to_q.dora_scale": torch.ones(12, 1),
        "lora_unet_conv_in.lora_down.weight": down.reshape(3, 5, 3, 3),
        "lora_unet_conv_in.lora_up.weight": up.reshape(6, 3, 1, 1),
        "lora_unet_conv_in.alpha": torch.tensor(3),
        "lora_unet_tucker.lora_down.weight": torch.ones(2, 5, 1, 1),
        "lora_unet_tucker.lora_mid.weight": torch.ones(2, 2, 3, 3),
        "lora_unet_tucker.lora_up.weight": torch.ones(6, 2, 1, 1),
        "lora_te_loha.hada_w1_a": torch.ones(3, 2),
        "lora_te_loha.hada_w1_b": torch.ones(2, 3),
        "lora_te_lokr.lokr_w1": torch.ones(2, 2),
    }


def merged(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """ΔW without its scaling, float64, of every pair of two- or four-dimensional factors under any naming."""
    found: dict[str, Tensor] = {}
    for name, A in tensors.items():
        partner = re.sub(r"lora_A|lora_down|lora\.down", lambda m: _PARTNER[m[0]], name)
        if partner != name and partner in tensors:
            found[name] = tensors[partner].double().flatten(1) @ A.double().flatten(1)
    return found


_PARTNER = {"lora_A": "lora_B", "lora_down": "lora_up", "lora.down": "lora.up"}


def raw_safetensors(header: object, data: bytes = b"", length: int | None = None) -> bytes:
    """A file with this header, be it valid or not; a JSON text passes as it is."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return (len(text) if length is None else length).to_bytes(8, "little") + text + data
