"""PyTorch's own."""

from __future__ import annotations

import torch
import torch.optim as o

from .row import Table, optimizers_of, row

_IMPLEMENTATIONS: dict[str, dict[str, bool]] = {
    "single": {"foreach": False},
    "foreach": {"foreach": True},
}
_FUSED: dict[str, dict[str, bool]] = {**_IMPLEMENTATIONS, "fused": {"fused": True}}

TABLE = Table(
    classes=optimizers_of(o),
    rows=[
        *[row(o.Adadelta, k, lr=0.1, **v) for k, v in _IMPLEMENTATIONS.items()],
        *[row(o.Adagrad, k, lr=0.01, **v) for k, v in _FUSED.items()],
        *[row(o.Adam, k, lr=0.01, **v) for k, v in _FUSED.items()],
        row(o.Adam, "amsgrad", lr=0.01, amsgrad=True, capturable=False),
        row(o.Adam, "decoupled", decoupled=True, lr=0.01, decoupled_weight_decay=True),
        *[row(o.AdamW, k, decoupled=True, lr=0.01, **v) for k, v in _FUSED.items()],
        row(o.AdamW, "tensor-lr", decoupled=True, dtype=torch.float32, lr=torch.tensor(0.01)),
        *[row(o.Adamax, k, lr=0.01, **v) for k, v in _IMPLEMENTATIONS.items()],
        row(o.Adafactor, decoupled=True, lr=0.01),
        *[row(o.ASGD, k, linear=True, pulls=True, lr=0.01, **v) for k, v in _IMPLEMENTATIONS.items()],
        row(o.Muon, decoupled=True, lr=0.01),
        *[row(o.NAdam, k, lr=0.01, **v) for k, v in _IMPLEMENTATIONS.items()],
        row(o.NAdam, "decoupled", decoupled=True, lr=0.01, decoupled_weight_decay=True),
        *[row(o.RAdam, k, linear=True, lr=0.01, **v) for k, v in _IMPLEMENTATIONS.items()],
        row(o.RAdam, "decoupled", decoupled=True, linear=True, lr=0.01, decoupled_weight_decay=True),
        *[row(o.RMSprop, k, lr=0.01, **v) for k, v in _IMPLEMENTATIONS.items()],
        *[row(o.Rprop, k, decays=False, lr=0.01, **v) for k, v in _IMPLEMENTATIONS.items()],
        *[row(o.SGD, k, linear=True, lr=0.01, **v) for k, v in _FUSED.items()],
        row(o.SGD, "nesterov", linear=True, lr=0.01, momentum=0.9, nesterov=True),
    ],
    refused={"LBFGS": lambda m: o.LBFGS(m.parameters()), "SparseAdam": lambda m: o.SparseAdam(m.parameters())},
)
