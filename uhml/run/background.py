"""Work in a process of its own, while this one goes on.

Not in a thread, which would share the interpreter's lock and torch's settings with the training steps and could not be
stopped at a signal. Not in a fork, which would take over threads, locks and a GPU half-way. Work and answer travel in
files without a name, which nobody else can open and which are gone with the processes.
"""

import logging
import os
import subprocess
import sys
import tempfile
import traceback
from collections.abc import Callable
from typing import IO, Any, NamedTuple

import torch

from uhml.errors import UserError
from uhml.run import interruption

logger = logging.getLogger(__name__)


class _Question(NamedTuple):
    work: Callable[[], Any]
    num_threads: int
    log_level: int


class _Answer(NamedTuple):
    result: Any
    users_error: str | None
    """What a ``UserError`` said."""
    error: str | None
    """The traceback of any other."""
    said: list[tuple[str, int, str]]
    """Logger, level and text of what was logged."""


class Background:
    """Does one piece of work at a time. A context manager: at its end, work that is not done is dropped."""

    def __init__(self) -> None:
        self._process: subprocess.Popen[bytes] | None = None
        self._answer: IO[bytes] | None = None

    def __enter__(self) -> "Background":
        return self

    def __exit__(self, *_: object) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.wait()

    def start(self, work: Callable[[], Any]) -> None:
        """Begin ``work``, a picklable function of a module's, and return at once.

        Raises:
            UserError: there is no room for what the work is about.
        """
        self._answer = tempfile.TemporaryFile()  # noqa: SIM115 (closed when it is read)
        with tempfile.TemporaryFile() as question:
            try:
                torch.save(_Question(work, torch.get_num_threads(), logging.getLogger().getEffectiveLevel()), question)
            except (OSError, RuntimeError) as e:
                raise UserError(
                    f"The folder for temporary files, {tempfile.gettempdir()}, cannot be written ({e}): make room, "
                    "name another by TMPDIR, or take hierarchy.overlap_steps=0, which needs none."
                ) from e
            question.seek(0)
            modules = os.pathsep.join(filter(None, sys.path))
            # Signals of the terminal are for the run.
            with interruption.workers_starting():
                self._process = subprocess.Popen(
                    [sys.executable, "-P", "-m", __name__],
                    stdin=question,
                    stdout=self._answer,
                    env={**os.environ, "PYTHONPATH": modules},
                )

    def result(self) -> Any:
        """Wait for the work, repeat what it logged, and return what it returned.

        Raises:
            UserError: the work raised one, or its process was killed.
            RuntimeError: the work raised anything else.
        """
        assert self._process is not None, "start() comes first"
        assert self._answer is not None
        status = self._process.wait()
        self._process = None
        if status:
            raise UserError(
                f"The process that clusters in the background ended with status {status}, killed perhaps for want of "
                "memory, or with no room for temporary files (TMPDIR): take hierarchy.overlap_steps=0, which needs no second process, and start the same command "
                "again with --allow-change hierarchy.overlap_steps to go on from the last checkpoint."
            )
        with self._answer as file:
            file.seek(0)
            answer: _Answer = torch.load(file, weights_only=False)
        for name, level, text in answer.said:
            logging.getLogger(name).log(level, "%s", text)
        if answer.users_error is not None:
            raise UserError(answer.users_error)
        if answer.error is not None:
            error = RuntimeError(answer.error.strip().rpartition("\n")[2])
            error.add_note(f"In the process that clusters in the background:\n{answer.error}")
            raise error
        return answer.result


class _Remembered(logging.Handler):
    """Keeps what is logged."""

    def __init__(self) -> None:
        super().__init__()
        self.said: list[tuple[str, int, str]] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.said.append((record.name, record.levelno, record.getMessage()))


def _do(question: _Question) -> _Answer:
    remembered = _Remembered()
    logging.getLogger().addHandler(remembered)
    logging.getLogger().setLevel(question.log_level)
    torch.set_num_threads(question.num_threads)
    result = users_error = error = None
    try:
        result = question.work()
    except UserError as e:
        users_error = str(e)
    except Exception:
        error = traceback.format_exc()
    return _Answer(result, users_error, error, remembered.said)


def _main() -> None:
    interruption.leave_to_parent()
    # What prints shall not print into the answer.
    with os.fdopen(os.dup(1), "wb") as to, os.fdopen(0, "rb") as question:
        os.dup2(2, 1)
        torch.save(_do(torch.load(question, weights_only=False)), to)


if __name__ == "__main__":
    # Not this module, whose classes have the wrong names when it is run, but the one that the parent knows.
    from uhml.run import background

    background._main()
