"""The tree as a figure."""

from collections.abc import Sequence

import numpy as np
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
        # Clusters of the coarsest cut have colours.
        threshold = next(iter(lines.values()), 0.0)
        labels = [f"{size:,}" for size in sizes]
        dendrogram(top, ax=axes, labels=labels, leaf_rotation=90, leaf_font_size=8, color_threshold=threshold)
        for n, height in lines.items():
            axes.axhline(height, color="0.4", linestyle="--", linewidth=0.8)
            axes.text(1, height, f" {n:,} clusters", transform=axes.get_yaxis_transform(), va="center", fontsize=8)
        # The merges below, within the clusters, are not drawn.
        margin = 0.1 * (heights[-1] - heights[0])
        if margin > 0:
            axes.set_ylim(max(0, heights[0] - margin), heights[-1] + margin)
    axes.set(title=title, ylabel="height of merge", xlabel="points in cluster")
    return figure
