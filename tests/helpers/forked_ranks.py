"""Ranks that are forked from the test process (torch and DeepSpeed are imported once) and talk over gloo."""

import gc
import importlib
import multiprocessing
import os
import socket
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest

PATIENCE = 250  # seconds for all ranks together to end; below pytest's own limit, which would leave them running


@pytest.fixture(scope="module", autouse=True)
def import_once() -> Iterator[None]:
    """What `deepspeed.initialize` imports takes seconds: once, before the forks. For the modules that import this name."""
    import torch

    for name in ("deepspeed", "torch._dynamo", "deepspeed.runtime.zero.muon.muon_optimizer", "peft"):
        importlib.import_module(name)
    torch.set_num_threads(1)
    gc.collect()
    gc.freeze()  # DeepSpeed collects garbage often; the forks need not look at all that was imported
    yield
    gc.unfreeze()


def run_ranks(world: int, body: Callable[..., Any], *arguments: Any, wait: bool = True) -> Any:
    """`body(*arguments)` on `world` forked ranks; what rank 0 returns (or, without waiting, the processes)."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    context = multiprocessing.get_context("fork")
    results = context.SimpleQueue()
    ranks = [context.Process(target=_rank, args=(r, world, port, results, body, arguments)) for r in range(world)]
    for rank in ranks:
        rank.start()
    if not wait:
        return ranks
    end = time.monotonic() + PATIENCE
    for rank in ranks:
        rank.join(max(0.0, end - time.monotonic()))
        if rank.is_alive():  # it waits for one that died; left alone, it would keep pytest from ending
            rank.kill()
            rank.join()
    assert [rank.exitcode for rank in ranks] == [0] * world
    return results.get()


def _rank(rank: int, world: int, port: int, results: Any, body: Callable[..., Any], arguments: tuple) -> None:
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(world), LOCAL_RANK=str(rank))
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), LOCAL_SIZE=str(world))
    import deepspeed
    import torch

    torch.set_num_threads(1)  # a fork has none of the threads that its parent's OpenMP counts on
    # Its C++ all_reduce is compiled at start, under a lock file that a killed process leaves behind for all later ones.
    importlib.import_module("deepspeed.comm.torch").build_shm_op = lambda: None
    # A fork replaces torch's thread pool at its first use, and two threads that read weights must not both be the first.
    torch.set_num_threads(1)
    deepspeed.init_distributed("gloo", auto_mpi_discovery=False, verbose=False)
    result = body(*arguments)
    if rank == 0:
        results.put(result)
