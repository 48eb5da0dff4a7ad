"""bitsandbytes, on the CPU: state in 8 bits from 4096 elements on, and in 32."""

from __future__ import annotations

from typing import Any

import bitsandbytes.optim as b
import torch

from .row import Inner, Table, optimizers_of, row

_LEFT_OUT = {
    "AdEMAMix32bit": "fails on a matrix on the CPU, bare too (0.50.2)",
    "PagedAdEMAMix32bit": "fails on a matrix on the CPU, bare too (0.50.2)",
}
_CLASSES = optimizers_of(b)


def _row(name: str) -> Inner:
    cls: Any = getattr(b, name)
    return row(
        cls,
        lr=0.01,
        decoupled=name.startswith(("Adam", "AdEMAMix", "LAMB", "Lion", "Paged")),  # also where it is not named AdamW
        linear="SGD" in name or name == "LARS8bit",  # which does not limit its step
        width=1536 if "8bit" in name else Inner.width,
        dtype=torch.float32,  # of their kernels
        **({"momentum": 0.9} if "LARS" in name or "SGD" in name else {}),
    )


TABLE = Table(_CLASSES, [_row(name) for name in sorted(_CLASSES - set(_LEFT_OUT))], left_out=_LEFT_OUT)
