"""What counts as a pair, what is skipped, and what `find_pairs` says about it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from sdsopt.errors import StaleParametersError
from sdsopt.pairs import PairList, find_pairs

peft = pytest.importorskip("peft")


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.q = nn.Linear(8, 8)
        self.k = nn.Linear(8, 6)


def lora(model: nn.Module | None = None, **config: Any) -> Any:
    options = {"r": 2, "target_modules": ["q", "k"], **config}
    return peft.get_peft_model(model or Net(), peft.LoraConfig(**options))


def names(pairs: PairList) -> list[str]:
    return [pair.name.removeprefix("base_model.model.") for pair in pairs]


def reasons(pairs: PairList) -> set[str]:
    return {skipped.reason for skipped in pairs.skipped}


# --- what is a pair ---------------------------------------------------------------------------------------------------


def test_names_and_factors() -> None:
    model = lora()
    pairs = find_pairs(model)
    assert [pair.name for pair in pairs] == ["base_model.model.q[default]", "base_model.model.k[default]"]
    assert pairs.skipped == ()
    layer = model.base_model.model.q
    assert pairs[0].module is layer and pairs[0].adapter == "default"
    assert pairs[0].A is layer.lora_A["default"].weight and pairs[0].B is layer.lora_B["default"].weight


def test_without_the_peft_wrapper() -> None:
    """PEFT can inject adapters into a model that stays of its own class."""
    model = peft.inject_adapter_in_model(peft.LoraConfig(r=2, target_modules=["q"]), Net())
    assert names(find_pairs(model)) == ["q[default]"]
    assert names(find_pairs(model.q)) == ["[default]"]


def test_scaling_and_rank_follow_the_patterns() -> None:
    pairs = find_pairs(lora(lora_alpha=6, rank_pattern={"k": 4}, alpha_pattern={"k": 10}))
    assert [(pair.rank, pair.scaling) for pair in pairs] == [(2, 3.0), (4, 2.5)]
    assert find_pairs(lora(r=4, lora_alpha=6, use_rslora=True))[0].scaling == 3.0


def test_scaling_is_live() -> None:
    model = lora(lora_alpha=2)
    pair = find_pairs(model)[0]
    model.base_model.model.q.set_scale("default", 5)
    assert pair.scaling == 5.0


def test_one_frozen_factor_is_still_a_pair() -> None:
    model = lora()
    for key, parameter in model.named_parameters():
        if "lora_A" in key:
            parameter.requires_grad_(False)
    pairs = find_pairs(model)
    assert len(pairs) == 2 and pairs.skipped == ()
    assert all(pair.trainable and not pair.A.requires_grad for pair in pairs)


@pytest.mark.parametrize(
    "config",
    [
        {"use_dora": True},
        {"init_lora_weights": "mica"},
        {"alora_invocation_tokens": [1]},
        {"velora_config": peft.VeloraConfig(num_groups=2)},
        {"init_lora_weights": "pissa"},
    ],
    ids=["dora", "mica", "alora", "velora", "pissa"],
)
def test_variants_that_stay_a_product(config: dict[str, Any]) -> None:
    if "alora_invocation_tokens" in config:
        config = {**config, "task_type": "CAUSAL_LM"}
        model = peft.inject_adapter_in_model(peft.LoraConfig(r=2, target_modules=["q", "k"], **config), Net())
    else:
        model = lora(**config)
    pairs = find_pairs(model)
    assert len(pairs) == 2 and pairs.skipped == ()


def test_dora_magnitudes_are_not_factors() -> None:
    model = lora(use_dora=True)
    factors = {id(factor) for pair in find_pairs(model) for factor in (pair.A, pair.B)}
    magnitudes = [parameter for key, parameter in model.named_parameters() if "magnitude" in key]
    assert len(magnitudes) == 2 and not any(id(parameter) in factors for parameter in magnitudes)


# --- several adapters -------------------------------------------------------------------------------------------------


def test_inactive_adapters_are_skipped_until_they_are_active() -> None:
    model = lora()
    model.add_adapter("other", peft.LoraConfig(r=3, target_modules=["q"]))
    before = find_pairs(model)
    assert names(before) == ["q[default]", "k[default]"]
    assert [(s.name, s.reason) for s in before.skipped] == [("base_model.model.q[other]", "both factors are frozen")]

    model.set_adapter("other")
    assert names(find_pairs(model)) == ["q[other]"]
    assert not before[0].trainable  # the pair looks at the parameters as they are now


def test_frozen_pairs_on_request() -> None:
    model = lora()
    model.add_adapter("other", peft.LoraConfig(r=3, target_modules=["q"]))
    pairs = find_pairs(model, include_frozen=True)
    assert names(pairs) == ["q[default]", "q[other]", "k[default]"] and pairs.skipped == ()


def test_both_adapters_active() -> None:
    model = lora()
    model.add_adapter("other", peft.LoraConfig(r=3, target_modules=["q"]))
    model.base_model.set_adapter(["default", "other"])
    assert names(find_pairs(model)) == ["q[default]", "q[other]", "k[default]"]


# --- looked up live ---------------------------------------------------------------------------------------------------


def replace_by_assignment(model: Any) -> None:
    model.load_state_dict({key: value.clone() for key, value in model.state_dict().items()}, assign=True)


def replace_on_meta(model: Any) -> None:
    model.to_empty(device="meta")


def replace_by_hand(model: Any) -> None:
    for pair in find_pairs(model):
        for path in (pair.path_A, pair.path_B):
            owner = pair.module.get_submodule(path.rpartition(".")[0])
            owner.weight = nn.Parameter(owner.weight.detach().clone())


@pytest.mark.parametrize("replace", [replace_by_assignment, replace_on_meta, replace_by_hand])
def test_replaced_parameters_are_seen(replace: Callable[[Any], None]) -> None:
    model = lora()
    pairs = find_pairs(model)
    old = [factor for pair in pairs for factor in (pair.A, pair.B)]
    replace(model)
    new = [factor for pair in pairs for factor in (pair.A, pair.B)]
    current = {id(parameter) for key, parameter in model.named_parameters() if "lora_" in key}
    assert {id(factor) for factor in new} == current
    assert not any(a is b for a, b in zip(old, new, strict=True))


@pytest.mark.parametrize("attribute", ["A", "B", "rank", "scaling", "trainable"])
def test_a_deleted_adapter_is_reported_by_name(attribute: str) -> None:
    model = lora()
    model.add_adapter("other", peft.LoraConfig(r=3, target_modules=["q"]))
    pair = find_pairs(model, include_frozen=True)[1]
    model.delete_adapter("other")
    with pytest.raises(StaleParametersError, match=r"q\[other\] is gone.*find_pairs"):
        getattr(pair, attribute)


# --- what is skipped, and why -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("config", "reason"),
    [
        (lambda: peft.LoHaConfig(target_modules=["q"]), "hada_w1_a"),
        (lambda: peft.LoKrConfig(target_modules=["q"]), "lokr_w1"),
        (lambda: peft.VeraConfig(target_modules=["q"]), "vera_lambda_b"),
        (lambda: peft.IA3Config(target_modules=["q"], feedforward_modules=[]), "ia3_l"),
        (lambda: peft.LoraConfig(target_modules=["q"], r=2, kasa_config=peft.KasaConfig()), "KaSA"),
        (lambda: peft.LoraConfig(target_modules=["q"], r=2, monteclora_config=peft.MontecloraConfig()), "MonteCLoRA"),
        (
            lambda: peft.LoraConfig(
                target_modules=["q"], r=2, use_bdlora=peft.BdLoraConfig(target_modules_bd_a=["q"], nblocks=2)
            ),
            "BD-LoRA",
        ),
    ],
    ids=["loha", "lokr", "vera", "ia3", "kasa", "monteclora", "bdlora"],
)
def test_what_is_not_a_plain_product(config: Callable[[], Any], reason: str) -> None:
    pairs = find_pairs(peft.get_peft_model(Net(), config()))
    assert len(pairs) == 0
    assert [skipped.name for skipped in pairs.skipped] == ["base_model.model.q[default]"]
    assert reason in pairs.skipped[0].reason


@pytest.mark.parametrize(
    ("kind", "reason"),
    [
        ("QALoraLinearVariant", "QA-LoRA"),
        ("ArrowLinearVariant", "Arrow"),
        ("VariantOfTheFuture", "does not know PEFT's VariantOfTheFuture"),
    ],
)
def test_variants_that_need_other_layers_or_are_unknown(kind: str, reason: str) -> None:
    model = lora(target_modules=["q"])
    model.base_model.model.q.lora_variant["default"] = type(kind, (), {})()
    pairs = find_pairs(model)
    assert len(pairs) == 0 and len(pairs.skipped) == 1
    assert reason in pairs.skipped[0].reason


def test_a_lora_bias_is_reported_beside_its_pair() -> None:
    pairs = find_pairs(lora(lora_bias=True, target_modules=["q"]))
    assert names(pairs) == ["q[default]"]
    assert [skipped.name for skipped in pairs.skipped] == ["base_model.model.q.lora_B.default.bias"]


def test_prompt_tuning_is_reported() -> None:
    tiny = pytest.importorskip("tiny_models")
    base = tiny.MODELS["llama"]()[0].unload()
    config = peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2)
    pairs = find_pairs(peft.get_peft_model(base, config))
    assert len(pairs) == 0 and [skipped.name for skipped in pairs.skipped] == ["prompt_encoder[default]"]


def test_factors_that_are_not_parameters() -> None:
    """What FSDP1 makes of them without `use_orig_params`."""
    model = lora(target_modules=["q"])
    layer = model.base_model.model.q.lora_A["default"]
    weight = layer.weight.detach()
    del layer.weight
    layer.weight = weight
    pairs = find_pairs(model)
    [reason] = reasons(pairs)
    assert len(pairs) == 0
    assert reason.startswith("its factors are not parameters. Most likely FSDP1 flattened")


def test_a_plain_model_has_nothing_to_report() -> None:
    pairs = find_pairs(Net())
    assert len(pairs) == 0 and pairs.skipped == ()


@pytest.mark.parametrize("wrong", [[1], "model", None, nn.Linear(2, 2).state_dict()], ids=type)
def test_anything_else_is_refused(wrong: Any) -> None:
    with pytest.raises(TypeError, match="Pass the model itself"):
        find_pairs(wrong)


# --- shared and wrapped modules ---------------------------------------------------------------------------------------


def test_a_module_used_twice_is_one_pair() -> None:
    model = lora(target_modules=["q"])
    model.base_model.model.again = model.base_model.model.q
    assert names(find_pairs(model)) == ["q[default]"]


def test_tied_factors() -> None:
    net = Net()
    net.k = nn.Linear(8, 8)
    model = lora(net)
    q, k = model.base_model.model.q, model.base_model.model.k
    k.lora_A["default"].weight = q.lora_A["default"].weight
    one = find_pairs(model)
    # With one factor shared, its gradient belongs to two products, and neither partner's Gram matrix is right.
    assert len(one) == 0 and reasons(one) == {"shares a factor with another pair"} and len(one.skipped) == 2

    k.lora_B["default"].weight = q.lora_B["default"].weight
    both = find_pairs(model)
    assert names(both) == ["q[default]"]
    assert reasons(both) == {"shares both factors with base_model.model.q[default]"}


def test_other_parameters_on_the_same_memory() -> None:
    """Each has a gradient of its own, so one of the two steps on that memory would be raw."""
    net = Net()
    net.k = nn.Linear(8, 8)
    model = lora(net)
    q, k = model.base_model.model.q, model.base_model.model.k
    for factors_q, factors_k in ((q.lora_A, k.lora_A), (q.lora_B, k.lora_B)):
        factors_k["default"].weight = nn.Parameter(factors_q["default"].weight.data)
    pairs = find_pairs(model)
    assert len(pairs) == 0 and len(pairs.skipped) == 2
    [reason] = reasons(pairs)
    assert reason.endswith("assign the very same Parameters to both layers")

    for factors_q, factors_k in ((q.lora_A, k.lora_A), (q.lora_B, k.lora_B)):
        factors_k["default"].weight = factors_q["default"].weight
    assert names(find_pairs(model)) == ["q[default]"]


def test_factors_tied_by_storage() -> None:
    """PEFT's `ensure_weight_tying` ties lm_head to the embedding so: new Parameters, one storage, roles swapped."""
    tiny = pytest.importorskip("tiny_models")
    base = tiny.hf.GemmaForCausalLM(tiny.hf.GemmaConfig(**tiny.DECODER))
    model = lora(base, target_modules=["embed_tokens", "lm_head", "q_proj"], ensure_weight_tying=True)
    pairs = find_pairs(model)
    assert len(pairs) == 2 and all("q_proj" in pair.name for pair in pairs)
    assert [s.name.split(".")[-1] for s in pairs.skipped] == ["embed_tokens[default]", "lm_head[default]"]
    assert reasons(pairs) == {"shares a factor with another pair"}


