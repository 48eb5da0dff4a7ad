"""LoRA layers of libraries that cannot be installed here, written to their published shapes and attributes.

Each `forward` is the library's formula, so that a wrong view of the factors shows in the product.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import Parameter


def random(*shape: int) -> Parameter:
    return Parameter(torch.randn(*shape, dtype=torch.float64))


def linear(rows: int, columns: int) -> nn.Linear:
    return nn.Linear(columns, rows, bias=False, dtype=torch.float64)


class LitGPTQKV(nn.Module):
    """litgpt 0.5 `LoRAQKVLinear` under grouped-query attention: queries and values adapted, keys not."""

    def __init__(self, columns: int = 10, head_size: int = 2, heads: int = 4, groups: int = 2, rank: int = 3) -> None:
        super().__init__()
        self.qkv_shapes = [head_size * heads, head_size * groups]
        self.keys = head_size * groups
        self.lora_A = random(2 * rank, columns)
        self.lora_B = random(sum(self.qkv_shapes), rank)
        self.scaling = 4 / rank

    def forward(self, x: Tensor) -> Tensor:
        halves = (x @ self.lora_A.T).chunk(2, dim=-1)
        q, v = (h @ B.T for h, B in zip(halves, self.lora_B.split(self.qkv_shapes), strict=True))
        return torch.cat([q, q.new_zeros(*q.shape[:-1], self.keys), v], dim=-1) * self.scaling


class TorchtuneLinear(nn.Module):
    """torchtune 0.6 `LoRALinear`."""

    def __init__(self, rows: int = 6, columns: int = 10, rank: int = 3) -> None:
        super().__init__()
        self.rank, self.alpha = rank, 4.0
        self.lora_a, self.lora_b = linear(rank, columns), linear(rows, rank)

    def forward(self, x: Tensor) -> Tensor:
        return (self.alpha / self.rank) * self.lora_b(self.lora_a(x))


class TorchtuneExperts(nn.Module):
    """torchtune's `LoRAGroupedExperts`, the gate projection alone: one slice of the input for each expert."""

    def __init__(self, experts: int = 3, columns: int = 10, rows: int = 6, rank: int = 2) -> None:
        super().__init__()
        self.rank, self.alpha = rank, 4.0
        self.lora_gate_a = random(experts, columns, rank)
        self.lora_gate_b = random(experts, rank, rows)

    def forward(self, x: Tensor) -> Tensor:
        return torch.bmm(torch.bmm(x, self.lora_gate_a), self.lora_gate_b) * (self.alpha / self.rank)


class AutomodelLinear(nn.Module):
    """nemo-automodel 0.7 `LinearLoRA`."""

    def __init__(self, rows: int = 6, columns: int = 10, rank: int = 3) -> None:
        super().__init__()
        self.scale = 4 / rank
        self.lora_A, self.lora_B = linear(rank, columns), linear(rows, rank)

    def forward(self, x: Tensor) -> Tensor:
        return self.lora_B(self.lora_A(x) * self.scale)


class AutomodelExperts(nn.Module):
    """nemo-automodel 0.7 `GroupedExpertsLoRA`, one projection."""

    def __init__(self, experts: int = 3, columns: int = 10, rows: int = 6, rank: int = 2) -> None:
        super().__init__()
        self.scale = 4 / rank
        self.lora_gate_and_up_A = random(experts, columns, rank)
        self.lora_gate_and_up_B = random(experts, rank, rows)

    def forward(self, x: Tensor) -> Tensor:
        return torch.bmm(torch.bmm(x, self.lora_gate_and_up_A), self.lora_gate_and_up_B) * self.scale


class MegatronLinear(nn.Linear):
    """What Megatron's parallel layers say of their size."""

    def __init__(self, rows: int, columns: int, shards: int = 1) -> None:
        super().__init__(columns, rows // shards, bias=False, dtype=torch.float64)
        self.output_size, self.output_size_per_partition = rows, rows // shards


class MegatronAdapter(nn.Module):
    """Megatron-Bridge's `ParallelLinearAdapter`."""

    def __init__(self, rows: int = 6, columns: int = 10, rank: int = 3, shards: int = 1) -> None:
        super().__init__()
        self.dim, self.alpha = rank, 4.0
        self.linear_in = MegatronLinear(rank, columns)
        self.linear_out = MegatronLinear(rows, rank, shards)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear_out(self.linear_in(x)) * (self.alpha / self.dim)


class Kohya(nn.Module):
    """sd-scripts' `LoRAModule`; with `split`, that of Flux, whose projections are adapted one by one."""

    def __init__(self, rows: tuple[int, ...] = (6,), columns: int = 10, rank: int = 3) -> None:
        super().__init__()
        self.lora_name = "lora_unet_down_blocks_0"
        self.scale, self.multiplier = 4 / rank, 0.5
        self.register_buffer("alpha", torch.tensor(4.0))
        downs = [linear(rank, columns) for _ in rows]
        ups = [linear(width, rank) for width in rows]
        split = len(rows) > 1
        self.lora_down = nn.ModuleList(downs) if split else downs[0]
        self.lora_up = nn.ModuleList(ups) if split else ups[0]
        self.layers = list(zip(downs, ups, strict=True))

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([up(down(x)) for down, up in self.layers], dim=-1) * self.scale * self.multiplier


class AdapterHub(nn.Module):
    """adapters 1.3 `LoRA`, in a merged projection of which queries and values are adapted."""

    def __init__(self, rows: int = 6, columns: int = 10, rank: int = 3, projections: int = 2) -> None:
        super().__init__()
        self.r, self.composition_mode = rank, "add"
        self.lora_A = random(rank * projections, columns)
        self.lora_B = random(rows * projections, rank)
        self.scaling = 4 / rank
        self.projections = projections

    def forward(self, x: Tensor) -> Tensor:
        h = (x @ self.lora_A.T).mT.unsqueeze(0) if x.ndim == 2 else (x @ self.lora_A.T).mT
        out = nn.functional.conv1d(h, self.lora_B.unsqueeze(-1), groups=self.projections)
        return out.squeeze(0).mT * self.scaling


class AdapterHubIA3(nn.Module):
    """adapters 1.3 `IA3`: a vector that scales."""

    def __init__(self) -> None:
        super().__init__()
        self.composition_mode = "scale"
        self.lora_B = random(6, 1)
        self.scaling = 1.0
