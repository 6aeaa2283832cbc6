"""The levels of the tree that a page shows, and what there is to say of their clusters."""

import math

import numpy as np
from torch import Tensor

from uhml.hierarchy import Dendrogram
from uhml.hierarchy.geometry import Geometry, polar

COARSEST = 10
# The least of a cluster's pictures to be looked at together; on the finest level, as many on average.
HANDFUL = 5
# From one level to the next, about.
FACTOR = 7
CENTRAL, UNUSUAL = 6, 3


def level_counts(num_pictures: int) -> list[int]:
    """Return how many clusters each level should have, coarsest first: 10, 90, 700 and 6,000 of 32,460 pictures."""
    finest = num_pictures / HANDFUL
    if finest <= COARSEST:
        return [max(2, int(finest))]
    gaps = round(math.log(finest / COARSEST, FACTOR))
    counts = np.geomspace(COARSEST, finest, gaps + 1) if gaps else np.array([COARSEST])
    return [int(float(f"{count:.1g}")) for count in counts]


def shown_levels(tree: Dendrogram, counts: list[int], shown: np.ndarray) -> np.ndarray:
    """Cut a tree into levels.

    Args:
        tree: over all n pictures.
        counts: numbers of clusters, rising.
        shown: ``[m]`` those of the pictures that are shown, in the order in which they are.

    Returns:
        ``[L, m]`` int32, coarsest first and nested, the clusters of each numbered from the one of most shown pictures
        down.
    """
    cut = tree.cut(counts=counts).numpy()[::-1, shown]
    return np.stack([_by_size(level) for level in cut])


def _by_size(level: np.ndarray) -> np.ndarray:
    """Number clusters by their sizes, the largest first, those of one size by their first picture."""
    _, first, cluster, sizes = np.unique(level, return_index=True, return_inverse=True, return_counts=True)
    number = np.empty(len(first), np.int32)
    number[np.lexsort([first, -sizes])] = np.arange(len(first))
    return number[cluster]


def heights(tree: Dendrogram, standing: np.ndarray, count: int) -> np.ndarray:
    """Return the height at which each picture's cluster was complete, ``[n]``; 0 for a picture by itself.

    Args:
        tree: over n pictures.
        standing: ``[n - 1]`` one of the pictures of each merge.
        count: number of clusters.
    """
    clusters = tree.cut(counts=[count])[0].numpy()
    num_merges = tree.num_points - int(clusters.max()) - 1
    complete = np.zeros(clusters.max() + 1)
    np.maximum.at(complete, clusters[standing[:num_merges]], tree.heights[:num_merges])
    return complete[clusters]


def central_and_unusual(points: Tensor, level: np.ndarray, geometry: Geometry) -> tuple[np.ndarray, np.ndarray]:
    """Return the pictures that are nearest to, and farthest from, the hyperbolic centroid of their cluster.

    Args:
        points: ``[m, d]`` points of the geometry.
        level: ``[m]`` their clusters.
        geometry: of the points.

    Returns:
        ``[clusters, CENTRAL]`` most central first, and ``[clusters, UNUSUAL]`` most unusual first, of the others;
        int32, -1 where there are no more.
    """
    lifted = geometry.lift(points.double())
    sizes = np.bincount(level)
    by_cluster = np.argsort(level, kind="stable")
    starts = np.cumsum(sizes) - sizes
    means = np.add.reduceat(lifted.numpy()[by_cluster], starts) / sizes[:, None]
    # The mean gap to the cluster's points, which rises with the distance to their centroid: that is the mean lift,
    # scaled back to the hyperboloid.
    gaps = np.einsum("ij,ij->i", polar(lifted).numpy(), means[level])
    ranked = np.lexsort([gaps, level])
    place = np.arange(len(level)) - starts[level[ranked]]
    from_end = sizes[level[ranked]] - 1 - place
    central = np.full((len(sizes), CENTRAL), -1, np.int32)
    unusual = np.full((len(sizes), UNUSUAL), -1, np.int32)
    for table, column, chosen in (
        (central, place, place < CENTRAL),
        (unusual, from_end, (from_end < UNUSUAL) & (place >= CENTRAL)),
    ):
        table[level[ranked[chosen]], column[chosen]] = ranked[chosen]
    return central, unusual
