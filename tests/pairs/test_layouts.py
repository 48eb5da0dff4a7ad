"""Each library's layers: found, seen as the right products, and corrected by the formula."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import peft
import pytest
import torch
from torch import Tensor, nn

import oracle
import published_layers as published
import tiny_models
from packages import package
from recorder import corrected_gradients
from sdsopt import Layout, LoRAPair, Skipped, attach, find_pairs, register_layout
from sdsopt.pairs import Groups
from sdsopt.pairs.find import LAYOUTS

DAMPING = 1e-6


@dataclass(frozen=True)
class Case:
    """One layer.

    Attributes:
        name: Library and layer.
        build: Returns the layer, float64 or float32.
        delta: Returns its dense update ΔW, by the library's own code.
        assemble: The same from the blocks s·B_i·A_i (e, m, n).
        package: What must be importable; empty for a layer written to published shapes.
        num_pairs: The number of pairs in the layer.
    """

    name: str
    build: Callable[[], nn.Module]
    delta: Callable[[Any], Tensor]
    assemble: Callable[[list[Tensor]], Tensor] = lambda pairs: torch.cat([b for blocks in pairs for b in blocks])
    package: str = ""
    num_pairs: int = 1


def applied(layer: nn.Module, width: int = 10) -> Tensor:
    """The matrix of a linear map."""
    return layer(torch.eye(width, dtype=torch.float64)).T


def applied_experts(layer: nn.Module) -> Tensor:
    return layer(torch.eye(10, dtype=torch.float64).repeat(3, 1, 1)).mT


def with_keys_left_out(blocks: list[Tensor]) -> Tensor:
    [[q, v]] = blocks
    return torch.cat([q, torch.zeros(4, 10, dtype=q.dtype), v[:4]])


def litgpt_qkv() -> nn.Module:
    options = {"head_size": 2, "n_head": 4, "n_query_groups": 2, "enable_lora": (True, False, True), "bias": False}
    return package("litgpt.lora").LoRAQKVLinear(10, 16, r=3, lora_alpha=4, **options)


def lycoris(base: nn.Module, algorithm: str = "locon", **options: Any) -> nn.Module:
    modules = package("lycoris.modules")
    kind = {"locon": "LoConModule", "loha": "LohaModule", "lokr": "LokrModule"}[algorithm]
    return getattr(modules, kind)("lora_unet_x", base, 0.5, 3, 4.0, **options)


def lycoris_delta(layer: Any) -> Tensor:
    return layer.get_diff_weight(layer.multiplier)[0].flatten(1)


def adalora() -> nn.Module:
    config = peft.AdaLoraConfig(init_r=4, lora_alpha=8, target_modules=["0"], total_step=10)
    return peft.get_peft_model(nn.Sequential(nn.Linear(10, 6)), config).base_model.model[0]  # pyright: ignore


def loralib_delta(layer: Any) -> Tensor:
    """Merging adds ΔW to the weight."""
    weight = layer.conv.weight if hasattr(layer, "conv") else layer.weight
    before = weight.detach().clone()
    layer.eval()
    change = weight.detach() - before
    layer.train()
    return change


def differential(layer: Any) -> Tensor:
    """What the adapter adds to a layer that has a base."""
    one = torch.eye(layer.linear.in_features)[None]  # a batch, which LitGPT's convolution needs
    return (layer(one) - layer.linear(one))[0].T


one: Any = "loralib"
CASES = [
    Case("loralib.Linear", lambda: package("loralib").Linear(10, 6, r=3, lora_alpha=4), loralib_delta, package=one),
    Case(
        "loralib.MergedLinear",
        lambda: package("loralib").MergedLinear(10, 12, r=3, lora_alpha=4, enable_lora=[True, False, True]),
        loralib_delta,
        lambda blocks: torch.cat([blocks[0][0], torch.zeros(4, 10), blocks[0][1]]),
        package=one,
    ),
    Case(
        "loralib.Conv2d",
        lambda: package("loralib").Conv2d(4, 6, 3, r=2, lora_alpha=4),
        loralib_delta,
        lambda blocks: blocks[0][0].reshape(6, 4, 3, 3),
        package=one,
    ),
    Case(
        "loralib.Embedding",
        lambda: package("loralib").Embedding(10, 6, r=3, lora_alpha=4),
        loralib_delta,
        lambda blocks: blocks[0][0].T,
        package=one,
    ),
    Case("litgpt.LoRAQKVLinear", litgpt_qkv, differential, with_keys_left_out, package="litgpt"),
    Case("litgpt.LoRALinear", lambda: package("litgpt.lora").LoRALinear(10, 6, r=3), differential, package="litgpt"),
    Case(
        "torchtune.LoRALinear",
        lambda: package("torchtune.modules.peft").LoRALinear(10, 6, rank=3, alpha=4.0),
        lambda layer: (layer(torch.eye(10)) - torch.eye(10) @ layer.weight.T).T,
        package="torchtune.modules.peft",
    ),
    Case("lycoris.LoCon", lambda: lycoris(nn.Linear(10, 6)), lycoris_delta, package="lycoris"),
    Case("lycoris.LoCon-conv", lambda: lycoris(nn.Conv2d(4, 6, 3)), lycoris_delta, package="lycoris"),
    Case("lycoris.LoCon-scalar", lambda: lycoris(nn.Linear(10, 6), use_scalar=True), lycoris_delta, package="lycoris"),
    Case("litgpt.LoRAQKVLinear, shapes", published.LitGPTQKV, applied, with_keys_left_out),
    Case("torchtune.LoRALinear, shapes", published.TorchtuneLinear, applied),
    Case("torchtune.LoRAGroupedExperts, shapes", published.TorchtuneExperts, applied_experts, torch.cat),
    Case("automodel.LinearLoRA, shapes", published.AutomodelLinear, applied),
    Case("automodel.GroupedExpertsLoRA, shapes", published.AutomodelExperts, applied_experts, torch.cat),
    Case("megatron.ParallelLinearAdapter, shapes", published.MegatronAdapter, applied),
    Case("kohya.LoRAModule, shapes", published.Kohya, applied),
    Case("kohya.LoRAModule-split, shapes", lambda: published.Kohya((2, 6, 3)), applied, num_pairs=3),
    Case("adapters.LoRA, shapes", published.AdapterHub, applied),
]


@pytest.fixture(params=CASES, ids=[case.name for case in CASES])
def case(request: pytest.FixtureRequest) -> Iterator[tuple[Case, nn.Module]]:
    found: Case = request.param
    if found.package:
        package(found.package)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        layer = found.build()
        with torch.no_grad():
            for parameter in layer.parameters():
                if parameter.ndim >= 2:
                    parameter.normal_()
                else:
                    parameter.fill_(1.5)
        yield found, layer


def products(pairs: list[LoRAPair]) -> list[Tensor]:
    """s·B·A block by block (e, m, n), one entry for each pair."""
    return [p.scaling * p.split_B(p.B.detach()) @ p.split_A(p.A.detach()) for p in pairs]


def test_the_products_are_the_librarys_update(case: tuple[Case, nn.Module]) -> None:
    row, layer = case
    pairs = list(find_pairs(nn.ModuleDict({"layer": layer})))
    assert len(pairs) == row.num_pairs
    expected = row.delta(layer).detach()
    assert expected.abs().max() > 0.1
    torch.testing.assert_close(row.assemble(products(pairs)), expected, rtol=1e-4, atol=1e-4)


def test_gradients_are_corrected_by_the_formula(case: tuple[Case, nn.Module]) -> None:
    """In wrapper and hook mode, with the library's own gradients in its own shapes."""
    _, layer = case
    model = nn.ModuleDict({"layer": layer})
    pairs = list(find_pairs(model))
    for pair in pairs:
        for factor in (pair.A, pair.B):
            factor.grad = torch.randn_like(factor)
    seen = corrected_gradients(model, "sds", DAMPING)
    for pair in pairs:
        expected_A, expected_B = oracle.corrected_pair(pair, 0.5, DAMPING)
        assert oracle.relative_error(pair.split_A(seen[pair.A]), expected_A) < 1e-5
        assert oracle.relative_error(pair.split_B(seen[pair.B]), expected_B) < 1e-5

    raw = {factor: factor.grad for pair in pairs for factor in (pair.A, pair.B)}
    model.zero_grad()
    with attach(model):
        sum((factor * raw[factor]).sum() for factor in raw).backward()  # pyright: ignore
    for factor in raw:
        assert factor.grad is not None
        torch.testing.assert_close(factor.grad, seen[factor])


