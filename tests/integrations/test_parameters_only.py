"""Trainers that name the optimizer's class and give it parameters alone: kohya's sd-scripts, LitGPT, torchtune."""

from __future__ import annotations

import ast
import importlib
import sys
from collections.abc import Callable
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import SGD, AdamW, Optimizer

import published_layers as published
from loop import Loop, assert_corrected, assert_resumes
from packages import package
from sdsopt import SDSSGD, SDSAdamW, SDSPreconditioner, find_pairs, link
from sdsopt.errors import DoubleCorrectionError, NoPairsError, UnsupportedCorrectionError
from toy import Network, assert_same

Build = Callable[[nn.Module], Optimizer]
OPTIONS: dict[str, Any] = {"lr": 0.02, "weight_decay": 0.1, "betas": [0.9, 0.99], "correction": "sds-split"}


def inner(model: nn.Module) -> Optimizer:
    return AdamW(model.parameters(), lr=0.02, weight_decay=0.1, betas=(0.9, 0.99))


def named(model: nn.Module) -> Optimizer:
    return SDSAdamW(model.named_parameters(), **OPTIONS)


def get_optimizer(args: SimpleNamespace, trainable_params: Any) -> Optimizer:
    """The end of sd-scripts' `train_util.get_optimizer`, for types that it does not know by name, as published."""
    options: dict[str, Any] = {}
    for arg in args.optimizer_args:
        key, value = arg.split("=")
        options[key] = ast.literal_eval(value)
    module, _, name = args.optimizer_type.rpartition(".")
    return getattr(importlib.import_module(module), name)(trainable_params, lr=args.learning_rate, **options)


def kohya(model: nn.Module) -> Optimizer:
    arguments = ["weight_decay=0.1", "betas=0.9,0.99", "correction='sds-split'"]
    args = SimpleNamespace(optimizer_type="sdsopt.SDSAdamW", optimizer_args=arguments, learning_rate=1.0)
    return get_optimizer(args, [{"params": list(model.parameters()), "lr": 0.02}])  # as network modules group them


def litgpt(model: nn.Module) -> Optimizer:
    config = {"class_path": "sdsopt.SDSAdamW", "init_args": OPTIONS}
    return package("litgpt.utils").instantiate_torch_optimizer(config, model.parameters())


def instantiate(config: dict[str, Any], *arguments: Any) -> Any:
    """What torchtune's recipes build models and optimizers with."""
    return package("torchtune.config").instantiate(package("omegaconf").OmegaConf.create(config), *arguments)


def torchtune(model: nn.Module) -> Optimizer:
    return instantiate({"_component_": "sdsopt.SDSAdamW", **OPTIONS}, model.parameters())


@pytest.mark.parametrize("build", [named, kohya, litgpt, torchtune])
def test_a_class_path_is_enough(build: Build) -> None:
    def loop(build: Build) -> Loop:
        network = Network()
        link(network)
        return Loop(network, build(network), clip=1.0)

    whole = assert_resumes(lambda: loop(build))
    assert_same(whole.network, loop(lambda m: SDSPreconditioner(inner(m), m, "sds-split")).run(0, 8).network)
    assert_corrected(whole.network, loop(inner).run(0, 8).network)


@pytest.mark.parametrize("build", [named, kohya, litgpt, torchtune])
def test_without_a_link_it_says_what_to_call(build: Build) -> None:
    with pytest.raises(Exception, match=r"Call sdsopt.link\(model\)"):
        build(Network())


