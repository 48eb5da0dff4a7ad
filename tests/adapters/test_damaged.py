"""Damaged and hostile files: a clear error that names the file and the way out, no traceback, nothing written."""

from __future__ import annotations

import json
import math
import os
import pickle
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from adapter_files import CONFIG, NAME, kohya_tensors, pair, peft_tensors, raw_safetensors, write_folder, write_shards
from sdsopt.cli import main

Breaks = Callable[[Path], object]

FACTORS = ("q.lora_A.weight", "q.lora_B.weight")
Q = FACTORS[0]


def entry(shape: list[int], begin: int, end: int, dtype: str = "F32") -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


def file_of(content: bytes) -> Breaks:
    return lambda folder: (folder / NAME).write_bytes(content)


def tensors_of(**changed: torch.Tensor | None) -> Breaks:
    """One pair q, with its factors and others replaced; None removes one."""

    def write(folder: Path) -> None:
        A, B = pair()
        tensors = {"q.lora_A.weight": A, "q.lora_B.weight": B}
        tensors |= {name.replace("__", "."): tensor for name, tensor in changed.items() if tensor is not None}
        for name in (name for name, tensor in changed.items() if tensor is None):
            del tensors[name.replace("__", ".")]
        save_file(tensors, folder / NAME)

    return write


def config_of(content: object) -> Breaks:
    text = content if isinstance(content, bytes) else json.dumps(content).encode()
    return lambda folder: (folder / "adapter_config.json").write_bytes(text)


def config_with(**options: Any) -> Breaks:
    return config_of({**CONFIG, **options})


def index_of(content: object) -> Breaks:
    def write(folder: Path) -> None:
        write_shards(folder)
        text = content if isinstance(content, bytes) else json.dumps(content).encode()
        (folder / f"{NAME}.index.json").write_bytes(text)

    return write


def index_naming(file: str) -> Breaks:
    return index_of({"weight_map": {Q: file}})


def linked(name: str) -> Breaks:
    def write(folder: Path) -> None:
        outside = folder.parent / "outside"
        (folder / name).rename(outside)
        (folder / name).symlink_to(outside)

    return write


def instead(name: str, make: Callable[[Path], object]) -> Breaks:
    def write(folder: Path) -> None:
        (folder / name).unlink()
        make(folder / name)

    return write


VALID = raw_safetensors({Q: entry([2, 2], 0, 16)}, bytes(16))


class RunsCode:
    def __reduce__(self) -> tuple[Any, ...]:
        return (os.mkdir, ("executed",))


