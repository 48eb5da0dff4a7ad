"""What the processes of tests/optimizer/test_distributed.py run; spawned ones import it by name."""

from __future__ import annotations

import gc
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from sdsopt import SDSPreconditioner, attach
from sdsopt.errors import PairShapeError
from toy import Network

STEPS, BATCH = 5, 16


def batch(step: int) -> torch.Tensor:
    return torch.randn(BATCH, 10, generator=torch.Generator().manual_seed(step), dtype=torch.float64)


def train(network: torch.nn.Module, optimizer: torch.optim.Optimizer, rank: int = 0, world_size: int = 1) -> None:
    for step in range(STEPS):
        optimizer.zero_grad()
        network(batch(step).chunk(world_size)[rank]).square().mean().backward()
        optimizer.step()


def optimizer_of(network: torch.nn.Module, correction: str) -> SDSPreconditioner:
    return SDSPreconditioner(torch.optim.AdamW(network.parameters(), lr=0.01), network, correction)


Body = Callable[..., None]


def run(rank: int, world_size: int, folder: str, body: Body, *arguments: str) -> None:
    """One process: joins the others, and calls `body(rank, world_size, folder, *arguments)`."""
    torch.set_num_threads(1)
    store = dist.FileStore(f"{folder}/store", world_size)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=world_size, timeout=timedelta(seconds=60))
    body(rank, world_size, Path(folder), *arguments)
    # DDP must be gone before its process group: as the group's last owner it can deadlock (torch 2.13).
    gc.collect()
    dist.destroy_process_group()


def ddp(rank: int, world_size: int, folder: Path, correction: str) -> None:
    network = Network(dtype=torch.float64)
    parallel = DistributedDataParallel(network)
    train(parallel, optimizer_of(parallel, correction), rank, world_size)
    torch.save(network.state_dict(), folder / f"{rank}.pt")


def ddp_hooks(rank: int, world_size: int, folder: Path) -> None:
    network = Network(dtype=torch.float64)
    parallel = DistributedDataParallel(network)
    with attach(parallel):
        train(parallel, torch.optim.AdamW(parallel.parameters(), lr=0.01), rank, world_size)
    torch.save(network.state_dict(), folder / f"{rank}.pt")


def fsdp2(rank: int, world_size: int, folder: Path) -> None:
    """Wrapping a sharded model says that it is not supported, instead of doing something else."""
    network = Network()
    fully_shard(network)
    messages: list[str] = []
    for build in (lambda: optimizer_of(network, "sds"), lambda: attach(network)):
        try:
            build()
        except PairShapeError as error:
            messages.append(str(error))
    (folder / f"{rank}.txt").write_text("\n".join(messages))
