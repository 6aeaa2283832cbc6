"""What a launch leaves in the run's folder, under ``launch/``.

    launch/job.json     which job the run is, on what
    launch/config.yaml  the config, resolved
    launch/snapshot/    the code
    launch/jobs/        submitit's files, and what the ranks printed

The runs of a sweep share snapshot and jobs, in the sweep's folder, where ``launch/sweep.json`` lists them.
"""

import dataclasses
import json
from pathlib import Path
from typing import Literal, TypeVar

from uhml.files import write_whole
from uhml.plain import Text, read_json
from uhml.run.status import JobNumber

FOLDER = "launch"

T = TypeVar("T", "JobRecord", "SweepRecord")

Cluster = Literal["slurm", "local"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class JobRecord:
    """The last job of a run."""

    cluster: Cluster
    job_id: JobNumber
    """SLURM's number, with ``_i`` in an array; the process that looks after the ranks, on cluster "local"."""
    host: str
    """From where it was launched; where it runs, on cluster "local"."""
    submitted_at: str
    """UTC, ISO 8601."""
    num_ranks: int
    jobs: Text
    """Folder of submitit's files and the ranks' output."""
    cancelled: bool = False
    """Whether the user has asked it to end, on cluster "local"; SLURM knows that by itself."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class SweepRecord:
    """The runs of a sweep."""

    runs: list[Text]
    """Names of their folders, in order."""
    values: list[dict[str, Text]]
    """The values of the swept keys in each, as they were typed."""


def write_record(run_dir: Path, record: JobRecord | SweepRecord) -> None:
    """Write ``record`` into the folder of its run or sweep; who reads meanwhile reads the one before."""
    write_whole(_path(run_dir, type(record)), json.dumps(dataclasses.asdict(record), indent=2) + "\n")


def read_record(run_dir: Path, kind: type[T]) -> T | None:
    """Return the record of a run or sweep, or None where there is none.

    Raises:
        Damaged: the file is not one that :func:`write_record` wrote.
    """
    return read_json(_path(run_dir, kind), kind)


def _path(run_dir: Path, kind: type) -> Path:
    return run_dir / FOLDER / ("sweep.json" if kind is SweepRecord else "job.json")
