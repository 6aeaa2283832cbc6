"""Thumbnails, many to a file: sprite sheets in JPEG, which a page decodes when one of their pictures is in view."""

import contextlib
import io
import logging
from collections.abc import Sequence
from typing import NamedTuple

from PIL import Image, ImageOps
from torch.utils.data import Dataset

from uhml.data.decode import load_rgb
from uhml.data.sampling import evenly
from uhml.data.workers import Loader
from uhml.errors import UserError
from uhml.progress import progress

logger = logging.getLogger(__name__)

# Small ones: a view of the whole tree takes a picture from each of very many, and a browser decodes all of a sheet.
COLUMNS = 8
PER_SHEET = COLUMNS * COLUMNS
NUM_SAMPLED = 256
# Pictures differ: what a sample of them takes is not quite what all take.
MARGIN = 1.1


class Look(NamedTuple):
    """Side of a thumbnail in pixels, a multiple of 16 so that JPEG's blocks keep neighbours apart; JPEG's quality."""

    side: int
    quality: int


LOOKS = (Look(96, 85), Look(96, 70), Look(64, 85), Look(64, 70), Look(48, 75), Look(48, 50))
"""The best first."""


def choose_look(paths: Sequence[str], num_bytes: int) -> Look:
    """Return the best look in which the thumbnails take no more than so much, judged by a sample of them.

    Raises:
        UserError: a picture cannot be read, or the least look takes more.
    """
    sample = [paths[i] for i in evenly(len(paths), NUM_SAMPLED)]
    images = [load_rgb(path) for path in sample]
    for look in LOOKS:
        estimate = len(_sheet(images, look)) / len(sample) * len(paths) * MARGIN
        if estimate <= num_bytes:
            return look
    raise UserError(f"{len(paths):,} pictures are too many for one page: lower --max-pictures.")


def sheets(paths: Sequence[str], look: Look, num_workers: int) -> list[bytes]:
    """Return the sheets, ``PER_SHEET`` pictures on each, row by row.

    Args:
        paths: the pictures.
        look: of the thumbnails: the middle square of each picture.
        num_workers: processes that read pictures.

    Raises:
        UserError: a picture cannot be read.
    """
    loader = Loader(_Sheets(paths, look), batch_size=1, num_workers=num_workers, collate_fn=_only)
    with contextlib.closing(iter(loader)) as drawn:
        return list(progress(drawn, "draw thumbnails", total=len(loader), unit="sheet"))


class _Sheets(Dataset[bytes]):
    def __init__(self, paths: Sequence[str], look: Look) -> None:
        self.paths, self.look = paths, look

    def __len__(self) -> int:
        return -(-len(self.paths) // PER_SHEET)

    def __getitem__(self, sheet: int) -> bytes:
        return _sheet([load_rgb(path) for path in self.paths[sheet * PER_SHEET :][:PER_SHEET]], self.look)


def _only(items: list[bytes]) -> bytes:
    return items[0]


def _sheet(images: Sequence[Image.Image], look: Look) -> bytes:
    rows = -(-len(images) // COLUMNS)
    sheet = Image.new("RGB", (COLUMNS * look.side, rows * look.side), "white")
    for i, image in enumerate(images):
        row, column = divmod(i, COLUMNS)
        sheet.paste(
            ImageOps.fit(image, (look.side, look.side), Image.Resampling.BICUBIC),
            (column * look.side, row * look.side),
        )
    file = io.BytesIO()
    sheet.save(file, "JPEG", quality=look.quality, optimize=True)
    return file.getvalue()
