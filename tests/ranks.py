"""Run a function on several ranks, as torchrun would, from within a test."""

import multiprocessing
import os
import pickle
import time
import traceback
from collections.abc import Callable
from multiprocessing.connection import wait
from typing import Any

import pytest
from torch.distributed import TCPStore  # noqa: TID251 (the part that torchrun's agent plays)

from uhml import distributed

# Forked from a server that has imported the slow modules once and run nothing: as fast as fork, and no thread of the
# test's own process is copied half-way.
CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(["pytest", "hypothesis", "uhml.cli", "uhml.train"])


def run_ranks(function: Callable[..., Any], world_size: int, *args: Any, timeout: float = 120) -> list[Any]:
    """Call ``function(*args)`` on every rank of a process group of its own and return the results by rank.

    Args:
        function: a top-level function of an importable module; runs inside :func:`uhml.distributed.process_group`.
        world_size: number of ranks, all on the CPU of this machine.
        args: for the function; they are pickled, and so is what it returns.
        timeout: seconds until the test fails and all ranks are killed.

    The test fails with the traceback of the rank that failed first; the others are killed, wherever they wait.
    """
    # As torchrun's agent does: the store is ours, on a port the system chose, and all ranks are its clients. A port
    # picked here for rank 0 to open might be somebody else's by then.
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    environment = {
        "WORLD_SIZE": str(world_size),
        "LOCAL_WORLD_SIZE": str(world_size),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(store.port),
        "TORCHELASTIC_USE_AGENT_STORE": "True",
        "TORCHELASTIC_RESTART_COUNT": "0",
    }
    processes, pipes = [], {}
    try:
        for rank in range(world_size):
            receiver, sender = CONTEXT.Pipe(duplex=False)
            ours = {**environment, "RANK": str(rank), "LOCAL_RANK": str(rank)}
            start_method = multiprocessing.get_start_method()
            process = CONTEXT.Process(target=_rank, args=(sender, start_method, ours, function, args), daemon=False)
            process.start()
            sender.close()
            processes.append(process)
            pipes[receiver] = rank
        return _results(pipes, world_size, time.monotonic() + timeout)
    finally:
        for process in processes:
            process.kill()
            process.join()
        for pipe in pipes:
            pipe.close()


def _results(pipes: dict[Any, int], world_size: int, deadline: float) -> list[Any]:
    results: list[Any] = [None] * world_size
    waiting = set(pipes)
    while waiting:
        ready = wait(waiting, max(0, deadline - time.monotonic()))
        if not ready:
            silent = sorted(pipes[pipe] for pipe in waiting)
            pytest.fail(f"ranks {silent} of {world_size} did not end in time: does a collective wait for ever?")
        failures = []
        for pipe in ready:
            rank = pipes[pipe]
            try:
                went_well, when, results[rank] = pickle.loads(pipe.recv_bytes())
            except EOFError:
                went_well, when, results[rank] = False, time.monotonic(), "The process died without a word."
            if not went_well:
                failures.append((when, rank))
            waiting.remove(pipe)
        if failures:
            _, rank = min(failures)
            pytest.fail(f"rank {rank} of {world_size} failed first:\n{results[rank]}", pytrace=False)
    return results


def _rank(
    sender: Any, start_method: str, environment: dict[str, str], function: Callable[..., Any], args: tuple[Any, ...]
) -> None:
    # What a rank starts itself, workers of a loader, it starts as everywhere else.
    multiprocessing.set_start_method(start_method, force=True)
    os.environ.update(environment)

    def tell(went_well: bool, result: Any) -> None:
        # Whole, not by multiprocessing's own way for tensors, whose memory would be gone with this process.
        sender.send_bytes(pickle.dumps((went_well, time.monotonic(), result)))

    try:
        with distributed.process_group("cpu"):
            try:
                result = function(*args)
            except BaseException:
                # Before this rank leaves the group, at which the others fail in their turn.
                tell(False, traceback.format_exc())
                return
        tell(True, result)
    except BaseException:
        tell(False, traceback.format_exc())
