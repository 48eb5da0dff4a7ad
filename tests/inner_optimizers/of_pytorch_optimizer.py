"""pytorch_optimizer: all that its `load_optimizer` knows, and those that wrap another."""

from __future__ import annotations

import inspect
from types import SimpleNamespace
from typing import Any

import pytorch_optimizer as p
import torch
from pytorch_optimizer.optimizer import fp16
from torch.optim import AdamW

from .row import Inner, Table, optimizers_of, row

# What a row needs beyond the learning rate of 0.01 that those without an entry of their own get.
_OPTIONS: dict[str, dict[str, Any]] = {
    "A2Grad": {"decays": False, "pulls": True},
    "ASGD": {"lr": 0.01, "linear": True},
    "AccSGD": {"lr": 0.01, "pulls": True},
    "AdaShift": {"lr": 0.01, "decays": False, "keep_num": 2, "weights_only": False},
    "Adai": {"lr": 0.01, "linear": True},
    "Adan": {"lr": 0.01, "unknowable": True},
    "AdamG": {"lr": 1.0},
    "ApolloDQN": {"lr": 0.01, "linear": True},
    "Conda": {"lr": 0.01, "decoupled": True, "weights_only": False},
    "DAdaptAdaGrad": {},
    "DAdaptAdam": {},
    "DAdaptAdan": {"unknowable": True},
    "DAdaptLion": {},
    "DAdaptSGD": {"linear": True},
    "FAdam": {"lr": 0.01, "dtype": torch.float32},
    "FOCUS": {"lr": 0.01, "pulls": True},
    "FTRL": {"lr": 0.01, "decays": False, "pulls": True},
    "Fromage": {"lr": 0.01, "decays": False, "pulls": True},
    "MADGRAD": {"lr": 0.01, "pulls": True},
    "Nero": {"lr": 0.01, "decays": False, "pulls": True},
    "Prodigy": {"unknowable": True},
    "Ranger": {"lr": 0.01, "pulls": True},
    "Ranger21": {"lr": 0.01, "pulls": True, "num_iterations": 100},
    "SCION": {"lr": 0.01, "weights_only": False},
    "SCIONLight": {"lr": 0.01, "weights_only": False},
    "SPlus": {"lr": 0.01, "pulls": True},
    "SRMM": {"lr": 0.01, "decays": False, "pulls": True},
    "SOAP": {"lr": 0.01, "unknowable": True},
    "SaRA": {"lr": 0.01, "decoupled": True, "threshold": 10.0},
    "ScalableShampoo": {"lr": 0.01, "linear": True, "weights_only": False},
    "ScheduleFreeAdamW": {"lr": 0.01, "pulls": True},
    "ScheduleFreeRAdam": {"lr": 0.01, "pulls": True},
    "ScheduleFreeSGD": {"lr": 0.01, "pulls": True},
    **{name: {"lr": 0.01, "linear": True} for name in ("AggMo", "NovoGrad", "PID", "PNM", "QHM", "SGDW")},
    **{name: {"lr": 0.01, "unknowable": True} for name in ("APOLLO", "AdaFactor", "AdamP", "AdamS", "RAdam", "SGDP")},
    "SpectralSphere": {"decoupled": True, "solver_max_iterations": 5},
    "StableAdamW": {"lr": 0.01, "unknowable": True},
    **{
        name: {"lr": 0.01, "decoupled": True} for name in ("DASH", "Fira", "FlashAdamW", "GaLore", "SPAM", "StableSPAM")
    },
    **{
        name: {"lr": 0.01, "decoupled": True, "group": {"use_muon": True}}
        for name in ("AdaGO", "AdaMuon", "Muon", "MuonClip", "NorMuon")
    },
}
_PROJECTED = {"rank": 2, "update_proj_gap": 2, "scale": 1.0, "projection_type": "std"}