class Net(nn.Module):
    """sd-scripts' `LoRANetwork`, as published: its LoRA layers become children when it is applied."""

    def __init__(self, options: dict[str, Any]) -> None:
        super().__init__()
        self.options = options
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            self.unet_loras = [published.Kohya(), published.Kohya((2, 6, 3))]

    def apply_to(self, text_encoder: Any, unet: Any, apply_text_encoder: bool = True, apply_unet: bool = True) -> None:
        for index, lora in enumerate(self.unet_loras):
            self.add_module(f"lora_unet_{index}", lora)

    def prepare_optimizer_params(self, text_encoder_lr: Any, unet_lr: float, default_lr: float) -> Any:
        self.requires_grad_(True)
        return [{"params": list(self.parameters()), "lr": unet_lr}], ["unet"]

    def loss(self, step: int) -> Tensor:
        x = torch.randn(8, 10, generator=torch.Generator().manual_seed(step), dtype=torch.float64)
        return torch.stack([lora(x).tanh().square().mean() for lora in self.unet_loras]).sum()


@pytest.fixture
def networks(monkeypatch: pytest.MonkeyPatch) -> None:
    """sd-scripts' own network modules, found by name."""

    def create_network(
        multiplier: float, dim: int, alpha: float, vae: Any, text: Any, unet: Any, neuron_dropout: Any = None, **kw: Any
    ) -> Net:
        return Net(kw)

    def create_network_from_weights(multiplier: float, file: str, vae: Any, text: Any, unet: Any, **kw: Any) -> Any:
        return Net(kw), {"file": file}

    module: Any = ModuleType("networks.lora")
    module.create_network, module.create_network_from_weights = create_network, create_network_from_weights
    monkeypatch.setitem(sys.modules, "networks.lora", module)
    monkeypatch.setitem(sys.modules, "networks.lora_flux", module)


def train_network(optimizer_type: str, network_module: str, *, from_weights: bool = False, **network_args: str) -> Net:
    """The order of sd-scripts' `train_network.py`, as published."""
    module: Any = importlib.import_module(network_module)
    if from_weights:
        network, _ = module.create_network_from_weights(1, "file", None, None, None, **network_args)
    else:
        network = module.create_network(1.0, 3, 4.0, None, None, None, neuron_dropout=None, **network_args)
    network.apply_to(None, None, False, True)
    params, _ = network.prepare_optimizer_params(None, 0.02, 0.02)
    args = SimpleNamespace(optimizer_type=optimizer_type, optimizer_args=["weight_decay=0.1"], learning_rate=0.02)
    optimizer = get_optimizer(args, params)
    for step in range(4):
        network.loss(step).backward()
        optimizer.step()
        optimizer.zero_grad()
    return network


OURS = "sdsopt.integrations.kohya"


@pytest.mark.usefixtures("networks")
@pytest.mark.parametrize("from_weights", [False, True])
def test_kohyas_network_module(from_weights: bool) -> None:
    plain = train_network("torch.optim.AdamW", "networks.lora")
    linked = train_network("sdsopt.SDSAdamW", OURS, from_weights=from_weights, correction="none")
    hooked = train_network("torch.optim.AdamW", OURS, from_weights=from_weights, conv_dim="4")
    assert hooked.options == {"conv_dim": "4"}
    assert len(find_pairs(linked)) == 4
    expected = Net({})
    expected.apply_to(None, None)
    optimizer = SDSPreconditioner(AdamW(expected.parameters(), lr=0.02, weight_decay=0.1), expected)
    for step in range(4):
        expected.loss(step).backward()
        optimizer.step()
        optimizer.zero_grad()
    assert_same(linked, expected)
    for one, other, uncorrected in zip(*(net.parameters() for net in (hooked, expected, plain)), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-12)
        assert not torch.allclose(other, uncorrected, rtol=1e-4)


@pytest.mark.usefixtures("networks")
def test_kohyas_network_module_may_be_another() -> None:
    assert find_pairs(train_network("torch.optim.AdamW", OURS, base="networks.lora_flux"))
    with pytest.raises(ModuleNotFoundError, match="networks"):
        train_network("torch.optim.AdamW", OURS, base="networks.nothing")


