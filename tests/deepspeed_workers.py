"""What the processes of tests/integrations/test_deepspeed.py run; spawned ones import it by name."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch

from distributed_workers import STEPS, batch
from sdsopt import SDSPreconditioner, attach
from toy import Network


def sgd(network: torch.nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(network.parameters(), lr=0.05, momentum=0.9)


def engine_of(network: Network, optimizer: torch.optim.Optimizer, stage: int) -> Any:
    import deepspeed

    config = {
        "train_batch_size": torch.distributed.get_world_size(),
        "gradient_clipping": 0.0,  # DeepSpeed's default is 1
        "zero_optimization": {"stage": stage},
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
    }
    return deepspeed.initialize(model=network, optimizer=optimizer, config=config)[0]  # pyright: ignore


def hooks(rank: int, world_size: int, folder: Path, stage: str) -> None:
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world_size))
    network = Network()
    attach(network)
    engine = engine_of(network, sgd(network), int(stage))
    for step in range(STEPS):
        engine.backward(engine(batch(step).float().chunk(world_size)[rank]).square().mean())
        engine.step()
    torch.save(network.state_dict(), folder / f"{rank}.pt")


def mistakes(rank: int, world_size: int, folder: Path) -> None:
    """Stage 3 shards the factors; and at stage 1 the wrapper would hold DeepSpeed's flat partitions."""
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world_size))
    messages: list[str] = []
    for stage in (3, 1):
        network = Network()
        optimizer = sgd(network)
        if stage == 3:
            attach(network)
        else:
            optimizer = SDSPreconditioner(optimizer, network)
        try:
            engine = engine_of(network, optimizer, stage)
            engine.backward(engine(batch(0).float()).square().mean())
            engine.step()
        except Exception as error:
            messages.append(f"{type(error).__name__}: {error}")
    (folder / f"{rank}.txt").write_text("\n".join(messages))
