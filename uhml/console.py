"""Where tables go."""

from rich.console import Console
from rich.markup import escape

from uhml.logs import shown


class _Console(Console):
    def on_broken_pipe(self) -> None:
        """Leave it to the command line, which ends as for anything else that nobody reads."""
        raise


def cell(text: object) -> str:
    """Return a text that anybody may have written as a cell of a table: neither the terminal nor rich obeys it."""
    return escape(shown(str(text)))


def console(width: int = 120) -> Console:
    """Return the terminal, or a pipe, which has no width of its own and gets one, in letters."""
    return _Console(width=None if Console().is_terminal else width)
