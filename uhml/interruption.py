"""Preemption: a signal asks the run to end, and the run ends where nothing is lost.

A cluster sends SIGUSR2 or SIGTERM before it takes the machine away; a terminal sends SIGINT for Ctrl-C, and SIGHUP when
it is closed. Inside :func:`handled` these do not end the process but are remembered, unless they are ignored, as nohup
has SIGHUP. The run looks after them where all ranks are at the same step (:func:`uhml.distributed.on_every_rank`), so
that all of them raise :class:`Preempted` together. Only within :func:`at_once`, around work whose loss costs no step,
does the signal itself raise it.
"""

import contextlib
import ctypes
import os
import signal
import sys
import time
from collections.abc import Iterator
from types import FrameType
from typing import Any

SIGNALS = (signal.SIGUSR2, signal.SIGTERM, signal.SIGINT, signal.SIGHUP)

START_AGAIN = os.EX_TEMPFAIL
"""Exit status of a run that goes on when the same command is started again."""

# torchrun and the terminal may both pass on one Ctrl-C; a second one of the user's comes later than that.
SECONDS_TO_SECOND_CTRL_C = 2.0


# Not an Exception: like KeyboardInterrupt, it must pass by those who handle errors of the work it interrupts.
class Preempted(BaseException):
    """The run ended because a signal asked it to; started again, it goes on.

    Args:
        number: of the signal.
        where: the run ended, if there is more to say than that it did.

    Attributes:
        signal: the number of the signal.
    """

    def __init__(self, number: int, where: str = "") -> None:
        name = signal.Signals(number).name
        super().__init__(f"Stopped by {name}{where and f' {where}'}: start the same command again to go on.")
        self.signal = number

    @property
    def exit_status(self) -> int:
        """What the process should exit with."""
        return 130 if self.signal == signal.SIGINT else START_AGAIN


class _Pending:
    """The signal that has arrived, if any: signal handlers belong to the process, and so does this."""

    number = 0
    since = 0.0
    raises = False


@contextlib.contextmanager
def handled() -> Iterator[None]:
    """Remember the signals that ask the run to end; put the handlers that were there before back at the end.

    May be nested. Python allows it in the main thread only.
    """
    before = {number: signal.getsignal(number) for number in SIGNALS}
    # What is ignored stays so: a shell without job control lets its background jobs ignore Ctrl-C.
    before = {number: handler for number, handler in before.items() if handler is not signal.SIG_IGN}
    nested = _remember in before.values()
    for number in before:
        signal.signal(number, _remember)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        if not nested:
            _Pending.number = 0


def _remember(number: int, frame: FrameType | None) -> None:
    now = time.monotonic()
    if number == signal.SIGINT == _Pending.number and now - _Pending.since > SECONDS_TO_SECOND_CTRL_C:
        raise KeyboardInterrupt  # the user does not want to wait
    if not _Pending.number:
        _Pending.number, _Pending.since = number, now
    if _Pending.raises:
        _Pending.raises = False
        raise Preempted(_Pending.number)


def when_parent_dies(number: int) -> None:
    """Get a signal when the process that started this one dies. On Linux; elsewhere nothing happens."""
    if sys.platform == "linux":
        pr_set_pdeathsig = 1
        ctypes.CDLL(None).prctl(pr_set_pdeathsig, number)


def check() -> None:
    """Raise :class:`Preempted` if a signal has arrived."""
    if _Pending.number:
        raise Preempted(_Pending.number)


def seconds_since() -> float:
    """Return how long ago a signal has arrived; 0 if none has."""
    return time.monotonic() - _Pending.since if _Pending.number else 0.0


@contextlib.contextmanager
def at_once() -> Iterator[None]:
    """Raise :class:`Preempted` as soon as a signal arrives, or at the start if one has; for work that may be dropped.

    Never around a collective: the other ranks would wait in it for this one.
    """
    before = _Pending.raises
    _Pending.raises = True
    try:
        check()
        yield
    finally:
        _Pending.raises = before


@contextlib.contextmanager
def workers_starting() -> Iterator[None]:
    """Around the start of worker processes: no signal reaches them before :func:`leave_to_parent` is called there.

    A death of theirs is told where their work is fetched, and not, as torch would have it, by an exception in whatever
    the main thread happens to do then.
    """
    before = signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
    child_died = signal.getsignal(signal.SIGCHLD)
    try:
        yield
    finally:
        signal.signal(signal.SIGCHLD, child_died)
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def leave_to_parent(*_: Any) -> None:
    """Ignore, in a worker process, the signals that its whole group gets: it ends when its parent says so, or dies."""
    when_parent_dies(signal.SIGKILL)
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)