@pytest.mark.usefixtures("networks")
def test_kohyas_mistakes() -> None:
    with pytest.raises(NoPairsError, match=r"Call sdsopt.link"):
        train_network("sdsopt.SDSAdamW", "networks.lora")
    with pytest.raises(DoubleCorrectionError, match="second time"):
        train_network("sdsopt.SDSAdamW", OURS)
    with pytest.raises(UnsupportedCorrectionError, match="use SDSPreconditioner"):
        train_network("torch.optim.AdamW", OURS, correction="sds-split")


class Transformer2DModel(nn.Module):
    """A block of a U-Net, which LyCORIS knows by its class's name."""

    def __init__(self) -> None:
        super().__init__()
        self.proj_in, self.proj_out = nn.Linear(8, 6), nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.proj_out(self.proj_in(x).tanh())


def train_lycoris(optimizer: Callable[..., Optimizer], correction: str, algo: str = "locon") -> Any:
    """LyCORIS's own network, through our network module."""
    package("lycoris.kohya")
    module = importlib.import_module(OURS)
    torch.manual_seed(0)
    unet, text_encoder = nn.Sequential(Transformer2DModel()), nn.Sequential()
    options = {"algo": algo, "base": "lycoris.kohya", "correction": correction}
    network = module.create_network(1.0, 3, 2.0, None, text_encoder, unet, neuron_dropout=None, **options)
    network.apply_to(text_encoder, unet, False, True)
    for lora in network.unet_loras:
        nn.init.normal_(lora.lora_up.weight, std=0.1)
    params = network.prepare_optimizer_params(None, 0.1, 0.1)
    trained = optimizer(params[0] if isinstance(params, tuple) else params, lr=0.1)
    for step in range(3):
        trained.zero_grad()
        unet(torch.randn(4, 8, generator=torch.Generator().manual_seed(step))).square().mean().backward()
        trained.step()
    return network


def test_lycoris_through_kohyas_network_module() -> None:
    hooked, linked, plain = (train_lycoris(*case) for case in ((SGD, "sds"), (SDSSGD, "none"), (SGD, "lora")))
    assert len(find_pairs(hooked)) == 2
    for one, other in zip(hooked.parameters(), linked.parameters(), strict=True):
        torch.testing.assert_close(one, other)
    assert_corrected(hooked, plain)
    with pytest.raises(NoPairsError, match="LyCORIS's loha is not a plain product"):
        train_lycoris(SGD, "sds", algo="loha")


def linked_llama(**options: Any) -> nn.Module:
    """What a user puts beside a torchtune config: the model's builder, and the link."""
    model = package("torchtune.models.llama3_2").lora_llama3_2(**options)
    link(model)
    return model


def test_a_torchtune_model_and_its_optimizer_from_a_config(monkeypatch: pytest.MonkeyPatch) -> None:
    peft = package("torchtune.modules.peft")
    recipe: Any = ModuleType("my_lora")
    recipe.linked_llama = linked_llama
    monkeypatch.setitem(sys.modules, "my_lora", recipe)
    model_config = {
        "_component_": "my_lora.linked_llama",
        "lora_attn_modules": ["q_proj", "v_proj"],
        "apply_lora_to_mlp": True,
        "vocab_size": 32,
        "num_layers": 1,
        "num_heads": 2,
        "num_kv_heads": 1,
        "embed_dim": 16,
        "max_seq_len": 16,
        "intermediate_dim": 24,
        "lora_rank": 2,
        "lora_alpha": 4,
    }

    def train(component: str) -> nn.Module:
        torch.manual_seed(0)
        model = instantiate(model_config)
        peft.set_trainable_params(model, peft.get_adapter_params(model))
        optimizer = instantiate({"_component_": component, "lr": 0.02, "fused": True}, model.parameters())
        for _ in range(4):
            optimizer.zero_grad()
            model(torch.randint(32, (2, 6))).logsumexp(-1).mean().backward()
            optimizer.step()
        return model

    corrected, plain = train("sdsopt.SDSAdamW"), train("torch.optim.AdamW")
    assert len(find_pairs(corrected)) == 5
    assert_corrected(corrected, plain)
