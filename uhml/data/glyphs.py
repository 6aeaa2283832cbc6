"""The embedded data set: characters drawn from the font faces that matplotlib ships.

A class is a character, its super class the Unicode block. What is drawn, and what is left out so that a score means
something:

* characters of Unicode's categories letter, number, punctuation and symbol that at least ``MIN_DRAWINGS`` of the faces
  have: 3,206. Computer Modern takes part with ASCII letters and digits, as its other places hold private encodings;
* a drawing that repeats one of the same character (an arrow is the same upright and italic) is left out, 6,650 in all:
  any model finds its twin. 873 characters, most of them box drawing and geometric shapes, then have too few drawings;
* a character that shares a drawing with one of a smaller code point is left out (Latin A stays, Greek Alpha and
  Cyrillic A go), 229 in all, so that no drawing belongs to two classes.

What stays is 2,104 characters of 36 blocks in 25,845 pictures: 1,052 characters train (12,950 pictures) and as many
test (12,895).
"""

import csv
import hashlib
import string
import tempfile
import unicodedata
from pathlib import Path

import matplotlib
import numpy as np
from fontTools.unicodedata import block
from matplotlib.ft2font import FT2Font
from PIL import Image, ImageDraw, ImageFont

from uhml import distributed
from uhml.data.listed import listed
from uhml.data.pictures import Splits
from uhml.errors import UserError
from uhml.files import user_cache
from uhml.progress import progress

VERSION = "1"
"""To be raised with any change to what is drawn or split, so that no drawings of an older uhml are taken for new."""

SIDE = 64
"""Width and height of a picture in pixels."""

FONT_SIZE = 44
"""Pixels to the em: the tallest capitals with an accent still fit."""

BASELINE = 46
"""The row of pixels on which characters stand."""

MIN_DRAWINGS = 8

DEJAVU_AND_STIX = (
    "DejaVuSans",
    "DejaVuSans-Bold",
    "DejaVuSans-BoldOblique",
    "DejaVuSans-Oblique",
    "DejaVuSansMono",
    "DejaVuSansMono-Bold",
    "DejaVuSansMono-BoldOblique",
    "DejaVuSansMono-Oblique",
    "DejaVuSerif",
    "DejaVuSerif-Bold",
    "DejaVuSerif-BoldItalic",
    "DejaVuSerif-Italic",
    "STIXGeneral",
    "STIXGeneralBol",
    "STIXGeneralBolIta",
    "STIXGeneralItalic",
)
COMPUTER_MODERN = ("cmb10", "cmr10", "cmss10", "cmti10", "cmtt10")
FACES = DEJAVU_AND_STIX + COMPUTER_MODERN
"""matplotlib's faces that draw the characters their tables name; the others are parts of symbols or placeholders."""


def glyphs(root: Path | None) -> Splits:
    """Draw the characters, on first use, and list them. A collective: rank 0 draws, the others wait.

    The same versions of matplotlib and Pillow draw the same bytes. Characters train and test in turn, in the order of
    their blocks and, within a block, of a hash, so that neither part has, say, all the capitals.

    Args:
        root: where the pictures are kept, in a folder by ``VERSION``; None stands for ``$XDG_CACHE_HOME/uhml/glyphs``
            or ``~/.cache/uhml/glyphs``.

    Raises:
        UserError: ``root`` cannot be written, or is not shared by the machines of the run.
    """
    if root is None:
        root = user_cache("glyphs")
    home = root / f"v{VERSION}"
    index = home / "glyphs.csv"
    # Only rank 0's look at the disk decides whether there is something to draw: it alone does, and says so to all.
    distributed.on_main(lambda: None if index.exists() else _make(home))
    if not index.exists():
        raise UserError(f"Rank 0 drew the glyphs in {root}, unseen from here; set data.root to a shared folder.")
    return listed(index)


