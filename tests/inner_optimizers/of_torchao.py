"""torchao: state in 8 and 4 bits and in float8, from 4096 elements on. The learning rate is a tensor."""

from __future__ import annotations

import torch
import torchao.optim as a

from .row import Table, optimizers_of, row


def _offload(model: torch.nn.Module) -> a.CPUOffloadOptimizer:
    """Without its construction, which needs an accelerator."""
    del model
    return a.CPUOffloadOptimizer.__new__(a.CPUOffloadOptimizer)


TABLE = Table(
    classes=optimizers_of(a),
    rows=[
        row(cls, lr=0.01, decoupled="AdamW" in cls.__name__, width=1536, dtype=torch.float32)
        for cls in (a.Adam4bit, a.Adam8bit, a.AdamFp8, a.AdamW4bit, a.AdamW8bit, a.AdamWFp8)
    ],
    refused={"CPUOffloadOptimizer": _offload},
)
