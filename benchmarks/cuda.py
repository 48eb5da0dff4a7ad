"""Everything about the correction that needs a GPU to be measured, in one run of a few minutes.

    python benchmarks/cuda.py [--out DIR]

It has not been run yet: no GPU was at hand when it was written. It prints

- the table of `sdsopt bench`: all 224 pairs of Llama-3-8B at r = 16 and 256, in bfloat16 and float32, beside peers,
  and the share in a whole training step;
- kernels launched by a step, and whether anything in it waited for the device (`set_sync_debug_mode("error")`);
- the time over the floor: A, B, gA, gB read once and gA, gB written once, at this GPU's own copy speed;
- whether a step that was captured into a CUDA graph does what the step does;
- the inverse-root methods side by side.
"""

from __future__ import annotations

import argparse
import copy
import runpy
import sys
from pathlib import Path
from statistics import median

import torch
from torch.autograd import DeviceType
from torch.optim import AdamW
from torch.profiler import ProfilerActivity, profile

from sdsopt import SDSPreconditioner
from sdsopt.bench import Settings, bench
from sdsopt.bench.adapter import Adapter
from sdsopt.bench.shapes import SHAPES
from sdsopt.bench.timing import Stopwatch

DEVICE = "cuda"
CORRECTIONS = ("sds", "sds-split", "scaled")
STOPWATCH = Stopwatch(DEVICE, "wall")


def llama(rank: int, dtype: torch.dtype) -> Adapter:
    shape = SHAPES["llama-3-8b"]
    adapter = Adapter(shape, shape.blocks, rank, dtype, DEVICE)
    adapter.backward()
    return adapter


def copy_bytes_per_second() -> float:
    """Read and written bytes of a large copy."""
    source = torch.empty(2**30, dtype=torch.uint8, device=DEVICE)
    target = torch.empty_like(source)
    times = [STOPWATCH.seconds(lambda: target.copy_(source)) for _ in range(20)]
    return 2 * source.nbytes / median(times)


def launches(optimizer: torch.optim.Optimizer) -> int:
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as profiler:
        optimizer.step()
        torch.cuda.synchronize()
    return sum(event.count for event in profiler.key_averages() if event.device_type == DeviceType.CUDA)


def waits(optimizer: torch.optim.Optimizer) -> str:
    torch.cuda.set_sync_debug_mode("error")
    try:
        optimizer.step()
    except RuntimeError as error:
        return f"yes: {error}"
    finally:
        torch.cuda.set_sync_debug_mode("default")
    return "no"


def against_the_floor() -> None:
    speed = copy_bytes_per_second()
    print(f"\nThis GPU copies {speed / 1e9:.0f} GB/s (read and written).\n")
    print("| correction | r | dtype | correction, ms | floor, ms | x floor | kernels | waits for the device |")
    print("|---|---:|---|---:|---:|---:|---:|---|")
    for rank in (16, 256):
        for dtype in (torch.bfloat16, torch.float32):
            adapter = llama(rank, dtype)
            # Capturable, so that AdamW itself keeps its step counters on the device.
            adamw = AdamW(adapter.parameters(), lr=1e-6, fused=True, capturable=True)
            adamw.step()
            floor = 3 * adapter.num_bytes / speed
            for name in CORRECTIONS:
                optimizer = SDSPreconditioner(adamw, adapter, name)
                optimizer.step()
                rounds = [STOPWATCH.seconds(optimizer.step) - STOPWATCH.seconds(adamw.step) for _ in range(30)]
                seconds = median(rounds)
                cells = f"{1e3 * seconds:.2f} | {1e3 * floor:.3f} | {seconds / floor:.1f}"
                print(f"| {name} | {rank} | {dtype} | {cells} | {launches(optimizer)} | {waits(optimizer)} |")


def captured_step_is_the_step(name: str) -> bool:
    """Replays a captured step three times beside three ordinary ones."""
    eager = llama(16, torch.float32)
    graphed = copy.deepcopy(eager)
    for parameter, twin in zip(eager.parameters(), graphed.parameters(), strict=True):
        twin.grad = None if parameter.grad is None else parameter.grad.clone()
    optimizers = [
        SDSPreconditioner(AdamW(model.parameters(), lr=1e-4, capturable=True), model, name)
        for model in (eager, graphed)
    ]
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        optimizers[1].step()  # allocates the state
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):  # records, and does not run
        optimizers[1].step()
    for _ in range(2):
        graph.replay()
    for _ in range(3):
        optimizers[0].step()
    return all(torch.allclose(p, q) for p, q in zip(eager.parameters(), graphed.parameters(), strict=True))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", default="bench-cuda", help="folder for bench.json and bench.md (%(default)s)")
    out = Path(parser.parse_args().out)
    if not torch.cuda.is_available():
        print("torch finds no GPU, and all of this needs one; on a CPU use `sdsopt bench`", file=sys.stderr)
        return 1
    torch.manual_seed(0)
    report = bench(
        Settings(
            device=DEVICE,
            ranks=(16, 256),
            dtypes=("bfloat16", "float32"),
            memory=60.0,
            training_step=True,
            growth=True,
        ),
        lambda what: print(f"measuring {what}", file=sys.stderr),
    )
    report.save(out)
    print(report.markdown())
    against_the_floor()
    for name in CORRECTIONS:
        print(f"\nA captured step of {name} is the step: {captured_step_is_the_step(name)}")
    print("\nInverse roots:\n")
    sys.argv = ["roots.py", DEVICE]
    runpy.run_path(str(Path(__file__).with_name("roots.py")), run_name="__main__")
    return 0


if __name__ == "__main__":
    sys.exit(main())
