"""Decoded pictures kept on the disk, so that they are decoded once and not in every epoch of every run.

The pictures of a list lie ``PER_FILE`` to a file, as raw RGB in their own shapes. A file is named by the digest of all
that its contents depend on: names, sizes and times of the pictures, and how they are decoded and reduced. So nothing is
ever out of date, a picture that changes costs one file, and launches that fill one folder at the same time help each
other. Files are written aside and renamed: one that is there is whole, and a launch that was ended goes on.
"""

import contextlib
import functools
import hashlib
import logging
import os
import random
import shutil
import time
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import PIL
from numpy.typing import NDArray
from PIL import Image
from torch.utils.data import Dataset

from uhml import distributed
from uhml.config import DataConfig
from uhml.data.decode import UnreadablePicture, load_rgb, stamp
from uhml.data.names import absolute
from uhml.data.sampling import evenly
from uhml.data.transforms import reduced
from uhml.data.workers import Loader, next_together, of_blocks
from uhml.environment import place
from uhml.errors import UserError, known_everywhere
from uhml.files import expanded, opened_aside
from uhml.progress import progress

logger = logging.getLogger(__name__)

GIB = 2**30

FORMAT = 1
"""To be raised whenever the files look otherwise, or ``load_rgb`` or ``reduced`` give other pixels."""

PER_FILE = 256
MAX_OPEN = 128
SAMPLED = 64
SUFFIX = ".pixels"
TABLE_ROW = 24
"""Bytes of a picture's place in a file: three numbers of int64."""

SECONDS_UNTIL_ABANDONED = 3600
"""A file that nothing was written to for so long is no longer being written."""


class Cached(NamedTuple):
    """Where some pictures are kept.

    Attributes:
        files: the files of the list that the pictures are of.
        rows: ``[n]``, each picture's place in that list.
    """

    files: tuple[Path, ...]
    rows: NDArray[np.int64]

    def select(self, rows: NDArray[np.int64]) -> "Cached":
        """Return where the pictures at ``rows`` of these are kept."""
        return Cached(self.files, self.rows[rows])

    def load(self, i: int) -> Image.Image | None:
        """Return the i-th picture; None if it could not be decoded, or if the cache was removed meanwhile."""
        number, row = divmod(int(self.rows[i]), PER_FILE)
        try:
            table, pixels = _opened(self.files[number])
        except FileNotFoundError:
            return None
        start, height, width = table[row].tolist()
        if not height:
            return None
        return Image.fromarray(pixels[start : start + height * width * 3].reshape(height, width, 3))

    def absent(self) -> NDArray[np.int64]:
        """Return which of the pictures could not be decoded."""
        # Read, not mapped, which takes ten times as long for so little.
        tables = [_table(np.fromfile(file, np.uint8, TABLE_ROW * PER_FILE)) for file in self.files]
        heights = np.concatenate([table[:, 1] for table in tables]) if tables else np.empty(0, np.int64)
        return np.flatnonzero(heights[self.rows] == 0)


def cache_pictures(lists: Sequence[Sequence[str]], config: DataConfig) -> list[Cached]:
    """Return where the pictures of some lists are kept, and keep those that are not yet. A collective.

    All ranks decode together, each its share, first as if all machines saw one folder; then the ranks of a machine
    make for themselves what they do not see there.

    Args:
        lists: of files, the same on every rank.
        config: for the folder, the size and the number of workers.

    Raises:
        Preempted: the run was asked to end. What is kept stays.
        UserError: the folder cannot be written, or there is too little room.
    """
    assert config.cache is not None
    folder = expanded(config.cache).absolute()
    kept, groups = [], []
    for paths in lists:
        blocks = [slice(start, min(start + PER_FILE, len(paths))) for start in range(0, len(paths), PER_FILE)]
        files = tuple(folder / f"{name}{SUFFIX}" for name in _names(paths, blocks, config.reduce_to))
        kept.append(Cached(files, np.arange(len(paths))))
        groups += [_Group(file, paths, block) for file, block in zip(files, blocks, strict=True)]

    def missing() -> list[_Group]:
        try:
            return [group for group in groups if not _is_whole(group.file, group.num_pictures)]
        except OSError as e:
            raise _refusal(config, e) from e

    if distributed.all_reduce_max(len(distributed.on_every_rank(missing))):
        distributed.on_every_rank(lambda: _make_room(folder, missing(), config))
        here = place()
        for number, num_ranks in (
            (distributed.rank(), distributed.world_size()),
            (here.local_rank, here.local_world_size),
        ):
            # Listed while no rank writes, or the shares would not be shares of the same.
            own = distributed.on_every_rank(missing)[number::num_ranks]
            # In no order: launches that start together shall not all make the same file at a time.
            random.Random(os.urandom(8)).shuffle(own)
            _fill(own, config)
        if distributed.all_reduce_max(len(distributed.on_every_rank(missing))):
            raise known_everywhere(
                UserError(f"data.cache={config.cache}: files that were written are not there. Take another folder.")
            )
    _opened.cache_clear()
    return kept


class _Group(NamedTuple):
    """The pictures of one file: some rows of a list of paths."""

    file: Path
    paths: Sequence[str]
    rows: slice

    @property
    def pictures(self) -> Sequence[str]:
        """Their paths."""
        return self.paths[self.rows]

    @property
    def num_pictures(self) -> int:
        return self.rows.stop - self.rows.start


