"""What every rank of a launched run does: train, and see to the requeue when it is preempted. Pickled by submitit."""

import logging
import os
import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from submitit import JobEnvironment
from submitit.helpers import Checkpointable, TorchDistributedEnvironment

from launch import slurm, snapshot
from uhml import interruption, logs
from uhml.config import load_config
from uhml.errors import UserError
from uhml.interruption import Preempted
from uhml.plain import read_json

logger = logging.getLogger("uhml.launch")


class TrainingJob(Checkpointable):
    """One run, from its first start to its end, over any number of preemptions.

    Args:
        run_dir: the run's folder, with its config and maybe its checkpoints.
        config: the resolved config file.
        code: the snapshot that the ranks must take their code from.
        allow_change: keys of the config that may differ from an unfinished run's.
    """

    def __init__(self, run_dir: Path, config: Path, code: Path, allow_change: Sequence[str] = ()) -> None:
        self.run_dir, self.config, self.code, self.allow_change = run_dir, config, code, allow_change

    def __call__(self) -> dict[str, Any]:
        """Train, or go on with the training, and return what ``result.json`` holds.

        Exits with 2 after a user's error, and after a preemption with what submitit or the signal asks for.
        """
        # Set by submitit just now. It must not run inside a signal: it ends rank 0 while the others go on.
        requeue = signal.getsignal(signal.SIGUSR2)
        assert callable(requeue), "submitit handles the signal of preemption"
        with interruption.handled():
            here = JobEnvironment()
            if here.cluster == "local":
                TorchDistributedEnvironment().export(set_cuda_visible_devices=False, overwrite=True)
                os.environ["MASTER_ADDR"] = "127.0.0.1"
            with logs.to_terminal():
                try:
                    return self._train()
                # An OSError is a full disk or a file taken away, as on the command line.
                except (UserError, OSError) as e:
                    logger.error("error: %s", e)
                    sys.exit(2)
                except Preempted as e:
                    logger.info("%s", e)
                    preemption = e
        # All ranks are here, and the run is saved. Were the first of them to end badly, SLURM would kill the others.
        if here.global_rank > 0:
            sys.exit(0)
        if _must_ask_for_requeue(here, preemption):
            requeue(preemption.signal, None)
        sys.exit(preemption.exit_status)

    def _train(self) -> dict[str, Any]:
        if not snapshot.is_in_use(self.code):
            raise UserError(f"The job takes its code from {sys.path}, not from its snapshot {self.code}.")
        finished = read_json(self.run_dir / "result.json", dict[str, Any])
        if finished is not None:
            return finished  # requeued by SLURM just as it had come to its end
        from uhml.train import train

        return train(load_config(self.config), self.run_dir, allow_change=self.allow_change)


def _must_ask_for_requeue(here: JobEnvironment, preemption: Preempted) -> bool:
    """Whether the job goes on only if it asks to be requeued.

    SLURM sends SIGTERM for two reasons. In the grace before a preemption the job is still running, and whoever ends
    then by himself has simply ended, as far as SLURM is concerned. But once SLURM ends the job, cancelled or to be
    requeued, it knows what it wants.
    """
    if here.cluster == "slurm":
        return slurm.ask(here.job_id).state == "RUNNING"
    return preemption.signal == signal.SIGUSR2
