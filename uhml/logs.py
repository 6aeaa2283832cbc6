"""Log lines: rank 0's on the terminal, every rank's in a file of its own."""

import contextlib
import errno
import logging
import re
import sys
from collections.abc import Iterator
from pathlib import Path

from tqdm import tqdm

from uhml.environment import place
from uhml.interruption import Preempted

logger = logging.getLogger(__name__)


def shown(text: str) -> str:
    """Return a line, such as a file's name, as a terminal can show it: without control characters or broken UTF-8."""
    return "".join(letter if letter.isprintable() else ascii(letter)[1:-1] for letter in text)


class _AboveProgressBars(logging.Handler):
    """Writes lines to stderr without tearing a progress bar apart."""

    def emit(self, record: logging.LogRecord) -> None:
        if sys.stderr is None:  # closed, and tqdm would write to the standard output instead
            return
        try:
            # Of a file's name, control characters are shown, not obeyed.
            tqdm.write("\n".join(map(shown, self.format(record).split("\n"))), file=sys.stderr)
        except OSError as e:
            # The terminal was closed: the run, which is about to end by SIGHUP, still has its own log.
            if e.errno != errno.EIO:
                raise


@contextlib.contextmanager
def to_terminal() -> Iterator[None]:
    """Show uhml's own messages, and others' warnings, on the terminal of rank 0; of other ranks only errors."""
    handler = _AboveProgressBars()
    # From the environment, as this comes before there is a process group.
    handler.setLevel(logging.INFO if place().rank == 0 else logging.ERROR)
    with _attached(handler, "%(asctime)s %(message)s", "%H:%M:%S"):
        logging.captureWarnings(True)
        try:
            yield
        finally:
            logging.captureWarnings(False)


def last_error(printed: str) -> str | None:
    """Return the last error in what a process wrote to its terminal, where the command line and jobs tell of one."""
    errors = re.findall(r"^\d\d:\d\d:\d\d error: (.+)$", printed, re.MULTILINE)
    return errors[-1] if errors else None


class _Kept(logging.FileHandler):
    """A log of which a full disk takes the rest: whatever ends the run by it is told on the terminal, once."""

    def handleError(self, record: logging.LogRecord) -> None:
        if not isinstance(sys.exc_info()[1], OSError):
            super().handleError(record)


@contextlib.contextmanager
def to_file(path: Path) -> Iterator[None]:
    """Write everything that is logged in this process to ``path`` too, and the traceback if it ends in an error."""
    with _attached(
        _Kept(path, encoding="utf-8", errors="backslashreplace"),
        "%(asctime)s %(levelname)s %(name)s: %(message)s",
    ):
        try:
            yield
        except Preempted as e:
            logger.debug("%s", e)
            raise
        except BaseException:
            # At a level that the terminal does not show: what it needs to say there, the command line says.
            logger.debug("the run ended in an error", exc_info=True)
            raise


@contextlib.contextmanager
def _attached(handler: logging.Handler, line: str, date: str | None = None) -> Iterator[None]:
    handler.setFormatter(logging.Formatter(line, date))
    logging.getLogger("uhml").setLevel(logging.DEBUG)
    logging.getLogger().addHandler(handler)
    try:
        yield
    finally:
        logging.getLogger().removeHandler(handler)
        handler.close()
