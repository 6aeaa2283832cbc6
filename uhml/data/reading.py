"""What the data sets' readers share: finding the folder, reading tables, and the sentences when something is off."""

import contextlib
import csv
import io
import os
from collections.abc import Iterator, Sequence
from contextvars import ContextVar
from pathlib import Path

from uhml.data.members import member_stamp
from uhml.data.names import Names
from uhml.data.workers import of_blocks
from uhml.errors import UserError
from uhml.files import regular_file

FILES_PER_BLOCK = 256
"""That a process looks for at a time."""


class NoDataSet(UserError):
    """The folder does not hold the data set that was looked for, not even a part of it."""


_noted: ContextVar[list[str] | None] = ContextVar("_noted", default=None)


def find_home(root: Path | None, name: str, folder: str, markers: Sequence[str]) -> Path:
    """Return the folder of an official data set: ``root``, or ``root/folder`` as its archive unpacks.

    Args:
        root: what ``data.root`` says.
        name: what ``data.dataset`` says.
        folder: the data set's folder in its archive.
        markers: files or folders below it; one of them must be there.

    Raises:
        NoDataSet: none is.
        UserError: there is no ``root``.
    """
    expected = " or ".join(markers)
    if root is None:
        raise UserError(f"data.dataset={name} needs data.root: the folder {folder} with {expected} in it.")
    for home in (root, root / folder):
        if any((home / marker).exists() for marker in markers):
            return home
    found = no_folder(root) if not root.is_dir() else f"data.root={root} holds {_some(sorted(os.listdir(root)))}"
    raise NoDataSet(f"{found}; data.dataset={name} expects {expected} in it or in its folder {folder}.")


def no_folder(root: Path) -> str:
    """Say that ``data.root`` is no folder and, if it depends on that, where it was looked for."""
    return f"data.root={root} is no folder{'' if root.is_absolute() else f' in {os.getcwd()}'}"


def read_lines(path: Path) -> list[str]:
    """Return the lines of a UTF-8 text file, without their ends.

    Raises:
        UserError: there is no such file, or it is no such text.
    """
    # Not splitlines, which also splits at characters that a path may have in it.
    return _read_text(path, newline=None).removesuffix("\n").split("\n")


def _read_text(path: Path, newline: str | None) -> str:
    try:
        with open(path, encoding="utf-8-sig", newline=newline, opener=regular_file) as file:
            return file.read()
    except OSError as error:
        raise UserError(f"Cannot read {path}: {error.strerror or error}.") from error
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not text in UTF-8: {error.reason} at byte {error.start}.") from error


def csv_rows(path: Path) -> Iterator[tuple[int, list[str]]]:
    """Yield the rows of a CSV file that are not empty, and the line on which each ends.

    Raises:
        UserError: there is no such file, or it is no CSV.
    """
    # With the ends of the lines as they are: a quoted path may have some in it.
    reader, whole = csv.reader(io.StringIO(_read_text(path, newline=""), newline=""), strict=True), 0
    try:
        for row in reader:
            whole = reader.line_num
            if row:
                yield whole, row
    except csv.Error as e:
        raise UserError(
            f"{path}, line {whole + 1}: {e}. Is a quote open there? One in a field is written twice."
        ) from e


def read_table(path: Path, columns: str, *, skip: int = 0) -> list[list[str]]:
    """Return the fields of every line of a table with columns between blanks. Blank lines are passed over.

    Args:
        path: the file.
        columns: what the columns are called, between blanks: "image_id class_id".
        skip: the number of lines before the first row.

    Raises:
        UserError: there is no such file, it has no rows, or a line has too many or too few fields.
    """
    num_columns = len(columns.split())
    rows = []
    for number, line in enumerate(read_lines(path)[skip:], start=skip + 1):
        fields = line.split()
        if fields and len(fields) != num_columns:
            raise UserError(
                f"{path}, line {number}: expected {num_columns} fields ({columns}), found {len(fields)}: {line!r}."
            )
        if fields:
            rows.append(fields)
    if not rows:
        raise UserError(f"{path} lists nothing; expected lines of {columns}.")
    return rows


def check_header(path: Path, line: int, header: str) -> None:
    """Check that line ``line`` (from 1) of a table is ``header``, whatever the blanks between its words.

    Raises:
        UserError: it is not.
    """
    lines = read_lines(path)
    found = lines[line - 1] if len(lines) >= line else ""
    if found.split() != header.split():
        raise UserError(f"{path}, line {line}: expected the header {header!r}, found {found!r}.")


def check_exist(paths: Sequence[str], listed_in: Path) -> None:
    """Check that pictures that a file lists are there.

    Raises:
        UserError: some are not, outside of :func:`missing_noted`.
    """
    # No file has a name with NUL in it, which separates names here.
    missing = [path for path in paths if "\0" in path]
    names = Names(path for path in paths if "\0" not in path) if missing else Names(paths)
    blocks = [slice(start, start + FILES_PER_BLOCK) for start in range(0, len(names), FILES_PER_BLOCK)]
    no_files = [path for found in of_blocks(_no_files, names, blocks, "look for pictures") for path in found]
    # In this process, for all to come shall know the shards that they are in.
    missing += [path for path in no_files if member_stamp(path) is None]
    noted = _noted.get()
    if noted is not None:
        noted += missing
    elif missing:
        raise UserError(
            f"{listed_in} lists {len(paths):,} pictures, of which {len(missing):,} are missing, first {missing[0]}."
            f"{_what_is_odd(missing[0])}"
        )


def _no_files(paths: Sequence[str]) -> list[str]:
    return [path for path in paths if not os.path.isfile(path)]


def _what_is_odd(path: str) -> str:
    """Return what to say of a path that was perhaps meant otherwise."""
    if "\\" in path:
        return " Between folders there must be /, not \\."
    if "\t" in path or "," in path:
        return " A list with more than a path on each line must be named .csv, and have a header and commas."
    return ""


@contextlib.contextmanager
def missing_noted() -> Iterator[list[str]]:
    """Within, :func:`check_exist` adds the pictures that are missing to the list that this yields, and goes on."""
    missing: list[str] = []
    token = _noted.set(missing)
    try:
        yield missing
    finally:
        _noted.reset(token)


def check_both_parts(trains: Sequence[bool], num_train_classes: int, path: Path) -> None:
    """Check that there are pictures to train on and to test on.

    Raises:
        UserError: there are only classes up to ``num_train_classes``, or only later ones.
    """
    if all(trains) or not any(trains):
        raise UserError(
            f"{path}: expected classes 1 to {num_train_classes} to train on and later ones to test on, "
            f"found {sum(trains):,} and {len(trains) - sum(trains):,} pictures."
        )


def check_int(text: str, what: str, path: Path) -> int:
    """Return ``text`` as a number.

    Raises:
        UserError: it is none; the sentence says of ``what`` in which file.
    """
    if not text.isdecimal():
        raise UserError(f"{path}: expected a number as {what}, found {text!r}.")
    return int(text)


def _some(names: Sequence[str], at_most: int = 4) -> str:
    return (
        ", ".join(names[:at_most]) + (f" and {len(names) - at_most} more" if len(names) > at_most else "") or "nothing"
    )
