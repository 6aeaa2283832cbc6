"""Errors that are the user's to mend, told apart from our own bugs."""

import difflib
from collections.abc import Iterable

KNOWN_EVERYWHERE = "Every rank was told of this error."


class UserError(Exception):
    """Something the user can put right. The message is one clear sentence: what is wrong, and what to do.

    The command line prints it without a traceback and exits with status 2.
    """


class RankFailed(RuntimeError):
    """Another rank failed, and this one cannot go on without it. What went wrong is in the other rank's log."""


class RunsFailed(RuntimeError):
    """Some of the runs that a command started failed. What went wrong is in their logs."""


def known_everywhere(error: UserError) -> UserError:
    """Mark an error that every rank raises, so that it is enough if rank 0 tells the user."""
    error.add_note(KNOWN_EVERYWHERE)
    return error


def is_known_everywhere(error: BaseException) -> bool:
    """Return whether rank 0 raises this error too."""
    return isinstance(error, RankFailed) or KNOWN_EVERYWHERE in getattr(error, "__notes__", ())


def did_you_mean(word: str, choices: Iterable[str]) -> str:
    """Return `` Did you mean 'x'?`` for the closest of ``choices``, or an empty string when none is close."""
    # The dashes that all options have are no likeness.
    word, names = word.lstrip("-"), {choice.lstrip("-"): choice for choice in choices}
    # Of three letters, two in common are no likeness unless the first is: gpu is not meant for cpu.
    alike = [name for name in names if len(word) > 3 or name[:1] == word[:1]]
    close = difflib.get_close_matches(word, alike, n=1, cutoff=0.6)
    return f" Did you mean {names[close[0]]!r}?" if close else ""
