"""`rebalance`: what PEFT and others make of the result, what is kept, and what is never overwritten."""

from __future__ import annotations

import json
import math
import os
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from adapter_files import CONFIG, NAME, kohya_tensors, merged, peft_tensors, write_folder, write_shards
from oracle import relative_error
from peft_layers import KINDS, Holder, adapted
from sdsopt.adapters import LayerChange, inspect_adapter, rebalance_adapter
from sdsopt.cli import main
from sdsopt.errors import AdapterError
from tiny_models import MODELS

Files = dict[str, bytes]


def contents(folder: Path) -> Files:
    """Every file below a folder, hidden ones too."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def assert_same_update(source: Path, target: Path, tolerance: float = 1e-6) -> None:
    old, new = load_file(source), load_file(target)
    assert list(old) == list(new)
    products = merged(old)
    assert products
    for name, product in merged(new).items():
        assert relative_error(product, products[name]) < tolerance
        assert not torch.equal(old[name], new[name])


@pytest.mark.parametrize("name", ["llama", "gemma", "vit", "qwen3_moe", "gpt2"])
@pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers`")
def test_peft_loads_the_result_and_merges_the_same(name: str, tmp_path: Path) -> None:
    model, batch = MODELS[name]()
    model.save_pretrained(str(tmp_path / "old"))
    report = rebalance_adapter(tmp_path / "old", tmp_path / "new")
    assert report.count(LayerChange.BALANCED) == len(report.layers) > 3
    assert 0 < report.largest_error < 1e-6

    base: Any = MODELS[name]()[0].unload()
    loaded = peft.PeftModel.from_pretrained(base, str(tmp_path / "new"))
    model.eval(), loaded.eval()
    factors = {n: p for n, p in model.named_parameters() if "lora_A" in n}
    assert factors and all(not torch.equal(p, loaded.get_parameter(n)) for n, p in factors.items())
    torch.testing.assert_close(loaded(**batch).loss, model(**batch).loss, rtol=1e-5, atol=0)
    for (n, module), (_, other) in zip(model.named_modules(), loaded.named_modules(), strict=True):
        if hasattr(module, "get_delta_weight"):
            old, new = module.get_delta_weight("default").detach(), other.get_delta_weight("default")
            assert relative_error(new.detach(), old) < 1e-6, n
    old_weights, new_weights = model.merge_and_unload().state_dict(), loaded.merge_and_unload().state_dict()
    for n, weight in old_weights.items():
        assert (new_weights[n] - weight).norm() <= 1e-6 * weight.norm(), n


@pytest.mark.parametrize("name", [name for name in KINDS if name != "lora bias"])
def test_every_kind_of_peft_layer(name: str, tmp_path: Path) -> None:
    kind = KINDS[name]
    model: Any = adapted(kind.build(), kind.config)  # in float64
    model.save_pretrained(str(tmp_path / "old"))
    rebalance_adapter(tmp_path / "old", tmp_path / "new")
    torch.manual_seed(1)
    base = Holder(kind.build()).double()
    base.load_state_dict({n: p.clone() for n, p in model.unload().state_dict().items()})
    loaded = peft.PeftModel.from_pretrained(base, str(tmp_path / "new"))
    original = peft.PeftModel.from_pretrained(Holder(kind.build()).double(), str(tmp_path / "old"), torch_device="cpu")
    compared = 0
    for (_, module), (_, other) in zip(original.named_modules(), loaded.named_modules(), strict=True):
        if hasattr(module, "get_delta_weight"):
            old, new = module.get_delta_weight("default").detach(), other.get_delta_weight("default").detach()
            assert relative_error(new, old) < 1e-12
            compared += 1
    assert compared == kind.pairs


def test_kohya(tmp_path: Path) -> None:
    metadata = {"ss_network_dim": "4", "ss_output_name": "x"}
    save_file(kohya_tensors(), tmp_path / "old.safetensors", metadata=metadata)
    report = rebalance_adapter(tmp_path / "old.safetensors", tmp_path / "new.safetensors")
    assert len(report.layers) == 2 and len(report.skipped) == 3
    old, new = load_file(tmp_path / "old.safetensors"), load_file(tmp_path / "new.safetensors")
    for layer in ("lora_unet_down_blocks_0_to_q", "lora_unet_conv_in"):
        down, up = f"{layer}.lora_down.weight", f"{layer}.lora_up.weight"
        scale = old[f"{layer}.alpha"].item() / old[down].shape[0]
        deltas = [scale * t[up].double().flatten(1) @ t[down].double().flatten(1) for t in (old, new)]
        assert relative_error(deltas[1], deltas[0]) < 1e-6
        assert not torch.equal(old[down], new[down]) and old[down].shape == new[down].shape
        old.pop(down), old.pop(up)
    assert all(torch.equal(tensor, new[name]) for name, tensor in old.items())
    with safe_open(tmp_path / "new.safetensors", "pt") as file:
        assert file.metadata() == metadata


def test_what_kohya_takes_apart_again_is_kept(tmp_path: Path) -> None:
    tensors = {
        "lora_unet_qkv.lora_down.weight": torch.randn(6, 8),
        "lora_unet_qkv.lora_up.weight": torch.block_diag(*torch.randn(3, 5, 2)),
        "lora_unet_out.lora_down.weight": torch.randn(6, 8),
        "lora_unet_out.lora_up.weight": torch.randn(5, 6),
    }
    save_file(tensors, tmp_path / "old.safetensors")
    report = rebalance_adapter(tmp_path / "old.safetensors", tmp_path / "new.safetensors")
    changes = {layer.name: layer.change for layer in report.layers}
    assert changes == {"lora_unet_qkv": LayerChange.BLOCK_DIAGONAL, "lora_unet_out": LayerChange.BALANCED}
    new = load_file(tmp_path / "new.safetensors")
    assert all(torch.equal(new[name], tensor) for name, tensor in tensors.items() if "qkv" in name)


def test_shards_keep_their_index_and_tensors_their_file(tmp_path: Path) -> None:
    write_shards(tmp_path / "old")
    rebalance_adapter(tmp_path / "old", tmp_path / "new")
    old, new = contents(tmp_path / "old"), contents(tmp_path / "new")
    assert {name: len(content) for name, content in old.items()} == {
        name: len(content) for name, content in new.items()
    }
    both: list[dict[str, Tensor]] = []
    for folder in ("old", "new"):
        files = sorted((tmp_path / folder).glob("*.safetensors"))
        both.append({name: tensor for file in files for name, tensor in load_file(file).items()})
    for name, product in merged(both[0]).items():
        assert relative_error(merged(both[1])[name], product) < 1e-6


@pytest.mark.parametrize(("dtype", "bound"), [(torch.float16, 2e-3), (torch.bfloat16, 1.2e-2), (torch.float64, 1e-12)])
def test_dtypes_are_kept_and_cost_their_rounding(dtype: torch.dtype, bound: float, tmp_path: Path) -> None:
    write_folder(tmp_path / "old", {name: tensor.to(dtype) for name, tensor in peft_tensors().items()})
    report = rebalance_adapter(tmp_path / "old", tmp_path / "new")
    assert_same_update(tmp_path / "old" / NAME, tmp_path / "new" / NAME, bound)
    assert report.largest_error < bound
    assert {tensor.dtype for tensor in load_file(tmp_path / "new" / NAME).values()} == {dtype}


def test_factors_out_of_a_dtypes_range_are_refused(tmp_path: Path) -> None:
    # Long and short: an even share of the size leaves the elements of A among float16's subnormal numbers.
    A, B = torch.rand(1, 1_000_000).half(), torch.full((1, 1), 2e-7).half()
    write_folder(tmp_path / "old", {"q.lora_A.weight": A, "q.lora_B.weight": B}, {"r": 1})
    with pytest.raises(AdapterError, match="out of the range of float16, which would change ΔW by"):
        rebalance_adapter(tmp_path / "old", tmp_path / "new")
    assert not (tmp_path / "new").exists()


def test_all_else_is_kept_byte_for_byte(tmp_path: Path) -> None:
    tensors: dict[str, Tensor] = {
        **peft_tensors(),
        "base_model.model.model.layers.0.self_attn.q_proj.lora_magnitude_vector": torch.rand(12),
        "base_model.model.model.layers.0.self_attn.q_proj.lora_B.bias": torch.rand(12),
        "base_model.model.score.weight": torch.rand(3, 4).bfloat16(),
        "base_model.model.eight": torch.rand(5).to(torch.float8_e4m3fn),
        "base_model.model.whole": torch.arange(7),
    }
    old = write_folder(tmp_path / "old", tensors, {**CONFIG, "use_dora": True})
    save_file(tensors, old / NAME, metadata={"format": "pt", "note": "kept"})
    (old / "tokenizer.json").write_text("{}")
    rebalance_adapter(old, tmp_path / "new")
    before, after = contents(old), contents(tmp_path / "new")
    assert {name for name in before if before[name] != after[name]} == {NAME}
    assert before.keys() == after.keys()
    start = 8 + int.from_bytes(before[NAME][:8], "little")
    assert before[NAME][:start] == after[NAME][:start]  # the header, with dtypes, order and metadata
    new = load_file(tmp_path / "new" / NAME)
    for name, tensor in tensors.items():
        same = torch.equal(tensor.view(torch.uint8), new[name].view(torch.uint8))
        assert same is not name.endswith(("lora_A.weight", "lora_B.weight")), name


def test_dora_is_the_same_function(tmp_path: Path) -> None:
    torch.manual_seed(0)
    linear = nn.Linear(6, 5)
    config = peft.LoraConfig(r=3, target_modules=["layer"], use_dora=True, init_lora_weights=False)
    model: Any = peft.get_peft_model(Holder(linear), config)  # pyright: ignore
    with torch.no_grad():
        model.base_model.model.layer.lora_magnitude_vector["default"].weight.mul_(1.7)
    x = torch.randn(4, 6)
    expected = model(x).detach()
    model.save_pretrained(str(tmp_path / "old"))
    rebalance_adapter(tmp_path / "old", tmp_path / "new")
    loaded = peft.PeftModel.from_pretrained(model.unload(), str(tmp_path / "new"))
    torch.testing.assert_close(loaded(x), expected, rtol=1e-5, atol=1e-6)


def test_the_result_is_as_well_conditioned_as_its_update(tmp_path: Path) -> None:
    before = inspect_adapter(write_folder(tmp_path / "old"))
    rebalance_adapter(tmp_path / "old", tmp_path / "new")
    for old, new in zip(before.layers, inspect_adapter(tmp_path / "new").layers, strict=True):
        assert new.balance == pytest.approx(1, rel=1e-6)
        assert new.condition_A == pytest.approx(math.sqrt(old.condition_delta), rel=1e-4)
        assert new.condition_B == pytest.approx(math.sqrt(old.condition_delta), rel=1e-4)
        assert new.spread < old.spread
        assert new.singular_values[0] == pytest.approx(old.singular_values[0], rel=1e-5)


def test_layers_without_an_update_stay_as_they_are(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tensors = peft_tensors()
    first = [name for name in tensors if ".0." in name]
    tensors[first[1]].zero_()
    write_folder(tmp_path / "old", tensors)
    assert main(["rebalance", str(tmp_path / "old"), str(tmp_path / "new")]) == 0
    out = capsys.readouterr().out
    assert "Balanced: 1 LoRA layers" in out and "Kept:     1 LoRA layers: ΔW = 0" in out
    new = load_file(tmp_path / "new" / NAME)
    assert all(torch.equal(new[name], tensor) is (name in first) for name, tensor in tensors.items())


def test_adalora_stays_as_it_is(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tensors = {"q.lora_A": torch.randn(4, 6), "q.lora_B": torch.randn(5, 4), "q.lora_E": torch.ones(4, 1)}
    write_folder(tmp_path / "old", tensors, {"peft_type": "ADALORA"})
    assert main(["rebalance", str(tmp_path / "old"), str(tmp_path / "new")]) == 0
    assert "AdaLoRA has singular values of its own" in capsys.readouterr().out
    assert contents(tmp_path / "old") == contents(tmp_path / "new")


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_nan_is_refused(bad: float, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tensors = peft_tensors()
    tensors["base_model.model.model.layers.1.self_attn.q_proj.lora_B.weight"][3, 1] = bad
    write_folder(tmp_path / "old", tensors)
    assert main(["rebalance", str(tmp_path / "old"), str(tmp_path / "new")]) == 1
    assert "layers.1.self_attn.q_proj' holds NaN or infinity" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["old"]


def test_a_trainers_checkpoint_loses_its_optimizer_only(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = write_folder(tmp_path / "checkpoint-500")
    torch.save({"state": {}}, folder / "optimizer.pt")
    (folder / "trainer_state.json").write_text("{}")
    write_folder(folder / "reward")
    assert main(["rebalance", str(folder), str(tmp_path / "new")]) == 0
    out = capsys.readouterr().out
    assert "Left out: optimizer.pt: an optimizer's state is that of the old factors" in out
    assert "Left out: reward: a folder" in out
    assert set(contents(tmp_path / "new")) == {"README.md", "adapter_config.json", NAME, "trainer_state.json"}
    # In place they would be lost, and nothing is ever lost.
    before = contents(folder)
    with pytest.raises(AdapterError, match=r"also holds 'optimizer\.pt', 'reward', which would be lost"):
        rebalance_adapter(folder, folder, force=True)
    assert contents(folder) == before


@pytest.mark.parametrize("single", [False, True])
def test_nothing_is_overwritten_without_force(single: bool, tmp_path: Path) -> None:
    write_folder(tmp_path / "old")
    write_folder(tmp_path / "new", peft_tensors(layers=1))
    source, target = (tmp_path / name / NAME if single else tmp_path / name for name in ("old", "new"))
    before = contents(tmp_path)
    for same in (source, target):
        with pytest.raises(AdapterError, match="exists; choose another place, or replace it with --force"):
            rebalance_adapter(source, same)
    assert contents(tmp_path) == before
    rebalance_adapter(source, target, force=True)
    assert_same_update(tmp_path / "old" / NAME, tmp_path / "new" / NAME)
    assert {path.name for path in tmp_path.iterdir()} == {"old", "new"}


@pytest.mark.parametrize("single", [False, True])
def test_in_place(single: bool, tmp_path: Path) -> None:
    write_folder(tmp_path / "adapter")
    write_folder(tmp_path / "before")
    path = tmp_path / "adapter" / NAME if single else tmp_path / "adapter"
    alias = tmp_path / "alias"
    alias.symlink_to(path)
    rebalance_adapter(path, alias, force=True)
    assert_same_update(tmp_path / "before" / NAME, tmp_path / "adapter" / NAME)
    assert set(contents(tmp_path / "adapter")) == set(contents(tmp_path / "before"))
    assert alias.is_symlink() and {path.name for path in tmp_path.iterdir()} == {"adapter", "before", "alias"}


def test_an_empty_folder_may_be_filled(tmp_path: Path) -> None:
    write_folder(tmp_path / "old")
    (tmp_path / "new").mkdir()
    rebalance_adapter(tmp_path / "old", tmp_path / "new")
    assert_same_update(tmp_path / "old" / NAME, tmp_path / "new" / NAME)


@pytest.mark.parametrize(
    ("source", "target", "message"),
    [
        ("old", "missing/new", "is no folder; create it first"),
        ("old", "file", "is a file, and .* a folder"),
        (f"old/{NAME}", "empty", "is a folder, and .* a single file"),
        ("old", "home", "also holds 'precious.txt', which would be lost"),
    ],
)
def test_targets_that_do_not_fit(source: str, target: str, message: str, tmp_path: Path) -> None:
    write_folder(tmp_path / "old")
    (tmp_path / "file").write_text("x")
    (tmp_path / "empty").mkdir()
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "precious.txt").write_text("x")
    before = contents(tmp_path)
    with pytest.raises(AdapterError, match=message):
        rebalance_adapter(tmp_path / source, tmp_path / target, force=True)
    assert contents(tmp_path) == before


@pytest.mark.parametrize("force", [False, True])
@pytest.mark.parametrize("single", [False, True])
def test_a_failure_on_the_way_leaves_everything_as_it_was(
    single: bool, force: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_folder(tmp_path / "old")
    if force:
        write_folder(tmp_path / "new", peft_tensors(layers=1))
    before = contents(tmp_path)
    source, target = (tmp_path / name / NAME if single and force else tmp_path / name for name in ("old", "new"))
    for broken in ("copymode", "copyfile"):
        with monkeypatch.context() as patch:
            patch.setattr(f"shutil.{broken}", _full)
            with pytest.raises(OSError, match="No space left"):
                rebalance_adapter(source, target, force=force)
        assert contents(tmp_path) == before
    with monkeypatch.context() as patch:  # the last moment: between putting the old one aside and the new one in place
        patch.setattr(Path, "rename", _fails_once(Path.rename))
        patch.setattr(Path, "replace", _full)
        with pytest.raises(OSError, match="No space left"):
            rebalance_adapter(source, target, force=force)
    assert contents(tmp_path) == before
    assert {path.name for path in tmp_path.iterdir()} == {"old", *(["new"] if force else [])}


def _full(*_arguments: Any, **_options: Any) -> None:
    raise OSError(28, "No space left on device")


def _fails_once(rename: Any) -> Any:
    def fails(self: Path, target: Path) -> Path:
        if self.name.startswith(".sdsopt-") and Path(target).name == "new":
            _full()
        return rename(self, target)

    return fails


def test_modes_of_files_are_kept(tmp_path: Path) -> None:
    write_folder(tmp_path / "old")
    (tmp_path / "old" / NAME).chmod(0o640)
    (tmp_path / "old").chmod(0o750)
    rebalance_adapter(tmp_path / "old", tmp_path / "new")
    assert (tmp_path / "new" / NAME).stat().st_mode & 0o777 == 0o640
    assert (tmp_path / "new").stat().st_mode & 0o777 == 0o750


def test_a_pickle_stays_one(tmp_path: Path) -> None:
    tensors = peft_tensors()
    torch.save({"state_dict": tensors, "epoch": 3}, tmp_path / "old.ckpt")
    with pytest.raises(AdapterError, match="is a pickle"):
        rebalance_adapter(tmp_path / "old.ckpt", tmp_path / "new.ckpt")
    rebalance_adapter(tmp_path / "old.ckpt", tmp_path / "new.ckpt", allow_pickle=True)
    new = torch.load(tmp_path / "new.ckpt", weights_only=True)
    assert new["epoch"] == 3 and new["state_dict"].keys() == tensors.keys()
    for name, product in merged(tensors).items():
        assert relative_error(merged(new["state_dict"])[name], product) < 1e-6
        assert not torch.equal(new["state_dict"][name], tensors[name])


def test_the_hugging_face_cache_is_read_through_its_links(tmp_path: Path) -> None:
    """There, a snapshot's files are links into blobs/."""
    snapshot = tmp_path / "models--x--y" / "snapshots" / "abc"
    blobs = tmp_path / "models--x--y" / "blobs"
    write_folder(blobs)
    snapshot.mkdir(parents=True)
    for path in blobs.iterdir():
        (snapshot / path.name).symlink_to(os.path.relpath(path, snapshot))
    rebalance_adapter(snapshot, tmp_path / "new")
    assert_same_update(blobs / NAME, tmp_path / "new" / NAME)
    assert not any(path.is_symlink() for path in (tmp_path / "new").iterdir())


