"""Launch runs of seconds as users do, and look at what they leave."""

import json
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from uhml.run.status import RunStatus, read_status

CONFIG = """\
data: {num_classes: 12, image_size: 32, fit: squash, num_workers: 0}
model: {backbone: test_efficientnet.r160_in1k, weights: random, embedding_dim: 16}
hierarchy: {recluster_every: 5, num_neighbors: 5, cut_by: counts, cuts: [30, 6, 3]}
mining: {pictures_per_cluster: 2}
train: {num_steps: 50, global_batch_size: 16, log_every: 1, checkpoint_every: 10, device: cpu}
eval: {recall_at: [1, 4]}
"""


def write_config(folder: Path, glyphs_root: Path) -> Path:
    """Write a config of a run of a few seconds on the glyphs."""
    path = folder / "tiny.yaml"
    path.write_text(CONFIG.replace("data: {", f"data: {{root: {glyphs_root}, "))
    return path


def uhml(*arguments: Any, expect: int = 0) -> str:
    """Run a command of uhml's, check its exit status, and return what it printed."""
    command = [sys.executable, "-m", "uhml", *map(str, arguments)]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=240, check=False)
    assert ended.returncode == expect, f"{' '.join(command)} ended with {ended.returncode}:\n{ended.stderr}"
    return ended.stdout + ended.stderr


def view(run_dir: Path) -> dict[str, Any]:
    """Return what ``uhml status --json`` says of a run."""
    (found,) = json.loads(uhml("status", "--json", run_dir))
    return found


def wait_for(run_dir: Path, what: str, condition: Callable[[RunStatus], bool], timeout: float = 120) -> RunStatus:
    """Wait until the run says of itself what ``condition`` wants; a run that fails fails the test at once."""
    deadline = time.monotonic() + timeout
    status = None
    while time.monotonic() < deadline:
        status = read_status(run_dir)
        if status is not None and condition(status):
            return status
        if status is not None and status.state == "failed":
            break
        time.sleep(0.1)
    return pytest.fail(f"{run_dir} was to be {what} and is {status}\n{printed(run_dir)}", pytrace=False)


def is_finished(status: RunStatus) -> bool:
    """For :func:`wait_for`."""
    return status.state == "finished"


def has_taken(step: int) -> Callable[[RunStatus], bool]:
    """For :func:`wait_for`: training, with so many steps taken."""
    return lambda status: status.state == "running" and status.phase == "train" and status.step >= step


def printed(run_dir: Path) -> str:
    """Return what rank 0 printed."""
    return "\n".join(path.read_text() for path in sorted(run_dir.glob("launch/jobs/*_0_log.err")))


def assert_same_run(one: Path, other: Path) -> None:
    """Check that two runs are the same to the last bit: all that was measured, and the whole last checkpoint."""
    assert (one / "metrics.jsonl").read_bytes() == (other / "metrics.jsonl").read_bytes()
    checkpoints = [sorted((run / "checkpoints").glob("step-*.pt"))[-1] for run in (one, other)]
    assert checkpoints[0].name == checkpoints[1].name
    mine, theirs = (torch.load(path, weights_only=True) for path in checkpoints)
    # How long it took may differ, and in how many event files TensorBoard has been told.
    assert mine.pop("seconds") > 0 < theirs.pop("seconds")
    assert mine.pop("recorded").pop("metrics.jsonl") == theirs.pop("recorded").pop("metrics.jsonl")
    assert mine["model"], "there is something to compare"
    _assert_same(mine, theirs, "")


def _assert_same(mine: Any, theirs: Any, where: str) -> None:
    assert type(mine) is type(theirs), where
    if isinstance(mine, torch.Tensor):
        assert torch.equal(mine, theirs), f"{where} differs"
    elif isinstance(mine, dict):
        assert mine.keys() == theirs.keys(), where
        for key in mine:
            _assert_same(mine[key], theirs[key], f"{where}/{key}")
    elif isinstance(mine, (list, tuple)):
        assert len(mine) == len(theirs), where
        for i, (a, b) in enumerate(zip(mine, theirs, strict=True)):
            _assert_same(a, b, f"{where}/{i}")
    else:
        assert mine == theirs, f"{where} differs: {mine}, {theirs}"
