"""Adapters changed at random: no crash, no traceback, no partial output, exit code 0 or 1."""

from __future__ import annotations

import json
import random
import shutil
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from adapter_files import CONFIG, kohya_tensors, peft_tensors, raw_safetensors, write_folder, write_shards
from sdsopt.adapters.adapter import open_adapter
from sdsopt.cli import main

JUNK: list[Any] = [
    None,
    True,
    -1,
    0,
    1,
    3,
    2**31,
    2**63,
    2**64,
    1e308,
    float("nan"),
    "",
    "x",
    "F32",
    "F4",
    "../x",
    "/x",
]
JUNK += ["\x1b[2J", "\ud800", "lora_A", [], [0], [2**40, 2**40], {}, {"a": [1]}]


def experts(folder: Path) -> Path:
    names = [f"base_model.model.experts{inner}.lora_{side}.weight" for inner in (".base_layer", "") for side in "AB"]
    shapes = ((8, 6), (5, 8), (8, 5), (6, 8))
    tensors = {name: torch.randn(shape) for name, shape in zip(names, shapes, strict=True)}
    return write_folder(folder, tensors, {**CONFIG, "target_parameters": ["experts.up"], "alpha_pattern": {"up": 3}})


def adalora(folder: Path) -> Path:
    tensors = {"q.lora_A": torch.randn(3, 6), "q.lora_B": torch.randn(5, 3), "q.lora_E": torch.ones(3, 1)}
    return write_folder(folder, tensors, {"peft_type": "ADALORA", "init_r": 3, "lora_alpha": 2})


def half(folder: Path) -> Path:
    return write_folder(folder, {name: tensor.half() for name, tensor in peft_tensors(layers=1).items()})


def single(folder: Path, tensors: dict[str, torch.Tensor], metadata: dict[str, str]) -> Path:
    folder.mkdir(parents=True)
    save_file(tensors, folder / "lora.safetensors", metadata=metadata)
    return folder / "lora.safetensors"


def kohya(folder: Path) -> Path:
    return single(folder, kohya_tensors(), {"ss_network_dim": "4"})


def diffusers(folder: Path) -> Path:
    tensors = {name.replace("base_model.model", "unet"): tensor for name, tensor in peft_tensors(layers=1).items()}
    return single(folder, tensors, {"lora_adapter_metadata": json.dumps({"unet.r": 4, "unet.lora_alpha": 3})})


def pickled(folder: Path) -> Path:
    folder.mkdir(parents=True)
    torch.save({"state_dict": peft_tensors(layers=1), "step": 3}, folder / "adapter.ckpt")
    return folder / "adapter.ckpt"


WRITERS: list[Callable[[Path], Path]] = [write_folder, write_shards, experts, adalora, half, kohya, diffusers, pickled]


def mutated_bytes(content: bytes, rng: random.Random) -> bytes:
    """A few bytes set, cut out, put in or moved, mostly near the start, where the structure is."""
    changed = bytearray(content)
    for _ in range(rng.choice([1, 1, 1, 2, 8])):
        at = rng.randrange(min(len(changed), rng.choice([8, 64, 512, 10**9])) or 1) if changed else 0
        length = rng.choice([1, 1, 2, 4, 16, 200])
        match rng.randrange(6):
            case 0:
                changed[at : at + length] = rng.randbytes(length)
            case 1:
                changed[at : at + length] = b""
            case 2:
                changed[at:at] = rng.randbytes(length)
            case 3:
                changed[at:at] = changed[at : at + length]
            case 4:
                del changed[at:]
            case _:
                changed[at : at + length] = rng.choice([b"\0", b"\xff", b'"', b"{", b"9"]) * length
    return bytes(changed)


def mutated_json(text: bytes, rng: random.Random) -> bytes:
    """One or two values or keys of a document replaced, removed, or there twice."""
    document = json.loads(text)
    for _ in range(rng.choice([1, 1, 2])):
        places = list(_places(document))
        if not places:
            break
        parent, key = rng.choice(places)
        match rng.randrange(4):
            case 0:
                del parent[key]
            case 1 if isinstance(parent, dict):
                parent[rng.choice([str(item) for item in JUNK if isinstance(item, str)])] = parent.pop(key)
            case 2 if isinstance(parent[key], int) and not isinstance(parent[key], bool):
                parent[key] += rng.choice([-4, -1, 1, 4, 2**32])
            case _:
                parent[key] = rng.choice(JUNK)
    mutated = json.dumps(document).encode()
    return mutated[:-1] + b"," + mutated[1:] if rng.random() < 0.03 and len(mutated) > 2 else mutated


def _places(value: Any) -> Any:
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, item in list(items):
        yield value, key
        yield from _places(item)


