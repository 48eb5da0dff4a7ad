"""The layers of real models: what a LoRA adapter of each of them consists of."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class LayerShape:
    """A linear layer (m, n), or a stack of experts of that shape, as PEFT adapts it.

    Attributes:
        rows: m, the output width.
        columns: n, the input width.
        experts: e, the number of stacked matrices; 1 for a plain linear layer.
    """

    rows: int
    columns: int
    experts: int = 1

    def num_parameters(self, rank: int) -> int:
        """The number of LoRA parameters, A and B together."""
        return self.experts * rank * (self.rows + self.columns)


@dataclass(frozen=True)
class ModelShape:
    """A model as one block of layers that repeats.

    Attributes:
        title: What it is.
        block: The adapted layers of one block.
        blocks: How often the block occurs.
    """

    title: str
    block: tuple[LayerShape, ...]
    blocks: int

    def num_parameters(self, rank: int) -> int:
        """The number of LoRA parameters of one block."""
        return sum(layer.num_parameters(rank) for layer in self.block)


def _llama_3_8b() -> ModelShape:
    hidden, inner, keys = 4096, 14336, 1024
    attention = (
        LayerShape(hidden, hidden),
        LayerShape(keys, hidden),
        LayerShape(keys, hidden),
        LayerShape(hidden, hidden),
    )
    mlp = (LayerShape(inner, hidden), LayerShape(inner, hidden), LayerShape(hidden, inner))
    return ModelShape("Llama-3-8B, all linear layers", attention + mlp, 32)


def _qwen3_30b_a3b() -> ModelShape:
    hidden, inner, experts = 2048, 768, 128
    stacks = (LayerShape(2 * inner, hidden, experts), LayerShape(hidden, inner, experts))  # gate_up_proj, down_proj
    return ModelShape("Qwen3-30B-A3B, stacked experts", stacks, 48)


def _sdxl() -> ModelShape:
    # Of the 70 transformer blocks 60 are this wide; the other 10 have 640 channels.
    width, text = 1280, 2048
    square = (LayerShape(width, width),) * 6  # queries, keys, values and output; queries and output of the text's
    return ModelShape("SDXL, attention of the 1280 channels", (*square, *(LayerShape(width, text),) * 2), 60)


SHAPES: dict[str, ModelShape] = {
    "llama-3-8b": _llama_3_8b(),
    "qwen3-30b-a3b": _qwen3_30b_a3b(),
    "sdxl": _sdxl(),
}


def square_layers(pairs: int, width: int) -> ModelShape:
    """A model of equal square layers, to see how the cost grows."""
    return ModelShape(f"{pairs} layers of {width} x {width}", (LayerShape(width, width),), pairs)
