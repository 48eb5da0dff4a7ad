"""What processes run with FSDP2."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor.debug import CommDebugMode
from torch.optim import AdamW

import sdsopt
from bodies.common import Case, State, batch, counted, error_of, network, optimizer_of, share, train, whole
from recorder import Recorder
from sdsopt import SDSPreconditioner
from sdsopt.engine import PairMeasurement
from toy import Network, lora_linear


def sharded(case: Case, **options: Any) -> Network:
    """A network whose layers are sharded one by one."""
    model = network(case)
    for layer in (model.first, model.second, model):
        fully_shard(layer, **options)
    return model


def training(case: Case) -> State:
    model = sharded(case)
    train(model, optimizer_of(model, case), case)
    return whole(model)


def cut_across_columns(case: Case) -> tuple[State, dict[str, str]]:
    """With `shard_placements`; also how each factor lies."""
    model = network(case)
    placement = sdsopt.shard_placements(model, dist.get_world_size())
    for layer in (model.first, model.second, model):
        fully_shard(layer, shard_placement_fn=placement)
    train(model, optimizer_of(model, case), case)
    return whole(model), {pair.name: f"{pair.A.placements} {pair.B.placements}" for pair in sdsopt.find_pairs(model)}


def mixed_precision(case: Case) -> State:
    """float32 parameters, bfloat16 in forward and backward."""
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32, cast_forward_inputs=True)
    model = sharded(case, mp_policy=policy)
    train(model, optimizer_of(model, case), case)
    return whole(model)


def offloaded(case: Case) -> State:
    model = sharded(case, offload_policy=CPUOffloadPolicy(pin_memory=False))
    train(model, optimizer_of(model, case), case)
    return whole(model)


def replicated_shards(case: Case) -> State:
    """HSDP: shards over two processes, twice."""
    model = sharded(case, mesh=init_device_mesh("cpu", (2, 2), mesh_dim_names=("replicate", "shard")))
    train(model, optimizer_of(model, case), case)
    return whole(model)


def corrections(case: Case) -> dict[str, tuple[Tensor, Tensor, Tensor]]:
    """Of each factor: its value, its raw gradient, and the one that the inner optimizer sees."""
    model = sharded(case)
    recorder = Recorder(model.parameters())
    optimizer = SDSPreconditioner(recorder, model, case.correction or "lora")
    model(share(batch(0, case.dtype))).float().square().mean().backward()
    raw = gathered({name: p.grad for name, p in model.named_parameters()})
    recorder.register_step_post_hook(lambda *_: [p.grad.zero_() for p in model.parameters() if p.grad is not None])
    optimizer.step()
    seen = gathered({name: recorder.seen[p] for name, p in model.named_parameters()})
    for name, gradient in gathered({name: p.grad for name, p in model.named_parameters()}).items():
        # What the inner optimizer writes into the gradients of factors is not written into the raw ones.
        assert torch.equal(gradient, raw[name]) == ("lora" in name), name
    values = gathered(dict(model.named_parameters()))
    return {name: (values[name], raw[name], seen[name]) for name in values if "lora" in name}


def gathered(tensors: dict[str, Any]) -> State:
    return {name: tensor.detach().full_tensor().clone() for name, tensor in tensors.items()}


def collectives(correction: str, pairs: int, along: str) -> tuple[list[tuple[str, int]], int]:
    """Those of one step: sdsopt's own with the bytes handed to each, and the number of all.

    Args:
        correction: The correction.
        pairs: The number of pairs.
        along: "rank" for FSDP2's usual cut, or "columns" for A cut across its columns.
    """
    model = nn.Sequential(*(lora_linear(12, 8, 4, seed=seed) for seed in range(pairs)))
    placement = sdsopt.shard_placements(model, dist.get_world_size()) if along == "columns" else None
    fully_shard(model, shard_placement_fn=placement)
    optimizer = SDSPreconditioner(AdamW(model.parameters()), model, correction)
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    with CommDebugMode() as all_of_them, counted() as ours:
        optimizer.step()
    return ours, all_of_them.get_total_counts()


def one_element_overflows(case: Case) -> dict[str, Any]:
    """One process has a single infinite gradient element in its shard of A."""
    model = sharded(case)
    recorder = Recorder(model.parameters())
    optimizer = SDSPreconditioner(recorder, model, case.correction or "lora")
    scaler: Any = torch.amp.GradScaler("cpu", init_scale=1024.0)
    scaler.scale(model(share(batch(0, case.dtype))).square().mean()).backward()
    factor: Any = model.first.A
    if dist.get_rank() == 1:
        factor.grad.to_local()[0, 0] = torch.inf
    before = gathered(dict(model.named_parameters()))
    optimizer.step()  # without a scaler
    seen = recorder.seen[factor].full_tensor()  # pyright: ignore
    wrapped = optimizer_of(model, case)
    scaler.step(wrapped)
    scaler.update()
    after = gathered(dict(model.named_parameters()))
    return {
        "finite": seen.isfinite(),
        "moved": [name for name in before if not torch.equal(before[name], after[name])],
        "scale": scaler.get_scale(),
    }


class SideBySide(nn.Module):
    """Pairs of one A, whose B have these numbers of rows."""

    def __init__(self, rows: tuple[int, ...]) -> None:
        super().__init__()
        self.layers = nn.ModuleList(
            lora_linear(m, 10, 4, condition=5.0, seed=3 * i, dtype=torch.float64) for i, m in enumerate(rows)
        )

    def forward(self, x: Tensor) -> Tensor:
        return torch.stack([layer(x).tanh().square().sum() for layer in self.layers])


def uneven(correction: str, rows: tuple[int, ...]) -> State:
    """One step; in one process without shards."""
    model = SideBySide(rows)
    if dist.is_initialized():
        for layer in model.layers:
            fully_shard(layer)
        fully_shard(model)
    optimizer = SDSPreconditioner(torch.optim.SGD(model.parameters(), lr=0.01), model, correction)
    model(batch(0, torch.float64)).sum().backward()
    optimizer.step()
    return whole(model)


def one_process_has_no_gradient(case: Case) -> str:
    """Returns the error; the collectives go on to the end."""
    model = sharded(case)
    optimizer = optimizer_of(model, case)
    train(model, optimizer, Case(steps=1))
    if dist.get_rank() == 1:
        model.second.A.grad = None
    return error_of(optimizer.step)


def adapter_that_no_process_runs(case: Case) -> tuple[State, State]:
    """All processes leave a layer out: it stays as it is, and the others are corrected as if it were not there."""
    model = sharded(case)
    optimizer = optimizer_of(model, case)
    before = whole(model)
    train(model, optimizer, Case(steps=1))
    optimizer.zero_grad()
    model.second.A.grad = model.second.B.grad = None
    model.first.A.grad, model.first.B.grad = torch.ones_like(model.first.A), torch.ones_like(model.first.B)
    middle = whole(model)
    optimizer.step()
    assert any(not torch.equal(before[name], middle[name]) for name in before)
    return middle, whole(model)


def attaching(case: Case) -> str:
    return error_of(lambda: sdsopt.attach(sharded(case)))


def wrapping(case: Case) -> str:
    return error_of(lambda: optimizer_of(sharded(case), case))


def sharded_after_wrapping(case: Case) -> str:
    """As Accelerate does: the optimizer is given the new parameters."""
    model = network(case)
    optimizer = optimizer_of(model, case)
    fully_shard(model)
    optimizer.param_groups[0]["params"] = list(model.parameters())
    return error_of(lambda: train(model, optimizer, case))


def diagnostics(case: Case) -> dict[str, dict[str, float]]:
    model = sharded(case) if dist.is_initialized() else network(case)
    optimizer: Any = optimizer_of(model, case)
    model(share(batch(0, case.dtype))).square().mean().backward()
    return {name: _numbers(pair) for name, pair in optimizer.diagnostics().items()}


def _numbers(measured: PairMeasurement) -> dict[str, float]:
    steps = {f"{name} {key}": value for name, step in measured.steps.items() for key, value in vars(step).items()}
    known = {key: value for key, value in steps.items() if value is not None}
    return {"condition_A": measured.condition_A, "stable_rank": measured.stable_rank, **known}
