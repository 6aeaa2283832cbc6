"""How runs stand: what SLURM says of their jobs, and what they say of themselves in ``status.json``."""

import dataclasses
import datetime
import os
import re
import socket
import subprocess
import sys
from pathlib import Path
from typing import Literal

from launch import slurm
from launch.record import JobRecord, read_record
from uhml.logs import last_error
from uhml.reporting.runs import read_result
from uhml.run.lock import is_locked
from uhml.run.status import RunStatus, read_status

State = Literal[
    "queued", "starting", "running", "stopping", "requeued", "preempted", "cancelled", "finished", "failed", "lost"
]
UNDER_WAY = ("queued", "starting", "running", "stopping", "requeued")
GONE = "its processes are gone"

# A run tells its step every second or so while it trains, and nothing while it clusters.
SECONDS_OF_SILENCE = {"train": 15 * 60, "embed": 6 * 3600, "cluster": 24 * 3600, "evaluate": 6 * 3600}


@dataclasses.dataclass(frozen=True, kw_only=True)
class View:
    """A run, as its user wants to know it."""

    run: str
    state: State
    """queued: waits for its first start. requeued: waits to go on. preempted: saved, but nothing will start it again.
    lost: said nothing of an end, and is gone."""
    note: str = ""
    """Why it waits, or what went wrong."""
    phase: str | None = None
    step: int | None = None
    num_steps: int | None = None
    seconds_left: float | None = None
    """Of training steps; clustering and scoring come on top."""
    restarts: int = 0
    cluster: str | None = None
    job_id: str | None = None
    updated_at: str | None = None
    """When the run last said something."""
    recall: dict[str, float] | None = None
    """Of a finished run: Recall@K for the least K, ``frozen``, ``untrained`` and ``trained``; None without labels."""
    recall_at: int | None = None
    """That K."""

    @property
    def is_under_way(self) -> bool:
        """Whether something runs or waits that will go on with the run."""
        return self.state in UNDER_WAY


def look(run_dir: Path) -> View | None:
    """Return how the run in a folder stands, or None where there is none.

    Raises:
        UserError: SLURM does not answer.
    """
    status = read_status(run_dir)
    record = present_job(run_dir, status)
    if record is None and status is None:
        return None
    view = View(run=str(run_dir), state="lost")
    if record is not None:
        view = dataclasses.replace(view, cluster=record.cluster, job_id=record.job_id)
    if status is not None:
        view = _with_status(view, run_dir, status)
    state, note = _state(run_dir, record, status)
    left = view.seconds_left if state == "running" else None
    return dataclasses.replace(view, state=state, note=note, seconds_left=left)


def _with_status(view: View, run_dir: Path, status: RunStatus) -> View:
    left = None
    if status.seconds_per_step is not None:
        left = (status.num_steps - status.step) * status.seconds_per_step
    recall, recall_at = _recall(run_dir) if status.state == "finished" else (None, None)
    return dataclasses.replace(
        view,
        phase=status.phase,
        step=status.step,
        num_steps=status.num_steps,
        seconds_left=left,
        restarts=status.restarts,
        updated_at=status.updated_at,
        recall=recall,
        recall_at=recall_at,
    )


def _state(run_dir: Path, record: JobRecord | None, status: RunStatus | None) -> tuple[State, str]:
    if status is not None and status.state == "finished":
        return "finished", ""
    if record is not None and record.cluster == "slurm":
        return _state_in_slurm(record, status, slurm.ask(record.job_id))
    if record is not None and record.host == socket.gethostname():
        return _state_of_local_job(record, status, is_controller(int(record.job_id)))
    if status is None:
        return "lost", "it was launched elsewhere and has said nothing"
    if status.state in ("preempted", "failed"):
        return status.state, status.error or ""
    if status.host == socket.gethostname() and not _is_running_here(run_dir, status):
        return "lost", GONE
    silence = _silence(status)
    if silence and status.host != socket.gethostname() and not is_locked(run_dir):
        return "lost", GONE  # or copied from where it was
    return status.state, silence or f"on {status.host}"


def _state_in_slurm(record: JobRecord, status: RunStatus | None, job: slurm.Job) -> tuple[State, str]:
    if job.waits:
        # Between two slots the run has said "preempted", or, when its node died, nothing.
        return ("queued" if status is None else "requeued"), job.reason
    told = None if status is None or _is_of_an_earlier_launch(record, status) else status.state
    if told == "failed":
        assert status is not None
        return "failed", status.error or ""
    if job.state == "COMPLETING":
        return "stopping", ""
    if job.is_active:
        if status is None or told in (None, "preempted", "starting"):
            return "starting", ""
        return "running", _silence(status)
    if job.state == "CANCELLED":
        return "cancelled", ""
    words = _last_words(record)
    if told == "preempted" and not (words and job.state == "FAILED"):
        return "preempted", f"SLURM says {job.state}; launch it again to go on"
    if not Path(record.jobs).is_dir():
        return "failed", f"SLURM says {job.state}; {record.jobs} is gone: was the run's folder moved? Launch it again"
    return "failed", words or f"SLURM says {job.state}; see {record.jobs}"


