"""What a run shows of a hierarchy: a function of the tree and the pictures, which any process can draw."""

import dataclasses

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from numpy.typing import NDArray

from uhml.data.pictures import Pictures
from uhml.hierarchy import Dendrogram
from uhml.hierarchy.plot import draw_top
from uhml.hierarchy.quality import dendrogram_purity
from uhml.reporting.figures import draw_batch, draw_clusters


@dataclasses.dataclass(frozen=True)
class ShownHierarchy:
    """A hierarchy as :meth:`uhml.reporting.report.Reporter.hierarchy` records it.

    Attributes:
        num_pictures: that were clustered.
        sizes: the sizes of each level's clusters, finest level first.
        clusters: of each level, some of its clusters as a picture, ``[3, h, w]`` uint8.
        tree: the top of the tree as a picture, ``[3, h, w]`` uint8.
        batch: a batch, likewise.
        purity: dendrogram purities by their names, for the labels that are known; nothing learns from it.
    """

    num_pictures: int
    sizes: list[NDArray[np.int64]]
    clusters: list[NDArray[np.uint8]]
    tree: NDArray[np.uint8]
    batch: NDArray[np.uint8]
    purity: dict[str, float]


def show_hierarchy(
    step: int, tree: Dendrogram, levels: NDArray[np.int32], pictures: Pictures, batch: NDArray[np.int64]
) -> ShownHierarchy:
    """Draw the tree, the clusters on each level, and a batch.

    Args:
        step: of the re-clustering.
        tree: that was found.
        levels: ``[K, n]``, finest first.
        pictures: the n training pictures.
        batch: ``[P, M]``, the pictures of the first batch from these levels, a row for each of its clusters.
    """
    sizes = [np.bincount(level) for level in levels]
    tops = draw_top(tree, f"Step {step}: the top of the tree of {tree.num_points:,} pictures", [*map(len, sizes)])
    batches = draw_batch(batch, levels, pictures, f"Step {step}: clusters of a batch of {batch.size:,} pictures")
    return ShownHierarchy(
        levels.shape[1],
        sizes,
        [draw_clusters(level, pictures).numpy() for level in levels],
        _painted(tops),
        _painted(batches),
        purities(tree, pictures),
    )


def purities(tree: Dendrogram, pictures: Pictures) -> dict[str, float]:
    """Return the dendrogram purity by each kind of the pictures' labels, by its name in ``metrics.jsonl``."""
    labels = {"": pictures.labels, "super_": pictures.super_labels}
    return {f"{name}dendrogram_purity": dendrogram_purity(tree, of) for name, of in labels.items() if of is not None}


def _painted(figure: Figure) -> NDArray[np.uint8]:
    """Return the figure as ``[3, h, w]`` uint8."""
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    return np.asarray(canvas.buffer_rgba())[..., :3].transpose(2, 0, 1).copy()
