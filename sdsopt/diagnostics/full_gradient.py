"""The gradient of the full matrix, which training with LoRA never computes."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn

from sdsopt.errors import UnsupportedGradientError
from sdsopt.pairs import LoRAPair
from sdsopt.pairs.pair import whole_shape

# Where PEFT, torchtune and LyCORIS keep them.
_DORA_MAGNITUDES = ("lora_magnitude_vector", "magnitude", "dora_scale")


def is_linear_pair(pair: LoRAPair) -> bool:
    """Tells whether a pair's factors are those of one matrix, so that its full gradient can be one too."""
    return pair.num_blocks == 1 and pair.A.ndim == 2


class FullGradients:
    """Sums G = ∂L/∂W = δᵀ·x for chosen linear layers while backward runs, over all micro-batches until `clear`.

    δ is the gradient of the layer's output and x its input, so where the layer computes with W + ΔW, G is the gradient
    of W and of ΔW alike. DoRA computes with rows of it rescaled, and is not watched. Dropout inside the adapter is not
    seen. Memory: one m×n matrix for each layer, in float32 (float64 for float64 inputs); time: one product of the size
    of the layer's own backward.

    Attributes:
        paused: Whether passes through the layers are left out, at no cost; False at first.

    Args:
        pairs: The pairs whose layers are watched.
        strict: Whether a layer with DoRA is an error, and one that is not called as a linear one, x (..., n) to
            (..., m), an error in its forward; otherwise these have no gradient here.

    Raises:
        UnsupportedGradientError: A layer is no linear one, or rescales rows.
    """

    def __init__(self, pairs: Sequence[LoRAPair], *, strict: bool = True) -> None:
        self.paused = False
        self._strict = strict
        self._sums: dict[LoRAPair, Tensor] = {}
        self._removers: list[Callable[[], None]] = []
        watched: list[LoRAPair] = []
        for pair in pairs:
            if not is_linear_pair(pair):
                raise UnsupportedGradientError(
                    f"the full gradient of {pair.name} cannot be captured: only linear layers can be watched"
                )
            if not _rescales_rows(pair):
                watched.append(pair)
            elif strict:
                raise UnsupportedGradientError(
                    f"the full gradient of {pair.name} cannot be captured: DoRA rescales the rows of W + ΔW by its "
                    "magnitudes, so the gradient of the layer's weight is not that of ΔW. Choose layers without DoRA"
                )
        for pair in watched:
            self._removers.append(pair.module.register_forward_hook(self._hook(pair)).remove)

    @property
    def gradients(self) -> Mapping[LoRAPair, Tensor]:
        """G (m, n) of each layer that took part in a backward pass since `clear`."""
        return self._sums

    def clear(self) -> None:
        """Forgets the sums."""
        self._sums.clear()

    def remove(self) -> None:
        """Takes the hooks off, and forgets the sums."""
        for remove in self._removers:
            remove()
        self._removers.clear()
        self.clear()

    def __enter__(self) -> FullGradients:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.remove()

    def _hook(self, pair: LoRAPair) -> Callable[[nn.Module, Any, Tensor], None]:
        def after_forward(module: nn.Module, inputs: Any, output: Tensor) -> None:
            del module
            if self.paused:
                return
            x: Any = inputs[0] if inputs else None
            if not _is_linear_call(pair, x, output):
                if self._strict:
                    raise UnsupportedGradientError(
                        f"the full gradient of {pair.name} cannot be captured: its layer is not called with one "
                        "tensor of its input's width"
                    )
            elif output.requires_grad:  # not the first of the two forward passes under gradient checkpointing
                output.register_hook(lambda delta: self._add(pair, x.detach(), delta))

        return after_forward

    def _add(self, pair: LoRAPair, x: Tensor, delta: Tensor) -> None:
        dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
        with torch.no_grad(), torch.autocast(x.device.type, enabled=False):
            G = delta.flatten(0, -2).to(dtype).mT @ x.flatten(0, -2).to(dtype)  # (m, k) @ (k, n)
            self._sums[pair] = self._sums[pair] + G if pair in self._sums else G


def _rescales_rows(pair: LoRAPair) -> bool:
    return any(name.partition(".")[0] in _DORA_MAGNITUDES for name, _ in pair.module.named_parameters())


def _is_linear_call(pair: LoRAPair, x: Any, output: Any) -> bool:
    if not (isinstance(x, Tensor) and isinstance(output, Tensor) and x.is_floating_point()):
        return False
    m, n = pair.blocks.shape_B(whole_shape(pair.B))[1], pair.blocks.shape_A(whole_shape(pair.A))[2]
    return x.ndim > 0 and x.shape[-1] == n and output.shape == (*x.shape[:-1], m)