def mutated_header(content: bytes, rng: random.Random) -> bytes:
    length = int.from_bytes(content[:8], "little")
    return raw_safetensors(mutated_json(content[8 : 8 + length], rng), content[8 + length :])


# NaN, -∞, the largest and the smallest of float32, and 0.
FLOATS = [b"\0\0\xc0\x7f", b"\0\0\x80\xff", b"\xff\xff\x7f\x7f", b"\1\0\0\0", bytes(4)]


def mutated_values(content: bytes, rng: random.Random) -> bytes:
    """Numbers of the tensors become NaN, infinite, huge, tiny or zero."""
    changed = bytearray(content)
    start = 8 + int.from_bytes(content[:8], "little")
    for _ in range(rng.choice([1, 5, 100])):
        at = start + 4 * rng.randrange(max(1, (len(content) - start) // 4))
        changed[at : at + 4] = rng.choice(FLOATS)
    return bytes(changed[: len(content)])


def mutate(path: Path, rng: random.Random) -> None:
    """Changes one of the files that make up an adapter."""
    files = sorted(file for file in (path.iterdir() if path.is_dir() else [path]) if file.suffix != ".md")
    file = rng.choice(files)
    content = file.read_bytes()
    if rng.random() < 0.4 or file.suffix == ".ckpt":
        change = mutated_bytes
    elif file.suffix == ".json":
        change = mutated_json
    else:
        change = rng.choice([mutated_header, mutated_header, mutated_values])
    file.write_bytes(change(content, rng))


def refuse(constant: str) -> None:
    raise AssertionError(f"{constant} is no JSON")


def check(path: Path, capsys: pytest.CaptureFixture[str], rng: random.Random) -> tuple[int, int]:
    """Runs both commands, and returns their exit codes."""
    work = path.parent if path.is_file() else path
    before = {file: file.read_bytes() for file in work.rglob("*")}
    options = ["--allow-pickle"] if path.suffix == ".ckpt" else []
    as_json = rng.random() < 0.5
    inspected = main(["inspect", str(path), *options, *(["--json"] if as_json else [])])
    out, err = capsys.readouterr()
    if inspected == 0:
        assert err == "" and (json.loads(out, parse_constant=refuse) if as_json else out)
    else:
        assert out == "" and err.startswith("sdsopt: error: ") and len(err) < 2000

    target = work.parent / f"new{path.suffix}"
    rebalanced = main(["rebalance", str(path), str(target), *options])
    out, err = capsys.readouterr()
    assert (rebalanced, err == "") in ((0, True), (1, False))
    assert "Traceback" not in err and "\x1b" not in out + err
    assert target.exists() is (rebalanced == 0)
    if rebalanced == 0:
        assert open_adapter(target, allow_pickle=True).layers
        assert inspected == 0  # what can be written can be measured
        shutil.rmtree(target) if target.is_dir() else target.unlink()
    assert {file: file.read_bytes() for file in work.rglob("*")} == before
    assert list(work.parent.iterdir()) == [work]
    return inspected, rebalanced


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """The factors are tiny: several threads would spend their time waiting for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def fuzz(count: int, seed: int, folder: Path, capsys: pytest.CaptureFixture[str]) -> Counter[tuple[int, int]]:
    codes: Counter[tuple[int, int]] = Counter()
    sound = folder / "sound"
    sound.mkdir()
    originals = [writer(sound / writer.__name__) for writer in WRITERS]
    for number in range(count):
        rng = random.Random(f"{seed} {number}")
        original = originals[number % len(originals)]
        work = folder / "work" / "adapter"
        shutil.copytree(original if original.is_dir() else original.parent, work)
        path = work if original.is_dir() else work / original.name
        mutate(path, rng)
        try:
            codes[check(path, capsys, rng)] += 1
        except BaseException as error:
            kept = folder / f"failed-{number}"
            shutil.copytree(work, kept)
            raise AssertionError(f"number {number} of seed {seed}, kept in {kept}: {error!r}") from error
        shutil.rmtree(work)
    return codes


def test_hundreds_of_damaged_adapters(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    codes = fuzz(320, 0, tmp_path, capsys)
    # Some are still sound, some only measurable (NaN), most are refused.
    assert {(0, 0), (0, 1), (1, 1)} == set(codes), codes
    assert codes[1, 1] > 100 and codes[0, 0] > 20


@pytest.mark.slow
def test_ten_thousand_damaged_adapters(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    codes = fuzz(10_000, 1, tmp_path, capsys)
    assert codes.total() == 10_000
    assert codes[1, 1] > 3000 and codes[0, 0] > 500


def test_sound_adapters_pass(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Else the mutations would prove nothing."""
    for writer in WRITERS:
        path = writer(tmp_path / writer.__name__ / "adapter")
        assert check(path, capsys, random.Random(0)) == (0, 0)
