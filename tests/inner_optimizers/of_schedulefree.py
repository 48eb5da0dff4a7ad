"""schedulefree. Its wrappers are no `torch.optim.Optimizer`, so they are not among its classes."""

from __future__ import annotations

import schedulefree as s

from .row import Table, optimizers_of, row

_CLOSURES = (s.AdamWScheduleFreeClosure, s.RAdamScheduleFreeClosure, s.SGDScheduleFreeClosure)

TABLE = Table(
    classes=optimizers_of(s),
    rows=[
        row(s.AdamWScheduleFree, lr=0.01, pulls=True, warmup_steps=2),
        row(s.AdamWScheduleFree, "single", lr=0.01, pulls=True, foreach=False),
        row(s.AdamWScheduleFreePaper, lr=0.01, pulls=True),
        row(s.AdamWScheduleFreeReference, lr=0.01, pulls=True),
        row(s.RAdamScheduleFree, lr=0.01, pulls=True),
        row(s.SGDScheduleFree, lr=0.01, pulls=True),
        row(s.SGDScheduleFreeReference, lr=0.01, pulls=True),
    ],
    refused={cls.__name__: lambda m, cls=cls: cls(m.parameters()) for cls in _CLOSURES},
)