def _state_of_local_job(record: JobRecord, status: RunStatus | None, alive: bool) -> tuple[State, str]:
    told = None if status is None or _is_of_an_earlier_launch(record, status) else status
    if told is not None and told.state == "failed":
        return "failed", told.error or ""
    if alive:
        if record.cancelled:
            return "stopping", ""
        if told is None or told.state == "preempted":
            return "starting", ""
        return told.state, _silence(told)
    if told is not None and told.state == "preempted":
        return "preempted", ""
    if words := _last_words(record):
        return "failed", words
    return ("cancelled", "") if record.cancelled else ("lost", GONE)


def _is_of_an_earlier_launch(record: JobRecord, status: RunStatus) -> bool:
    """Whether the run has said nothing yet since its job was submitted."""
    return status.updated_at < record.submitted_at  # both in UTC and in one format, which sorts by time


def _last_words(record: JobRecord) -> str:
    """The error that rank 0 printed before the run could say anything of itself, or that it was killed."""
    try:
        printed = (Path(record.jobs) / f"{record.job_id}_0_log.err").read_text(errors="replace")
    except OSError:
        return ""
    # Of the rank's own; srun, which has the last word, says only that tasks have ended.
    if own := last_error(printed):
        return own
    if re.search(r"^srun: error: .*: Killed$", printed, re.MULTILINE):
        return "a process was killed, perhaps for want of memory: launch it again to go on"
    return ""


def _silence(status: RunStatus) -> str:
    """Say so when a run has said nothing for longer than it should."""
    now = datetime.datetime.now(datetime.UTC)
    silent = (now - datetime.datetime.fromisoformat(status.updated_at)).total_seconds()
    if silent < SECONDS_OF_SILENCE[status.phase]:
        return ""
    return f"not heard of for {readable(silent)}"


def _recall(run_dir: Path) -> tuple[dict[str, float] | None, int | None]:
    result = read_result(run_dir)
    if result is None:
        return None, None
    rows = {"frozen": result.frozen, "untrained": result.start, "trained": result.trained}
    recall = {name: row.recall_at_k for name, row in rows.items() if row is not None}
    if len(recall) < len(rows):
        return None, None
    least = min(recall["trained"], key=int)
    return {name: values[least] for name, values in recall.items()}, int(least)


def present_job(run_dir: Path, status: RunStatus | None) -> JobRecord | None:
    """Return the last job of a run; None where there was none, or where the run goes on here without it."""
    job = read_record(run_dir, JobRecord)
    if status is not None and status.slurm_job and (job is None or not _is_of_an_earlier_launch(job, status)):
        job = _of_batch_script(status.slurm_job, run_dir, status)
    if job is None or status is None or not _is_running_here(run_dir, status):
        return job
    if job.cluster == "slurm":
        there = slurm.ask(job.job_id)
        return job if there.is_active or there.waits else None
    return job if job.host == socket.gethostname() and is_controller(int(job.job_id)) else None


def _of_batch_script(job_id: str, run_dir: Path, status: RunStatus) -> JobRecord:
    """Return the job of a run that ``slurm/train.sbatch`` has started, as if ``uhml launch`` had."""
    return JobRecord(
        cluster="slurm",
        job_id=job_id,
        host=status.host,
        submitted_at=status.started_at,
        num_ranks=status.world_size,
        jobs=str(run_dir / "logs"),
    )


def _is_running_here(run_dir: Path, status: RunStatus) -> bool:
    """Whether the process that has last told how a run stands is on this machine, and at work in its folder."""
    return status.host == socket.gethostname() and _is_alive(status.pid) and is_locked(run_dir)


def _is_alive(pid: int) -> bool:
    """Whether there is a process of a number, which may be another's by now."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


def is_controller(pid: int) -> bool:
    """Whether the process that looks after the ranks of a local job is there; its number may be another's by now."""
    if sys.platform == "linux":  # where slim images have no ps
        try:
            command = Path(f"/proc/{pid}/cmdline").read_bytes()
        except OSError:
            return False
    else:
        # -ww: as wide as it is, whatever COLUMNS says, for a long path to Python comes before the name.
        ps = ["ps", "-ww", "-p", str(pid), "-o", "command="]
        command = subprocess.run(ps, capture_output=True, check=False).stdout
    return b"submitit.local._local" in command


def readable(seconds: float) -> str:
    """Return a duration for people: "3 d 4 h", "2 h 5 min", "40 s"."""
    units, whole = (("d", 86400), ("h", 3600), ("min", 60), ("s", 1)), round(seconds)
    for i, (unit, size) in enumerate(units):
        if whole >= size or unit == "s":
            many, rest = divmod(whole, size)
            smaller = units[i + 1 : i + 2]
            finer = (
                f" {rest // smaller[0][1]} {smaller[0][0]}"
                if smaller and unit != "min" and rest // smaller[0][1]
                else ""
            )
            return f"{many} {unit}{finer}"
    raise AssertionError