def _wrapper(cls: Any, **options: Any) -> Inner:
    """Around AdamW, so that it decays too."""
    known = {name: options.pop(name) for name in list(options) if name in Inner.__dataclass_fields__}

    def make(parameters: Any, weight_decay: float) -> torch.optim.Optimizer:
        return cls(AdamW(parameters, lr=0.01, weight_decay=weight_decay), **options)

    return Inner(cls.__name__, make, **known)


def _sam(cls: Any, **options: Any) -> Any:
    return lambda m: cls(m.parameters(), AdamW, lr=0.01, **options)


_REFUSED = {
    "AdaHessian": lambda m: p.AdaHessian(m.parameters()),
    "AdaLOMO": p.AdaLOMO,
    "AliG": lambda m: p.AliG(m.parameters()),
    "BSAM": lambda m: p.BSAM(m.parameters(), num_data=10),
    "FriendlySAM": _sam(p.FriendlySAM),
    "GSAM": lambda m: p.GSAM(m.parameters(), AdamW(m.parameters()), m, SimpleNamespace(step=lambda: 0.05)),
    "LOMO": p.LOMO,
    "LoRARite": lambda m: p.LoRARite(m.parameters()),
    "LookSAM": _sam(p.LookSAM),
    "SAM": _sam(p.SAM),
    "SafeFP16Optimizer": lambda m: fp16.SafeFP16Optimizer(AdamW(m.parameters())),
    "SophiaH": lambda m: p.SophiaH(m.parameters()),
    "WSAM": lambda m: p.WSAM(m, m.parameters(), AdamW, lr=0.01),
}
_LEFT_OUT = {
    "AdamMini": "takes the model; tested apart",
    "BaseOptimizer": "abstract",
    "DeMo": "needs a process group",
    "DistributedMuon": "needs a process group",
    "TRAC": "goes back to its start in every step, bare too (4.1.0)",
}
_WRAPPERS = [
    _wrapper(p.Lookahead, pulls=True),
    _wrapper(p.Magma, unknowable=True),
    _wrapper(p.OrthoGrad, decoupled=True),
    _wrapper(p.PCGrad, decoupled=True),
    _wrapper(p.ScheduleFreeWrapper, pulls=True),
]
_VARIANTS = [
    row(p.A2Grad, "inc", decays=False, pulls=True, variant="inc"),
    row(p.A2Grad, "exp", decays=False, pulls=True, variant="exp"),
    row(
        p.APOLLO,
        "projected",
        lr=0.01,
        unknowable=True,
        weights_only=False,
        group={**_PROJECTED, "scale_type": "channel"},
    ),
    row(p.Fira, "projected", decoupled=True, lr=0.01, weights_only=False, group=_PROJECTED),
    row(p.GaLore, "projected", decoupled=True, lr=0.01, weights_only=False, group=_PROJECTED),
    row(p.Lion, "cautious", decoupled=True, lr=0.01, cautious=True),
    row(p.Lion, "fixed", decoupled=True, lr=0.01, fixed_decay=True),
]


def _row(cls: Any) -> Inner:
    """As the package makes it; its signature tells whether it decays, and whether that is decoupled."""
    parameters = inspect.signature(cls).parameters
    known = _OPTIONS.get(cls.__name__, {"lr": 0.01})
    flag = parameters.get("weight_decouple")
    decoupled = flag is not None and flag.default and not known.get("unknowable")
    return row(cls, **{"decays": "weight_decay" in parameters, "decoupled": decoupled, **known})


def _rows() -> list[Inner]:
    done = {*_REFUSED, *_LEFT_OUT, *(inner.name for inner in _WRAPPERS)}
    found: list[Any] = [p.load_optimizer(name) for name in p.get_supported_optimizers()]
    return [_row(cls) for cls in found if not cls.__module__.startswith("torch.") and cls.__name__ not in done]


TABLE = Table(
    classes=optimizers_of(p, p.optimizer),
    rows=[*_rows(), *_WRAPPERS, *_VARIANTS],
    refused=_REFUSED,
    left_out=_LEFT_OUT,
)
