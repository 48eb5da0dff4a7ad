"""Every engine × correction × dtype: equal to one process, or refused. The documentation's table is made of this."""

from __future__ import annotations

from functools import cache
from pathlib import Path

import pytest
import torch
from torch import Tensor

from bodies import deepspeeded
from bodies.common import Case, State
from distributed_cells import CELLS, Cell, Engine, table
from packages import package
from process_pool import ProcessPool

Pools = dict[int, ProcessPool]


@cache
def uncorrected(engine: Engine, case: Case, folder: str) -> State:
    return engine.alone(case, *((folder,) if engine.on_llama else ()))


def factors(state: State) -> Tensor:
    return torch.cat([tensor.double().flatten() for name, tensor in state.items() if "lora" in name])


@pytest.mark.parametrize("cell", [cell for cell in CELLS if not cell.refused], ids=str)
def test_equals_one_process(cell: Cell, pools: Pools, llama: Path) -> None:
    engine, case = cell.engine, cell.case
    if engine.name.startswith("DeepSpeed"):
        package("deepspeed")
    folder = (str(llama),) if engine.on_llama else ()
    results = pools[engine.processes].run(engine.training, case, *engine.arguments, *folder)
    expected = factors(engine.alone(case, *folder))
    effect = (expected - factors(uncorrected(engine, Case(None, case.dtype, case.steps), str(llama)))).norm()
    assert effect > 0.05 * expected.norm()
    for state in results:
        assert state.keys() == results[0].keys()
        assert all(torch.equal(state[name], results[0][name]) for name in state)
        assert (factors(state) - expected).norm() < cell.tolerance * effect


@pytest.mark.parametrize("cell", [cell for cell in CELLS if cell.refused], ids=str)
def test_refused(cell: Cell, pools: Pools) -> None:
    package("deepspeed")
    [stage] = cell.engine.arguments
    for hooked, wrapped in pools[2].run(deepspeeded.refusals, cell.case, stage):
        assert hooked.startswith("UnsupportedCorrectionError: 'sds-split' maps the step")
        assert wrapped.startswith("StaleParametersError: the optimizer no longer holds any of the 4 LoRA factors")
        assert "call sdsopt.attach(model) after deepspeed.initialize" in wrapped


def test_the_documentation_prints_this_table() -> None:
    page = Path(__file__).parents[2] / "docs" / "distributed.md"
    assert table() in page.read_text(encoding="utf8")
