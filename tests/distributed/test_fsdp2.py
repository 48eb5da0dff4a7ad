"""FSDP2: equal to one process, with few collectives whatever the number of pairs."""

from __future__ import annotations

from unittest import mock

import pytest
import torch

import oracle
from bodies import common, fsdp2
from bodies.common import Case, State
from process_pool import ProcessPool
from sdsopt.corrections import available_corrections, make_correction
from sdsopt.engine.presence import Presence
from sdsopt.errors import UnequalGradientsError
from sdsopt.sharding import Group

Pools = dict[int, ProcessPool]

EXPONENTS = {"lora": 0.0, "sds": 0.5, "sds-split": 0.5, "scaled": 1.0}


def assert_equal_to(states: list[State], expected: State, tolerance: float) -> None:
    for state in states:
        for name, tensor in expected.items():
            torch.testing.assert_close(state[name], tensor, rtol=tolerance, atol=tolerance, msg=name)


@pytest.mark.parametrize("size", [2, 4])  # with 4, one process has no row of the second A
@pytest.mark.parametrize(
    "case",
    [
        Case("lora"),
        Case("sds", torch.float64),
        Case("sds-split", torch.float64),
        Case("sds", micro=3),
        Case("sds-split", micro=3),
        Case("sds", options=(("rescale", "grad_norm"),)),
        Case("sds-split", options=(("rescale", "grad_norm"),)),
        Case("sds", options=(("inverse_root", "svd"),)),
        Case("scaled", options=(("max_grad_norm", 0.1),)),
        Case("sds", torch.float64, options=(("update_every", 2),)),
        Case("sds-split", torch.float64, options=(("update_every", 3),)),
    ],
    ids=str,
)
def test_equals_one_process(case: Case, size: int, pools: Pools) -> None:
    tolerance = 1e-12 if case.dtype == torch.float64 else 2e-6
    assert_equal_to(pools[size].run(fsdp2.training, case), common.alone(case), tolerance)


@pytest.mark.parametrize("correction", ["sds", "sds-split", "lora-pro"])
@pytest.mark.parametrize("rows", [(5, 6, 5), (6, 5, 6, 7)])
def test_shards_whose_lengths_differ_from_process_to_process(
    rows: tuple[int, ...], correction: str, pools: Pools
) -> None:
    """Of 5 and 6 rows the first of two processes has 3 and 3, the second 2 and 3: they stack other pairs."""
    expected = fsdp2.uneven(correction, rows)
    assert_equal_to(pools[2].run(fsdp2.uneven, correction, rows), expected, 1e-12)


@pytest.mark.parametrize("correction", ["sds", "sds-split"])
@pytest.mark.parametrize("size", [2, 4])
def test_factors_cut_across_columns(size: int, correction: str, pools: Pools) -> None:
    """The first A has 10 columns, which four processes cannot share evenly, so it stays cut across its rank."""
    results = pools[size].run(fsdp2.cut_across_columns, Case(correction))
    assert_equal_to([state for state, _ in results], common.alone(Case(correction)), 2e-6)
    for _, lies in results:
        assert lies == {
            "first[default]": f"(Shard(dim={int(size == 2)}),) (Shard(dim=0),)",
            "second[default]": "(Shard(dim=1),) (Shard(dim=0),)",
        }


@pytest.mark.parametrize("correction", ["sds", "sds-split"])
def test_replicated_shards_and_offloaded_parameters(correction: str, pools: Pools) -> None:
    case = Case(correction)
    assert_equal_to(pools[4].run(fsdp2.replicated_shards, case), common.alone(case), 2e-6)
    assert_equal_to(pools[2].run(fsdp2.offloaded, case), common.alone(case), 2e-6)


def test_mixed_precision_computes_in_bfloat16_and_corrects_in_float32(pools: Pools) -> None:
    """bfloat16 rounds one batch otherwise than two halves, so this measures by what the correction does."""
    found, plain = (pools[2].run(fsdp2.mixed_precision, Case(correction))[0] for correction in ("sds", None))
    expected = common.alone(Case("sds"))
    names = [name for name in expected if "lora" in name]
    error = sum((found[name] - expected[name]).square().sum() for name in names)
    effect = sum((found[name] - plain[name]).square().sum() for name in names)
    assert all(found[name].dtype == torch.float32 for name in names)
    assert error < 0.1**2 * effect


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.bfloat16, 2**-8)])
@pytest.mark.parametrize("correction", EXPONENTS)
def test_gradients_are_those_of_the_formula(
    correction: str, dtype: torch.dtype, tolerance: float, pools: Pools
) -> None:
    """Of the same raw gradients, so that bfloat16 leaves one rounding."""
    for found in pools[4].run(fsdp2.corrections, Case(correction, dtype)):
        for layer in ("first", "second"):
            (A, raw_A, seen_A), (B, raw_B, seen_B) = (found[f"{layer}.lora_{side}.default.weight"] for side in "AB")
            expected = oracle.corrected(A, B, raw_A, raw_B, EXPONENTS[correction], 1e-6)
            for seen, raw, wanted in ((seen_A, raw_A, expected[0]), (seen_B, raw_B, expected[1])):
                assert seen.dtype == dtype
                scale = wanted.abs().max().item()
                torch.testing.assert_close(seen.double(), wanted, rtol=tolerance, atol=tolerance * scale)
                assert torch.equal(seen, raw) == (correction == "lora")