def test_links_out_of_the_folder_are_not_copied(tmp_path: Path) -> None:
    (tmp_path / "secret").write_text("key")
    folder = write_folder(tmp_path / "old")
    (folder / "README.md").unlink()
    (folder / "README.md").symlink_to(tmp_path / "secret")
    with pytest.raises(AdapterError, match="a link that leads out of its folder"):
        rebalance_adapter(folder, tmp_path / "new")
    assert not (tmp_path / "new").exists()


def test_nothing_to_balance(tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "old", {"x.hada_w1_a": torch.ones(2, 2)}, {"peft_type": "LOHA"})
    with pytest.raises(AdapterError, match="has no layer to balance: loha is not a plain product"):
        rebalance_adapter(folder, tmp_path / "new")
    assert not (tmp_path / "new").exists()


def test_an_unknown_method(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(ValueError, match="unknown method 'qr'; known: svd"):
        rebalance_adapter(tmp_path, tmp_path / "new", method="qr")  # pyright: ignore
    assert main(["rebalance", "a", "b", "--method", "qr"]) == 2
    assert "--method" in capsys.readouterr().err


def test_quiet_prints_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_folder(tmp_path / "old")
    assert main(["rebalance", "-q", str(tmp_path / "old"), str(tmp_path / "new")]) == 0
    assert capsys.readouterr() == ("", "")
    assert json.loads((tmp_path / "new" / "adapter_config.json").read_text()) == CONFIG
