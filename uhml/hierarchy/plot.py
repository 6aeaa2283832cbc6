"""The tree as a figure."""

from collections.abc import Callable, Sequence

import matplotlib
import numpy as np
from matplotlib.colors import to_hex
from matplotlib.figure import Figure
from scipy.cluster.hierarchy import dendrogram

from uhml.hierarchy.dendrogram import Dendrogram

SHOWN_CLUSTERS = 50


def draw_top(tree: Dendrogram, title: str, cuts: Sequence[int] = ()) -> Figure:
    """Draw the top of the tree, down to SHOWN_CLUSTERS clusters, each with its number of points.

    Args:
        tree: to draw.
        title: of the figure.
        cuts: numbers of clusters; a line marks where the tree is cut into so many, if it is drawn that far down.
    """
    figure = Figure(figsize=(10, 5), dpi=120, layout="constrained")
    axes = figure.subplots()
    # Where all points are equal, all merges are at one height, which is none.
    if tree.num_points > 1 and tree.heights[-1] > 0:
        # scipy walks the whole tree recursively, so it is given the top alone, with clusters as its leaves.
        top, sizes = tree.top(SHOWN_CLUSTERS)
        # A cut lies between two merges; below the first and above the last there is none.
        heights = np.array([top[0, 2], *top[:, 2], top[-1, 2]])
        lines = {n: heights[len(sizes) - n :][:2].mean() for n in sorted(cuts) if 1 < n <= len(sizes)}
        labels = [f"{size:,}" for size in sizes]
        color_of = _colors(top, next(iter(lines), 1))
        dendrogram(top, ax=axes, labels=labels, leaf_rotation=90, leaf_font_size=8, link_color_func=color_of)
        for n, height in lines.items():
            axes.axhline(height, color="0.4", linestyle="--", linewidth=0.8)
            axes.text(1, height, f" {n:,} clusters", transform=axes.get_yaxis_transform(), va="center", fontsize=8)
        # The merges below, within the clusters, are not drawn.
        margin = 0.1 * (heights[-1] - heights[0])
        if margin > 0:
            axes.set_ylim(max(0, heights[0] - margin), heights[-1] + margin)
    else:
        axes.text(0.5, 0.5, "no two points differ", transform=axes.transAxes, ha="center", color="0.4")
        axes.set(xticks=[], yticks=[])
    axes.set(title=title, ylabel="height of merge", xlabel="points in cluster")
    return figure


def _colors(top: np.ndarray, num_clusters: int) -> Callable[[int], str]:
    """Return the colour of each merge: within a cluster of a cut its own, as far as there are twenty, grey above."""
    colormap = matplotlib.colormaps["tab10" if num_clusters <= 10 else "tab20"]
    palette = [to_hex(colormap(i)) for i in range(colormap.N)]
    m = len(top) + 1
    colors: dict[int, str] = {}
    # From the top down and from left to right, as scipy draws it: neighbours get colours that follow each other.
    stack, num_colored = [(2 * m - 2, "")], 0
    while stack:
        node, color = stack.pop()
        if node < m:
            continue
        # Merges stand in the order of their heights: the last ones join what the cut leaves apart.
        if not color and node <= 2 * m - 1 - num_clusters:
            color = palette[num_colored % len(palette)]
            num_colored += 1
        colors[node] = color or "#888888"
        left, right = top[node - m, :2].astype(int)
        stack += [(right, color), (left, color)]
    return colors.__getitem__
