"""From PEFT to the paper's layers and back to a plain adapter on disk."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from torch import nn

from sdsopt.errors import NoPairsError, UnsupportedLayerError
from sdsopt.reference import SDSLinear, SDSSchedule, convert, export_adapter
from tiny_models import HIDDEN, MODELS, RANK, Batch


def logits(model: nn.Module, batch: Batch) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(**batch).logits


def base_of(name: str) -> nn.Module:
    return MODELS[name]()[0].unload()


def trained(name: str, steps: int) -> tuple[peft.PeftModel, Batch]:
    model, batch = MODELS[name]()
    convert(model)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.01)
    schedule = SDSSchedule(model, optimizer, 10, warmup_steps=2, phases=2)
    for _ in range(steps):
        optimizer.zero_grad()
        model(**batch).loss.backward()
        optimizer.step()
        schedule.step()
    return model, batch


@pytest.mark.parametrize("name", ["llama", "gpt2", "mistral", "bert"])
def test_conversion_changes_no_output_and_keeps_the_parameters(name: str) -> None:
    model, batch = MODELS[name]()
    before = logits(model, batch)
    trainable = {id(p) for p in model.parameters() if p.requires_grad}
    layers = convert(model)
    assert all(isinstance(layer, SDSLinear) for layer in layers)
    torch.testing.assert_close(logits(model, batch), before, rtol=0, atol=1e-6)
    assert {id(p) for p in model.parameters() if p.requires_grad} == trainable
    assert not [name for name, _ in model.named_parameters() if "lora_" in name]


@pytest.mark.parametrize(("steps", "rank"), [(1, RANK), (5, 2 * RANK)], ids=["plain LoRA so far", "split"])
@pytest.mark.parametrize("name", ["llama", "gpt2", "mistral", "bert"])
def test_peft_loads_it_with_equal_outputs(name: str, steps: int, rank: int, tmp_path: Path) -> None:
    """Conv1D, rsLoRA and a head that is trained whole are among them."""
    model, batch = trained(name, steps)
    expected = logits(model, batch)
    untrained = logits(MODELS[name]()[0], batch)
    assert (expected - untrained).abs().max() > 1e-3
    export_adapter(model, tmp_path)

    loaded: Any = peft.PeftModel.from_pretrained(base_of(name), str(tmp_path))
    assert {p.shape[0] for n, p in loaded.named_parameters() if "lora_A" in n} == {rank}
    torch.testing.assert_close(logits(loaded, batch), expected, rtol=0, atol=1e-6)
    torch.testing.assert_close(logits(loaded.merge_and_unload(), batch), expected, rtol=0, atol=2e-6)


def test_merged_weights_are_the_base_plus_delta(tmp_path: Path) -> None:
    model, _ = trained("llama", 5)
    export_adapter(model, tmp_path)
    loaded: Any = peft.PeftModel.from_pretrained(base_of("llama"), str(tmp_path)).merge_and_unload()
    merged = dict(loaded.named_parameters())
    layers = {n.removeprefix("base_model.model."): m for n, m in model.named_modules() if isinstance(m, SDSLinear)}
    assert len(layers) == 14
    for name, layer in layers.items():
        assert isinstance(layer.base, nn.Linear)
        expected = layer.base.weight + layer.delta
        torch.testing.assert_close(merged[f"{name}.weight"], expected, rtol=0, atol=1e-6)
        assert (expected - layer.base.weight).abs().max() > 1e-3


def test_ranks_and_scalings_that_differ_between_layers(tmp_path: Path) -> None:
    """On a model that PEFT has not seen, with one layer's name at the end of another's."""

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.fc = nn.Linear(6, 8)
            self.block = nn.Sequential(nn.Tanh())
            self.block.add_module("fc", nn.Linear(8, 5))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.block(self.fc(x))

    base, x = Net(), torch.randn(4, 6)
    model = copy.deepcopy(base)
    model.fc = SDSLinear.around(model.fc, rank=2, alpha=3.0)  # pyright: ignore
    model.block.fc = SDSLinear.around(model.block.fc, rank=3, alpha=1.0)  # pyright: ignore
    for layer in (model.fc, model.block.fc):
        nn.init.normal_(layer.B)  # pyright: ignore
    model.fc.split()  # pyright: ignore
    export_adapter(model, tmp_path)
    loaded = peft.PeftModel.from_pretrained(base, str(tmp_path))
    torch.testing.assert_close(loaded(x), model(x), rtol=0, atol=1e-6)
    assert json.loads((tmp_path / "adapter_config.json").read_text())["use_rslora"] is False


@pytest.mark.filterwarnings("ignore:.*lora_bias=True.*:UserWarning")  # of PEFT, on layers without a bias
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"target_modules": ["q_proj", "embed_tokens"]}, "embed_tokens.*no linear layer with LoRA"),
        ({"use_dora": True}, "a variant of it"),
        ({"lora_bias": True}, "lora_bias"),
        ({"r": HIDDEN + 1}, "exceeds neither"),
    ],
)
def test_layers_that_are_refused(options: dict[str, Any], message: str) -> None:
    config = peft.LoraConfig(**{"r": 2, "target_modules": ["q_proj"], **options})
    model = peft.get_peft_model(base_of("llama"), config)
    before = [type(module) for module in model.modules()]
    with pytest.raises((UnsupportedLayerError, ValueError), match=message):
        convert(model)
    assert [type(module) for module in model.modules()] == before


def test_a_second_adapter_is_refused() -> None:
    model = MODELS["llama"]()[0]
    model.add_adapter("other", peft.LoraConfig(r=2, target_modules=["q_proj"]))
    with pytest.raises(UnsupportedLayerError, match="a second adapter"):
        convert(model)


def test_nothing_to_convert_or_export(tmp_path: Path) -> None:
    with pytest.raises(NoPairsError, match="no trainable LoRA layer"):
        convert(nn.Linear(2, 2))
    with pytest.raises(NoPairsError, match="no SDSLinear"):
        export_adapter(nn.Linear(2, 2), tmp_path)
    assert not list(tmp_path.iterdir())


def test_an_initialisation_that_changed_the_base_is_refused(tmp_path: Path) -> None:
    config = peft.LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights="pissa")
    model = peft.get_peft_model(base_of("llama"), config)
    convert(model)
    with pytest.raises(ValueError, match="pissa, which changed the base"):
        export_adapter(model, tmp_path)
