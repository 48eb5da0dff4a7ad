"""The examples of plain PyTorch, Lightning and LitGPT: they learn, resume exactly, and the correction acts."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch

import ema
import parameters_only
import plain_loop
from documented import blocks, execute
from loop import assert_corrected
from packages import package
from sdsopt import SDSAdamW
from toy import Network, assert_same


@pytest.mark.parametrize("correction", ["sds", "sds-split"])
def test_plain_loop(correction: str) -> None:
    loss, resumed = plain_loop.main(correction, steps=10)
    assert loss == resumed < 3.7  # from log(64) ≈ 4.2
    assert loss != plain_loop.main("lora", steps=10)[0]


def test_parameters_only() -> None:
    losses = parameters_only.main()
    assert losses[-1] < 0.8 * losses[0]
    plain = {"optimizer": "torch.optim.AdamW", "arguments": {"lr": 1e-2}}
    assert losses[-1] != parameters_only.main(plain)[-1]


def test_ema() -> None:
    last, average = ema.main()
    assert last != average
    assert max(last, average) < 3.5
    assert ema.main("lora") != (last, average)


@pytest.mark.filterwarnings("ignore:.*does not have many workers", "ignore:.*treespec, LeafSpec")
@pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty")
def test_lightning_module(tmp_path: Path) -> None:
    package("lightning.pytorch")
    import lightning_module

    whole, resumed, hooked = lightning_module.main()
    assert_same(whole, resumed)
    plain = lightning_module.build(None)
    lightning_module.fit(plain, str(tmp_path))
    for module in (whole, hooked):
        assert_corrected(module, plain)


def tiny_checkpoint(folder: Path) -> Path:
    """What `litgpt download` leaves behind, made here."""
    tokenizers, yaml, model = package("tokenizers"), package("yaml"), package("litgpt.model")
    words = ["<unk>", "<s>", "</s>", "one", "two", "three", "four", "five"]
    vocabulary = {word: index for index, word in enumerate(words)}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    tokenizer.save(str(folder / "tokenizer.json"))
    special = {"bos_token": "<s>", "eos_token": "</s>", "tokenizer_class": "Tokenizer"}
    (folder / "tokenizer_config.json").write_text(json.dumps(special))
    config = model.Config(
        name="tiny", n_layer=1, n_head=4, n_embd=16, n_query_groups=2, block_size=64, vocab_size=8, padded_vocab_size=8
    )
    (folder / "model_config.yaml").write_text(yaml.safe_dump(dataclasses.asdict(config)))
    torch.manual_seed(0)
    torch.save(model.GPT(config).state_dict(), folder / "lit_model.pth")
    return folder


@pytest.mark.filterwarnings("ignore:.*treespec, LeafSpec", "ignore:.*weights_only=False.*")
def test_litgpt_lora(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """LitGPT's own fine-tuning command on a tiny checkpoint, from its optimizer's class path."""
    finetune, args = package("litgpt.finetune.lora"), package("litgpt.args")
    import litgpt_lora

    checkpoint = tiny_checkpoint(tmp_path)
    rows = [{"instruction": "one two three", "output": "four five"}] * 40
    (tmp_path / "data.json").write_text(json.dumps(rows))
    # What follows training: a record of the command line (which needs jsonargparse), and merging.
    monkeypatch.setattr(finetune, "save_hyperparameters", lambda *_: None)
    monkeypatch.setattr(finetune, "merge_lora", lambda **_: None)
    monkeypatch.setattr(finetune, "mark_only_lora_as_trainable", finetune.mark_only_lora_as_trainable)
    litgpt_lora.link_models()

    def train(optimizer: str, **options: Any) -> dict[str, torch.Tensor]:
        data = package("litgpt.data").JSON(tmp_path / "data.json", val_split_fraction=0.1, num_workers=0)
        batches = {"global_batch_size": 4, "micro_batch_size": 2, "lr_warmup_steps": 2, "epochs": 1}
        finetune.setup(
            checkpoint,
            tmp_path / optimizer,
            precision="32-true",
            lora_dropout=0.0,
            data=data,
            train=args.TrainArgs(save_interval=1000, log_interval=1000, max_seq_length=32, **batches),
            eval=args.EvalArgs(interval=1000, max_new_tokens=2, max_iters=1),
            optimizer={"class_path": optimizer, "init_args": {"lr": 0.01, "weight_decay": 0.0, **options}},
        )
        return torch.load(tmp_path / optimizer / "final" / "lit_model.pth.lora", weights_only=True)["model"]

    corrected, plain = train("sdsopt.SDSAdamW"), train("torch.optim.AdamW")
    same = train("sdsopt.SDSAdamW", correction="lora")
    assert len(corrected) == 2
    for name, factor in corrected.items():
        assert not torch.allclose(factor, plain[name], rtol=1e-3)
        assert torch.equal(same[name], plain[name])


PAGE = "docs/use-with/pytorch.md"


@pytest.mark.filterwarnings("ignore:.*torch.jit.*:DeprecationWarning")
def test_the_pages_compiled_step() -> None:
    [code] = blocks(PAGE, "## torch.compile")
    assert len(execute(code, PAGE, model=Network())["optimizer"].pairs) == 2


def test_the_pages_torchtune_builder() -> None:
    package("torchtune.models.llama3_2")
    [code] = blocks(PAGE, "### torchtune")
    names = execute(code.replace("lora_llama3_2_1b", "lora_llama3_2"), PAGE)
    shape = {"vocab_size": 8, "num_layers": 1, "num_heads": 2, "num_kv_heads": 1, "embed_dim": 8, "max_seq_len": 8}
    model = names["linked_lora"](lora_attn_modules=["q_proj"], lora_rank=2, lora_alpha=4, intermediate_dim=8, **shape)
    assert len(SDSAdamW(model.parameters()).pairs) == 1
