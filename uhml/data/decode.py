"""From a picture file to an RGB image, or a clear refusal."""

import contextlib
import io
import math
import os
import warnings
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError
from torch.utils.data import Dataset

from uhml import distributed
from uhml.data.formats import FORMATS
from uhml.data.members import member_stamp, read_member
from uhml.data.workers import Loader, next_together
from uhml.errors import UserError
from uhml.files import regular_file
from uhml.progress import progress

MAX_PIXELS = 2 * 89_478_485
"""Larger pictures are refused; in RGB such a one takes half a gigabyte. This is where Pillow sees an attack, too."""

DRAFT_SIDE = 1024
"""A JPEG with both sides at least twice, four or eight times this is decoded at a half, a quarter or an eighth."""


BATCH = 32


class UnreadablePicture(UserError):
    """A file that cannot be decoded to a picture. The message names it and says why."""


class _Refused(Exception):
    """Why a file is refused, as the end of the sentence "the picture ..."."""


def load_rgb(path: str | Path) -> Image.Image:
    """Decode a picture file as people see it.

    Grey, palette, 16-bit and CMYK pictures become 8-bit RGB, transparency lies on white, EXIF's rotation is applied,
    and an animation shows its first frame. Large JPEGs come out smaller, see ``DRAFT_SIDE``.

    Args:
        path: a file in one of ``FORMATS``; its contents decide which, not its suffix.

    Returns:
        An image of mode "RGB", without reference to the file.

    Raises:
        UnreadablePicture: the file is missing, empty, truncated, no picture, or of more than ``MAX_PIXELS``.
    """
    try:
        return _decode(path)
    except _Refused as refusal:
        raise UnreadablePicture(f"The picture {path} {refusal}.") from refusal


def as_rgb(image: Image.Image) -> Image.Image:
    """Return an image that Pillow has opened as :func:`load_rgb` would have it.

    Raises:
        UnreadablePicture: it cannot be decoded, or has grey values of which none is agreed to be white.
    """
    try:
        return _upright_rgb(image.copy())  # the user's stays as it is
    except _Refused as refusal:
        raise UnreadablePicture(f"An image of mode {image.mode} {refusal}.") from refusal
    except Exception as error:  # of a file that it has yet to read, as in _decode
        raise UnreadablePicture(f"An image of mode {image.mode} cannot be decoded ({error}).") from error


def opened(path: str | Path) -> io.BufferedReader | io.BytesIO:
    """Open a picture's file, or a member of a tar file by the path ``shard.tar/member.jpg``.

    Raises:
        OSError: there is no such file or member, or it is no file but a pipe or a device.
        UserError: the tar file is not usable.
    """
    try:
        return open(path, "rb", opener=regular_file)
    except NotADirectoryError:
        contents = read_member(str(path))
        if contents is None:
            raise
        return io.BytesIO(contents)


def stamp(path: str) -> tuple[int, int]:
    """Return size and time of a picture's file, by which it is recognised without being read; zeros if it is not there.

    Units are bytes, and nanoseconds since 1970.
    """
    try:
        about = os.stat(path)
    except NotADirectoryError:
        return member_stamp(path) or (0, 0)
    except OSError:
        return 0, 0
    return about.st_size, about.st_mtime_ns


def find_unreadable(paths: Sequence[str], num_workers: int) -> list[tuple[int, str]]:
    """Decode every picture once, each rank its share, and tell which ones are refused. A collective.

    Args:
        paths: the n files, the same on every rank.
        num_workers: processes of each rank that decode; 0 decodes in this one.

    Returns:
        The refused pictures' places in ``paths`` with the end of the sentence "the picture ...", in order, on every
        rank: ``[(17, "is empty (0 bytes)")]``.
    """
    loader = Loader(
        _Refusals(paths, distributed.share(len(paths))), batch_size=BATCH, num_workers=num_workers, collate_fn=list
    )
    own: list[tuple[int, str]] = []
    num_rounds = math.ceil(len(paths) / (distributed.world_size() * BATCH))
    with contextlib.closing(iter(loader)) as batches:
        for _ in progress(range(num_rounds), "check pictures", unit="batch"):
            own += filter(None, next_together(batches, ()))
    return sorted(refused for ranks_own in distributed.gather_objects(own) for refused in ranks_own)


class _Refusals(Dataset[tuple[int, str] | None]):
    """For each of some rows of ``paths``: None, or the row and why it is refused."""

    def __init__(self, paths: Sequence[str], rows: Sequence[int]) -> None:
        self.paths = paths
        self.rows = rows

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> tuple[int, str] | None:
        row = self.rows[index]
        try:
            _decode(self.paths[row])
        except _Refused as refusal:
            return row, str(refusal)
        return None


def _decode(path: str | Path) -> Image.Image:
    try:
        with warnings.catch_warnings():
            # Pillow's doubts (a size half way to the limit) are no reason to refuse.
            warnings.simplefilter("ignore")
            with opened(path) as file, Image.open(file, formats=sorted(set(FORMATS.values()))) as image:
                image.draft(None, (DRAFT_SIDE, DRAFT_SIDE))
                return _upright_rgb(image)
    except (_Refused, UserError):
        raise
    except FileNotFoundError as error:
        raise _Refused("does not exist") from error
    except IsADirectoryError as error:
        raise _Refused("is a folder") from error
    except UnidentifiedImageError as error:
        raise _Refused(_why_unidentified(str(path))) from error
    except Image.DecompressionBombError as error:
        raise _Refused(f"has more than {MAX_PIXELS:,} pixels") from error
    except Exception as error:  # Pillow's decoders raise nearly anything on broken files: OSError, SyntaxError, ...
        raise _Refused(f"cannot be decoded ({error})") from error


def _why_unidentified(path: str) -> str:
    if stamp(path)[0] == 0:
        return "is empty (0 bytes)"
    return f"is in none of the formats {', '.join(sorted(set(FORMATS.values())))}"


def _upright_rgb(image: Image.Image) -> Image.Image:
    image.load()
    if 0 in image.size:
        raise _Refused("has no pixels")
    with contextlib.suppress(Exception):  # of a broken EXIF block
        ImageOps.exif_transpose(image, in_place=True)
    return _to_rgb(image)


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I"):  # Pillow's own conversion would cut 16-bit greys off at 255
        grey = np.asarray(image)
        if grey.min() < 0 or grey.max() > 65535:
            raise _Refused("has 32-bit grey values, of which none is agreed to be white")
        return Image.fromarray((grey // 257).astype(np.uint8)).convert("RGB")
    if image.mode == "F":
        raise _Refused("has floating-point grey values, of which none is agreed to be white")
    if image.has_transparency_data:
        white = Image.new("RGBA", image.size, "white")
        white.alpha_composite(image.convert("RGBA"))
        return white.convert("RGB")
    return image.convert("RGB")
