"""Pictures that a text or CSV file lists."""

import logging
import os
from pathlib import Path

from uhml.data.pictures import Pictures, Splits
from uhml.data.reading import check_exist, csv_rows, read_lines
from uhml.data.splitting import first_half, split
from uhml.errors import UserError, did_you_mean

logger = logging.getLogger(__name__)

COLUMNS = ("path", "label", "super_label", "split")


def listed(root: Path | None) -> Splits:
    """List the pictures that a file names; relative paths start at the file's own folder.

    A file ``*.csv`` has a header with the column ``path`` and, where wanted, ``label``, ``super_label`` and ``split``
    (train or test); any other file has a path on each line. With labels but no split, the first half of the sorted
    labels trains and the other half tests, as for class folders. Without labels nothing is scored.

    Args:
        root: the file.

    Raises:
        UserError: there is no such file, it is not of this form, it lists no pictures, or some are missing.
    """
    if root is None:
        raise UserError("data.dataset=list needs data.root: the text or CSV file that lists the pictures.")
    if root.is_dir():
        raise UserError(f"data.root={root} is a folder; data.dataset=list expects a text or CSV file.")
    columns = read_list(root)
    paths = columns["path"]
    labels, super_labels, parts = (columns.get(column) for column in COLUMNS[1:])
    if labels is None:
        return Splits(train=Pictures(paths=paths))
    splits = split(paths, labels, super_labels, first_half(labels) if parts is None else [p == "train" for p in parts])
    if not len(splits.train):
        raise UserError(f"{root}: no row has the split train.")
    both = set(splits.train.class_names).intersection(splits.test.class_names if splits.test else ())
    if both:
        logger.warning(
            "%s: %d labels, such as %r, are in train and test, so the score is not on unseen classes alone",
            root,
            len(both),
            min(both),
        )
    return splits


def read_list(file: Path) -> dict[str, list[str]]:
    """Return the columns of ``COLUMNS`` that a list has. The paths in it are those of files that are there.

    Args:
        file: as for :func:`listed`.

    Raises:
        UserError: there is no such file, it is not of this form, it lists no pictures, or some are missing.
    """
    if file.suffix.lower() == ".csv":
        columns = _read_csv(file)
    else:
        columns = {"path": [line.strip() for line in read_lines(file) if line.strip()]}
    is_absolute = [path.startswith(os.sep) for path in columns["path"]]
    # All of one kind, or they would have no folder in common.
    folder = file.absolute().parent if any(is_absolute) else file.parent
    start = "" if folder == Path() else os.path.join(folder, "")
    columns["path"] = [path if done else start + path for path, done in zip(columns["path"], is_absolute, strict=True)]
    if not columns["path"]:
        raise UserError(f"{file} lists no pictures.")
    check_exist(columns["path"], file)
    if num_again := len(columns["path"]) - len(set(columns["path"])):
        logger.warning("%s lists %s pictures more than once.", file, f"{num_again:,}")
    return columns


def _read_csv(file: Path) -> dict[str, list[str]]:
    """Return the columns of ``COLUMNS`` that ``file`` has."""
    reader = csv_rows(file)
    _, header = next(reader, (1, []))
    if "path" not in header:
        found, hint = ", ".join(header), ""
        if ";" in found or "\t" in found:
            hint = f" Between the columns there must be commas, not {';' if ';' in found else 'tabs'}."
        elif capital := next((column for column in header if column.lower() == "path"), None):
            hint = f" Did you mean 'path' by {capital!r}?"
        raise UserError(f"{file}, line 1: expected a header with the column path, found {found or 'nothing'}.{hint}")
    for other in set(header) - set(COLUMNS):
        if guess := did_you_mean(other, COLUMNS):
            raise UserError(f"{file}, line 1: the column {other!r} means nothing here.{guess}")
    known = [column for column in COLUMNS if column in header]
    if "label" not in known and len(known) > 1:
        raise UserError(f"{file}, line 1: the column {known[1]} needs a column label beside it.")
    columns: dict[str, list[str]] = {column: [] for column in known}
    places = [(column, header.index(column)) for column in known]
    for number, row in reader:
        for column, place in places:
            value = row[place] if place < len(row) <= len(header) else ""
            if not value:
                raise UserError(
                    f"{file}, line {number}: expected {len(header)} fields ({', '.join(header)}) "
                    f"and none of {', '.join(known)} empty."
                )
            if column == "split" and value not in ("train", "test"):
                raise UserError(f"{file}, line {number}: expected the split train or test, found {value!r}.")
            columns[column].append(value)
    return columns
