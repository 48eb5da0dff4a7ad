"""pytorch_optimizer: all that its `load_optimizer` knows, and those that wrap another."""

from __future__ import annotations

import inspect
from types import SimpleNamespace
from typing import Any

import pytorch_optimizer as p
import torch
from pytorch_optimizer.optimizer import fp16
from torch.optim import AdamW, Muon

from .row import Inner, Table, optimizers_of, row

# What is said of classes; see `Inner`. The rest follows from their signatures.
_PULL = {
    *("A2Grad", "AccSGD", "FOCUS", "FTRL", "Fromage", "MADGRAD", "Nero", "Ranger", "Ranger21", "SPlus", "SRMM"),
    *("ScheduleFreeAdamW", "ScheduleFreeRAdam", "ScheduleFreeSGD"),
}
_LINEAR = {
    *("ASGD", "Adai", "AggMo", "ApolloDQN", "DAdaptSGD", "NovoGrad", "PID", "PNM", "QHM", "SGDW", "ScalableShampoo"),
}
_UNKNOWABLE = {
    *("APOLLO", "AdaFactor", "AdamP", "AdamS", "Adan", "DAdaptAdan", "Prodigy", "RAdam", "SGDP", "SOAP"),
    "StableAdamW",
}
_DECOUPLED_WITHOUT_A_FLAG = {"Conda", "DASH", "Fira", "FlashAdamW", "GaLore", "MuonClip", "SPAM", "SaRA", "StableSPAM"}
_NEED_A_PICKLE = {"AdaShift", "Conda", "SCION", "SCIONLight", "ScalableShampoo"}
_OWN_LEARNING_RATE = {
    *("AdamG", "DAdaptAdaGrad", "DAdaptAdam", "DAdaptAdan", "DAdaptLion", "DAdaptSGD", "Prodigy", "SpectralSphere"),
}
_OPTIONS: dict[str, dict[str, Any]] = {
    "AdaShift": {"keep_num": 2},
    "FAdam": {"dtype": torch.float32},
    "Ranger21": {"num_iterations": 100},
    "SaRA": {"threshold": 10.0},
    "SpectralSphere": {"solver_max_iterations": 5},
    **{name: {"group": {"use_muon": True}} for name in ("AdaGO", "AdaMuon", "Muon", "MuonClip", "NorMuon")},
}
_PROJECTED = {"rank": 2, "update_proj_gap": 2, "scale": 1.0, "projection_type": "std"}


def _wrapper(cls: Any, label: str = "", inside: Any = AdamW, **options: Any) -> Inner:
    """Around one that decays."""
    known = {name: options.pop(name) for name in list(options) if name in Inner.__dataclass_fields__}

    def make(parameters: Any, weight_decay: float) -> torch.optim.Optimizer:
        return cls(inside(parameters, lr=0.01, weight_decay=weight_decay), **options)

    return Inner(f"{cls.__name__}-{label}" if label else cls.__name__, make, **known)


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
    "AdamMini": "takes the model, and is tested apart",
    "BaseOptimizer": "abstract",
    "DeMo": "needs a process group, and is tested apart",
    "DistributedMuon": "needs a process group, and is tested apart",
    "TRAC": "goes back to its start in every step, bare too (4.1.0)",
}
_WRAPPERS = [
    _wrapper(p.Lookahead, pulls=True),
    _wrapper(p.Magma, unknowable=True),
    _wrapper(p.OrthoGrad, decoupled=True),
    _wrapper(p.OrthoGrad, "muon", Muon, decoupled=True),
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
    name, parameters = cls.__name__, inspect.signature(cls).parameters
    flag = parameters.get("weight_decouple")
    return row(
        cls,
        decays="weight_decay" in parameters,
        decoupled=name in _DECOUPLED_WITHOUT_A_FLAG or (flag is not None and flag.default and name not in _UNKNOWABLE),
        linear=name in _LINEAR,
        unknowable=name in _UNKNOWABLE,
        pulls=name in _PULL,
        weights_only=name not in _NEED_A_PICKLE,
        **({"lr": 0.01} if "lr" in parameters and name not in _OWN_LEARNING_RATE else {}),
        **_OPTIONS.get(name, {}),
    )


def _rows() -> list[Inner]:
    done = {*_REFUSED, *_LEFT_OUT, *(inner.name.partition("-")[0] for inner in _WRAPPERS)}
    found: list[Any] = [p.load_optimizer(name) for name in p.get_supported_optimizers()]
    return [_row(cls) for cls in found if not cls.__module__.startswith("torch.") and cls.__name__ not in done]


TABLE = Table(
    classes=optimizers_of(p, p.optimizer),
    rows=[*_rows(), *_WRAPPERS, *_VARIANTS],
    refused=_REFUSED,
    left_out=_LEFT_OUT,
)