@pytest.mark.parametrize("correction", available_corrections())
def test_every_correction_equals_one_process_or_is_refused(correction: str, pools: Pools) -> None:
    """Those that do not say how they work row by row get whole factors."""
    case = Case(correction, torch.float64)
    if make_correction(correction).carries_moments:
        for message in pools[2].run(fsdp2.wrapping, case):
            assert message.startswith("UnsupportedCorrectionError: the factors of first[default] are sharded")
        return
    assert_equal_to(pools[2].run(fsdp2.training, case), common.alone(case), 1e-9)


@pytest.mark.parametrize("option", [("transport", "moments"), ("rebalance_every", 2)])
def test_what_happens_between_steps_needs_whole_factors(option: tuple[str, object], pools: Pools) -> None:
    case = Case("sds", options=(option,))
    for body in (fsdp2.wrapping, fsdp2.sharded_after_wrapping):
        for message in pools[2].run(body, case):
            assert message.startswith("UnsupportedCorrectionError: the factors of first[default] are sharded")
            assert "leave out transport and rebalance_every" in message


def test_diagnostics_are_those_of_one_process(pools: Pools) -> None:
    expected = fsdp2.diagnostics(Case("sds", torch.float64))
    for found in pools[2].run(fsdp2.diagnostics, Case("sds", torch.float64)):
        assert found.keys() == expected.keys()
        for name, numbers in expected.items():
            assert found[name] == pytest.approx(numbers, rel=1e-9)


SUM, TURN = "all_reduce", "all_to_all_single"
STEP = [TURN, SUM, TURN]


@pytest.mark.parametrize(
    ("correction", "along", "expected"),
    [
        ("sds", "rank", STEP),
        ("scaled", "rank", STEP),
        ("sds-split", "rank", [*STEP, *STEP]),  # once for the gradients, once for the updates
        ("sds", "columns", [SUM]),
        ("sds-split", "columns", [SUM, SUM]),
    ],
)
@pytest.mark.parametrize("pairs", [1, 7])
def test_collectives_of_a_step(correction: str, along: str, expected: list[str], pairs: int, pools: Pools) -> None:
    """As many as there are pairs or one: the same few."""
    for ours, total in pools[2].run(fsdp2.collectives, correction, pairs, along):
        assert [name for name, _ in ours] == expected
        assert total == len(expected)  # none came from DTensor


def test_one_infinite_element_stays_infinite_and_all_processes_skip(pools: Pools) -> None:
    for found in pools[2].run(fsdp2.one_element_overflows, Case("sds")):
        assert not found["finite"][:, 0].any()  # the whole column, which the correction mixes
        assert found["finite"][:, 1:].all()
        assert found["moved"] == []
        assert found["scale"] == 512.0


@pytest.mark.parametrize("update_every", [1, 5])  # with 5 the step has nothing else to add up
def test_a_gradient_that_only_some_processes_have(update_every: int, pools: Pools) -> None:
    case = Case("sds", options=(("update_every", update_every),))
    for message in pools[4].run(fsdp2.one_process_has_no_gradient, case):
        assert message.startswith(
            "UnequalGradientsError: 3 of 4 processes have a gradient of factor A of second[default]"
        )


def test_counts_of_gradients_are_read_a_step_later_on_an_accelerator() -> None:
    """Without one here: the reading is as if the device of the counts were not the CPU."""
    presence, group = Presence(), Group((0, 1), "cpu", None)  # pyright: ignore
    event = mock.Mock()
    device = mock.Mock(type="accelerator")
    counts = mock.Mock(device=device, to=lambda *_, **__: torch.tensor([2.0, 1.0]))
    with mock.patch("torch.get_device_module", return_value=mock.Mock(Event=lambda: event)):
        presence.check([("one", group, True), ("other", group, True)], [counts])
    event.record.assert_called_once()
    event.synchronize.assert_not_called()
    with pytest.raises(UnequalGradientsError, match="1 of 2 processes have a gradient of other"):
        presence.parts([], torch.zeros(1))
    event.synchronize.assert_called_once()


def test_an_adapter_that_no_process_runs(pools: Pools) -> None:
    for before, after in pools[4].run(fsdp2.adapter_that_no_process_runs, Case("sds-split")):
        moved = {name for name in before if not torch.equal(before[name], after[name])}
        assert moved == {"first.lora_A.default.weight", "first.lora_B.default.weight"}


def test_hook_mode_is_refused(pools: Pools) -> None:
    for message in pools[2].run(fsdp2.attaching, Case()):
        assert message.startswith("PairShapeError: the factors of first[default] are DTensors, sharded by FSDP2")
        assert "Use SDSPreconditioner(optimizer, model)" in message
