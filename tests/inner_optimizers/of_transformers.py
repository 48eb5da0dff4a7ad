"""transformers."""

from __future__ import annotations

import transformers.optimization as h
from transformers.trainer_pt_utils import LayerWiseDummyOptimizer

from .row import Table, optimizers_of, row

TABLE = Table(
    classes=optimizers_of(h),
    rows=[
        row(h.Adafactor, "relative", decoupled=True),
        row(h.Adafactor, decoupled=True, lr=0.01, relative_step=False, scale_parameter=False),
        row(h.Adafactor, "momentum", decoupled=True, lr=0.01, relative_step=False, beta1=0.9),
    ],
    refused={"LayerWiseDummyOptimizer": lambda m: LayerWiseDummyOptimizer({})},
)
