"""The article's own linkage: the mean of the plain distance over all pairs, from the full matrix of distances."""

import scipy.cluster.hierarchy
import torch
from torch import Tensor

from uhml.hierarchy.dendrogram import Dendrogram
from uhml.hierarchy.geometry import Geometry

# 3.4 GiB of distances, twice.
MAX_POINTS = 30_000


def dense_linkage(points: Tensor, geometry: Geometry) -> Dendrogram:
    """Cluster points by the mean distance over all pairs of two clusters; scipy does it, in n^2 memory.

    Args:
        points: ``[n, d]`` points; computed in float64 whatever their type.
        geometry: the geometry they are points of: the distance is hyperbolic, ``1 - cosine`` or Euclidean.

    Returns:
        The tree; heights are mean distances.
    """
    n = len(points)
    points = points.double().cpu()
    weights = geometry.weights(points)
    distances = torch.empty(n * (n - 1) // 2, dtype=torch.float64)
    start = 0
    for i in range(n - 1):
        gap = geometry.gap(points[i], points[i + 1 :], weights[i], weights[i + 1 :])
        distances[start : start + n - 1 - i] = geometry.distance(gap)
        start += n - 1 - i
    if n == 1:
        return Dendrogram(distances.new_empty(0, 4).numpy())
    return Dendrogram(scipy.cluster.hierarchy.linkage(distances.numpy(), "average"))


def dense_memory(num_points: int) -> int:
    """Return the bytes that :func:`dense_linkage` takes: all distances, and scipy's copy of them."""
    return 8 * num_points**2 + 2**28
