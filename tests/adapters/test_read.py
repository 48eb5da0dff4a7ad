"""Every format and layout: the factors, blocks and scalings that the library which wrote them would use."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from adapter_files import NAME, kohya_tensors, pair, peft_tensors, write_folder, write_shards
from peft_layers import KINDS, adapted
from sdsopt.adapters.adapter import Adapter, open_adapter
from sdsopt.pairs import Experts, Groups, find_pairs
from tiny_models import MODELS


def assert_same_as_in_the_model(adapter: Adapter, model: nn.Module) -> None:
    pairs = {pair.name.removesuffix("[default]"): pair for pair in find_pairs(model, include_frozen=True)}
    assert {layer.name for layer in adapter.layers} == set(pairs)
    for layer in adapter.layers:
        expected = pairs[layer.name]
        A, B, E = adapter.read(layer)
        assert layer.blocks == expected.blocks
        assert layer.scaling == pytest.approx(expected.scaling, rel=1e-12)
        assert torch.equal(A, expected.split_A(expected.A)) and torch.equal(B, expected.split_B(expected.B))
        assert (E is None) == (expected.E is None)
        if E is not None and expected.E is not None:
            assert torch.equal(E, expected.E.flatten())


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers`")
def test_models(name: str, tmp_path: Path) -> None:
    model, _ = MODELS[name]()
    model.save_pretrained(str(tmp_path))
    adapter = open_adapter(tmp_path)
    assert len(adapter.layers) > 3 and not adapter.skipped
    assert_same_as_in_the_model(adapter, model)


@pytest.mark.filterwarnings("ignore:Adapter 'default'. 1 LoRA tensor")  # PEFT's, of a bias
@pytest.mark.parametrize("name", KINDS)
def test_every_kind_of_peft_layer(name: str, tmp_path: Path) -> None:
    kind = KINDS[name]
    model: Any = adapted(kind.build(), kind.config)
    model.save_pretrained(str(tmp_path))
    assert_same_as_in_the_model(open_adapter(tmp_path), model)


class TwoLayers(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(5, 7), nn.Linear(5, 7), nn.Conv2d(6, 8, 3, groups=2)])


@pytest.mark.filterwarnings("ignore:LoRA adapter added to ConvNd layer with groups", "ignore:Using Rank-Stabilized")
@pytest.mark.parametrize("rslora", [False, True])
def test_patterns_are_matched_as_peft_does(rslora: bool, tmp_path: Path) -> None:
    config = peft.LoraConfig(
        r=4,
        lora_alpha=6,
        use_rslora=rslora,
        target_modules=["layers.0", "layers.1", "layers.2"],
        rank_pattern={"0": 2, r"^layers\.1": 3},
        alpha_pattern={"layers.[01]": 5},
    )
    model = peft.get_peft_model(TwoLayers(), config)  # pyright: ignore
    model.save_pretrained(str(tmp_path))
    adapter = open_adapter(tmp_path)
    assert [layer.blocks.num_blocks for layer in adapter.layers] == [1, 1, 2]
    assert_same_as_in_the_model(adapter, model)


def test_adalora(tmp_path: Path) -> None:
    config = peft.AdaLoraConfig(init_r=6, target_r=2, lora_alpha=3, target_modules=["layers.0"], total_step=10)
    model = peft.get_peft_model(TwoLayers(), config)  # pyright: ignore
    model.save_pretrained(str(tmp_path))
    assert_same_as_in_the_model(open_adapter(tmp_path), model)


@pytest.mark.parametrize(
    ("config", "reason"),
    [
        (peft.LoHaConfig(target_modules=["layers.0"]), "loha is not a plain product B·A"),
        (peft.LoKrConfig(target_modules=["layers.0"]), "lokr is not a plain product B·A"),
        (peft.VeraConfig(target_modules=["layers.0"]), "vera is not a plain product B·A"),
        (peft.IA3Config(target_modules=["layers.0"], feedforward_modules=[]), "ia3 is not a plain product B·A"),
        (peft.LoraConfig(r=2, target_modules=["layers.0"], use_qalora=True, qalora_group_size=5), "QA-LoRA's A acts"),
    ],
    ids=lambda value: value.peft_type.value if hasattr(value, "peft_type") else "",
)
def test_what_is_no_product_is_skipped_with_the_reason(config: peft.PeftConfig, reason: str, tmp_path: Path) -> None:
    peft.get_peft_model(TwoLayers(), config).save_pretrained(str(tmp_path))  # pyright: ignore
    adapter = open_adapter(tmp_path)
    assert not adapter.layers
    [skipped] = adapter.skipped
    assert reason in skipped.reason


def test_shards(tmp_path: Path) -> None:
    whole, sharded = open_adapter(write_folder(tmp_path / "whole")), open_adapter(write_shards(tmp_path / "shards"))
    assert whole.layers == sharded.layers
    for layer in whole.layers:
        assert torch.equal(whole.read(layer).A, sharded.read(layer).A)
        assert torch.equal(whole.read(layer).B, sharded.read(layer).B)


def test_a_file_of_a_folder_keeps_its_configuration(tmp_path: Path) -> None:
    write_folder(tmp_path)
    assert [layer.scaling for layer in open_adapter(tmp_path / NAME).layers] == [2.0, 2.0]
    (tmp_path / NAME).rename(tmp_path / "other.safetensors")
    [layer, _] = open_adapter(tmp_path / "other.safetensors").layers
    assert layer.scaling == 1.0 and "a scaling" not in layer.name
    assert "1 is assumed" in layer.note


def test_kohya(tmp_path: Path) -> None:
    tensors = kohya_tensors()
    save_file(tensors, tmp_path / "lora.safetensors")
    adapter = open_adapter(tmp_path / "lora.safetensors")
    layers = {layer.name: layer for layer in adapter.layers}
    assert set(layers) == {"lora_unet_down_blocks_0_to_q", "lora_unet_conv_in"}
    assert layers["lora_unet_down_blocks_0_to_q"].scaling == 2 / 4
    convolution = layers["lora_unet_conv_in"]
    assert convolution.scaling == 1.0 and convolution.note == ""
    A, B, _ = adapter.read(convolution)
    assert A.shape == (1, 3, 45) and B.shape == (1, 6, 3)
    reasons = {skipped.name: skipped.reason for skipped in adapter.skipped}
    assert set(reasons) == {"lora_unet_tucker", "lora_te_loha", "lora_te_lokr"}
    assert "lora_mid" in reasons["lora_unet_tucker"]


def test_kohyas_alpha_of_zero_means_none(tmp_path: Path) -> None:
    save_file({**kohya_tensors(), "lora_unet_conv_in.alpha": torch.tensor(0.0)}, tmp_path / "lora.safetensors")
    assert {layer.name: layer.scaling for layer in open_adapter(tmp_path / "lora.safetensors").layers}[
        "lora_unet_conv_in"
    ] == 1.0


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning", "ignore::UserWarning")
def test_names_that_diffusers_writes(tmp_path: Path) -> None:
    diffusers = pytest.importorskip("diffusers.utils.state_dict_utils", exc_type=ImportError)
    A, B = pair()
    written = {f"unet.mid.to_q.lora_{side}.weight": value for side, value in (("A", A), ("B", B))}
    forms: list[dict[str, torch.Tensor]] = [
        written,
        diffusers.convert_state_dict_to_kohya(dict(written)),
        diffusers.convert_state_dict(dict(written), diffusers.PEFT_TO_DIFFUSERS),  # to_q.lora.down
        {
            name.replace(".to_q.lora_A", ".processor.to_q_lora.down").replace(
                ".to_q.lora_B", ".processor.to_q_lora.up"
            ): t
            for name, t in written.items()
        },
        {
            name.replace("lora_A", "lora_linear_layer.down").replace("lora_B", "lora_linear_layer.up"): t
            for name, t in written.items()
        },
    ]
    assert len({tuple(form) for form in forms}) == len(forms)
    for form in forms:
        save_file(form, tmp_path / "pytorch_lora_weights.safetensors")
        for path in (tmp_path, tmp_path / "pytorch_lora_weights.safetensors"):  # a folder without a configuration, too
            adapter = open_adapter(path)
            [layer] = adapter.layers
            assert torch.equal(adapter.read(layer).A[0], A) and torch.equal(adapter.read(layer).B[0], B)
            assert layer.scaling == 1.0


def test_the_configuration_that_diffusers_puts_into_the_file(tmp_path: Path) -> None:
    A, B = pair()
    metadata = {"transformer.r": 4, "transformer.lora_alpha": 10, "transformer.alpha_pattern": {"b.to_k": 2}}
    tensors = {
        f"transformer.b.{name}.lora_{side}.weight": value.clone()
        for name in ("to_q", "to_k")
        for side, value in (("A", A), ("B", B))
    }
    tensors |= {f"text_encoder.q.lora_{side}.weight": value.clone() for side, value in (("A", A), ("B", B))}
    save_file(tensors, tmp_path / "lora.safetensors", metadata={"lora_adapter_metadata": json.dumps(metadata)})
    scalings = {layer.name: layer.scaling for layer in open_adapter(tmp_path / "lora.safetensors").layers}
    assert scalings == {"transformer.b.to_q": 2.5, "transformer.b.to_k": 0.5, "text_encoder.q": 1.0}


def test_lycoris(tmp_path: Path) -> None:
    """The names and shapes that LyCORIS itself writes."""
    lycoris = pytest.importorskip("lycoris", exc_type=ImportError)
    network = lycoris.create_lycoris(TwoLayers(), 1.0, linear_dim=3, linear_alpha=1.5, algo="lora")
    network.apply_to()
    save_file({name: tensor.clone() for name, tensor in network.state_dict().items()}, tmp_path / "l.safetensors")
    adapter = open_adapter(tmp_path / "l.safetensors")
    assert {layer.name: layer.scaling for layer in adapter.layers if "2" not in layer.name} == {
        "lycoris_layers_0": 0.5,
        "lycoris_layers_1": 0.5,
    }


def test_a_whole_models_state_dict(tmp_path: Path) -> None:
    """With the adapter's name in the tensors' names, and all the base weights beside them."""
    model, _ = MODELS["llama"]()
    save_file({name: tensor.clone() for name, tensor in model.state_dict().items()}, tmp_path / "model.safetensors")
    adapter = open_adapter(tmp_path / "model.safetensors")
    assert {layer.name for layer in adapter.layers} == {pair.name for pair in find_pairs(model)}


def test_stacked_experts_whose_ranks_differ_are_skipped(tmp_path: Path) -> None:
    names = [
        f"base_model.model.mlp.experts{inner}.lora_{side}.weight" for inner in (".base_layer", "") for side in "AB"
    ]
    shapes = [(8, 6), (5, 8), (4, 5), (6, 4)]
    targets = ["mlp.experts.up", "mlp.experts.down"]
    config = {"peft_type": "LORA", "r": 4, "lora_alpha": 4, "target_parameters": targets}
    tensors = {name: torch.randn(shape) for name, shape in zip(names, shapes, strict=True)}
    write_folder(tmp_path, tensors, config)
    assert sorted(str(layer.blocks) for layer in open_adapter(tmp_path).layers) == sorted(
        map(str, (Experts(2), Groups()))
    )

    write_folder(tmp_path, tensors, {**config, "rank_pattern": {"up": 2}})
    adapter = open_adapter(tmp_path)
    assert not adapter.layers
    assert "no tensor's name says which it is" in adapter.skipped[0].reason


@pytest.mark.parametrize("nested", [False, True])
def test_pickles(nested: bool, tmp_path: Path) -> None:
    tensors = peft_tensors()
    content = {"state_dict": tensors, "epoch": 3} if nested else tensors
    torch.save(content, tmp_path / "adapter.ckpt")
    adapter = open_adapter(tmp_path / "adapter.ckpt", allow_pickle=True)
    assert [layer.name for layer in adapter.layers] == [
        name.removesuffix(".lora_A.weight") for name in tensors if "lora_A" in name
    ]

    write_folder(tmp_path)
    torch.save(load_file(tmp_path / NAME), tmp_path / "adapter_model.bin")
    (tmp_path / NAME).unlink()
    assert [layer.scaling for layer in open_adapter(tmp_path, allow_pickle=True).layers] == [2.0, 2.0]
