"""Names of very many files, in little memory that processes can share."""

import os
from collections.abc import Iterable, Iterator, Sequence
from typing import overload

import numpy as np

NAMES_AT_ONCE = 4096


class Names(Sequence[str]):
    """File names as one block of bytes, which a process that is forked shares for good.

    Of a tuple of strings, each of which takes another half of its length, it would copy every one that it looks at.

    Args:
        names: as the system takes them: without NUL.
    """

    def __init__(self, names: Iterable[str]) -> None:
        # An end after each name: joined, not put together in Python one by one.
        self._bytes = os.fsencode("\0".join(names) + "\0")
        ends = np.flatnonzero(np.frombuffer(self._bytes, np.uint8) == 0)
        # No name at all and one empty name look alike; there is no file of an empty name.
        self._ends = ends if len(self._bytes) > 1 else ends[:0]

    def __len__(self) -> int:
        return len(self._ends)

    @overload
    def __getitem__(self, i: int | np.integer) -> str: ...
    @overload
    def __getitem__(self, i: slice) -> tuple[str, ...]: ...
    def __getitem__(self, i: int | np.integer | slice) -> str | tuple[str, ...]:
        if isinstance(i, slice):
            rows = range(*i.indices(len(self)))
            if rows.step != 1:
                return tuple(self[row] for row in rows)
            return tuple(self._text(rows.start, rows.stop).split("\0")) if rows else ()
        if not -len(self) <= i < len(self):
            raise IndexError(f"there are {len(self)} names, and none at {i}")
        row = int(i) % len(self)
        return self._text(row, row + 1)

    def _text(self, first: int, last: int) -> str:
        start = int(self._ends[first - 1]) + 1 if first else 0
        return os.fsdecode(self._bytes[start : int(self._ends[last - 1])])

    def __iter__(self) -> Iterator[str]:
        for start in range(0, len(self), NAMES_AT_ONCE):
            yield from self[start : start + NAMES_AT_ONCE]

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Sequence) and len(self) == len(other) and all(map(str.__eq__, self, other))

    __hash__ = None  # type: ignore[assignment]


def absolute(paths: Iterable[str]) -> Iterator[str]:
    """Yield what ``os.path.abspath`` makes of each path; what it makes of a folder is found once."""
    starts: dict[str, str] = {}
    for path in paths:
        end = path.rfind(os.sep) + 1
        folder, name = path[:end], path[end:]
        if folder not in starts:
            starts[folder] = os.path.join(os.path.abspath(folder), "")
        yield starts[folder] + name if name not in ("", os.curdir, os.pardir) else os.path.abspath(path)


def common_folder(paths: Iterable[str]) -> str:
    """Return the deepest folder that all paths lie in, or below."""
    # What os.path.dirname returns, in half the time: the root's own name is its separator.
    return os.path.commonpath({path[: max(path.rfind(os.sep), path.startswith(os.sep))] for path in paths})
