"""One process at a time in a run's folder. Imports no torch."""

import contextlib
import fcntl
import os
import struct
import sys
import time
from pathlib import Path
from typing import IO

from uhml.errors import UserError
from uhml.files import is_taken, regular_file
from uhml.run.status import read_status

LOCK = "lock"


def lock(run_dir: Path, stack: contextlib.ExitStack) -> None:
    """Keep every other launch out of the folder until this process ends, however it ends.

    Raises:
        UserError: another process has it.
    """
    file: IO[str] = stack.enter_context((run_dir / LOCK).open("a"))
    if is_taken(run_dir, file):
        # Somebody may just have been looking.
        time.sleep(0.1)
        if not is_taken(run_dir, file):
            return
        running = None
        with contextlib.suppress(UserError):
            running = read_status(run_dir)
        where = f" (host {running.host}, process {running.pid})" if running else ""
        raise UserError(
            f"{run_dir} is in use by another launch{where}: wait until it ends, or name another folder by --run-dir."
        )


def holder(run_dir: Path) -> int | None:
    """Return the process of this machine that is in a run's folder; None where there is none, or it cannot be known."""
    if sys.platform != "linux":
        return None
    # The C library's struct flock: kind, from where, start, length, process.
    form = "hhqqi4x"
    try:
        with open(run_dir / LOCK, "rb", opener=regular_file) as file:
            asked = struct.pack(form, fcntl.F_WRLCK, os.SEEK_SET, 0, 0, 0)
            kind, _, _, _, process = struct.unpack(form, fcntl.fcntl(file, fcntl.F_GETLK, asked))
    except OSError:
        return None
    return None if kind == fcntl.F_UNLCK else process


def is_locked(run_dir: Path) -> bool:
    """Return whether another process is in a run's folder; where that cannot be known, that one is.

    Not for the process that has the lock, which would lose it by this.
    """
    try:
        with (run_dir / LOCK).open("r+") as file:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except FileNotFoundError:
        return False
    except OSError:
        return True
    return False