def test_wrappers_that_forward_attributes_are_not_counted() -> None:
    class Forwarding(nn.Module):
        """As FSDP1 and torch.compile do."""

        def __init__(self, wrapped: nn.Module) -> None:
            super().__init__()
            self.wrapped = wrapped

        def __getattr__(self, name: str) -> Any:
            try:
                return super().__getattr__(name)
            except AttributeError:
                return getattr(self.wrapped, name)

    model = lora(target_modules=["q"])
    model.base_model.model.q = Forwarding(model.base_model.model.q)
    pairs = find_pairs(model)
    assert names(pairs) == ["q.wrapped[default]"] and pairs.skipped == ()


# --- the list itself --------------------------------------------------------------------------------------------------


def test_the_list_prints_as_a_summary() -> None:
    model = lora(rank_pattern={"k": 4})
    model.add_adapter("other", peft.LoraConfig(r=3, target_modules=["q", "k"]))
    text = str(find_pairs(model))
    assert text == (
        "2 LoRA pairs, rank 2, 4, adapter default; skipped: 2 × both factors are frozen (base_model.model.q[other], …)"
    )
    assert repr(find_pairs(Net())) == "0 LoRA pairs"


def test_the_list_is_a_sequence() -> None:
    pairs = find_pairs(lora())
    assert isinstance(pairs[:1], PairList) and list(pairs[:1]) == [pairs[0]]
    assert pairs[-1] is pairs[1] and pairs[1] in pairs
    with pytest.raises(IndexError):
        pairs[2]


def test_finding_needs_no_data() -> None:
    """On the meta device nothing can be computed."""
    with torch.device("meta"):
        model = lora(nn.ModuleList(Net() for _ in range(100)))
    assert len(find_pairs(model)) == 200
