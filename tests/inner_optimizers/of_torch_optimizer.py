"""torch-optimizer."""

from __future__ import annotations

import torch
import torch_optimizer as t

from .row import Inner, Table, optimizers_of, row

TABLE = Table(
    classes=optimizers_of(t),
    rows=[
        row(t.A2GradExp, decays=False, pulls=True, lips=10.0, beta=10.0),
        row(t.A2GradInc, decays=False, pulls=True, lips=10.0, beta=10.0),
        row(t.A2GradUni, decays=False, pulls=True, lips=10.0, beta=10.0),
        row(t.AccSGD, pulls=True, lr=0.01),
        row(t.AdaBelief, lr=0.01, weight_decouple=False),
        row(t.AdaBelief, "decoupled", decoupled=True, lr=0.01, weight_decouple=True),
        row(t.AdaBelief, "fixed", decoupled=True, lr=0.01, weight_decouple=True, fixed_decay=True),
        row(t.AdaBound, lr=0.01),
        row(t.AdaMod, decoupled=True, lr=0.01),
        row(t.Adafactor, decoupled=True, lr=0.01, relative_step=False),
        row(t.Adafactor, "relative", decoupled=True),
        row(t.AdamP, unknowable=True, lr=0.01),
        row(t.AggMo, linear=True, lr=0.01),
        row(t.Apollo, linear=True, lr=0.01),
        row(t.DiffGrad, lr=0.01),
        row(t.LARS, lr=0.01),
        row(t.Lamb, lr=0.01),
        Inner(
            "Lookahead",
            lambda parameters: t.Lookahead(torch.optim.SGD(parameters, lr=0.01)),
            decays=False,
            pulls=True,
            loads=False,
        ),
        row(t.MADGRAD, pulls=True, lr=0.01),
        row(t.NovoGrad, linear=True, lr=0.01),
        row(t.PID, linear=True, lr=0.01, momentum=0.9),
        row(t.QHAdam, lr=0.01),
        row(t.QHAdam, "decoupled", decoupled=True, lr=0.01, decouple_weight_decay=True),
        row(t.QHM, linear=True, lr=0.01, momentum=0.9),
        row(t.QHM, "direct", decoupled=True, lr=0.01, momentum=0.9, weight_decay_type="direct"),
        row(t.RAdam, decoupled=True, dtype=torch.float32, lr=0.01),
        row(t.Ranger, pulls=True, lr=0.01),
        row(t.RangerQH, pulls=True, lr=0.01),
        row(t.RangerVA, pulls=True, lr=0.01),
        row(t.SGDP, unknowable=True, lr=0.01),
        row(t.SGDW, unknowable=True, lr=0.01),
        row(t.SWATS, lr=0.01),
        row(t.Shampoo, lr=0.01),
        row(t.Yogi, lr=0.01),
    ],
    refused={"Adahessian": lambda m: t.Adahessian(m.parameters())},
)
