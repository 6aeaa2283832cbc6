"""Tar files of pictures, as WebDataset writes them, for those whose pictures are too many for a folder."""

import logging
import os
from pathlib import Path

import numpy as np

from uhml import distributed
from uhml.data.folder import files_below
from uhml.data.formats import FORMATS
from uhml.data.members import SUFFIX, index
from uhml.data.pictures import Pictures, Splits
from uhml.data.reading import no_folder
from uhml.data.splitting import first_half, split
from uhml.errors import UserError
from uhml.progress import progress

logger = logging.getLogger(__name__)

COMPRESSED = (".tgz", ".tbz2", ".txz", *(f"{SUFFIX}.{ending}" for ending in ("gz", "bz2", "xz", "zst")))


def shards(root: Path | None) -> Splits:
    """List the pictures in the tar files of a folder, in the order of the files' names and of the pictures in them.

    The members of one key (``0001.jpg``, ``0001.cls``: the path up to the first dot of the name) are one picture and
    what is known of it: a class as text in ``.cls``, or as ``label`` of an object in ``.json``. Where each picture has
    one, the first half of the sorted classes trains and the other half tests, as for class folders. Otherwise every
    picture trains and nothing is scored.

    Args:
        root: the folder; what lies in folders below it is not looked at.

    Raises:
        UserError: it is none, or holds no shard, one that is not usable, or no picture.
    """
    if root is None:
        raise UserError("data.dataset=shards needs data.root: the folder with the tar files.")
    if not root.is_dir():
        raise UserError(f"{no_folder(root)}; data.dataset=shards expects one with tar files.")
    paths, labels = pictures_in_shards(root, f"data.root={root}")
    unknown = [path for path, label in zip(paths, labels, strict=True) if not label]
    if not unknown:
        return split(paths, labels, None, first_half(labels))
    if len(unknown) < len(paths):
        logger.warning(
            "%s of the %s pictures, first %s, have no class, so there are no classes to score on",
            f"{len(unknown):,}",
            f"{len(paths):,}",
            unknown[0],
        )
    return Splits(train=Pictures(paths=paths))


def pictures_in_shards(root: Path, said: str) -> tuple[list[str], list[str]]:
    """List the pictures in the tar files of a folder.

    Args:
        root: the folder.
        said: how the user named it, such as "data.root=shards".

    Returns:
        The n paths ``shard.tar/member.jpg``, and the n names of their classes, empty where they are not known.

    Raises:
        UserError: there is no shard, one is not usable, or they hold no picture.
    """
    names = sorted(os.listdir(root))
    for name in names:
        if name.lower().endswith(COMPRESSED):
            raise UserError(
                f"{said} holds {name}, which is compressed, so that no picture in it can be reached without all before "
                "it: decompress it. Pictures are compressed already."
            )
    files = [str(root / name) for name in names if _is_shard(name)]
    if not files:
        raise UserError(f"{said} holds no shard (*{SUFFIX}).")
    # Each rank begins elsewhere, and finds what others have looked through and kept meanwhile.
    first = len(files) * distributed.rank() // distributed.world_size()
    for file in progress([*files[first:], *files[:first]], "look through shards", unit="shard"):
        index(file)
    paths: list[str] = []
    labels: list[str] = []
    for file in files:
        rows = index(file).rows
        rows = rows[np.argsort(rows["offset"])]
        paths += [f"{file}/{os.fsdecode(name)}" for name in rows["name"].tolist()]
        labels += [label.decode() for label in rows["label"].tolist()]
    if not paths:
        raise UserError(f"{said} holds no picture ({', '.join(FORMATS)}) in its {len(files):,} shards.")
    return paths, labels


def holds_shards_only(root: Path) -> bool:
    """Return whether a folder holds tar files, and neither it nor folders below it hold a picture."""
    return any(_is_shard(name) for name in os.listdir(root)) and not any(
        os.path.splitext(path)[1].lower() in FORMATS for path in files_below(root)
    )


def _is_shard(name: str) -> bool:
    return name.lower().endswith(SUFFIX) and not name.startswith(".")
