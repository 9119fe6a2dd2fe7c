"""Run a function on several real processes joined by gloo, and collect what each returns."""

from __future__ import annotations

import datetime
import multiprocessing
import os
import pickle
import tempfile
import time
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch._dynamo  # noqa: F401  (optimizers import it: once here, not in every forked process)
import torch.distributed as dist


def run_ranks(world: int, function: Callable[[int], Any], timeout: float = 240.0) -> list[Any]:
    """Call `function(rank)` in `world` forked processes with a gloo default group; results by rank.

    Forked, so that closures and monkeypatches carry over and torch is not imported again. Raises
    AssertionError with the first traceback when a rank fails, dies, or is not done after `timeout` seconds.
    """
    context = multiprocessing.get_context("fork")
    with tempfile.TemporaryDirectory() as folder:
        ranks = []
        for rank in range(world):
            ours, theirs = context.Pipe()
            process = context.Process(target=_child, args=(function, rank, world, folder, timeout, theirs))
            process.start()
            theirs.close()
            ranks.append((process, ours))
        try:
            return _collect(ranks, timeout)
        finally:
            for process, _ in ranks:
                process.kill()
                process.join()


def _child(
    function: Callable[[int], Any], rank: int, world: int, folder: str, timeout: float, pipe: Connection
) -> None:
    try:
        store = f"file://{Path(folder) / 'store'}"
        limit = datetime.timedelta(seconds=timeout)
        dist.init_process_group("gloo", init_method=store, rank=rank, world_size=world, timeout=limit)
        pipe.send_bytes(pickle.dumps((True, function(rank))))
        pipe.recv_bytes()  # leave together: a rank that exits early breaks the others' connections
    except BaseException:
        pipe.send_bytes(pickle.dumps((False, traceback.format_exc())))
    os._exit(0)


def _collect(ranks: list[tuple[Any, Connection]], timeout: float) -> list[Any]:
    deadline = time.monotonic() + timeout
    results: dict[int, Any] = {}
    while len(results) < len(ranks):
        for rank, (_, pipe) in enumerate(ranks):
            if rank in results or not pipe.poll(0.005):
                continue
            try:
                # From our own fork, as Pipe.recv would: but whole tensors, where Pipe.send shares their memory.
                done, value = pickle.loads(pipe.recv_bytes())
            except EOFError:
                done, value = False, "the process died"
            assert done, f"rank {rank} failed:\n{value}"
            results[rank] = value
        missing = [rank for rank in range(len(ranks)) if rank not in results]
        assert time.monotonic() < deadline, f"ranks {missing} are not done after {timeout} s"
    for _, pipe in ranks:
        pipe.send_bytes(b"leave")
    return [results[rank] for rank in range(len(ranks))]
