"""A model and data on disk, through the command line: tiny, random, and made here."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import nn

from sdsopt import find_pairs
from sdsopt.cli import main
from sdsopt.compare import CausalLMTask, ClassificationTask
from sdsopt.compare.tasks.prepared import in_memory, prepared
from tiny_models import DECODER, HIDDEN

WORDS = ["red", "green", "blue", "one", "two", "three", "is", "and"]
COLOURS, NUMBERS = WORDS[:3], WORDS[3:6]
SMALL = ["--length", "8", "--batch-size", "4", "--steps", "6", "--seeds", "1", "--ranks", "2", "--lrs", "0.02"]
SWEEP = [*SMALL, "--inner", "adamw", "--corrections", "lora,sds", "--jobs", "1"]


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    yield
    in_memory.cache_clear()


def save_tokenizer(folder: Path, words: list[str] = WORDS) -> None:
    special = {"<pad>": 0, "<bos>": 1, "<eos>": 2, "<unk>": 3}
    vocabulary = special | {word: len(special) + i for i, word in enumerate(words)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()  # pyright: ignore
    fast = hf.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<bos>", eos_token="<eos>", unk_token="<unk>"
    )
    fast.save_pretrained(str(folder))


def save_model(folder: Path, kind: str) -> Path:
    """With dropout, which must not act; "body" has no head, as pretrained models that shall classify."""
    bert: dict[str, Any] = {
        "vocab_size": 64,
        "hidden_size": HIDDEN,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "intermediate_size": 24,
        "max_position_embeddings": 32,
    }
    distilbert = {"vocab_size": 64, "dim": HIDDEN, "n_layers": 1, "n_heads": 2, "hidden_dim": 24}
    gpt2 = {"vocab_size": 64, "n_positions": 32, "n_embd": HIDDEN, "n_layer": 1, "n_head": 2, "eos_token_id": 2}
    made: dict[str, Any] = {
        "llama": lambda: hf.LlamaForCausalLM(hf.LlamaConfig(**DECODER, attention_dropout=0.5)),
        "gpt2": lambda: hf.GPT2LMHeadModel(hf.GPT2Config(**gpt2, bos_token_id=1)),
        "bert": lambda: hf.BertModel(hf.BertConfig(**bert, hidden_dropout_prob=0.5)),
        "distilbert": lambda: hf.DistilBertModel(hf.DistilBertConfig(**distilbert)),
    }
    with torch.random.fork_rng():
        torch.manual_seed(0)
        made[kind]().save_pretrained(folder)
    save_tokenizer(folder)
    return folder


def rows(count: int = 40) -> list[dict[str, Any]]:
    """Sentences of colours and of numbers; first all of one kind, as files often are."""
    kinds = [(COLOURS, "colour")] * (count // 2) + [(NUMBERS, "number")] * (count // 2)
    return [
        {"text": f"{words[i % 3]} and {words[(i + 1) % 3]} is {words[(i // 3) % 3]}", "label": label, "id": i}
        for i, (words, label) in enumerate(kinds)
    ]


def save_lines(path: Path, lines: list[dict[str, Any]] | None = None) -> Path:
    path.write_text("\n".join(map(json.dumps, rows() if lines is None else lines)))
    return path


def save_text(path: Path) -> Path:
    path.write_text(" ".join(row["text"] for row in rows()))
    return path


def save_folder(path: Path, splits: bool = False) -> Path:
    datasets = pytest.importorskip("datasets", exc_type=ImportError)
    dataset = datasets.Dataset.from_list(rows())
    if splits:
        dataset = datasets.DatasetDict(train=dataset, test=datasets.Dataset.from_list(rows(8)))
    dataset.save_to_disk(str(path))
    return path


def results(capsys: pytest.CaptureFixture[str], *arguments: str) -> dict[str, Any]:
    capsys.readouterr()  # what saving had to say
    code = main(["compare", "--task", "hf", *SWEEP, *arguments, "--json", "--quiet"])
    out, err = capsys.readouterr()
    assert (code, err) == (0, "")
    return {row["method"]: row for row in json.loads(out)["methods"]}


LM_DATA = {"text": save_text, "lines": save_lines, "folder": save_folder}
NAMES = {"text": "data.txt", "lines": "data.jsonl", "folder": "data"}


@pytest.mark.parametrize(
    ("kind", "data"), [("llama", "text"), ("llama", "lines"), ("llama", "folder"), ("gpt2", "text")]
)
def test_a_language_model(kind: str, data: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model, path = save_model(tmp_path / kind, kind), LM_DATA[data](tmp_path / NAMES[data])
    found = results(capsys, "--model", str(model), "--data", str(path), "--out", str(tmp_path / "out"))
    assert list(found) == ["full", "lora", "sds"]
    runs = {r["method"]: r for r in map(json.loads, (tmp_path / "out" / "runs.jsonl").read_text().splitlines())}
    assert len({run["losses"][0] for run in runs.values()}) == 1  # no dropout, and adapters start at the model
    assert all(run["losses"][-1] < run["losses"][0] for run in runs.values())
    assert runs["sds"]["losses"] != runs["lora"]["losses"]
    assert all(0 <= run["accuracy"] <= 1 for run in runs.values())


@pytest.mark.parametrize(("kind", "data"), [("bert", "lines"), ("distilbert", "folder"), ("llama", "lines")])
def test_a_classifier(kind: str, data: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model, path = save_model(tmp_path / kind, kind), LM_DATA[data](tmp_path / NAMES[data])
    arguments = ["--model", str(model), "--data", str(path), "--label", "label", "--out", str(tmp_path / "out")]
    found = results(capsys, *arguments, "--steps", "30")
    assert list(found) == ["full", "lora", "sds"]
    lines = (tmp_path / "out" / "runs.jsonl").read_text().splitlines()
    runs = {r["method"]: r for r in map(json.loads, lines)}
    assert len({run["losses"][0] for run in runs.values()}) == 1  # the head is drawn by the seed, the same for all
    assert runs["sds"]["losses"] != runs["lora"]["losses"]
    # Words alone tell the classes apart. A split that were not shuffled would hold out one class.
    assert runs["sds"]["accuracy"] > 0.9

    assert list(results(capsys, *arguments, "--steps", "30")) == ["full", "lora", "sds"]
    assert (tmp_path / "out" / "runs.jsonl").read_text().splitlines() == lines  # all were found on disk


def test_what_is_trained(tmp_path: Path) -> None:
    """All linear layers but the output, in adapters and in full; and a head beside them, the same for every method."""
    lm = CausalLMTask(str(save_model(tmp_path / "llama", "llama")), str(save_text(tmp_path / "d.txt")), length=8)
    paired = {p.name.removeprefix("base_model.model.").removesuffix("[default]") for p in find_pairs(lm.build_model(2))}
    full = {name for name, p in lm.build_model(None).named_parameters() if p.requires_grad}
    assert full == {f"{name}.weight" for name in paired}
    assert len(paired) == 2 * 7 and not any("lm_head" in name for name in paired)
    some = CausalLMTask(lm.model, lm.data, length=8, target_modules=("q_proj", "v_proj"))
    assert len(find_pairs(some.build_model(2))) == 4

    folder = save_model(tmp_path / "distilbert", "distilbert")
    classes = ClassificationTask(str(folder), str(save_lines(tmp_path / "d.jsonl")), length=8)
    heads: list[list[torch.Tensor]] = []
    for rank in (2, None):
        torch.manual_seed(5)
        model = classes.build_model(rank)
        heads.append([p for p in classes.shared_parameters(model) if p.requires_grad])
        assert not any(m.p for m in model.modules() if isinstance(m, nn.Dropout))
        trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
        assert trained > sum(p.numel() for p in heads[-1]) > 0
    assert len(heads[0]) == 4  # pre_classifier and classifier
    assert all(torch.equal(p, q) for p, q in zip(*heads, strict=True))


def test_seeds_order_the_batches_and_splits_stay(tmp_path: Path) -> None:
    folder, data = str(save_model(tmp_path / "bert", "bert")), str(save_lines(tmp_path / "data.jsonl"))
    task = ClassificationTask(folder, data, length=8, batch_size=4, held_out=0.25)
    first, same, other = (next(task.batches(seed)) for seed in (0, 0, 1))
    assert torch.equal(first.tokens, same.tokens) and not torch.equal(first.tokens, other.tokens)
    tensors = prepared(task)
    assert len(tensors["train_labels"]) == 30 and len(tensors["held_out_labels"]) == 10
    assert 0 < tensors["held_out_labels"].sum() < 10
    again = task.make_tensors()
    assert all(torch.equal(tensor, again[name]) for name, tensor in tensors.items())


def test_a_split_of_the_datas_own_is_held_out(tmp_path: Path) -> None:
    folder, data = str(save_model(tmp_path / "bert", "bert")), str(save_folder(tmp_path / "data", splits=True))
    tensors = ClassificationTask(folder, data, length=8).make_tensors()
    assert len(tensors["train_labels"]) == 40 and len(tensors["held_out_labels"]) == 8
    streams = CausalLMTask(folder, data, length=8).make_tensors()
    assert [len(streams[name]) for name in ("train_tokens", "held_out_tokens")] == [40 * 6, 8 * 6]


def test_results_belong_to_contents_not_to_places(tmp_path: Path) -> None:
    here = CausalLMTask(str(save_model(tmp_path / "a", "llama")), str(save_text(tmp_path / "a.txt")))
    there = CausalLMTask(str(save_model(tmp_path / "b", "llama")), str(save_text(tmp_path / "b.txt")), device="meta")
    assert here.fingerprint == there.fingerprint
    assert CausalLMTask(here.model, here.data, length=9).fingerprint != here.fingerprint
    before = here.fingerprint
    Path(here.data).write_text("red and green")
    assert here.fingerprint != before
    Path(here.data).write_text("red and green is blue " * 60)
    before_edit = prepared(here)["train_tokens"]
    Path(here.data).write_text("one and two is three " * 60)
    assert not torch.equal(prepared(here)["train_tokens"], before_edit)  # also in the process that read the old ones


def fails(capsys: pytest.CaptureFixture[str], tmp_path: Path, *arguments: str, code: int = 1) -> str:
    assert main(["compare", "--task", "hf", *SWEEP, "--quiet", "--out", str(tmp_path / "out"), *arguments]) == code
    assert not (tmp_path / "out" / "runs.jsonl").exists()
    return capsys.readouterr().err


def test_what_can_be_wrong_with_the_data(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = ["--model", str(save_model(tmp_path / "bert", "bert")), "--data"]
    lines = str(save_lines(tmp_path / "data.jsonl"))

    def says(*arguments: str) -> str:
        return fails(capsys, tmp_path, *model, *arguments)

    assert "there is no" in says(str(tmp_path / "nothing.jsonl"))
    assert "line 1" in (found := says(lines, "--text", "sentence"))
    assert "has no column 'sentence'; it has 'text', 'label', 'id'" in found and "--text" in found
    assert "has no column 'class'; it has" in says(lines, "--label", "class")
    folder = str(save_folder(tmp_path / "folder"))
    assert "has no column 'class'; it has 'text', 'label', 'id'" in says(folder, "--label", "class")
    (tmp_path / "empty.jsonl").write_text("\n")
    assert "empty.jsonl is empty" in says(str(tmp_path / "empty.jsonl"))
    (tmp_path / "empty.txt").write_text("")
    assert "empty.txt is empty" in says(str(tmp_path / "empty.txt"))
    (tmp_path / "short.txt").write_text("red and green")
    assert "too few for sequences of 8; give more text, or lower --length" in says(str(tmp_path / "short.txt"))
    assert "which has no labels; give JSON lines" in says(str(tmp_path / "short.txt"), "--label", "label")
    (tmp_path / "broken.jsonl").write_text('{"text": "red"}\n{"text": ')
    assert "line 2" in (found := says(str(tmp_path / "broken.jsonl"))) and "one object a line" in found
    (tmp_path / "list.jsonl").write_text("[1]")
    assert "is no JSON object" in says(str(tmp_path / "list.jsonl"))
    (tmp_path / "binary.txt").write_bytes(b"\xff\xfe\x00")
    assert "is no text in UTF-8" in says(str(tmp_path / "binary.txt"))
    assert "cannot be read as a dataset" in says(str(tmp_path / "bert"))
    odd = save_lines(tmp_path / "odd.jsonl", [{"text": 3, "label": 0}])
    assert "has 3 in the column 'text', where a text should be" in says(str(odd))
    odd = save_lines(tmp_path / "odd.jsonl", [{"text": "red", "label": None}])
    assert "has the label None" in says(str(odd), "--label", "label")
    one = save_lines(tmp_path / "one.jsonl", [{"text": "red", "label": 0}] * 30)
    assert "has 1 classes" in says(str(one), "--label", "label")
    few = save_lines(tmp_path / "few.jsonl", [{"text": "red", "label": i % 2} for i in range(4)])
    assert "fewer rows to train on than a batch has (4)" in says(str(few), "--label", "label")


def test_what_can_be_wrong_with_the_model(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = ["--data", str(save_text(tmp_path / "data.txt")), "--model"]

    def says(*arguments: str) -> str:
        return fails(capsys, tmp_path, *data, *arguments)

    assert "Download a model first" in says(str(tmp_path / "nothing"))
    (tmp_path / "empty").mkdir()
    assert "cannot load the tokenizer" in says(str(tmp_path / "empty"))
    save_tokenizer(tmp_path / "empty")
    assert "cannot load the model" in (found := says(str(tmp_path / "empty"))) and "save_pretrained" in found
    vit = hf.ViTConfig(hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8, image_size=8)
    hf.ViTModel(vit).save_pretrained(tmp_path / "empty")
    assert "cannot load the model" in (found := says(str(tmp_path / "empty"))) and "--task package.module:Task" in found
    llama = str(save_model(tmp_path / "llama", "llama"))
    assert "no linear layer to adapt called key" in (found := says(llama, "--target-modules", "key"))
    assert "down_proj, gate_proj, k_proj" in found and "lm_head" not in found
    assert "sequences of 40 tokens exceed the model's 32 positions; lower --length" in says(llama, "--length", "40")
    save_tokenizer(tmp_path / "llama", [f"word{i}" for i in range(80)])
    (tmp_path / "data.txt").write_text(" ".join(f"word{i}" for i in range(80)))
    assert "is another model's: it gives the token" in says(llama)


def test_mistakes_in_the_arguments(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "--task hf needs --model and --data" in fails(capsys, tmp_path, code=2)
    assert "--task hf needs --data" in fails(capsys, tmp_path, "--model", "x", code=2)
    places = ("--model", "x", "--data", "y")
    assert "length must be at least 2" in fails(capsys, tmp_path, *places, "--length", "1", code=2)
    assert "batch_size must be at least 1" in fails(capsys, tmp_path, *places, "--batch-size", "0", code=2)
    assert main(["compare", "--task", "digits", "--target-modules", "q_proj"]) == 2
    assert "--target-modules belongs to --task hf, not digits" in capsys.readouterr().err
    with pytest.raises(ValueError, match="held_out must be a share"):
        CausalLMTask("x", "y", held_out=1.0)


def test_a_missing_package_is_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    model, folder = save_model(tmp_path / "llama", "llama"), save_folder(tmp_path / "data")
    monkeypatch.setitem(__import__("sys").modules, "datasets", None)
    assert "pip install 'sdsopt[hf]'" in fails(capsys, tmp_path, "--model", str(model), "--data", str(folder))
