"""Files that are never found half written, where they can be written, and folders that one process has."""

import codecs
import contextlib
import csv
import errno
import fcntl
import logging
import os
import secrets
import stat
import tokenize
import zipfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import IO, Any

from uhml.errors import UserError

logger = logging.getLogger(__name__)

NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)
HELD = (errno.EACCES, errno.EAGAIN)

NO_ARRAY = (
    ValueError,
    EOFError,
    TypeError,
    AttributeError,
    OverflowError,
    MemoryError,
    tokenize.TokenError,
    zipfile.BadZipFile,
)
"""What numpy raises, where it is not to unpickle, of files that are none of its arrays."""

PLOT_SUFFIXES = (".png", ".svg", ".pdf", ".jpg")
"""Of figures without photographs in them."""


@contextlib.contextmanager
def opened_aside(path: Path) -> Iterator[IO[bytes]]:
    """Open a file that takes its place at ``path`` when the block ends well; otherwise nothing has happened.

    It is written aside, forced to the disk and renamed: who opens ``path`` at any time, also after the machine lost its
    power, finds all of what was there before or all of what is there now. Of several processes that write to ``path``
    at a time, on whatever machines, the last has it.
    """
    aside = path.with_name(f"{path.name}.{secrets.token_hex(8)}.partial")
    try:
        with aside.open("wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        aside.replace(path)
        # The new name itself is on the disk only once the folder is.
        descriptor = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
    finally:
        aside.unlink(missing_ok=True)


def csv_writer(file: IO[bytes], names: Sequence[str]) -> Any:
    """Return a writer of rows of CSV, in which these names of files may be, into a file."""
    # Which end of line is quoted Python's versions do not agree on.
    style: Any = {"quoting": csv.QUOTE_ALL} if any("\r" in name for name in names) else {}
    return csv.writer(codecs.getwriter("utf-8")(file, "surrogateescape"), lineterminator="\n", **style)


def regular_file(path: str, flags: int) -> int:
    """Open a file, and no pipe or device, for ``open``: to open a pipe would wait until somebody writes into it."""
    number = os.open(path, flags | os.O_NONBLOCK)
    kind = os.fstat(number).st_mode
    if not (stat.S_ISREG(kind) or stat.S_ISDIR(kind)):  # of a folder, open itself says so
        os.close(number)
        raise OSError("it is no regular file")
    return number


def write_whole(path: Path, text: str) -> None:
    """Write a small file, as :func:`opened_aside` does."""
    with opened_aside(path) as file:
        file.write(text.encode())


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


def check_out(path: Path, option: str, suffixes: Sequence[str], overwrite: bool) -> None:
    """Look before the work whether its result can be written.

    Args:
        path: the file to be.
        option: what the user calls it, such as "--out".
        suffixes: one of which it must have; none for any name.
        overwrite: whether it may be there already.

    Raises:
        UserError: it cannot.
    """
    if suffixes and path.suffix.lower() not in suffixes:
        raise UserError(f"{option} {path} must end in {' or '.join(suffixes)}.")
    if not path.absolute().parent.is_dir():
        raise UserError(f"{option} {path}: there is no folder {path.absolute().parent} to write to.")
    if path.is_dir():
        raise UserError(f"{option} {path} is a folder: name a file.")
    if path.exists() and not overwrite:
        raise UserError(f"{option} {path} is there already: name another file, or add --overwrite.")


def expanded(path: str | Path) -> Path:
    """Return the path with ``~`` and ``~user`` made the folders that they stand for.

    Raises:
        UserError: there is no such folder.
    """
    try:
        return Path(path).expanduser()
    except RuntimeError as e:
        raise UserError(f"{path}: nobody knows what folder ~ stands for in it: write that out.") from e


def user_cache(name: str) -> Path:
    """Return where this user's copies of things lie that can be made again: ``~/.cache/uhml/name``, or as XDG says."""
    return Path(os.environ.get("XDG_CACHE_HOME") or expanded("~/.cache")) / "uhml" / name
