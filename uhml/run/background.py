"""Work in a process of its own, while this one goes on.

Not in a thread, which would share the interpreter's lock and torch's settings with the training steps, and could not be
stopped at a signal. Not in a fork, which would take over threads, locks and a GPU half-way. Work and answer travel in
files without a name, which nobody else can open and which are gone with the processes; a byte on a pipe tells that one
is there.
"""

import contextlib
import logging
import os
import subprocess
import sys
import tempfile
import traceback
from collections.abc import Callable
from typing import Any, NamedTuple

import torch

from uhml import interruption
from uhml.errors import UserError
from uhml.progress import silence


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
    """Does one piece of work at a time, all in one process. A context manager: at its end, work not done is dropped."""

    def __init__(self) -> None:
        self._stack = contextlib.ExitStack()
        self._process: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> "Background":
        return self

    def __exit__(self, *_: object) -> None:
        if self._process is not None:
            self._process.kill()
        self._stack.close()

    def start(self, work: Callable[[], Any]) -> None:
        """Begin ``work``, a picklable function of a module's, and return at once.

        Raises:
            UserError: there is no room for what the work is about, or the process cannot be started or was killed.
        """
        question = _Question(work, torch.get_num_threads(), logging.getLogger().getEffectiveLevel())
        try:
            if self._process is None:
                self._question = self._stack.enter_context(tempfile.TemporaryFile())  # noqa: SIM115
                self._answer = self._stack.enter_context(tempfile.TemporaryFile())  # noqa: SIM115
            _put(self._question.fileno(), question)
        except (OSError, RuntimeError) as e:
            raise UserError(
                f"The folder for temporary files, {tempfile.gettempdir()}, cannot be written ({e}): make room, name "
                "another by TMPDIR, or take hierarchy.overlap_steps=0, which needs none."
            ) from e
        if self._process is None:
            self._process = self._stack.enter_context(_launch(self._question.fileno(), self._answer.fileno()))
        assert self._process.stdin is not None
        try:
            os.write(self._process.stdin.fileno(), b"?")
        except BrokenPipeError:
            raise self._killed() from None

    def result(self) -> Any:
        """Wait for the work, repeat what it logged, and return what it returned.

        Raises:
            UserError: the work raised one, or its process was killed.
            RuntimeError: the work raised anything else.
        """
        assert self._process is not None, "start() comes first"
        assert self._process.stdout is not None
        if not os.read(self._process.stdout.fileno(), 1):
            raise self._killed()
        answer: _Answer = _take(self._answer.fileno())
        for name, level, text in answer.said:
            logging.getLogger(name).log(level, "%s", text)
        if answer.users_error is not None:
            raise UserError(answer.users_error)
        if answer.error is not None:
            error = RuntimeError(answer.error.strip().rpartition("\n")[2])
            error.add_note(f"In the process that clusters in the background:\n{answer.error}")
            raise error
        return answer.result

    def _killed(self) -> UserError:
        assert self._process is not None
        return UserError(
            f"The process that clusters in the background ended with status {self._process.wait()}, killed perhaps for "
            "want of memory, or without room for temporary files (TMPDIR). Start the same command again to go on from "
            "the last checkpoint, with hierarchy.overlap_steps=0 and --allow-change hierarchy.overlap_steps to need no "
            "such process."
        )


def _launch(*files: int) -> "subprocess.Popen[bytes]":
    # Signals of the terminal are for the run.
    command = [sys.executable, "-P", "-m", __name__, *map(str, files)]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    pipe = subprocess.PIPE
    try:
        with interruption.workers_starting():
            return subprocess.Popen(command, stdin=pipe, stdout=pipe, pass_fds=files, env=environment)
    except OSError as e:
        raise UserError(
            f"No process can be started beside rank 0 ({e}): make room for one, or take hierarchy.overlap_steps=0, "
            "which needs none."
        ) from e


def _put(descriptor: int, what: object) -> None:
    # Opened anew each time: a buffer that is kept would not notice what the other process has written.
    with os.fdopen(os.dup(descriptor), "r+b") as file:
        file.seek(0)
        file.truncate()
        torch.save(what, file)


def _take(descriptor: int) -> Any:
    with os.fdopen(os.dup(descriptor), "r+b") as file:
        file.seek(0)
        found = torch.load(file, weights_only=False)
        file.truncate(0)
    return found


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
    logging.getLogger().removeHandler(remembered)
    return _Answer(result, users_error, error, remembered.said)


def _main(question: int, answer: int) -> None:
    interruption.leave_to_parent()
    silence()
    asked, told = os.dup(0), os.dup(1)
    os.dup2(2, 1)  # what prints shall not tell of an answer
    while os.read(asked, 1):
        _put(answer, _do(_take(question)))
        os.write(told, b"!")


if __name__ == "__main__":
    # Not this module, whose classes have other names when it is run, but the one that the parent knows.
    from uhml.run import background

    background._main(*map(int, sys.argv[1:]))