def test_adalora_is_corrected_through_its_diagonal() -> None:
    """ΔW = s·B·diag(E)·A: A's gradient comes through B·diag(E), and B's through diag(E)·A."""
    layer: Any = adalora()
    torch.manual_seed(0)
    for name in ("lora_A", "lora_B", "lora_E"):
        getattr(layer, name)["default"].data.normal_()
    [pair] = find_pairs(layer)
    A, B, E = pair.A, pair.B, pair.E
    assert E is not None
    x, delta = torch.randn(5, 10), pair.scaling * pair.B @ (pair.E * pair.A)
    torch.testing.assert_close(layer(x) - layer.base_layer(x), x @ delta.T, rtol=1e-4, atol=1e-4)

    layer(x).square().sum().backward()
    assert A.grad is not None and B.grad is not None and E.grad is not None
    raw = [tensor.grad.clone() for tensor in (A, B, E) if tensor.grad is not None]
    expected = oracle.corrected((E * A).detach(), (B * E.T).detach(), raw[0], raw[1], 0.5, DAMPING)
    seen = corrected_gradients(layer, "sds", DAMPING)
    for factor, wanted in zip((A, B), expected, strict=True):
        assert oracle.relative_error(seen[factor], wanted) < 1e-5
    assert torch.equal(seen[E], raw[2])

    layer.zero_grad()
    with attach(layer):
        layer(x).square().sum().backward()
    torch.testing.assert_close(A.grad, seen[A])
    torch.testing.assert_close(B.grad, seen[B])


