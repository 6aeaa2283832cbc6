"""The tree of the pictures drawn into the Poincaré disk, which has room for it: as much as a tree has leaves.

In the hyperbolic plane a circle's length grows exponentially with its radius, as the number of clusters does with the
depth of a tree; so a tree fits there without crowding (Sarkar, "Low distortion Delaunay embedding of trees in
hyperbolic plane", 2011; Lamping and Rao, "The hyperbolic browser", 1996). Here its nodes are pictures. Of two clusters
that merge, the more central picture stands for both, so that every picture but one stands, at last, for one greatest
cluster. The pictures of great clusters lie near the centre and those that stand for themselves alone far out, as dense
everywhere as anywhere, each in the direction of the middle of the cluster that it stands for. A cluster is a sector,
and so is each within it.
"""

import math
from typing import NamedTuple

import numpy as np
from torch import Tensor

from uhml.hierarchy import Dendrogram
from uhml.hierarchy.geometry import Geometry, polar

# Of the plane of curvature -1, for each picture: near the centre, a thumbnail's worth.
AREA = 0.5
# So few pictures are spread further, to fill the disk.
FILLED_BY = 400


class Drawing(NamedTuple):
    """Where the pictures of a tree are drawn.

    Attributes:
        order: ``[n]`` int64, the pictures around the circle; every cluster of every cut is a row of neighbours in it.
        turn: ``[n]`` float64, the direction of each picture, 0 to 1 of a full turn.
        rank: ``[n]`` int64, how many pictures stand for greater clusters than this one; 0 for that at the centre.
        standing: ``[n - 1]`` int64, the picture that stands for the cluster of each merge.
    """

    order: np.ndarray
    turn: np.ndarray
    rank: np.ndarray
    standing: np.ndarray


def draw(tree: Dendrogram, points: Tensor, geometry: Geometry) -> Drawing:
    """Draw a tree.

    Args:
        tree: over the points.
        points: ``[n, d]`` points of the geometry.
        geometry: says which of a cluster's points is most central, and which of two clusters go side by side.
    """
    linkage = tree.to_scipy()
    n, children = tree.num_points, linkage[:, :2].astype(np.int64)
    lifted = geometry.lift(points.double())
    polars = polar(lifted).cpu().numpy()
    sizes = np.concatenate([np.ones(n), linkage[:, 3]])
    # The mean gap of a point, or of all points of a cluster, to a cluster is its product with the cluster's mean.
    means = np.concatenate([lifted.cpu().numpy(), np.empty((n - 1, lifted.shape[1]))])
    standing = np.arange(2 * n - 1)
    greatest = np.arange(n)
    height = np.full(n, np.inf)
    for merge, (left, right) in enumerate(children):
        node = n + merge
        means[node] = (sizes[left] * means[left] + sizes[right] * means[right]) / sizes[node]
        first, second = standing[left], standing[right]
        if polars[second] @ means[node] < polars[first] @ means[node]:
            first, second, right = second, first, left
        standing[node], greatest[second], height[second] = first, right, linkage[merge, 2]
    greatest[standing[-1]] = 2 * n - 2

    start = _starts(children, sizes, means)
    order = np.argsort(start[:n])
    turn = (start[greatest] + sizes[greatest] / 2) / n
    rank = np.empty(n, np.int64)
    rank[np.lexsort([start[:n], -height, -sizes[greatest]])] = np.arange(n)
    return Drawing(order, turn, rank, standing[n:])


def _starts(children: np.ndarray, sizes: np.ndarray, means: np.ndarray) -> np.ndarray:
    """Return where each cluster begins around the circle, ``[2 n - 1]``; like clusters lie side by side.

    From the top down: of the two orders of a cluster's halves, the one in which they are more like what lies beside.
    """
    n = len(children) + 1
    polars = np.concatenate([means[:, 1:2], means[:, :1], -2 * means[:, 2:]], 1)
    start = np.zeros(2 * n - 1, np.int64)
    before, after = np.full((2, 2 * n - 1), -1)
    for merge in range(n - 2, -1, -1):
        node, (first, second) = n + merge, children[merge]
        left, right = before[node], after[node]
        beside = (means[left] if left >= 0 else 0) - (means[right] if right >= 0 else 0)
        if np.sum((polars[second] - polars[first]) * beside) < 0:
            first, second = second, first
        start[first], start[second] = start[node], start[node] + sizes[first]
        before[first], after[first], before[second], after[second] = left, second, first, right
    return start


def places(turn: np.ndarray, rank: np.ndarray) -> np.ndarray:
    """Return points of the unit disk, ``[n, 2]`` float32.

    Args:
        turn: ``[n]`` directions.
        rank: ``[n]`` different numbers; the disk out to a picture has the area of all that are ranked before it.
    """
    n = len(turn)
    place = np.empty(n)
    place[np.argsort(rank)] = np.arange(n)
    # A disk of radius r has the area 4 pi sinh(r / 2)^2, and is drawn with the radius tanh(r / 2).
    sinh2 = place * max(1, FILLED_BY / n) * AREA / (4 * math.pi)
    radius = np.sqrt(sinh2 / (1 + sinh2))
    angle = 2 * math.pi * turn
    return np.stack([radius * np.cos(angle), radius * np.sin(angle)], 1).astype(np.float32)
