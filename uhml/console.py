"""Where tables go."""

from rich.console import Console


class _Console(Console):
    def on_broken_pipe(self) -> None:
        """Leave it to the command line, which ends as for anything else that nobody reads."""
        raise


def console(width: int = 120) -> Console:
    """Return the terminal, or a pipe, which has no width of its own and gets one, in letters."""
    return _Console(width=None if Console().is_terminal else width)