def test_diffusers_models_hold_peft_layers() -> None:
    pytest.importorskip("diffusers", exc_type=ImportError)
    unet = tiny_models.unet()
    pairs = find_pairs(unet)
    assert any(pair.A.ndim == 4 for pair in pairs)
    trainable = {p for p in unet.parameters() if p.requires_grad}
    assert trainable == {factor for pair in pairs for factor in (pair.A, pair.B)}


@pytest.mark.parametrize(
    ("build", "reason"),
    [
        (lambda: lycoris(nn.Conv2d(4, 6, 3), use_tucker=True), "Tucker"),
        (lambda: lycoris(nn.Linear(10, 6), "loha"), "LyCORIS's loha is not a plain product"),
        (lambda: lycoris(nn.Linear(10, 6), "lokr"), "LyCORIS's (kron|lokr) is not a plain product"),
        (lambda: published.MegatronAdapter(shards=2), "Megatron tensor parallelism"),
        (published.AdapterHubIA3, "AdapterHub's AdapterHubIA3 is not a plain product"),
    ],
    ids=["tucker", "loha", "lokr", "megatron-tp", "ia3"],
)
def test_what_is_no_plain_pair_is_reported(build: Callable[[], nn.Module], reason: str) -> None:
    found = find_pairs(nn.ModuleDict({"layer": build()}))
    assert len(found) == 0
    [skipped] = found.skipped
    assert skipped.name == "layer"
    assert re.search(reason, skipped.reason)


class Mine(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.reduce = nn.Parameter(torch.randn(3, 10))
        self.expand = nn.Parameter(torch.randn(6, 3))


def one_point_five(module: nn.Module) -> float:
    return 1.5


class MyLayout(Layout):
    def inspect(self, name: str, module: nn.Module) -> Iterator[LoRAPair | Skipped]:
        if isinstance(module, Mine):
            yield LoRAPair(name, module, "default", "reduce", "expand", Groups(), one_point_five)


def test_a_layout_of_ones_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sdsopt.pairs.find.LAYOUTS", list(LAYOUTS))
    model = nn.Sequential(Mine(), Mine())
    assert len(find_pairs(model)) == 0
    register_layout(MyLayout())
    register_layout(MyLayout())
    pairs = find_pairs(model)
    assert [(pair.name, pair.rank, pair.scaling) for pair in pairs] == [("0", 3, 1.5), ("1", 3, 1.5)]
    with pytest.raises(TypeError, match="instance of a Layout"):
        register_layout(MyLayout)  # pyright: ignore


def test_the_table_covers_every_layout() -> None:
    modules = {type(layout).__module__.split(".")[-1] for layout in LAYOUTS}
    assert modules == {"peft", "litgpt", "loralib", "torchtune", "nemo", "kohya"}
    assert len(CASES) > 15
