"""A trace of a run's steps, by torch's profiler."""

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile, schedule, tensorboard_trace_handler

from uhml import distributed
from uhml.reporting.report import TENSORBOARD

STEPS_BEFORE = 2
"""The first steps of a launch are like no others: memory is taken, kernels are chosen."""


@contextlib.contextmanager
def profiled(run_dir: Path, num_steps: int) -> Iterator[Callable[[], None]]:
    """Record ``num_steps`` steps of rank 0, after the first two. Yields what to call after each step.

    The trace is there once they are taken, or at the end if there are fewer; ``num_steps`` of 0 records none.
    """
    if num_steps == 0 or not distributed.is_main():
        yield lambda: None
        return
    gpu = [ProfilerActivity.CUDA] if torch.cuda.is_available() else []
    with profile(
        activities=[ProfilerActivity.CPU, *gpu],
        schedule=schedule(wait=STEPS_BEFORE - 1, warmup=1, active=num_steps, repeat=1),
        on_trace_ready=tensorboard_trace_handler(str(run_dir / TENSORBOARD)),
    ) as profiler:
        yield profiler.step
