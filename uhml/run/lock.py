"""One process at a time in a run's folder. Imports no torch."""

import contextlib
import errno
import fcntl
import logging
import time
from pathlib import Path
from typing import IO

from uhml.errors import UserError
from uhml.run.status import read_status

logger = logging.getLogger(__name__)

LOCK = "lock"

NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)
HELD = (errno.EACCES, errno.EAGAIN)


def is_taken(folder: Path, file: IO[str]) -> bool:
    """Lock a file in a folder, until it is closed or this process ends, and return whether another process has it.

    A lock of POSIX's, not of BSD's: worker processes would keep that one alive after this process is killed.
    """
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as e:
        if e.errno in HELD:
            return True
        if e.errno not in NO_LOCKS:
            raise
        logger.warning("The file system of %s has no locks: nothing keeps a second command out of it.", folder)
    return False


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
