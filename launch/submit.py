"""Hand runs to SLURM, or to processes on this machine, by submitit."""

import contextlib
import dataclasses
import datetime
import os
import re
import shlex
import shutil
import socket
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from submitit import AutoExecutor, Job
from submitit.core.utils import FailedJobError, environment_variables

from launch import snapshot
from launch.job import TrainingJob
from launch.record import FOLDER, Cluster, JobRecord, write_record
from uhml.config import Config, dump_config
from uhml.errors import UserError

# submitit gives up after so many time limits; a run of weeks in slots of hours meets many.
ENDLESS = 1_000_000


@dataclasses.dataclass(frozen=True, kw_only=True)
class Resources:
    """What a run needs of the cluster, and for how long at a time."""

    cluster: Cluster = "slurm"
    nodes: int = 1
    gpus_per_node: int = 0
    tasks_per_node: int = 1
    """Ranks on a node: one for each GPU, where there are GPUs."""
    cpus_per_task: int | None = None
    mem: str | None = None
    """Of a node, in SLURM's words: 64G."""
    minutes: int
    """After which the job must make room. It is signalled before, and requeued."""
    signal_delay: int
    """Seconds from that signal to the end."""
    partition: str | None = None
    sbatch: dict[str, str | bool] = dataclasses.field(default_factory=dict)
    """Any other options of sbatch; True for those without a value."""

    @property
    def num_ranks(self) -> int:
        """Number of processes of a run."""
        return self.nodes * self.tasks_per_node


def script(resources: Resources, run_dir: Path, num_runs: int) -> str:
    """Return the script that would be submitted, and touch nothing.

    Raises:
        UserError: there is no SLURM here.
    """
    executor: Any = _executor(resources, run_dir)._executor
    if num_runs > 1:
        executor.parameters["map_count"] = num_runs
    return str(executor._make_submission_file_text(executor._submitit_command_str, uid=""))


def submit(
    resources: Resources, run_dir: Path, runs: dict[Path, Config], allow_change: Sequence[str] = ()
) -> list[JobRecord]:
    """Submit runs that need the same resources: one job, or one array of jobs.

    Args:
        resources: of each run.
        run_dir: the folder that gets the code's snapshot and submitit's files.
        runs: the configs by the folders of the runs; ``run_dir`` itself where there is one run.
        allow_change: keys of the config that may differ from an unfinished run's.

    Raises:
        UserError: a folder cannot be written, or SLURM does not take the job; nothing is left then that was not there.
    """
    with _undone_on_error([run_dir, *runs]):
        executor = _executor(resources, run_dir)
        jobs: list[TrainingJob] = []
        for own_dir, config in runs.items():
            (own_dir / FOLDER).mkdir(parents=True, exist_ok=True)
            (own_dir / FOLDER / "config.yaml").write_text(dump_config(config))
            jobs.append(TrainingJob(own_dir, own_dir / FOLDER / "config.yaml", _code(run_dir), allow_change))
        snapshot.take_snapshot(_code(run_dir))
        with _apart_from_terminal(resources, run_dir) if resources.cluster == "local" else contextlib.nullcontext():
            submitted: Sequence[Job[Any]] = executor.submit_array(jobs) if len(jobs) > 1 else [executor.submit(jobs[0])]
    now = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    records = [
        JobRecord(
            cluster=resources.cluster,
            job_id=job.job_id,
            host=socket.gethostname(),
            submitted_at=now,
            num_ranks=resources.num_ranks,
            jobs=str(executor.folder),
        )
        for job in submitted
    ]
    for own_dir, record in zip(runs, records, strict=True):
        write_record(own_dir, record)
    return records


def _code(run_dir: Path) -> Path:
    return run_dir / FOLDER / "snapshot"


def _variables(resources: Resources, run_dir: Path) -> dict[str, str]:
    """Return the environment of the ranks, as far as it is not the user's."""
    return {**snapshot.environment(_code(run_dir)), "OMP_NUM_THREADS": str(resources.cpus_per_task or 1)}


def _executor(resources: Resources, run_dir: Path) -> AutoExecutor:
    # A signal that arrives before Python listens would be the end.
    python = f"""sh -c 'trap "" TERM USR2; exec "$@"' sh {shlex.quote(sys.executable)}"""
    try:
        executor = AutoExecutor(
            run_dir / FOLDER / "jobs",
            cluster=resources.cluster,
            slurm_max_num_timeout=ENDLESS,
            slurm_python=python,
            local_python=python,
        )
    except RuntimeError as e:
        raise UserError("There is no SLURM on this machine: launch from a cluster's login node.") from e
    executor.update_parameters(
        name=run_dir.name,
        nodes=resources.nodes,
        tasks_per_node=resources.tasks_per_node,
        gpus_per_node=resources.gpus_per_node or None,
        cpus_per_task=resources.cpus_per_task,
        timeout_min=resources.minutes,
        slurm_mem=resources.mem,
        slurm_partition=resources.partition,
        slurm_signal_delay_s=resources.signal_delay,
        # A rank that dies takes its job along; srun asks for CPUs by itself since SLURM 22.05.
        slurm_srun_args=["--kill-on-bad-exit=1"]
        + ([f"--cpus-per-task={resources.cpus_per_task}"] if resources.cpus_per_task else []),
        slurm_setup=[f"export {name}={shlex.quote(value)}" for name, value in _variables(resources, run_dir).items()],
        slurm_additional_parameters={"requeue": True, **resources.sbatch},
    )
    return executor


@contextlib.contextmanager
def _undone_on_error(folders: Sequence[Path]) -> Iterator[None]:
    """Remove folders that were not there before, if what is done with them fails."""
    new = [folder for folder in folders if not folder.exists()]
    try:
        yield
    except BaseException as e:
        for folder in new:
            shutil.rmtree(folder, ignore_errors=True)
        if isinstance(e, FailedJobError):
            raise UserError(f"SLURM does not take the job: {_sbatchs_words(str(e))}") from e
        if isinstance(e, OSError):
            # Of a folder that is copied, shutil tells of every file.
            first = e.args[0][0][2] if isinstance(e, shutil.Error) else e
            raise UserError(f"The run's folder cannot be written: {first}") from e
        raise


def _sbatchs_words(printed: str) -> str:
    """Return why sbatch refuses, in one line."""
    lines = [re.sub(r"^sbatch: (error: |fatal: )?", "", line.strip()) for line in printed.splitlines()]
    said = "; ".join(line for line in lines if line and "--help" not in line) or printed.strip()
    return f"{said}; is SLURM_CONF set?" if "configuration source" in said else said


@contextlib.contextmanager
def _apart_from_terminal(resources: Resources, run_dir: Path) -> Iterator[None]:
    """Give processes that are started meanwhile the ranks' environment, and a file in the place of the terminal."""
    log = run_dir / FOLDER / "jobs" / "controller.log"
    terminal = os.dup(1), os.dup(2)
    with log.open("a") as file, environment_variables(**_variables(resources, run_dir)):
        # They outlive this command, and whoever reads its output must not wait for them.
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
        try:
            yield
        finally:
            for number, saved in enumerate(terminal, start=1):
                os.dup2(saved, number)
                os.close(saved)
