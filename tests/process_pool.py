"""Processes that stay up between tests and run bodies together, over gloo."""

from __future__ import annotations

import gc
import io
import tempfile
import traceback
from collections.abc import Callable
from datetime import timedelta
from multiprocessing.connection import Connection, wait
from typing import Any

import torch
import torch.distributed as dist
from torch import multiprocessing

# How long a collective waits for another process, and how long a test waits for a body.
COLLECTIVE_SECONDS = 60.0
BODY_SECONDS = 150.0


class ProcessPool:
    """Starts `size` processes, which join one process group, on first use.

    After a failed body the processes may be out of step, so they are ended and the next body gets new ones.

    Args:
        size: The number of processes.
        setup: Called in each process instead of torch's `init_process_group`, with (rank, size, folder).
    """

    def __init__(self, size: int, setup: Callable[[int, int, str], None] | None = None) -> None:
        self.size = size
        self._setup = setup or join
        self._processes: list[Any] = []
        self._pipes: list[Connection] = []
        self._folder: tempfile.TemporaryDirectory[str] | None = None

    def run(self, body: Callable[..., Any], *arguments: Any) -> list[Any]:
        """Returns what `body(*arguments)` returns in each process, by rank.

        Raises:
            AssertionError: It raised in a process, or did not end in time; with the traceback.
        """
        if not self._processes:
            self._start()
        for pipe in self._pipes:
            pipe.send((body, arguments))
        waiting = dict(zip(self._pipes, range(self.size), strict=True))
        results: dict[int, Any] = {}
        while waiting:
            ready = wait(list(waiting), timeout=BODY_SECONDS)
            if not ready:
                self._fail(f"process(es) {sorted(waiting.values())} did not end in {BODY_SECONDS:.0f} s")
            for pipe in ready:
                assert isinstance(pipe, Connection)
                rank = waiting.pop(pipe)
                try:
                    error, payload = pipe.recv()
                except (EOFError, ConnectionError):
                    self._fail(f"process {rank} died")
                if error is not None:
                    self._fail(f"process {rank}:\n{error}")
                results[rank] = torch.load(io.BytesIO(payload), weights_only=False)
        return [results[rank] for rank in range(self.size)]

    def close(self) -> None:
        """Ends the processes."""
        for pipe in self._pipes:
            try:
                pipe.send(None)
            except OSError:
                continue
        for process in self._processes:
            process.join(timeout=5)
            if process.is_alive():
                process.terminate()
        self._processes, self._pipes = [], []
        if self._folder is not None:
            self._folder.cleanup()

    def _fail(self, message: str) -> None:
        for process in self._processes:
            process.kill()
        self.close()
        raise AssertionError(message)

    def _start(self) -> None:
        context = multiprocessing.get_context("spawn")
        self._folder = tempfile.TemporaryDirectory(prefix="sdsopt-store-")
        for rank in range(self.size):
            ours, theirs = context.Pipe()
            arguments = (rank, self.size, self._folder.name, theirs, self._setup)
            process = context.Process(target=_serve, args=arguments, daemon=True)
            process.start()
            theirs.close()
            self._processes.append(process)
            self._pipes.append(ours)


def join(rank: int, size: int, folder: str) -> None:
    """Makes the default process group."""
    store = dist.FileStore(f"{folder}/store", size)
    timeout = timedelta(seconds=COLLECTIVE_SECONDS)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=size, timeout=timeout)


def _serve(rank: int, size: int, folder: str, pipe: Connection, setup: Callable[[int, int, str], None]) -> None:
    torch.set_num_threads(1)
    setup(rank, size, folder)
    while (task := pipe.recv()) is not None:
        body, arguments = task
        buffer = io.BytesIO()
        error = None
        try:
            torch.save(body(*arguments), buffer)
        except Exception:
            error = traceback.format_exc()
        pipe.send((error, buffer.getvalue()))
        # DDP must be gone before its process group: as the group's last owner it can deadlock (torch 2.13).
        gc.collect()
    dist.destroy_process_group()