def _names(paths: Sequence[str], blocks: Sequence[slice], reduce_to: int | None) -> list[str]:
    """Return what tells the contents of the file of each block from those of any other. A collective."""
    own = [blocks[i] for i in distributed.share(len(blocks))]
    name = functools.partial(_name, reduce_to=reduce_to)
    found = of_blocks(name, paths, own, "look for pictures in the cache")
    names = distributed.gather_objects(distributed.on_every_rank(lambda: list(found), interruptible=False))
    return [names[i % len(names)][i // len(names)] for i in range(len(blocks))]


def _name(paths: Sequence[str], reduce_to: int | None) -> str:
    digest = hashlib.sha256(f"{FORMAT} {PIL.__version__} {reduce_to}".encode())
    # The whole path: sizes and times are alike in an archive's folders of uncompressed pictures.
    digest.update(os.fsencode("".join(f"\0{path}\0{stamp(path)}" for path in absolute(paths))))
    return digest.hexdigest()


def _make_room(folder: Path, groups: Sequence[_Group], config: DataConfig) -> None:
    """Make the folder, and see whether there is room, on one rank of each machine."""
    if place().local_rank != 0:
        return
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for path in folder.glob(f"*{SUFFIX}.*.partial"):
            with contextlib.suppress(OSError):  # another user's, perhaps
                if time.time() - path.stat().st_mtime > SECONDS_UNTIL_ABANDONED:
                    path.unlink()
        free = shutil.disk_usage(folder).free
    except OSError as e:
        raise _refusal(config, e) from e
    paths = [path for group in groups for path in group.pictures]
    need = len(paths) * bytes_per_picture(paths, config.reduce_to)
    if need > free:
        smaller = "" if config.reduce_to else ", reduce them with data.reduce_to"
        raise UserError(
            f"data.cache={config.cache} would take {need / GIB:.1f} GiB more for {len(paths):,} pictures, and "
            f"{free / GIB:.1f} GiB are free there: take another folder{smaller}, or leave the cache out with "
            "data.cache=null."
        )
    if paths and distributed.is_main():
        logger.info(
            "Decoding %s pictures into the cache, where they take about %.2f GiB; %.1f GiB are free.",
            f"{len(paths):,}",
            need / GIB,
            free / GIB,
        )


def bytes_per_picture(paths: Sequence[str], reduce_to: int | None) -> float:
    """Return how much of the disk a picture takes on average, from a sample of them that is decoded."""
    sizes = []
    for i in evenly(len(paths), SAMPLED):
        with contextlib.suppress(UnreadablePicture):
            image = reduced(load_rgb(paths[i]), reduce_to)
            sizes.append(3 * image.width * image.height)
    return float(np.mean(sizes)) if sizes else 0.0


def _fill(own: Sequence[_Group], config: DataConfig) -> None:
    """Write this rank's files. A collective."""
    loader = Loader(_Files(own, config), batch_size=1, num_workers=config.num_workers, collate_fn=list)
    num_rounds = distributed.all_reduce_max(len(own))
    with contextlib.closing(iter(loader)) as written:
        for _ in progress(range(num_rounds), "decode pictures into the cache", unit="file"):
            next_together(written, ())


class _Files(Dataset[None]):
    """Files that are written where they are asked for: in the worker processes."""

    def __init__(self, own: Sequence[_Group], config: DataConfig) -> None:
        self.own, self.config = own, config

    def __len__(self) -> int:
        return len(self.own)

    def __getitem__(self, i: int) -> None:
        group = self.own[i]
        try:
            # Another launch may have been quicker.
            if not _is_whole(group.file, group.num_pictures):
                _write(group.file, group.pictures, self.config.reduce_to)
        except OSError as e:
            raise _refusal(self.config, e) from e


def _write(file: Path, paths: Sequence[str], reduce_to: int | None) -> None:
    """Write a table of where each picture starts, of its height and its width, and then the pictures.

    A picture that cannot be decoded has height and width 0.
    """
    table = np.zeros((len(paths), 3), np.int64)
    with opened_aside(file) as out:
        out.write(table.tobytes())
        for row, path in enumerate(paths):
            table[row, 0] = out.tell()
            with contextlib.suppress(UnreadablePicture):
                pixels = np.asarray(reduced(load_rgb(path), reduce_to))
                table[row, 1:] = pixels.shape[:2]
                out.write(pixels.tobytes())
        out.seek(0)
        out.write(table.tobytes())


def _is_whole(file: Path, num_pictures: int) -> bool:
    """Return whether a file is there. Its length is looked at, should something else have cut it off."""
    try:
        with file.open("rb") as opened:
            table = np.frombuffer(opened.read(TABLE_ROW * num_pictures), np.int64)
            if len(table) < 3 * num_pictures or table[0] != table.nbytes:
                return False
            start, height, width = table[-3:].tolist()
            return os.stat(opened.fileno()).st_size == start + height * width * 3
    except (FileNotFoundError, ValueError):  # the latter for half a number
        return False


@functools.lru_cache(MAX_OPEN)
def _opened(file: Path) -> tuple[NDArray[np.int64], NDArray[np.uint8]]:
    pixels = np.memmap(file, mode="r")
    return _table(pixels), pixels


def _table(pixels: NDArray[np.uint8]) -> NDArray[np.int64]:
    # The first picture starts where the table ends.
    return pixels[: int(pixels[:8].view(np.int64)[0])].view(np.int64).reshape(-1, 3)


def _refusal(config: DataConfig, error: OSError) -> UserError:
    return UserError(
        f"The cache data.cache={config.cache} cannot be used ({error.strerror or error}): make room, take another "
        "folder, or leave the cache out with data.cache=null. The same command then goes on."
    )
