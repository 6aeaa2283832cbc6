"""Figures of clusters, for people to see what a run learns from."""

import matplotlib
import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Patch, Rectangle
from numpy.typing import NDArray
from torch import Tensor
from torchvision.transforms.v2.functional import pil_to_tensor
from torchvision.utils import make_grid

from uhml.data.pictures import Pictures
from uhml.data.sampling import evenly
from uhml.mining import starts_of_runs
from uhml.reporting.sheets import thumbnail

SHEET_CLUSTERS, SHEET_PICTURES, THUMBNAIL = 10, 12, 64
BATCH_CLUSTERS, BATCH_PICTURES = 16, 12
APART = "#d4d4d8"


def thumbnails(pictures: Pictures) -> list[Tensor]:
    """Return each picture, whole, in a square: ``[3, THUMBNAIL, THUMBNAIL]`` uint8.

    Raises:
        UnreadablePicture: one cannot be read any more.
    """
    return [pil_to_tensor(thumbnail(pictures.load(i), THUMBNAIL)) for i in range(len(pictures))]


def draw_clusters(level: NDArray[np.int32], pictures: Pictures) -> Tensor:
    """Draw one row per cluster: clusters of all sizes from the largest down, pictures from all over each.

    Args:
        level: ``[n]``, the cluster of each picture.
        pictures: the n pictures.

    Returns:
        ``[3, h, w]`` uint8.
    """
    ids, sizes = np.unique(level, return_counts=True)
    by_size = ids[np.argsort(-sizes, kind="stable")]
    by_size = by_size[: max(1, int((sizes > 1).sum()))]
    blank = torch.full((3, THUMBNAIL, THUMBNAIL), 255, dtype=torch.uint8)
    tiles = []
    for cluster in by_size[evenly(len(by_size), SHEET_CLUSTERS)]:
        members = np.flatnonzero(level == cluster)
        row = thumbnails(pictures.select(members[evenly(len(members), SHEET_PICTURES)]))
        tiles += row + [blank] * (SHEET_PICTURES - len(row))
    return make_grid(tiles, nrow=SHEET_PICTURES, padding=2, pad_value=200)


def draw_batch(batch: NDArray[np.int64], levels: NDArray[np.int32], pictures: Pictures, title: str) -> Figure:
    """Draw clusters of a batch, a row for each, with what they and their pictures share.

    Rows stand in the order of the tree, and bars on the left join those that share a cluster of a coarser level. The
    frame of a picture has the colour of the finest level on which it is in one cluster with the first of its row: small
    clusters are filled up from coarser ones.

    Args:
        batch: ``[P, M]``, indices of pictures, P clusters of M pictures each.
        levels: ``[K, n]``, nested clusters of the n pictures, finest first.
        pictures: the n pictures.
        title: of the figure.
    """
    batch = batch[np.lexsort(levels[:, batch[:, 0]])]
    rows = batch[evenly(len(batch), BATCH_CLUSTERS), :BATCH_PICTURES]
    num_rows, num_columns, num_levels = *rows.shape, len(levels)
    colours = [matplotlib.colormaps["viridis"](x) for x in np.linspace(0.85, 0.1, num_levels)]
    width, height = num_levels + num_columns, num_rows + 2.2
    figure = Figure(figsize=(max(0.72 * width, 6.4), 0.72 * height), dpi=100)
    axes = figure.add_axes((0, 0, 1, 1))
    axes.set(xlim=(-num_levels - 0.2, max(num_columns, 6.4 / 0.72 - num_levels) + 0.1), ylim=(num_rows + 1.1, -1.1))
    axes.axis("off")
    axes.text(-num_levels, -0.85, title, fontsize=11, va="center")
    for k, level in enumerate(levels):
        _draw_bars(axes, level[rows[:, 0]], np.bincount(level), -k - 1, colours[k])
        axes.text(-k - 0.55, -0.25, f"level {k + 1}", fontsize=8, ha="center")
    for row, members in enumerate(rows):
        shared = (levels[:, members] == levels[:, members[:1]]).sum(0)
        for column, tile in enumerate(thumbnails(pictures.select(members))):
            box = (column + 0.06, column + 0.94, row + 0.94, row + 0.06)
            axes.imshow(tile.permute(1, 2, 0).numpy(), extent=box, aspect="auto", interpolation="antialiased")
            colour = colours[num_levels - shared[column]] if shared[column] else APART
            frame = Rectangle((column + 0.04, row + 0.04), 0.92, 0.92, fill=False, edgecolor=colour, linewidth=3)
            axes.add_patch(frame)
    names = [f"level {k + 1}" for k in range(num_levels)]
    names[0] += ", the finest"
    figure.legend(
        handles=[Patch(color=c, label=name) for c, name in zip([*colours, APART], [*names, "none"], strict=True)],
        title="bars: clusters, with their number of pictures; frames: finest level shared with the first of the row",
        loc="lower left",
        ncols=num_levels + 1,
        fontsize=8,
        title_fontsize=8,
        alignment="left",
        frameon=False,
    )
    return figure


def _draw_bars(axes: Axes, clusters: NDArray[np.int32], sizes: NDArray[np.int64], left: float, colour: tuple) -> None:
    """Draw a bar along each run of rows of one cluster."""
    starts = starts_of_runs(clusters)
    for start, end in zip(starts, [*starts[1:], len(clusters)], strict=True):
        axes.add_patch(Rectangle((left + 0.2, start + 0.06), 0.5, end - start - 0.12, color=colour))
        ink = "white" if sum(colour[:3]) < 1.5 else "black"
        size = f"{sizes[clusters[start]]:,}"
        axes.text(left + 0.45, (start + end) / 2, size, color=ink, fontsize=8, ha="center", va="center", rotation=90)
