"""Errors that are the user's to mend, told apart from our own bugs."""

import difflib
from collections.abc import Iterable


class UserError(Exception):
    """Something the user can put right. The message is one clear sentence: what is wrong, and what to do.

    The command line prints it without a traceback and exits with status 2.
    """


def did_you_mean(word: str, choices: Iterable[str]) -> str:
    """Return `` Did you mean 'x'?`` for the closest of ``choices``, or an empty string when none is close."""
    close = difflib.get_close_matches(word, list(choices), n=1, cutoff=0.6)
    return f" Did you mean {close[0]!r}?" if close else ""
