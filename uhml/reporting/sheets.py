"""Sheets of pictures to look at: a query on the left, what was found for it on the right."""

import dataclasses
import functools
from collections.abc import Sequence
from pathlib import Path

import matplotlib
from PIL import Image, ImageDraw, ImageFont, ImageOps

from uhml.data.decode import load_rgb

TILE, FRAME, GAP, MARGIN = 128, 5, 10, 28
COLUMNS = 10
# Between the query and its neighbours.
GUTTER = 26
LINE = 17
INK, FAINT, BACKGROUND = "#1f2328", "#656d76", "#ffffff"
QUERY, PLAIN, RIGHT, WRONG = "#1f2328", "#d1d9e0", "#1a7f37", "#d1242f"
# Frames and marks are drawn so many times larger, and shrunk: Pillow's own lines are jagged.
FINER = 4


@dataclasses.dataclass(frozen=True)
class Tile:
    """A picture on a sheet.

    Attributes:
        path: of its file.
        captions: lines below it, cut off where they are too long.
        is_right: whether a neighbour is what it should be: framed green with a tick, or red with a cross; None where
            nobody knows.
    """

    path: str
    captions: tuple[str, ...] = ()
    is_right: bool | None = None


@dataclasses.dataclass(frozen=True)
class Answer:
    """A query and its neighbours, nearest first."""

    query: Tile
    neighbors: Sequence[Tile]


def draw_sheet(answers: Sequence[Answer], title: str, subtitle: str) -> Image.Image:
    """Draw the answers one below the other.

    Raises:
        UnreadablePicture: one of the pictures is not there any more.
    """
    step = TILE + 2 * FRAME + GAP
    most = max(len(answer.neighbors) for answer in answers)
    columns = min(most, COLUMNS)
    tall = [_height(answer) for answer in answers]
    head = MARGIN + 58
    width = max(2 * MARGIN + step * (columns + 1) - GAP + GUTTER, 640)
    sheet = Image.new("RGB", (width, head + sum(tall) + MARGIN - GAP), BACKGROUND)
    draw = ImageDraw.Draw(sheet)
    draw.text((MARGIN, MARGIN - 6), _cut(title, width - 2 * MARGIN, 22), INK, _font(22))
    draw.text((MARGIN, MARGIN + 25), _cut(subtitle, width - 2 * MARGIN, 13), FAINT, _font(13))
    top = head
    for answer, height in zip(answers, tall, strict=True):
        _place(sheet, answer.query, MARGIN, top, QUERY)
        down = _step_down(answer.neighbors)
        for i, tile in enumerate(answer.neighbors):
            colour = PLAIN if tile.is_right is None else RIGHT if tile.is_right else WRONG
            left = MARGIN + GUTTER + step * (1 + i % COLUMNS)
            _place(sheet, tile, left, top + i // COLUMNS * down, colour)
        top += height
    return sheet


def write_sheet(path: Path, answers: Sequence[Answer], title: str, subtitle: str) -> None:
    """Draw the answers into a file; see :func:`draw_sheet`."""
    draw_sheet(answers, title, subtitle).save(path)


def thumbnail(image: Image.Image, side: int) -> Image.Image:
    """Return the whole picture in a square."""
    return ImageOps.pad(image, (side, side), Image.Resampling.LANCZOS, color=BACKGROUND)


def _step_down(tiles: Sequence[Tile]) -> int:
    return TILE + 2 * FRAME + LINE * max((len(tile.captions) for tile in tiles), default=0) + GAP


def _height(answer: Answer) -> int:
    lines = max(1, -(-len(answer.neighbors) // COLUMNS))
    return max(_step_down([answer.query]), lines * _step_down(answer.neighbors)) + GAP


def _place(sheet: Image.Image, tile: Tile, left: int, top: int, colour: str) -> None:
    sheet.paste(thumbnail(load_rgb(tile.path), TILE), (left + FRAME, top + FRAME))
    frame = _frame(colour, tile.is_right)
    sheet.paste(frame, (left, top), frame)
    draw = ImageDraw.Draw(sheet)
    for i, caption in enumerate(tile.captions):
        where = (left + FRAME, top + TILE + 2 * FRAME + 2 + LINE * i)
        draw.text(where, _cut(caption, TILE, 12), FAINT if i else INK, _font(12))


@functools.cache
def _frame(colour: str, is_right: bool | None) -> Image.Image:
    """Return a transparent square with a frame, and a mark that is told by its shape where the colour is not seen."""
    side = (TILE + 2 * FRAME) * FINER
    frame = Image.new("RGBA", (side, side))
    draw = ImageDraw.Draw(frame)
    thick = FRAME * FINER if is_right is not None or colour == QUERY else 2 * FINER
    # White behind the round corners, so that the picture's own do not stick out.
    draw.rectangle((0, 0, side - 1, side - 1), outline=BACKGROUND, width=FRAME * FINER)
    draw.rounded_rectangle((0, 0, side - 1, side - 1), radius=7 * FINER, outline=colour, width=thick)
    if is_right is not None:
        radius, across = 11 * FINER, 4.5 * FINER
        x, y = side - radius - 2 * FINER, radius + 2 * FINER
        draw.ellipse((x - radius, y - radius, x + radius, y + radius), colour, BACKGROUND, 2 * FINER)
        stroke = int(2.6 * FINER)
        if is_right:
            tick = [(x - 1.1 * across, y), (x - 0.3 * across, y + 0.9 * across), (x + 1.2 * across, y - 0.9 * across)]
            draw.line(tick, BACKGROUND, stroke, joint="curve")
        else:
            for up in (-across, across):
                draw.line([(x - across, y - up), (x + across, y + up)], BACKGROUND, stroke)
    return frame.resize((side // FINER, side // FINER), Image.Resampling.LANCZOS)


@functools.cache
def _font(size: int) -> ImageFont.FreeTypeFont:
    return ImageFont.truetype(Path(matplotlib.get_data_path(), "fonts", "ttf", "DejaVuSans.ttf"), size)


def _cut(text: str, width: int, size: int) -> str:
    """Return the text on one line, without its middle where it is too long."""
    text = " ".join(text.split())
    kept, shown = len(text), text
    while _font(size).getlength(shown) > width:
        kept -= 1
        shown = f"{text[: kept - kept // 2]}…{text[len(text) - kept // 2 :]}"
    return shown
