"""What processes run with tensor parallelism: PEFT on a transformers model, and by hand on a mesh of two dimensions."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

from bodies.common import Case, State, batch, counted, network, optimizer_of, share, whole
from toy import factor


def llama(case: Case, folder: str) -> nn.Module:
    """A saved Llama with adapters, split over all processes, if there are any."""
    import peft
    import transformers as hf
    from transformers.distributed import DistributedConfig

    split = {"distributed_config": DistributedConfig(tp_size=dist.get_world_size())} if dist.is_initialized() else {}
    base = hf.LlamaForCausalLM.from_pretrained(folder, dtype=case.dtype, **split)
    config = peft.LoraConfig(r=4, lora_alpha=8, target_modules="all-linear")
    model: Any = peft.get_peft_model(base, config, autocast_adapter_dtype=False)
    for module in model.modules():
        if isinstance(module, nn.Linear):
            # transformers 5.23 reads the whole layer's features here, and PEFT 0.21 leaves the local ones.
            module.out_features, module.in_features = module.weight.shape
    for index, (_, parameter) in enumerate(_trained(model)):
        # By name and whole, so that the factors do not depend on how they are split.
        _set(parameter, factor(*parameter.shape, condition=5.0, seed=index).to(case.dtype))
    return model.train()


def save_llama(folder: str) -> None:
    import transformers as hf

    from tiny_models import DECODER

    torch.manual_seed(0)
    hf.LlamaForCausalLM(hf.LlamaConfig(**DECODER)).save_pretrained(folder)


def llama_training(case: Case, folder: str) -> State:
    model: Any = llama(case, folder)
    optimizer = optimizer_of(model, case)
    for step in range(case.steps):
        optimizer.zero_grad()
        ids = torch.randint(3, 64, (4, 6), generator=torch.Generator().manual_seed(step))
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
    return whole(model)


def llama_placements(case: Case, folder: str) -> dict[str, str]:
    """How each factor lies: what the training is a test of."""
    return {n: str(p.placements) if isinstance(p, DTensor) else "plain" for n, p in _trained(llama(case, folder))}


def mesh_training(case: Case) -> State:
    """FSDP2 over pairs of processes, tensor parallelism within: the first layer colwise, the second rowwise."""
    net, mesh = _on_mesh(case)
    optimizer = optimizer_of(net, case)
    for step in range(case.steps):
        optimizer.zero_grad()
        part = share(batch(step, case.dtype), mesh.get_local_rank("data"), 2)
        net(part).float().square().mean().backward()
        optimizer.step()
    return whole(net)


def _on_mesh(case: Case) -> tuple[nn.Module, DeviceMesh]:
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("data", "model"))
    net = network(case)
    plan = {"first.lora_B.default": ColwiseParallel(), "second.lora_A.default": RowwiseParallel()}
    parallelize_module(net, mesh["model"], plan)
    for layer in (net.first, net.second, net):
        fully_shard(layer, mesh=mesh["data"])
    return net, mesh


def _trained(model: nn.Module) -> list[tuple[str, Any]]:
    return [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]


@torch.no_grad()
def _set(parameter: Any, value: Tensor) -> None:
    if isinstance(parameter, DTensor):
        value = distribute_tensor(value, parameter.device_mesh, parameter.placements, src_data_rank=None)
    parameter.copy_(value)


def llama_collectives(case: Case, folder: str) -> list[str]:
    """sdsopt's collectives in one step."""
    model: Any = llama(case, folder)
    optimizer = optimizer_of(model, case)
    for _, parameter in _trained(model):
        parameter.grad = torch.ones_like(parameter)
    with counted() as calls:
        optimizer.step()
    return [name for name, _ in calls]


def mesh_collectives(case: Case) -> list[tuple[str, int]]:
    """The same on a mesh of two dimensions."""
    net, _ = _on_mesh(case)
    optimizer = optimizer_of(net, case)
    for parameter in net.parameters():
        parameter.grad = torch.ones_like(parameter)
    with counted() as calls:
        optimizer.step()
    return calls
