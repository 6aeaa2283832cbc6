"""The folder of a run: made, or entered again to go on, by one launch at a time and never over a run that is done."""

import contextlib
import os
import shutil
from collections.abc import Iterator, Sequence
from fnmatch import fnmatch
from pathlib import Path
from typing import NamedTuple

from uhml import distributed, logs
from uhml.config import Config, dump_config, load_config, refuse_changes
from uhml.errors import UserError
from uhml.files import write_whole
from uhml.run.checkpoint import newest_checkpoint
from uhml.run.lock import LOCK, lock
from uhml.run.status import FILE as STATUS
from uhml.run.status import RunStatus, StatusReport, read_status, reported

LAUNCH = "launch"
HIERARCHIES = "hierarchies"

CONTENTS = (
    "config.yaml",
    "metrics.jsonl",
    "result.json",
    "checkpoints",
    HIERARCHIES,
    "tensorboard",
    "logs",
    "nan-step-*.pt",
    STATUS,
    LOCK,
    LAUNCH,
    "evaluation",
    "search",
)
"""All that a run leaves, and the commands that look into it, but for what a killed one was about to rename."""

UNFINISHED = ("*.partial", "checkpoints/*.partial", f"{HIERARCHIES}/*.partial")


class OpenRun(NamedTuple):
    """A run's folder, open for this launch.

    Attributes:
        folder: the folder.
        checkpoint: what to go on from, the same on every rank; None to begin.
        status: to be told what is being done.
    """

    folder: Path
    checkpoint: Path | None
    status: StatusReport


@contextlib.contextmanager
def open_run_dir(
    run_dir: Path, config: Config, overwrite: bool = False, allow_change: Sequence[str] = ()
) -> Iterator[OpenRun]:
    """Make the folder of a new run, or find where an unfinished one stopped. A collective.

    Every rank's log goes to ``logs/rank<r>.log``, and rank 0 keeps ``status.json`` while the run is open. A run that
    ends by the user's mistake before its first checkpoint leaves no folder, if it made one.

    Args:
        run_dir: the folder.
        config: written to ``config.yaml``, with everything resolved, where the run begins.
        overwrite: begin anew, and remove what an earlier run left.
        allow_change: keys of the config that may differ from the unfinished run's.

    Raises:
        UserError: the folder holds a finished run, a run of another config, a run that goes on elsewhere or something
            else, or cannot be written.
    """
    with contextlib.ExitStack() as stack:
        checkpoint, before, is_new = distributed.from_main(
            lambda: _prepare(run_dir, config, overwrite, allow_change, stack)
        )
        if distributed.is_main() and is_new:
            stack.push(lambda kind, *_: _remove_unbegun(run_dir, kind))
        stack.enter_context(logs.to_file(run_dir / "logs" / f"rank{distributed.rank()}.log"))
        status = StatusReport(
            run_dir,
            config.train.num_steps,
            distributed.world_size(),
            active=distributed.is_main(),
            before=before,
        )
        stack.enter_context(reported(status))
        stack.enter_context(distributed.lost_ranks_told())
        yield OpenRun(run_dir, checkpoint, status)


def _prepare(
    run_dir: Path, config: Config, overwrite: bool, allow_change: Sequence[str], stack: contextlib.ExitStack
) -> tuple[Path | None, RunStatus | None, bool]:
    """Return the checkpoint to go on from, the status of the launch before, and whether the folder is a new one."""
    try:
        os.fspath(run_dir.absolute()).encode()
    except UnicodeEncodeError as e:
        raise UserError(f"--run-dir {os.fspath(run_dir)!a} is no name in UTF-8, which TensorBoard asks for.") from e
    if run_dir.exists() and not run_dir.is_dir():
        raise UserError(f"--run-dir {run_dir} is a file: name a folder, new or of an earlier run.")
    try:
        present = sorted(p.name for p in run_dir.iterdir()) if run_dir.is_dir() else []
        strange = [name for name in present if not any(fnmatch(name, known) for known in CONTENTS + UNFINISHED)]
        if strange:
            raise UserError(f"{run_dir} holds {strange[0]!r}, which no run leaves: name another folder by --run-dir.")
        is_new = not run_dir.exists()
        if set(present) - {LAUNCH} and LOCK not in present and not overwrite:
            raise UserError(
                f"{run_dir} holds {present[0]!r} but no run to go on with: name another folder by --run-dir, or add "
                "--overwrite."
            )
        run_dir.mkdir(parents=True, exist_ok=True)
        lock(run_dir, stack)
        if not overwrite and (run_dir / "result.json").exists():
            raise UserError(
                f"{run_dir} holds a finished run: name another folder by --run-dir, or add --overwrite. "
                f"model.init_from={run_dir} in another folder starts from its weights."
            )
        try:
            newest = None if overwrite else newest_checkpoint(run_dir / "checkpoints")
            checkpoint = None if newest is None else newest[0]
        except UserError as e:
            raise UserError(f"{e} Begin anew with --overwrite.") from e
        before = None if overwrite else read_status(run_dir)
        if checkpoint is None:
            if not overwrite and (copies := sorted((run_dir / "checkpoints").glob("*.pt"))):
                raise UserError(f"{copies[0]} is of no step's name: move it elsewhere, or add --overwrite.")
            # An earlier launch may have ended before there was anything to go on from: what it said stays.
            _empty(run_dir, keep=(LOCK, LAUNCH) if overwrite else (LOCK, LAUNCH, STATUS, "logs"))
        else:
            # Which was right for the ranks that there were.
            refuse_changes(load_config(run_dir / "config.yaml", num_ranks=1), config, allow_change)
            if (taken := int(checkpoint.stem.removeprefix("step-"))) > config.train.num_steps:
                raise UserError(f"train.num_steps={config.train.num_steps}: the run has taken {taken} steps already.")
            # Trees of later steps, too: with a changed config they may never be found again.
            later = [path for path in run_dir.glob(f"{HIERARCHIES}/*.npz") if path.stem > checkpoint.stem]
            for path in (*later, *(path for part in UNFINISHED for path in run_dir.glob(part))):
                path.unlink()
        for name in ("checkpoints", HIERARCHIES, "logs"):
            (run_dir / name).mkdir(exist_ok=True)
        if checkpoint is None:
            record_config(run_dir, config)
    except OSError as e:
        raise UserError(f"The run's folder {run_dir} cannot be written: {e}") from e
    return checkpoint, before, is_new


def record_config(run_dir: Path, config: Config) -> None:
    """Write the resolved config into a run's folder: of a run that goes on once its checkpoint is known to fit it."""
    write_whole(run_dir / "config.yaml", dump_config(config))


def _empty(run_dir: Path, keep: Sequence[str]) -> None:
    for path in run_dir.iterdir():
        if path.name not in keep:
            shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()


def _remove_unbegun(run_dir: Path, error: type[BaseException] | None) -> None:
    """Leave no folder behind a mistyped option. What a launcher put there meanwhile stays, with all that tells why."""
    if error is None or not issubclass(error, UserError):
        return
    if not (run_dir / LAUNCH).exists() and not any((run_dir / "checkpoints").iterdir()):
        shutil.rmtree(run_dir)
