"""Optimizers that are built from parameters alone, after `sdsopt.link(model)`."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Literal

from torch import Tensor
from torch.optim import SGD, AdamW

from sdsopt.corrections import Correction
from sdsopt.errors import NoPairsError
from sdsopt.linalg import InverseRoot
from sdsopt.optimizer import SDSPreconditioner
from sdsopt.pairs import LoRAPair, linked_pairs

Params = Iterable[Tensor] | Iterable[dict[str, Any]] | Iterable[tuple[str, Tensor]]


class _Linked(SDSPreconditioner):
    """A wrapper whose model is known from its parameters."""

    def _present_pairs(self, param_groups: list[dict[str, Any]]) -> Iterable[LoRAPair]:
        try:
            return _pairs_of(param_groups)
        except NoPairsError:  # copies of parameters are linked to nothing
            return []


class SDSAdamW(_Linked):
    """`torch.optim.AdamW` on corrected gradients, for trainers that build the optimizer by its class.

    The pairs are found from the parameters, so `sdsopt.link(model)` must have been called before. For any other
    optimizer: `SDSPreconditioner(inner, linked_pairs(parameters))`.

    Args:
        params: Parameters, named parameters, or param groups, as for AdamW.
        lr: Learning rate.
        betas: Decay rates of the two moments.
        eps: Added to the denominator.
        weight_decay: Decoupled weight decay.
        amsgrad: AdamW's option of that name.
        foreach: AdamW's option of that name.
        fused: AdamW's option of that name.
        correction: As in `SDSPreconditioner`, like the options that follow.
        damping: Relative damping δ ≥ 0.
        inverse_root: Method for the roots.
        rescale: "grad_norm" or None.
        max_grad_norm: Clips corrected gradients.
        transport: "moments" or None.
        rebalance_every: Number of steps, or None.
        max_workspace_bytes: Bound on the memory to compute with at a time, or None.
        update_every: For how many steps roots serve.

    Raises:
        NoPairsError: No parameter is linked to a pair.
    """

    def __init__(
        self,
        params: Params,
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        amsgrad: bool = False,
        *,
        foreach: bool | None = None,
        fused: bool | None = None,
        correction: str | Correction = "sds",
        damping: float = 1e-6,
        inverse_root: str | InverseRoot = "auto",
        rescale: Literal["grad_norm"] | None = None,
        max_grad_norm: float | None = None,
        transport: Literal["moments"] | None = None,
        rebalance_every: int | None = None,
        max_workspace_bytes: int | None = None,
        update_every: int = 1,
    ) -> None:
        inner = AdamW(params, lr, betas, eps, weight_decay, amsgrad, foreach=foreach, fused=fused)
        super().__init__(
            inner,
            _pairs_of(inner.param_groups),
            correction,
            damping=damping,
            inverse_root=inverse_root,
            rescale=rescale,
            max_grad_norm=max_grad_norm,
            transport=transport,
            rebalance_every=rebalance_every,
            max_workspace_bytes=max_workspace_bytes,
            update_every=update_every,
        )


class SDSSGD(_Linked):
    """`torch.optim.SGD` on corrected gradients, for trainers that build the optimizer by its class.

    The pairs are found from the parameters, so `sdsopt.link(model)` must have been called before.

    Args:
        params: Parameters, named parameters, or param groups, as for SGD.
        lr: Learning rate.
        momentum: Momentum factor.
        dampening: Dampening of the momentum.
        weight_decay: L2 penalty, added to the corrected gradient.
        nesterov: Nesterov momentum.
        foreach: SGD's option of that name.
        fused: SGD's option of that name.
        correction: As in `SDSPreconditioner`, like the options that follow.
        damping: Relative damping δ ≥ 0.
        inverse_root: Method for the roots.
        rescale: "grad_norm" or None.
        max_grad_norm: Clips corrected gradients.
        transport: "moments" or None.
        rebalance_every: Number of steps, or None.
        max_workspace_bytes: Bound on the memory to compute with at a time, or None.
        update_every: For how many steps roots serve.

    Raises:
        NoPairsError: No parameter is linked to a pair.
    """

    def __init__(
        self,
        params: Params,
        lr: float | Tensor = 1e-3,
        momentum: float = 0.0,
        dampening: float = 0.0,
        weight_decay: float = 0.0,
        nesterov: bool = False,
        *,
        foreach: bool | None = None,
        fused: bool | None = None,
        correction: str | Correction = "sds",
        damping: float = 1e-6,
        inverse_root: str | InverseRoot = "auto",
        rescale: Literal["grad_norm"] | None = None,
        max_grad_norm: float | None = None,
        transport: Literal["moments"] | None = None,
        rebalance_every: int | None = None,
        max_workspace_bytes: int | None = None,
        update_every: int = 1,
    ) -> None:
        inner = SGD(params, lr, momentum, dampening, weight_decay, nesterov, foreach=foreach, fused=fused)
        super().__init__(
            inner,
            _pairs_of(inner.param_groups),
            correction,
            damping=damping,
            inverse_root=inverse_root,
            rescale=rescale,
            max_grad_norm=max_grad_norm,
            transport=transport,
            rebalance_every=rebalance_every,
            max_workspace_bytes=max_workspace_bytes,
            update_every=update_every,
        )


def _pairs_of(param_groups: list[dict[str, Any]]) -> list[LoRAPair]:
    return linked_pairs(parameter for group in param_groups for parameter in group["params"])
