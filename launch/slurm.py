"""What SLURM says of a job."""

import subprocess
from typing import NamedTuple

from submitit.slurm.slurm import SlurmInfoWatcher

from uhml.errors import UserError

SECONDS = 60

WAITING = {"PENDING", "CONFIGURING", "REQUEUED", "REQUEUE_HOLD", "REQUEUE_FED", "SPECIAL_EXIT"}
ACTIVE = {"RUNNING", "COMPLETING", "SUSPENDED", "STOPPED", "RESIZING", "SIGNALING", "STAGE_OUT"}


class Job(NamedTuple):
    """A job, as SLURM sees it.

    Attributes:
        state: in SLURM's words: PENDING, RUNNING, CANCELLED, NODE_FAIL, ...; UNKNOWN where SLURM has forgotten it.
        reason: why it waits, in SLURM's words, or "".
    """

    state: str
    reason: str = ""

    @property
    def waits(self) -> bool:
        """Whether it is in the queue."""
        return self.state in WAITING

    @property
    def is_active(self) -> bool:
        """Whether it has nodes."""
        return self.state in ACTIVE


def ask(job_id: str) -> Job:
    """Return what SLURM says of a job: the controller, or for jobs of long ago, the accounting.

    Raises:
        UserError: SLURM does not answer.
    """
    # One line for each member of an array, also for those that wait.
    command = ["squeue", "--noheader", "--array", "--states=all", f"--jobs={job_id}", "--format=%T|%r"]
    try:
        answer = subprocess.run(command, capture_output=True, text=True, timeout=SECONDS, check=False)
    except (OSError, subprocess.TimeoutExpired) as e:
        raise UserError(f"SLURM cannot be asked after job {job_id} from here: {e}.") from e
    if answer.returncode and "Invalid job id" not in answer.stderr:
        raise UserError(f"SLURM cannot be asked after job {job_id}: {' '.join(answer.stderr.split())}")
    if line := answer.stdout.strip():
        state, reason = line.splitlines()[0].split("|", 1)
        return Job(state, "" if reason == "None" else reason)
    watcher = SlurmInfoWatcher()
    watcher.register_job(job_id)
    # "CANCELLED by 1000"
    return Job(watcher.get_state(job_id, mode="force").split()[0])


def cores_per_gpu(gpus_per_node: int, partition: str | None) -> int | None:
    """Return how many cores there are for each of so many GPUs of a node, on the node with fewest; None if unknown."""
    command = ["sinfo", "--noheader", "--Node", "--format=%c|%G", *([f"--partition={partition}"] if partition else [])]
    try:
        answer = subprocess.run(command, capture_output=True, text=True, timeout=SECONDS, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None
    found = [line.split("|", 1) for line in answer.stdout.splitlines()]
    cores = [int(number) for number, devices in found if "gpu" in devices and number.isdecimal()]
    return max(1, min(cores) // gpus_per_node) if cores else None


def cancel(job_id: str) -> None:
    """Cancel a job, or a whole array by its first number.

    Raises:
        UserError: SLURM will not.
    """
    answer = subprocess.run(["scancel", job_id], capture_output=True, text=True, timeout=SECONDS, check=False)
    if answer.returncode:
        raise UserError(f"SLURM does not cancel job {job_id}: {' '.join(answer.stderr.split())}")
