"""prodigyopt."""

from __future__ import annotations

import prodigyopt

from .row import Table, optimizers_of, row

TABLE = Table(
    classes=optimizers_of(prodigyopt),
    rows=[
        row(prodigyopt.Prodigy, unknowable=True, d0=1e-3),
        row(prodigyopt.Prodigy, "l2", d0=1e-3, decouple=False),
    ],
)
