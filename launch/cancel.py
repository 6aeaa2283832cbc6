"""``uhml cancel``: end a run, wherever it runs or waits. It saves first; launched again, it goes on."""

import argparse
import dataclasses
import logging
import os
import signal
import socket
import sys
from pathlib import Path

from launch import slurm
from launch.overview import present_job
from launch.record import write_record
from launch.status import existing_run, members
from uhml.errors import UserError
from uhml.run.lock import holder
from uhml.run.status import FILE as STATUS
from uhml.run.status import read_status

logger = logging.getLogger("uhml.launch")

EXAMPLES = """\
examples:
  uhml cancel runs/mine
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of ``uhml cancel``."""
    parser.epilog = EXAMPLES
    parser.add_argument("run_dir", type=Path, metavar="RUN", help="folder of a run or of a sweep")


def run(args: argparse.Namespace) -> None:
    """Cancel the job, or ask the processes to end.

    Raises:
        UserError: there is nothing to end, or it cannot be reached from here.
    """
    views = {folder: existing_run(folder) for folder in members(args.run_dir)}
    under_way = [folder for folder, view in views.items() if view.is_under_way]
    if not under_way:
        states = " and ".join(sorted({view.state for view in views.values()}))
        raise UserError(f"{args.run_dir} is {states}: there is nothing to cancel.")
    for folder in under_way:
        _cancel(folder)


def _cancel(run_dir: Path) -> None:
    status = read_status(run_dir)
    job = present_job(run_dir, status)
    if job is not None and job.cluster == "slurm":
        slurm.cancel(job.job_id)
        logger.info("Cancelled job %s of %s.", job.job_id, run_dir)
        return
    if job is not None:
        host, pid = job.host, int(job.job_id)
    else:
        assert status is not None, "what is under way has a job or has said something"
        host, pid = status.host, status.pid
        # The number may be another's by now, or the file a stranger's: the system knows who is at work there.
        if host == socket.gethostname() and sys.platform == "linux" and holder(run_dir) != pid:
            raise UserError(
                f"{run_dir}: process {pid}, which its {STATUS} names, is not seen to have the folder. If you know that "
                f"it is the run's, kill -TERM {pid} has it save and end."
            )
    if host != socket.gethostname():
        raise UserError(f"{run_dir} runs on {host}: cancel it there.")
    try:
        os.kill(pid, signal.SIGTERM)
    except (ProcessLookupError, PermissionError) as e:
        raise UserError(f"{run_dir}: process {pid} cannot be asked to end: {e.strerror}.") from e
    if job is not None:
        write_record(run_dir, dataclasses.replace(job, cancelled=True))
    logger.info("Asked process %d of %s to save and end.", pid, run_dir)