def _make(home: Path) -> None:
    """Draw everything aside and move it into place whole, so that an interrupted run leaves nothing half done."""
    try:
        home.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".unfinished-", dir=home.parent) as aside:
            _draw_all(Path(aside) / home.name)
            try:
                (Path(aside) / home.name).rename(home)
            except OSError:
                if not (home / "glyphs.csv").exists():  # else another run was faster, with the same drawings
                    raise
    except OSError as error:
        raise UserError(
            f"Cannot keep the glyphs in {home.parent}: {error.strerror}. Set data.root to a folder that can be written."
        ) from error


def _draw_all(folder: Path) -> None:
    fonts = {name: _font(name) for name in FACES}
    faces_of: dict[str, list[str]] = {}
    for name in FACES:
        for character in _characters(name):
            faces_of.setdefault(character, []).append(name)
    candidates = sorted(character for character, names in faces_of.items() if len(names) >= MIN_DRAWINGS)
    seen: set[bytes] = set()
    kept: dict[str, list[str]] = {}
    for character in progress(candidates, "draw glyphs", unit="character"):
        drawings: dict[bytes, tuple[str, Image.Image]] = {}
        for name in faces_of[character]:
            picture = _draw(character, fonts[name])
            if picture is not None:
                drawings.setdefault(picture.tobytes(), (name, picture))
        if len(drawings) < MIN_DRAWINGS or not seen.isdisjoint(drawings):
            continue
        seen.update(drawings)
        kept[character] = []
        (folder / _code(character)).mkdir(parents=True)
        for name, picture in drawings.values():
            kept[character].append(f"{_code(character)}/{name}.png")
            picture.save(folder / kept[character][-1])
    _write_index(folder / "glyphs.csv", kept)


def _font(name: str) -> ImageFont.FreeTypeFont:
    # The basic layout: one character at a time needs no shaping, and it is there on every machine.
    return ImageFont.truetype(_file(name), FONT_SIZE, layout_engine=ImageFont.Layout.BASIC)


def _file(name: str) -> str:
    return str(Path(matplotlib.get_data_path(), "fonts", "ttf", f"{name}.ttf"))


def _characters(name: str) -> list[str]:
    """Return the characters that a face draws and that are letters, numbers, punctuation or symbols."""
    drawn = {chr(code) for code, glyph in FT2Font(_file(name)).get_charmap().items() if glyph != 0}
    if name in COMPUTER_MODERN:
        return sorted(drawn.intersection(string.ascii_letters + string.digits))
    return sorted(character for character in drawn if unicodedata.category(character)[0] in "LNPS")


def _draw(character: str, font: ImageFont.FreeTypeFont) -> Image.Image | None:
    """Return the character in black on white, or None where nothing can be seen or it does not fit."""
    picture = Image.new("L", (SIDE, SIDE), 255)
    origin = (SIDE // 2, BASELINE)
    left, top, right, bottom = font.getbbox(character, anchor="ms")
    if origin[0] + left < 0 or origin[1] + top < 0 or origin[0] + right > SIDE or origin[1] + bottom > SIDE:
        return None
    ImageDraw.Draw(picture).text(origin, character, fill=0, font=font, anchor="ms")
    return picture if np.asarray(picture).min() < 128 else None


def _code(character: str) -> str:
    return f"U+{ord(character):04X}"


def _write_index(file: Path, kept: dict[str, list[str]]) -> None:
    def place(character: str) -> tuple[str, str]:
        return block(character), hashlib.sha256(character.encode()).hexdigest()

    split_of = {character: ("train", "test")[i % 2] for i, character in enumerate(sorted(kept, key=place))}
    with file.open("w", newline="", encoding="utf-8") as stream:
        writer = csv.writer(stream)
        writer.writerow(["path", "label", "super_label", "split"])
        for character, paths in kept.items():
            label = f"{_code(character)} {unicodedata.name(character)}"
            writer.writerows([path, label, block(character), split_of[character]] for path in paths)
