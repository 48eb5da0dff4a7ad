"""What `inspect` measures, says, prints and draws."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from adapter_files import kohya_tensors, pair, peft_tensors, write_folder
from sdsopt.adapters import AdapterReport, Level, inspect_adapter
from sdsopt.cli import main
from sdsopt.errors import AdapterError
from toy import factor

Q_PROJ = "base_model.model.model.layers.{}.self_attn.q_proj"


def with_conditions(folder: Path, conditions: list[float], scale: float = 1.0) -> Path:
    """One layer for each condition number, which both of its factors have."""
    tensors: dict[str, Tensor] = {}
    for i, condition in enumerate(conditions):
        tensors[f"{Q_PROJ.format(i)}.lora_A.weight"] = factor(4, 10, condition, seed=i).float()
        tensors[f"{Q_PROJ.format(i)}.lora_B.weight"] = scale * factor(12, 4, condition, seed=i + 50).float()
    return write_folder(folder, tensors)


def test_measurements_are_those_of_the_dense_update(tmp_path: Path) -> None:
    tensors = peft_tensors(layers=3)
    report = inspect_adapter(write_folder(tmp_path, tensors))
    assert [layer.name for layer in report.layers] == [Q_PROJ.format(i) for i in range(3)]
    for layer in report.layers:
        A, B = (tensors[f"{layer.name}.lora_{side}.weight"].double() for side in "AB")
        delta = 2.0 * B @ A  # lora_alpha 8, r 4
        values = torch.linalg.svdvals(delta)[:4]
        shares = values / values.sum()
        assert layer.condition_A == pytest.approx(torch.linalg.cond(A).item())
        assert layer.condition_B == pytest.approx(torch.linalg.cond(B).item())
        assert layer.sigma_max == pytest.approx(torch.linalg.matrix_norm(delta, 2).item())
        assert layer.stable_rank == pytest.approx((delta.norm() / layer.sigma_max).square().item())
        assert layer.effective_rank == pytest.approx(math.exp(-(shares * shares.log()).sum().item()))
        assert layer.balance == pytest.approx((A.norm() / B.norm()).item())
        assert layer.singular_values[0] == pytest.approx(values.tolist())
        assert layer.spread == pytest.approx(math.sqrt(layer.condition_A * layer.condition_B))
        assert layer.balanced_spread == pytest.approx(math.sqrt(values[0] / values[3]))
        assert layer.balanced_spread <= layer.spread


def test_adalora_is_measured_with_its_diagonal(tmp_path: Path) -> None:
    A, B = pair()
    E = torch.tensor([[4.0], [-2.0], [1.0], [0.5]])
    tensors = {f"base_model.model.q.lora_{side}": value for side, value in (("A", A), ("B", B), ("E", E))}
    report = inspect_adapter(write_folder(tmp_path, tensors, {"peft_type": "ADALORA", "init_r": 4, "lora_alpha": 8}))
    [layer] = report.layers
    delta = 8 / (4 + 1e-5) * B.double() @ (E.double() * A.double())
    assert layer.sigma_max == pytest.approx(torch.linalg.matrix_norm(delta, 2).item())
    assert layer.condition_A == pytest.approx(torch.linalg.cond(E.double() * A.double()).item())
    assert layer.condition_B == pytest.approx(torch.linalg.cond(B.double() * E.double().T).item())


def test_layers_with_several_blocks_show_medians_over_those_in_use(tmp_path: Path) -> None:
    blocks = [pair(seed=i) for i in range(3)]
    A = torch.cat([A for A, _ in blocks])  # expert by expert
    B = torch.stack([blocks[0][1], blocks[1][1], torch.zeros_like(blocks[2][1])], -1).flatten(1)  # expert fastest
    tensors = {"base_model.model.experts.lora_A.weight": A, "base_model.model.experts.lora_B.weight": B}
    config = {"peft_type": "LORA", "r": 4, "lora_alpha": 4, "target_parameters": ["experts.up"]}
    [layer] = inspect_adapter(write_folder(tmp_path, tensors, config)).layers
    assert (layer.rank, layer.num_blocks) == (4, 3)
    kappas = [torch.linalg.cond(A.double()).item() for A, _ in blocks[:2]]
    assert layer.condition_A == pytest.approx(sum(kappas) / 2)
    norms = [torch.linalg.matrix_norm(B.double() @ A.double(), 2).item() for A, B in blocks[:2]]
    assert layer.sigma_max == pytest.approx(max(norms))
    assert layer.singular_values[2] == [0.0] * 4


@pytest.mark.parametrize(
    ("conditions", "level", "words"),
    [
        ([1.0, 2.0, 2.5], Level.LITTLE, "Little for SDS to undo"),
        ([2.0, 6.0, 8.0], Level.SOME, "no better with the correction"),
        ([5.0, 100.0, 300.0], Level.MUCH, "about that factor fewer steps"),
    ],
)
def test_the_judgement(conditions: list[float], level: Level, words: str, tmp_path: Path) -> None:
    verdict = inspect_adapter(with_conditions(tmp_path, conditions)).verdict
    assert verdict.level is level
    assert verdict.spread == pytest.approx(conditions[1], rel=1e-3)
    assert words in verdict.text and "no promise" in verdict.text


def test_the_judgement_names_rebalance_only_where_it_helps(tmp_path: Path) -> None:
    A, B = torch.eye(4, 10), torch.eye(12, 4)
    sizes = torch.tensor([1.0, 10.0, 100.0, 1000.0])
    # The product's condition is 1, each factor's 1000.
    opposed = {"q.lora_A.weight": sizes[:, None] * A, "q.lora_B.weight": B / sizes}
    assert (
        "`sdsopt rebalance` would bring that down to 1.00"
        in inspect_adapter(write_folder(tmp_path, opposed)).verdict.text
    )
    assert "rebalance" not in inspect_adapter(with_conditions(tmp_path / "balanced", [1.0])).verdict.text


def broken(folder: Path) -> Path:
    """A layer of each kind that has no numbers, and a sound one."""
    tensors = peft_tensors(layers=4)
    tensors[f"{Q_PROJ.format(1)}.lora_B.weight"].zero_()
    tensors[f"{Q_PROJ.format(2)}.lora_B.weight"][:, 1] = 0
    tensors[f"{Q_PROJ.format(3)}.lora_A.weight"][0, 0] = math.nan
    return write_folder(folder, tensors)


def test_layers_without_numbers(tmp_path: Path) -> None:
    report = inspect_adapter(broken(tmp_path))
    assert [layer.status.value for layer in report.layers] == ["ok", "zero", "rank_deficient", "not_finite"]
    _, zero, deficient, nan = report.layers
    assert zero.sigma_max == zero.stable_rank == zero.effective_rank == 0
    assert zero.condition_A > 1 and math.isnan(zero.condition_B) and math.isinf(zero.balance)
    assert math.isinf(deficient.condition_B) and deficient.sigma_max > 0
    assert math.isnan(nan.sigma_max) and math.isnan(nan.condition_A) and math.isnan(nan.condition_B)


def test_an_untrained_adapter_is_not_judged(tmp_path: Path) -> None:
    report = inspect_adapter(with_conditions(tmp_path, [2.0, 2.0], scale=0.0))
    assert report.verdict.level is Level.NOTHING and math.isnan(report.verdict.spread)


def refuse(constant: str) -> None:
    raise AssertionError(f"{constant} is no JSON")


def test_json_is_one_document_without_nan(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", str(broken(tmp_path)), "--json"]) == 0
    out, err = capsys.readouterr()
    found = json.loads(out, parse_constant=refuse)
    assert err == ""
    assert [layer["condition_B"] is None for layer in found["layers"]] == [False, True, True, True]
    assert found["layers"][3]["sigma_max"] is None and found["layers"][3]["status"] == "not_finite"
    assert found["summary"]["level"] == "much" and found["summary"]["spread"] is None
    assert set(found) == {"path", "layers", "skipped", "notes", "summary"}


def printed(capsys: pytest.CaptureFixture[str], *arguments: Any) -> str:
    assert main(["inspect", *map(str, arguments)]) == 0
    out, err = capsys.readouterr()
    assert err == ""
    assert max(len(line) for line in out.splitlines() if not line.startswith("Figure:")) <= 80
    return out


def test_the_table_fits_80_columns(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = printed(capsys, broken(tmp_path))
    rows = {line.split()[0]: line.split()[1:] for line in out.splitlines() if ".self_attn" in line}
    layers = {f"{i}.self_attn.q_proj": layer for i, layer in enumerate(inspect_adapter(tmp_path).layers)}
    assert set(rows) == set(layers)
    assert float(rows["0.self_attn.q_proj"][1]) == pytest.approx(layers["0.self_attn.q_proj"].condition_A, rel=1e-2)
    assert rows["1.self_attn.q_proj"][2] == "–" and rows["2.self_attn.q_proj"][2] == "∞"
    assert rows["3.self_attn.q_proj"][1:] == ["NaN"] * 6
    for words in ("1 layer has NaN or infinity", "1 layer has ΔW = 0", "1 layer has a rank-deficient factor"):
        assert words in out


def test_long_names_are_folded_and_not_cut(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save_file(kohya_tensors(), tmp_path / "lora.safetensors")
    out = printed(capsys, tmp_path / "lora.safetensors")
    assert "down_blocks_0_to_q" in out
    assert "Skipped: 1 × a Tucker decomposition" in out
    long = {
        f"x.{'attentions_' * 8}{i}.lora_{side}.weight": value
        for i in "01"
        for side, value in zip("AB", pair(), strict=True)
    }
    save_file({name: tensor.clone() for name, tensor in long.items()}, tmp_path / "long.safetensors")
    out = printed(capsys, tmp_path / "long.safetensors", "--layer", "0")
    assert "attentions_" * 8 + "0" in "".join(
        line.split(" ")[1] if line.startswith(" ") else "" for line in out.splitlines()
    )
    assert "Note: neither a configuration nor an alpha" in out


def test_quiet_leaves_the_judgement(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = printed(capsys, "-q", with_conditions(tmp_path, [2.0]))
    assert out.startswith("1 LoRA layer, rank 4; κ(A) 2.00 (2.00 to 2.00), κ(B) 2.00 (2.00 to 2.00)\nLittle")


@pytest.mark.parametrize(
    ("pattern", "count"), [("q_proj", 12), ("layers.1.", 1), ("layers.1*", 3), ("s.?.", 10), ("[", 0)]
)
def test_layers_are_chosen_by_any_part_of_their_name(pattern: str, count: int, tmp_path: Path) -> None:
    with_conditions(tmp_path, [2.0] * 12)
    if count:
        assert len(inspect_adapter(tmp_path, pattern=pattern).layers) == count
    else:
        with pytest.raises(AdapterError, match=r"no LoRA layer of .* is called"):
            inspect_adapter(tmp_path, pattern=pattern)


def test_layers_are_in_natural_order(tmp_path: Path) -> None:
    names = [layer.name for layer in inspect_adapter(with_conditions(tmp_path, [2.0] * 12)).layers]
    assert names == [Q_PROJ.format(i) for i in range(12)]


def test_names_cannot_write_to_the_terminal(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    A, B = pair()
    evil = "x\x1b[2J\r[bold]$\\frac{"
    tensors = {f"{evil}.lora_A.weight": A, f"{evil}.lora_B.weight": B, "\x1b[31m.hada_w1_a": A.clone()}
    save_file(tensors, tmp_path / "lora.safetensors")
    out = printed(capsys, tmp_path / "lora.safetensors", "--plot", tmp_path / "figure.png")
    assert "\x1b" not in out and "\r" not in out
    assert "[bold]" in out and (tmp_path / "figure.png").exists()


def pixels(path: Path) -> Tensor:
    image = pytest.importorskip("matplotlib.image", exc_type=ImportError).imread(path)
    return torch.tensor(image)


def test_the_figure_reads_on_light_and_dark(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = printed(capsys, broken(tmp_path), "-q", "--plot", tmp_path / "figure.png")
    assert f"Figure: {tmp_path / 'figure.png'}" in out
    image = pixels(tmp_path / "figure.png")  # (height, width, RGBA)
    assert image[0, 0, 3] == 0  # transparent
    drawn = image[image[..., 3] == 1][:, :3]
    assert len(drawn) > 1000
    # WCAG's contrast with white and with a dark page's #0d1117, of everything that is drawn: 3 for lines and symbols.
    linear = torch.where(drawn <= 0.04045, drawn / 12.92, ((drawn + 0.055) / 1.055) ** 2.4)
    luminance = linear @ torch.tensor([0.2126, 0.7152, 0.0722])
    assert ((1.05 / (luminance + 0.05)) >= 3).float().mean() > 0.99
    assert (((luminance + 0.05) / 0.0557) >= 3).float().mean() > 0.99


@pytest.mark.parametrize("layers", [0, 1, 100])
@pytest.mark.parametrize("suffix", [".svg", ".pdf"])
def test_figures_of_any_size(layers: int, suffix: str, tmp_path: Path) -> None:
    from sdsopt.adapters.figure import save_figure

    report = inspect_adapter(with_conditions(tmp_path, [2.0] * max(layers, 1)))
    save_figure(AdapterReport(tmp_path, report.layers[:layers], (), ()), tmp_path / f"figure{suffix}")
    assert (tmp_path / f"figure{suffix}").stat().st_size > 1000


def test_a_figure_of_an_unknown_kind_is_a_mistake(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = with_conditions(tmp_path, [2.0])
    assert main(["inspect", str(folder), "--plot", str(folder / "adapter_model.safetensors")]) == 2
    assert "must end in .png, .svg, .pdf" in capsys.readouterr().err
    assert len(inspect_adapter(folder).layers) == 1  # still there


def test_only_what_is_no_product(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = write_folder(tmp_path, {"x.hada_w1_a": torch.ones(2, 2)}, {"peft_type": "LOHA", "r": 4})
    assert "Skipped: 1 × loha is not a plain product B·A" in printed(capsys, folder)