# What is wrong with a valid adapter's folder, and what the error must say.
DAMAGE: dict[str, tuple[Breaks, str]] = {
    "empty file": (file_of(b""), "no valid safetensors file"),
    "seven bytes": (file_of(b"1234567"), "no valid safetensors file"),
    "text": (file_of(b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 1\n"), "no valid safetensors"),
    "truncated": (file_of(VALID[:-3]), "no valid safetensors file"),
    "with more at the end": (file_of(VALID + b"x"), "no valid safetensors file"),
    "header longer than the file": (file_of(raw_safetensors({}, length=10_000)), "no valid safetensors file"),
    "header of an exabyte": (file_of(raw_safetensors({}, length=2**60)), "no valid safetensors file"),
    "header with a negative length": (file_of(b"\xff" * 8 + b"{}"), "no valid safetensors file"),
    "header not JSON": (file_of(raw_safetensors(b"{")), "no valid safetensors file"),
    "header not UTF-8": (file_of(raw_safetensors(b'{"\xff": 1}')), "no valid safetensors file"),
    "header a list": (file_of(raw_safetensors([])), "no valid safetensors file"),
    "header too deep": (
        file_of(raw_safetensors(b'{"a":' * 50_000 + b"1" + b"}" * 50_000)),
        "no valid safetensors file",
    ),
    "a tensor twice": (
        file_of(raw_safetensors(b'{"q": %b, "q": %b}' % ((json.dumps(entry([1], 0, 4)).encode(),) * 2), bytes(4))),
        "'q' occurs twice",
    ),
    "overlapping tensors": (
        file_of(raw_safetensors({"a": entry([2, 2], 0, 16), "b": entry([2, 2], 8, 24)}, bytes(24))),
        "no valid safetensors file",
    ),
    "a gap between tensors": (
        file_of(raw_safetensors({"a": entry([2, 2], 0, 16), "b": entry([2, 2], 20, 36)}, bytes(36))),
        "no valid safetensors file",
    ),
    "offsets beyond the end": (file_of(raw_safetensors({Q: entry([2, 2], 16, 32)}, bytes(16))), "no valid safetensors"),
    "offsets backwards": (file_of(raw_safetensors({Q: entry([2, 2], 16, 0)}, bytes(16))), "no valid safetensors file"),
    "shape and offsets disagree": (
        file_of(raw_safetensors({Q: entry([3, 2], 0, 16)}, bytes(16))),
        "no valid safetensors",
    ),
    "a shape of 2^80 elements": (
        file_of(raw_safetensors({Q: entry([2**40, 2**40], 0, 16)}, bytes(16))),
        "no valid safetensors file",
    ),
    "a negative shape": (file_of(raw_safetensors({Q: entry([-1, 4], 0, 16)}, bytes(16))), "no valid safetensors file"),
    "an unknown dtype": (file_of(raw_safetensors({Q: entry([2, 2], 0, 16, "F33")}, bytes(16))), "no valid safetensors"),
    "no tensors": (file_of(raw_safetensors({})), "0 tensors, none of which is a LoRA factor"),
    "no factors": (
        tensors_of(q__lora_A__weight=None, q__lora_B__weight=None, x=torch.ones(2)),
        "1 tensors, none of which",
    ),
    "a folder for the file": (instead(NAME, Path.mkdir), f"has no regular file '{NAME}'"),
    "a pipe for the file": (instead(NAME, os.mkfifo), f"has no regular file '{NAME}'"),
    "B missing": (tensors_of(q__lora_B__weight=None), "'q.lora_A.weight' without its partner 'q.lora_B.weight'"),
    "A missing": (tensors_of(q__lora_A__weight=None), "'q.lora_B.weight' without its partner 'q.lora_A.weight'"),
    "ranks differ": (
        tensors_of(q__lora_B__weight=torch.ones(12, 3)),
        "do not fit together: A is [4, 10] and B is [12, 3]",
    ),
    "of another rank than configured": (config_with(r=3), "have rank 4 and the configuration says 3"),
    "a vector for a factor": (tensors_of(q__lora_A__weight=torch.ones(4)), "is no factor: its shape is [4]"),
    "an empty factor": (tensors_of(q__lora_A__weight=torch.ones(0, 4)), "is no factor: its shape is [0, 4]"),
    "integers": (tensors_of(q__lora_A__weight=torch.ones(4, 10, dtype=torch.int32)), "is not in float16, bfloat16"),
    "float8": (tensors_of(q__lora_A__weight=torch.ones(4, 10).to(torch.float8_e5m2)), "is not in float16, bfloat16"),
    "no configuration": (lambda folder: (folder / "adapter_config.json").unlink(), "has no adapter_config.json"),
    "configuration empty": (config_of(b""), "adapter_config.json is not valid JSON"),
    "configuration truncated": (config_of(b'{"r": 4, "lora'), "adapter_config.json is not valid JSON"),
    "configuration a list": (config_of([1]), "holds a JSON list and no object"),
    "configuration not UTF-8": (config_of(b'{"r": "\xff\xfe"}'), "adapter_config.json is not UTF-8"),
    "configuration in UTF-16": (config_of('{"r": 4}'.encode("utf-16")), "adapter_config.json is not UTF-8"),
    "configuration too deep": (config_of(b"[" * 100_000), "nested too deeply"),
    "a number of 10,000 digits": (config_of(b'{"r": ' + b"9" * 10_000 + b"}"), "adapter_config.json is not valid JSON"),
    "an option twice": (config_of(b'{"r": 4, "r": 8}'), "the key 'r' occurs twice"),
    "r a text": (config_with(r="4"), "r must be a positive whole number, and is '4'"),
    "r negative": (config_with(r=-4), "r must be a positive whole number"),
    "r true": (config_with(r=True), "r must be a positive whole number"),
    "r a fraction": (config_with(r=4.0), "r must be a positive whole number"),
    "alpha a list": (config_with(lora_alpha=[8]), "lora_alpha must be a finite number"),
    "alpha NaN": (config_with(lora_alpha=math.nan), "lora_alpha must be a finite number"),
    "alpha infinite": (config_of(b'{"peft_type": "LORA", "r": 4, "lora_alpha": 1e999}'), "lora_alpha must be a finite"),
    "rslora a number": (config_with(use_rslora=1), "use_rslora must be true or false"),
    "peft_type a number": (config_with(peft_type=3), "peft_type must be a text"),
    "rank_pattern a list": (config_with(rank_pattern=[1]), "rank_pattern must be an object"),
    "rank_pattern of texts": (config_with(rank_pattern={"q": "4"}), "rank_pattern must be a positive whole number"),
    "rank_pattern no expression": (config_with(rank_pattern={"(": 4}), "rank_pattern holds '(', no regular expression"),
    "alpha_pattern of nulls": (config_with(alpha_pattern={"q": None}), "alpha_pattern must be a finite number"),
    "target_parameters a text": (config_with(target_parameters="q"), "target_parameters must be a list of texts"),
    "configuration a link outwards": (linked("adapter_config.json"), "a link that leads out of its folder"),
    "file a link outwards": (linked(NAME), "a link that leads out of its folder"),
    "file a link to itself": (instead(NAME, lambda path: path.symlink_to(path)), "holds no adapter"),
    "index not JSON": (index_of(b"{"), "index.json is not valid JSON"),
    "index without a map": (index_of({"metadata": {}}), "weight_map must be an object from tensors to file names"),
    "index of numbers": (index_of({"weight_map": {Q: 3}}), "weight_map must be an object from tensors to file names"),
    "index empty": (index_of({"weight_map": {}}), "weight_map must be an object from tensors to file names"),
    "index with a tensor twice": (index_of(b'{"weight_map": {"a": "b", "a": "c"}}'), "the key 'a' occurs twice"),
    "index leading up": (index_naming("../../../etc/passwd"), "is no plain file name; it is not to be trusted"),
    "index with an absolute path": (index_naming("/etc/passwd"), "is no plain file name; it is not to be trusted"),
    "index with a Windows path": (index_naming("..\\secret"), "is no plain file name; it is not to be trusted"),
    "index naming the parent": (index_naming(".."), "is no plain file name"),
    "index naming the folder": (index_naming("."), "is no plain file name"),
    "index naming nothing": (index_naming(""), "is no plain file name"),
    "index with a zero byte": (index_naming("a\0b"), "has no regular file"),
    "index with a long name": (index_naming("a" * 5000), "has no regular file"),
    "index naming a missing file": (index_naming("adapter_model-3.safetensors"), "has no regular file"),
    "index naming a device": (index_naming("pipe"), "has no regular file 'pipe'"),
    "index naming the configuration": (index_naming("adapter_config.json"), "no valid safetensors file"),
    "index not listing all": (
        index_of({"weight_map": dict.fromkeys(list(peft_tensors())[:1], "adapter_model-00001-of-00002.safetensors")}),
        "without its partner",
    ),
    "index listing others": (index_naming("adapter_model-00001-of-00002.safetensors"), "does not list the tensors"),
    "AdaLoRA's diagonal too short": (
        lambda folder: write_folder(
            folder,
            {"q.lora_A": torch.ones(4, 6), "q.lora_B": torch.ones(5, 4), "q.lora_E": torch.ones(3, 1)},
            {"peft_type": "ADALORA"},
        ),
        "has not one number for each row of A",
    ),
    "a pickle": (
        lambda folder: [(folder / NAME).unlink(), torch.save({}, folder / "adapter_model.bin")],
        "is a pickle",
    ),
}


def refused(capsys: pytest.CaptureFixture[str], path: Path, message: str, *options: str) -> None:
    """Both commands end with exit code 1, one line on stderr that names the file, and nothing written."""
    parent = path.parent
    (parent / "pipe").exists() or os.mkfifo(parent / "pipe")
    before = sorted(parent.rglob("*"))
    for command in (["inspect", str(path)], ["rebalance", str(path), str(parent / "new")]):
        assert main([*command, *options]) == 1
        out, err = capsys.readouterr()
        assert out == ""
        assert err.startswith("sdsopt: error: ") and message in err, err
        assert str(parent) in err and len(err) < 1000
        assert err.isprintable() or err[:-1].isprintable()
    assert sorted(parent.rglob("*")) == before


@pytest.mark.parametrize("name", DAMAGE)
def test_damaged_folders(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    damage, message = DAMAGE[name]
    folder = write_folder(tmp_path / "adapter", {"q.lora_A.weight": pair()[0], "q.lora_B.weight": pair()[1]})
    assert main(["inspect", "-q", str(folder)]) == 0  # before
    capsys.readouterr()
    damage(folder)
    refused(capsys, folder, message)


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ({"lora_unet_conv_in.alpha": torch.ones(3)}, "'lora_unet_conv_in.alpha' is not a single number"),
        ({"lora_unet_conv_in.alpha": torch.tensor(math.nan)}, "'lora_unet_conv_in.alpha' is nan"),
        ({"lora_unet_conv_in.alpha": torch.tensor(2 + 1j)}, "'lora_unet_conv_in.alpha' is nan"),
        ({"lora_unet_conv_in.lora_up.weight": torch.ones(6, 2, 1, 1)}, "do not fit together"),
        ({"lora_unet_conv_in.lora_up.weight": torch.ones(6, 2, 3, 3)}, None),
    ],
)
def test_damaged_kohya_files(
    tensors: dict[str, torch.Tensor], message: str | None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    save_file({**kohya_tensors(), **tensors}, tmp_path / "lora.safetensors")
    if message is not None:
        refused(capsys, tmp_path / "lora.safetensors", message)
    else:
        assert main(["inspect", str(tmp_path / "lora.safetensors")]) == 0
        assert "B has a kernel of its own" in capsys.readouterr().out


@pytest.mark.parametrize("text", ["[1]", "{", '{"unet.r": "x"}', "\ud800"])
def test_damaged_metadata_of_diffusers(text: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    if text.isprintable():
        save_file(peft_tensors(), tmp_path / "lora.safetensors", metadata={"lora_adapter_metadata": text})
        refused(capsys, tmp_path / "lora.safetensors", "lora_adapter_metadata in the header")
    else:  # JSON can spell half of a character
        header = {"__metadata__": {"lora_adapter_metadata": text}, Q: entry([2, 2], 0, 16)}
        (tmp_path / "lora.safetensors").write_bytes(raw_safetensors(header, bytes(16)))
        refused(capsys, tmp_path / "lora.safetensors", "lora.safetensors")


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("nothing", "there is no such file or folder"),
        ("pipe", "is neither a folder nor a regular file"),
        ("adapter/adapter_config.json", "give the folder that it is in"),
        ("adapter/README.md", "no valid safetensors file"),
        ("trainer", "There are adapters in"),
        ("other", "If its factors are in one of its files, give that: model.safetensors"),
        ("empty", "Give the folder that peft's save_pretrained or a Trainer wrote"),
    ],
)
def test_what_is_no_adapter(path: str, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_folder(tmp_path / "adapter")
    write_folder(tmp_path / "trainer" / "checkpoint-500")
    (tmp_path / "other").mkdir()
    save_file({"w": torch.ones(1)}, tmp_path / "other" / "model.safetensors")
    (tmp_path / "empty").mkdir()
    os.mkfifo(tmp_path / "pipe")
    for command in (["inspect", str(tmp_path / path)], ["rebalance", str(tmp_path / path), str(tmp_path / "new")]):
        assert main(command) == 1
        assert message in capsys.readouterr().err
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize(
    ("write", "message"),
    [
        (lambda path: path.write_bytes(b""), "cannot be loaded"),
        (lambda path: path.write_bytes(b"PK\x03\x04 and no more"), "cannot be loaded"),
        (lambda path: path.write_bytes(pickle.dumps(RunsCode())), "could run code"),
        (lambda path: torch.save({"q": RunsCode()}, path), "could run code"),
        (lambda path: torch.save([torch.ones(2)], path), "holds no state dict"),
        (lambda path: torch.save({1: torch.ones(2)}, path), "holds no state dict"),
        (lambda path: torch.save({"q.lora_A.weight": torch.ones(2, 2)}, path), "without its partner"),
        (
            lambda path: torch.save(dict.fromkeys(FACTORS, torch.eye(2).to_sparse()), path),
            "is not in float16, bfloat16",
        ),
        (lambda path: torch.save(dict.fromkeys(FACTORS, torch.ones(2, 2, device="meta")), path), "is not in float16"),
    ],
)
def test_damaged_pickles(
    write: Callable[[Path], object], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "adapter.pt"
    write(path)
    refused(capsys, path, "is a pickle")
    refused(capsys, path, message, "--allow-pickle")
    assert not Path("executed").exists()


def test_a_sparse_file_of_a_terabyte_is_not_read(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    size = 2**40
    header = json.dumps({Q: entry([2**18, 2**20], 0, size), "q.lora_B.weight": entry([1, 2**18], size, size + 2**20)})
    path = tmp_path / "lora.safetensors"
    path.write_bytes(raw_safetensors(header.encode()))
    os.truncate(path, 8 + len(header) + size + 2**20)
    # Where the system maps as much, it is refused for the factor's size.
    assert main(["inspect", str(path)]) == 1
    assert re.search("larger than any factor|lora.safetensors cannot be opened", capsys.readouterr().err)
