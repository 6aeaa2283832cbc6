"""This process among others, as torchrun or SLURM put it into the environment, and in its machine. Imports no torch."""

import contextlib
import ctypes
import os
import re
import sys
from collections.abc import Iterator
from typing import NamedTuple

from threadpoolctl import ThreadpoolController

STEP = {"SLURM_STEP_ID", "SLURM_STEP_TASKS_PER_NODE", "SLURM_NODEID", "SLURM_PROCID", "SLURM_LOCALID"}


class Place(NamedTuple):
    """A process among those of one run.

    Attributes:
        launcher: "torchrun", "slurm", or "single" for a process by itself.
        rank: over all nodes.
        world_size: number of processes over all nodes.
        local_rank: on this node.
        local_world_size: number of processes on this node.
    """

    launcher: str
    rank: int = 0
    world_size: int = 1
    local_rank: int = 0
    local_world_size: int = 1


def place() -> Place:
    """Return this process's place: by torchrun's variables, then by SLURM's, then as a single one."""
    env = os.environ
    if env.get("RANK") and env.get("WORLD_SIZE"):
        world_size = int(env["WORLD_SIZE"])
        local = int(env.get("LOCAL_RANK", 0)), int(env.get("LOCAL_WORLD_SIZE", 1))
        return Place("torchrun", int(env["RANK"]), world_size, *local)
    # A shell under salloc and a batch script know of the job's tasks without being one: only srun's steps are.
    # Half of the variables, as a container may pass on, name no place either.
    world_size = int(env.get("SLURM_NTASKS", 1)) if env.keys() >= STEP else 1
    if world_size > 1:
        here = _tasks_per_node(env["SLURM_STEP_TASKS_PER_NODE"])[int(env["SLURM_NODEID"])]
        return Place("slurm", int(env["SLURM_PROCID"]), world_size, int(env["SLURM_LOCALID"]), here)
    return Place("single")


def _tasks_per_node(said: str) -> list[int]:
    """Spell out SLURM's list of tasks: "2(x3),1" is [2, 2, 2, 1]."""
    tasks: list[int] = []
    for part in said.split(","):
        found = re.fullmatch(r"(\d+)(?:\(x(\d+)\))?", part)
        if found is None:
            raise ValueError(f"SLURM_STEP_TASKS_PER_NODE={said} is not understood")
        tasks += [int(found[1])] * int(found[2] or 1)
    return tasks


def cores() -> int:
    """Return the number of cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


@contextlib.contextmanager
def one_thread_of_openblas() -> Iterator[None]:
    """Within it, the OpenBLAS that scipy brings uses one thread.

    Its threads spin while they wait, on the cores that torch's threads and loader processes need: fitting a head on two
    busy cores took from 1.5 to 12 seconds instead of 0.3.
    """
    with ThreadpoolController().select(internal_api="openblas").limit(limits=1):
        yield


def keep_freed_memory() -> None:
    """Have the C library keep what is freed for the next step. With glibc; elsewhere nothing happens.

    Left alone, it gives every large block back to the system, which clears each page anew before it hands it out again:
    a third of a training step's time on a CPU. The process stays as large as it ever was.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt is not None:
        m_trim_threshold, m_mmap_threshold, never = -1, -3, -1
        # 32 MiB is the most that an older glibc takes.
        if mallopt(m_mmap_threshold, 2**30) or mallopt(m_mmap_threshold, 2**25):
            mallopt(m_trim_threshold, never)


def give_back_freed_memory() -> None:
    """Have the C library give what is freed back to the system for once. With glibc; elsewhere nothing happens.

    A process that is forked gets all of it, and holds on to it when this one writes there anew.
    """
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform == "linux" else None
    if trim is not None:
        trim(0)
