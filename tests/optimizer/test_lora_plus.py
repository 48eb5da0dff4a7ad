"""LoRA+ groups against PEFT's, and in training."""

from __future__ import annotations

import peft
import pytest
import torch
import transformers
from peft.optimizers import create_loraplus_optimizer
from torch import nn
from torch.optim import SGD, AdamW

from sdsopt import SDSPreconditioner, lora_plus_groups
from sdsopt.errors import NoPairsError
from tiny_models import MODELS
from toy import Network, train


def bert_with_everything_trainable() -> peft.PeftModel:
    """Adapters also on an embedding, a head, LayerNorms, biases and DoRA's magnitudes."""
    config = transformers.BertConfig(
        vocab_size=32, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=24, num_labels=3
    )
    lora = peft.LoraConfig(
        r=2,
        target_modules=["query", "dense", "word_embeddings"],
        modules_to_save=["classifier", "LayerNorm"],
        use_dora=True,
        bias="all",
        init_lora_weights=False,
    )
    return peft.get_peft_model(transformers.BertForSequenceClassification(config), lora)  # pyright: ignore


MODELS_TO_GROUP = {
    "everything": bert_with_everything_trainable,
    **{name: lambda name=name: MODELS[name]()[0] for name in ("llama", "gemma", "bert")},
}


def settings(groups: list[dict[str, object]]) -> dict[int, tuple[object, object]]:
    members = [(id(p), (group["lr"], group["weight_decay"])) for group in groups for p in group["params"]]  # pyright: ignore
    assert len(dict(members)) == len(members)
    return dict(members)


@pytest.mark.parametrize("name", MODELS_TO_GROUP)
def test_the_groups_are_pefts(name: str) -> None:
    model = MODELS_TO_GROUP[name]()
    theirs = create_loraplus_optimizer(model, SGD, lr=1e-3, loraplus_lr_ratio=16.0, loraplus_weight_decay=0.1)
    groups = lora_plus_groups(model, lr=1e-3, weight_decay=0.1)
    assert settings(groups) == settings(theirs.param_groups)
    assert all(group["params"] for group in groups)
    assert {0.016, 1e-3} <= {group["lr"] for group in groups}


def test_pairs_of_other_layouts_are_grouped_too() -> None:
    """By what they are, not by PEFT's names."""

    class Layer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.lora_down, self.lora_up = nn.Linear(6, 2, bias=False), nn.Linear(2, 5, bias=False)
            self.scale = self.multiplier = 1.0
            self.register_buffer("alpha", torch.tensor(2.0))

    layer = Layer()
    rates = {id(p): group["lr"] for group in lora_plus_groups(layer, 0.1, 4.0) for p in group["params"]}
    assert rates == {id(layer.lora_down.weight): 0.1, id(layer.lora_up.weight): pytest.approx(0.4)}


def test_the_rates_act_bare_and_wrapped() -> None:
    steps: list[float] = []
    for ratio in (1.0, 16.0):
        model = Network(dtype=torch.float64)
        before = model.first.A.detach().clone(), model.first.B.detach().clone()
        inner = AdamW(lora_plus_groups(model, lr=1e-4, ratio=ratio))
        train(model, SDSPreconditioner(inner, model, "sds"), steps=1)
        steps.append(((model.first.B - before[1]).norm() / (model.first.A - before[0]).norm()).item())
    assert steps[1] == pytest.approx(16 * steps[0], rel=1e-3)


def test_bad_input() -> None:
    with pytest.raises(NoPairsError):
        lora_plus_groups(nn.Linear(2, 2), lr=1e-3)
    for arguments, message in (({"lr": 0.0}, "lr must"), ({"lr": 1.0, "ratio": -1.0}, "ratio must")):
        with pytest.raises(ValueError, match=message):
            lora_plus_groups(Network(), **arguments)
