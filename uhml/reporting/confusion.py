"""The picture of what is taken for what: a matrix where it can be read, and the most confused pairs."""

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from matplotlib.colors import PowerNorm
from matplotlib.figure import Figure
from numpy.typing import NDArray

from uhml import logs
from uhml.data.decode import load_rgb
from uhml.reporting.sheets import thumbnail

# Rows of a matrix whose names can still be read, and up to which the numbers fit into it.
MATRIX_UP_TO, NUMBERS_UP_TO = 40, 12
NUM_PAIRS, THUMBNAIL, NAME_LENGTH = 12, 96, 28
COLOUR, FAINT = "#1a5fb4", "#656d76"


class Pair(NamedTuple):
    """Pictures of one class that have their nearest neighbour in another; paths are those of one such picture."""

    name: str
    taken_for: str
    pictures: int
    share: float
    path: str
    neighbor_path: str


class Matrix(NamedTuple):
    """What each group's pictures have as nearest neighbour.

    Attributes:
        what: the groups are: "class", "super-class".
        names: of the groups.
        shares: ``[g, g]``, rows sum to 1.
    """

    what: str
    names: list[str]
    shares: NDArray[np.float64]


def matrix(what: str, names: tuple[str, ...], labels: NDArray[np.int64], nearest: NDArray[np.int64]) -> Matrix | None:
    """Count what the nearest neighbours are, or return None for more groups than can be read.

    Args:
        what: the groups are.
        names: of the groups.
        labels: ``[n]``, groups of the queries.
        nearest: ``[n]``, groups of their nearest neighbours.
    """
    present = np.unique(np.concatenate([labels, nearest]))
    if not 2 <= len(present) <= MATRIX_UP_TO:
        return None
    counts = np.zeros((len(present), len(present)))
    np.add.at(counts, (np.searchsorted(present, labels), np.searchsorted(present, nearest)), 1)
    return Matrix(what, [names[i] for i in present], counts / counts.sum(1, keepdims=True).clip(min=1))


def draw_confusion(
    path: Path, title: str, found: Matrix | None, pairs: Sequence[Pair], recall_of_classes: NDArray[np.float64]
) -> None:
    """Draw the matrix, if there is one, how R@1 is spread over the classes, and the first of the pairs.

    Args:
        path: of the picture.
        title: of the picture.
        found: the matrix.
        pairs: the most confused first.
        recall_of_classes: ``[c]``.

    Raises:
        UnreadablePicture: one of the pairs' pictures is not there any more.
    """
    # Names of fonts that lack a letter are no concern of the user's.
    logging.getLogger("matplotlib.font_manager").setLevel(logging.ERROR)
    shown = pairs[:NUM_PAIRS]
    groups = 0 if found is None else len(found.names)
    left_width = 5.5 if found is None else max(6.0, 2.6 + 0.27 * groups)
    height = max(7.0, 1.0 + 0.27 * groups + 3.6 if found is not None else 0.0)
    figure: Any = Figure(figsize=(left_width + 6.6, height), layout="constrained")
    figure.suptitle(title, x=0.01, ha="left", fontsize=14, parse_math=False)
    left, right = figure.subfigures(1, 2, width_ratios=[left_width, 6.6], wspace=0.03)
    if found is None:
        _histogram(left.subplots(), recall_of_classes)
    else:
        above, below = left.subfigures(2, 1, height_ratios=[height - 2.6, 2.6])
        _heat(above.subplots(), found)
        _histogram(below.subplots(), recall_of_classes)
    _pairs(right, shown)
    figure.savefig(path, dpi=110)


def _heat(axes: Any, found: Matrix) -> None:
    # The root of the share: a confusion of a few per cent should be seen beside a diagonal of nearly all.
    image = axes.imshow(found.shares, cmap="Blues", norm=PowerNorm(0.5, 0, 1))
    at, names = range(len(found.names)), [_short(name) for name in found.names]
    axes.set_xticks(at, names, rotation=60, ha="right", rotation_mode="anchor", fontsize=8, parse_math=False)
    axes.set_yticks(at, names, fontsize=8, parse_math=False)
    axes.set_xlabel("nearest neighbour", color=FAINT)
    axes.set_ylabel("query", color=FAINT)
    axes.set_title(f"Share of nearest neighbours, by {found.what}", loc="left", fontsize=10)
    axes.tick_params(length=0)
    for side in axes.spines.values():
        side.set_visible(False)
    if len(found.names) <= NUMBERS_UP_TO:
        for (i, j), share in np.ndenumerate(found.shares):
            if share >= 0.005:
                colour = "white" if share > 0.3 else "black"
                axes.text(j, i, f"{100 * share:.0f}", ha="center", va="center", fontsize=8, color=colour)
    bar = axes.figure.colorbar(image, ax=axes, shrink=0.6, format=lambda share, _: f"{100 * share:.0f} %")
    bar.outline.set_visible(False)


def _histogram(axes: Any, recall: NDArray[np.float64]) -> None:
    axes.hist(100 * recall, bins=np.linspace(0, 100, 21), color=COLOUR, rwidth=0.9)
    axes.axvline(100 * recall.mean(), color="black", linewidth=1, linestyle="--")
    axes.set_title(f"R@1 of {len(recall):,} classes, mean {100 * recall.mean():.1f} %", loc="left", fontsize=10)
    axes.set(xlabel="R@1, per cent", ylabel="classes", xlim=(0, 100))
    axes.yaxis.get_major_locator().set_params(integer=True)
    axes.spines[["top", "right"]].set_visible(False)


def _pairs(figure: Any, pairs: Sequence[Pair]) -> None:
    if not pairs:
        figure.text(0.5, 0.5, "No picture's nearest neighbour is of another class.", ha="center", color=FAINT)
        return
    axes = figure.subplots(NUM_PAIRS // 2, 2, squeeze=False)
    figure.suptitle("Most confused: a picture, and the nearest neighbour it has", x=0.02, ha="left", fontsize=10)
    for cell in axes.flat:
        cell.axis("off")
    for cell, pair in zip(axes.T.flat, pairs, strict=False):
        gap = np.full((THUMBNAIL, THUMBNAIL // 3, 3), 255, np.uint8)
        both = [np.asarray(thumbnail(load_rgb(path), THUMBNAIL)) for path in (pair.path, pair.neighbor_path)]
        cell.imshow(np.concatenate([both[0], gap, both[1]], 1))
        cell.annotate("", (0.575, 0.5), (0.425, 0.5), "axes fraction", arrowprops={"arrowstyle": "->", "color": FAINT})
        said = f"{_short(pair.name)}: {100 * pair.share:.0f} % ({pair.pictures})\n→ {_short(pair.taken_for)}"
        cell.set_title(said, fontsize=8, loc="left", parse_math=False)


def _short(name: str) -> str:
    """Cut out the middle of a long name: siblings often differ at the end."""
    name = logs.shown(name)
    half = NAME_LENGTH // 2
    return name if len(name) <= NAME_LENGTH else f"{name[: half - 1]}…{name[-half:]}"
