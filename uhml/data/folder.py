"""Any folder of pictures, with or without class folders."""

import logging
import os
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from uhml.data.formats import FORMATS
from uhml.data.names import common_folder
from uhml.data.pictures import Pictures, Splits
from uhml.data.reading import no_folder
from uhml.data.splitting import first_half, split
from uhml.errors import UserError

logger = logging.getLogger(__name__)

PARTS = {"train", "training", "test", "val", "valid", "validation"}
"""Names of folders that are parts of a data set, not classes."""

UNREAD = (".heic", ".heif", ".avif", ".jxl", ".jp2", ".dng", ".cr2", ".nef", ".arw", ".psd", ".svg")
"""Suffixes of pictures, too, which those who have such will miss."""


def folder(root: Path | None) -> Splits:
    """List every picture below ``root``, in sorted order.

    Where folders below ``root`` hold all the pictures, they are the classes, whatever lies deeper; a single folder that
    holds everything is looked into first. The first half of the classes by sorted name trains, the other half tests.
    Otherwise every picture trains and nothing is scored.

    Hidden files and folders are passed over, and so are files that are no pictures by their suffix (``FORMATS``).

    Args:
        root: the folder; links in it are followed.

    Raises:
        UserError: it is none, it holds no picture, or its folders are named train and test.
    """
    if root is None:
        raise UserError("data.dataset=folder needs data.root: the folder with the pictures.")
    if not root.is_dir():
        raise UserError(f"{no_folder(root)}; data.dataset=folder expects one with pictures.")
    paths = pictures_below(root, f"data.root={root}")
    base = common_folder(paths)
    # Strings alone: for a million lists Python's garbage collector would take longer than all of this.
    inside = [path[len(base) :].lstrip(os.sep) for path in paths]
    loose = [path for path, name in zip(paths, inside, strict=True) if os.sep not in name]
    if loose:
        if len(loose) < len(paths):
            logger.warning(
                "%s of the %s pictures, first %s, lie in no class folder, so there are no classes to score on",
                f"{len(loose):,}",
                f"{len(paths):,}",
                loose[0],
            )
        return Splits(train=Pictures(paths=paths))
    classes = [name.partition(os.sep)[0] for name in inside]
    if {name.lower() for name in classes} <= PARTS:
        raise UserError(
            f"The folders in {base or os.curdir} are named {', '.join(sorted(set(classes)))}: parts of a data set, not "
            "classes. Point data.root to one of them, or use data.dataset=list with a column split."
        )
    return split(paths, classes, None, first_half(classes))


def pictures_below(root: Path, said: str) -> list[str]:
    """List every picture below a folder, in sorted order. Hidden files and those that are no pictures are passed over.

    Args:
        root: the folder; links in it are followed.
        said: how the user named it, such as "data.root=pictures".

    Raises:
        UserError: there is no picture.
    """
    paths: list[str] = []
    others: Counter[str] = Counter()
    for path in files_below(root):
        suffix = os.path.splitext(path)[1].lower()
        if suffix in FORMATS:
            paths.append(path)
        else:
            others[suffix or "without suffix"] += 1
    if others:
        kinds = ", ".join(f"{count:,} {suffix}" for suffix, count in others.most_common(4))
        more = ", ..." if len(others) > 4 else ""
        number = f"{others.total():,}"
        logger.info("%s: passed over %s files that are no pictures: %s%s", root, number, kinds, more)
    unread = [suffix for suffix in UNREAD if suffix in others]
    if unread:
        logger.warning("%s: pictures in %s are not read; convert them to JPEG or PNG", root, " and ".join(unread))
    if not paths:
        hint = " Those in tar files are read with data.dataset=shards." if ".tar" in others else ""
        raise UserError(f"{said} holds no picture ({', '.join(FORMATS)}), nor do folders below it.{hint}")
    # By the names of folders, then of files: those of one folder together, and as people sort them.
    return sorted(paths, key=lambda path: path.replace(os.sep, "\0"))


def files_below(root: Path) -> Iterator[str]:
    """Yield the files below ``root`` that are not hidden. Links are followed, but not back to where they led from.

    Raises:
        UserError: a folder cannot be listed; one that this user may not look into is passed over with a warning.
    """
    # Of folders that are still to be looked into: the real ones from which links have led there.
    left_by_links: dict[str, tuple[str, ...]] = {os.fspath(root): ()}
    for where, folders, files in os.walk(root, followlinks=True, onerror=_not_listed):
        left, kept = left_by_links.pop(where), []
        for name in folders:
            inside = os.path.join(where, name)
            if name.startswith("."):
                continue
            now_left = (*left, _real(where)) if os.path.islink(inside) else left
            if now_left and any(folder.startswith(_real(inside)) for folder in now_left):
                continue
            left_by_links[inside] = now_left
            kept.append(name)
        folders[:] = kept
        inside = "" if where == os.curdir else os.path.join(where.removeprefix(os.curdir + os.sep), "")
        yield from (inside + name for name in files if not name.startswith("."))


def _real(folder: str) -> str:
    return os.path.join(os.path.realpath(folder), "")


def _not_listed(error: OSError) -> None:
    if not isinstance(error, PermissionError):
        raise UserError(f"{error.filename} cannot be listed: {error.strerror}.") from error
    logger.warning("%s cannot be looked into, and is passed over: %s", error.filename, error.strerror)
