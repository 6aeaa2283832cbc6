"""Cars196 (Krause et al., 2013), in each of the three layouts in which it is still found."""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import scipy.io

from uhml.data.pictures import Splits
from uhml.data.reading import check_both_parts, check_exist, check_int, csv_rows, find_home, read_lines
from uhml.data.splitting import split
from uhml.errors import UserError

NUM_TRAIN_CLASSES = 98

Row = tuple[str, int]
"""A picture's path and its class, from 1."""


def cars196(root: Path | None) -> Splits:
    """Read Cars196: classes 1 to 98 train (8,054 pictures), 99 to 196 test (8,131), over both of its official halves.

    Args:
        root: the folder that holds one of these, or the one that this folder ``cars196`` lies in:

            * ``cars_annos.mat`` and ``car_ims/000001.jpg``, as the authors published it last;
            * ``devkit/cars_train_annos.mat``, ``cars_test_annos_withlabels.mat`` (there or beside ``devkit/``),
              ``cars_train/00001.jpg``, ``cars_test/00001.jpg``, as torchvision and Kaggle have it;
            * ``anno_train.csv``, ``anno_test.csv``, ``names.csv``, ``car_data/train/<class>/00001.jpg`` and
              ``car_data/test/...``.

    Raises:
        UserError: none of them is there, a file is not in the expected form, or a picture is missing.
    """
    home = find_home(root, "cars196", "cars196", list(LAYOUTS))
    marker = next(marker for marker in LAYOUTS if (home / marker).exists())
    rows, names = LAYOUTS[marker](home)
    for path, number in rows:
        if not 1 <= number <= len(names):
            raise UserError(f"{home / marker}: expected classes 1 to {len(names)}, found {number} for {path}.")
    paths = [path for path, _ in rows]
    trains = [number <= NUM_TRAIN_CLASSES for _, number in rows]
    check_both_parts(trains, NUM_TRAIN_CLASSES, home / marker)
    check_exist(paths, home / marker)
    return split(paths, [f"{number:03d} {names[number - 1]}" for _, number in rows], None, trains)


def _read_pooled(home: Path) -> tuple[list[Row], list[str]]:
    file = home / "cars_annos.mat"
    annotations = _read_mat(file, "annotations", ["relative_im_path", "class"])
    rows = [(str(home / row["relative_im_path"]), int(row["class"])) for row in annotations]
    return rows, _class_names(file)


def _read_devkit(home: Path) -> tuple[list[Row], list[str]]:
    devkit = home / "devkit"
    test = "cars_test_annos_withlabels.mat"  # its namesake without labels has no classes
    rows: list[Row] = []
    for part, file in (
        ("cars_train", devkit / "cars_train_annos.mat"),
        ("cars_test", devkit / test if (devkit / test).exists() else home / test),
    ):
        annotations = _read_mat(file, "annotations", ["fname", "class"])
        rows += _locate(home / part, [(str(row["fname"]), int(row["class"])) for row in annotations])
    return rows, _class_names(devkit / "cars_meta.mat")


def _read_csv(home: Path) -> tuple[list[Row], list[str]]:
    rows: list[Row] = []
    for part in ("train", "test"):
        file = home / f"anno_{part}.csv"
        listed = []
        for number, fields in csv_rows(file):
            if len(fields) != 6:
                raise UserError(
                    f"{file}, line {number}: expected 6 fields (file, 4 sides of a box, class), found {len(fields)}."
                )
            listed.append((fields[0], check_int(fields[5], f"the class on line {number}", file)))
        rows += _locate(home / "car_data" / part, listed)
    # A line is a name: commas in it are not quoted there.
    return rows, [line.strip() for line in read_lines(home / "names.csv") if line.strip()]


LAYOUTS = {
    "cars_annos.mat": _read_pooled,
    "devkit/cars_train_annos.mat": _read_devkit,
    "anno_train.csv": _read_csv,
}
"""From the file that tells a layout to the function that reads its rows and names of classes."""


def _locate(folder: Path, listed: list[Row]) -> list[Row]:
    """Put the path before each file's name, wherever below ``folder`` it lies: some copies are one level deeper."""
    path_of = {file: os.path.join(where, file) for where, _, files in os.walk(folder) for file in files}
    return [(path_of.get(file, str(folder / file)), number) for file, number in listed]


def _read_mat(path: Path, variable: str, fields: Sequence[str] = ()) -> Any:
    """Return a MATLAB array, flat, with Python's numbers and texts in it; a struct array has at least ``fields``."""
    if not path.exists():
        raise UserError(f"data.dataset=cars196 expects the file {path}, which is missing.")
    try:
        contents = scipy.io.loadmat(path, squeeze_me=True)
    except Exception as error:  # scipy raises nearly anything on a broken file
        raise UserError(f"{path} is no MATLAB file that can be read: {error}.") from error
    found = np.atleast_1d(contents.get(variable))
    if variable not in contents or not set(fields) <= set(found.dtype.names or ()):
        with_fields = f" with the fields {', '.join(fields)}" if fields else ""
        raise UserError(f"{path}: expected the variable {variable}{with_fields}.")
    return found


def _class_names(path: Path) -> list[str]:
    return [str(name) for name in _read_mat(path, "class_names")]
