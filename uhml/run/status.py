"""``status.json``: what a run is doing, for whoever looks from outside. Rank 0 writes, always the whole file."""

import contextlib
import dataclasses
import datetime
import json
import os
import socket
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Field

from uhml.files import write_whole
from uhml.interruption import Preempted
from uhml.plain import Damaged, Text, read_json

FILE = "status.json"
SECONDS_BETWEEN_WRITES = 1.0

State = Literal["starting", "running", "preempted", "finished", "failed"]
Phase = Literal["embed", "cluster", "train", "evaluate"]


JobNumber = Annotated[str, Field(pattern=r"^[1-9]\d*(_\d+)?$")]
"""SLURM's number of a job, with ``_i`` in an array; or a process's."""


def _checked_time(said: str) -> str:
    if datetime.datetime.fromisoformat(said).tzinfo is None:
        raise ValueError("it names no time zone")
    return said


@dataclasses.dataclass(frozen=True, kw_only=True)
class RunStatus:
    """A run at one moment."""

    state: State
    phase: Phase
    step: int
    """Steps taken."""
    num_steps: int
    """Steps in all."""
    restarts: int
    """How often the run was started again."""
    seconds_per_step: float | None
    """Recent, re-clustering not counted; None before the second step of a launch."""
    updated_at: Annotated[str, AfterValidator(_checked_time)]
    """UTC, ISO 8601."""
    started_at: str
    """Of the first launch."""
    host: str
    """Of rank 0."""
    pid: Annotated[int, Field(gt=0, lt=2**31)]
    """Of rank 0."""
    world_size: int
    error: Text | None
    """One line, where the state is "failed"."""
    slurm_job: JobNumber | None = None
    """The job that starts the run again when it is preempted, under ``slurm/train.sbatch``."""


def read_status(run_dir: Path) -> RunStatus | None:
    """Return the status of the run in a folder, or None where no run has told one.

    With its result a run is finished, also where it was killed before it could say so.

    Raises:
        Damaged: the file is not one that :func:`write_status` wrote.
    """
    try:
        status = read_json(run_dir / FILE, RunStatus)
    except Damaged as e:
        raise Damaged(f"{run_dir / FILE} is no status of a run; remove it, and the run can go on: {e}") from e
    if status is not None and (run_dir / "result.json").exists():
        return dataclasses.replace(status, state="finished", error=None)
    return status


def write_status(run_dir: Path, status: RunStatus) -> None:
    """Put ``status`` in the place of the one before; who reads meanwhile reads the one or the other."""
    write_whole(run_dir / FILE, json.dumps(dataclasses.asdict(status), indent=2) + "\n")


class StatusReport:
    """Keeps ``status.json`` of a running run up to date, at most once a second while it trains.

    Args:
        run_dir: the folder of the run.
        num_steps: steps in all.
        world_size: number of ranks.
        active: whether to write at all: on rank 0.
        before: the status that an earlier launch of this run left, if there was one.
    """

    def __init__(
        self, run_dir: Path, num_steps: int, world_size: int, *, active: bool, before: RunStatus | None
    ) -> None:
        self.run_dir, self.active = run_dir, active
        self.written = self.stepped = -float("inf")
        now = _now()
        self.status = RunStatus(
            state="starting",
            phase="embed",
            step=0 if before is None else before.step,
            num_steps=num_steps,
            restarts=0 if before is None else before.restarts + 1,
            seconds_per_step=None,
            updated_at=now,
            started_at=now if before is None else before.started_at,
            host=socket.gethostname(),
            pid=os.getpid(),
            world_size=world_size,
            error=None,
            slurm_job=os.environ.get("UHML_SLURM_JOB") or None,
        )
        self.tell()

    def tell(self, **changes: Any) -> None:
        """Change fields and write."""
        self.status = dataclasses.replace(self.status, updated_at=_now(), **changes)
        if self.active:
            write_status(self.run_dir, self.status)
            self.written = time.monotonic()

    def phase(self, phase: Phase) -> None:
        """Tell that something else is being done now, if it is."""
        if (self.status.state, self.status.phase) == ("running", phase):
            return
        self.stepped = -float("inf")
        self.tell(state="running", phase=phase)

    def step(self, step: int) -> None:
        """Tell that ``step`` steps are taken."""
        now = time.monotonic()
        took, self.stepped = now - self.stepped, now
        pace = self.status.seconds_per_step
        if took < float("inf"):
            pace = took if pace is None else 0.9 * pace + 0.1 * took
        self.status = dataclasses.replace(self.status, step=step, seconds_per_step=pace)
        if now - self.written > SECONDS_BETWEEN_WRITES:
            self.tell()


@contextlib.contextmanager
def reported(report: StatusReport) -> Iterator[StatusReport]:
    """Tell at the end how the run ended."""
    try:
        yield report
    except Preempted:
        report.tell(state="preempted")
        raise
    except BaseException as e:
        # On a full disk or a folder taken away, the error itself is what must be told.
        with contextlib.suppress(OSError):
            report.tell(state="failed", error=" ".join(f"{e}".split()) or type(e).__name__)
        raise
    else:
        report.tell(state="finished")


def _now() -> str:
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
