"""Joins what the rounds of merging over a graph leave: clusters that nothing links, or those of rounds given up."""

import heapq

import numpy as np
import torch
from scipy.sparse import coo_matrix
from scipy.sparse.csgraph import minimum_spanning_tree
from torch import Tensor

from uhml.hierarchy.dendrogram import Dendrogram, Merges
from uhml.hierarchy.exact import merge_nearest
from uhml.hierarchy.geometry import Geometry

# Up to so many parts the order in which they are joined follows from all pairs of them.
MAX_PARTS = 30_000


def sums_of_parts(points: Tensor, parts: Tensor, num_parts: int, geometry: Geometry) -> Tensor:
    """Return the sums of the lifted points of each part, ``[num_parts, d + 2]`` float64.

    Args:
        points: ``[m, d]`` points.
        parts: ``[m]`` int64, the part that each is in.
        num_parts: the number of parts.
        geometry: the geometry they are points of.
    """
    sums = torch.zeros(num_parts, points.shape[1] + 2, dtype=torch.float64, device=points.device)
    for rows, at in zip(points.split(2**16), parts.split(2**16), strict=True):
        sums.index_add_(0, at, geometry.lift(rows.double()))
    return sums


def join_parts(sums: Tensor, names: Tensor, sizes: Tensor, height: float) -> Merges:
    """Join parts of a graph that no edge links, all at one height, in the order of average linkage over all pairs.

    A graph does not say which parts are near to each other, but the points do: so a cut into fewer clusters than
    there are parts keeps together what belongs together.

    Args:
        sums: ``[p, d + 2]`` float64, see :func:`sums_of_parts`.
        names: ``[p]`` int64, names of the parts.
        sizes: ``[p]`` int64.
        height: of all merges.
    """
    numbers = torch.arange(len(names), device=names.device)
    tree = Dendrogram.from_merges(list(merge_nearest(sums / sizes[:, None], sizes, numbers))).to_scipy()
    name = names.tolist()
    joined = []
    for left, right, _, size in tree.astype(np.int64).tolist():
        joined.append((name[left], name[right], size))
        name.append(name[left])
    kept, absorbed, merged = torch.tensor(joined, dtype=torch.long, device=names.device).reshape(-1, 3).unbind(1)
    return Merges(kept, absorbed, sums.new_full((len(kept),), height), merged)


def join_smallest(names: Tensor, sizes: Tensor, height: float) -> Merges:
    """Join parts all at one height, always the two smallest; for parts too many for :func:`join_parts`.

    Args:
        names: ``[p]`` int64, names of the parts.
        sizes: ``[p]`` int64.
        height: of all merges.
    """
    heap = list(zip(sizes.tolist(), names.tolist(), strict=True))
    heapq.heapify(heap)
    joined = []
    while len(heap) > 1:
        (size_a, a), (size_b, b) = heapq.heappop(heap), heapq.heappop(heap)
        joined.append((min(a, b), max(a, b), size_a + size_b))
        heapq.heappush(heap, (size_a + size_b, min(a, b)))
    kept, absorbed, size = torch.tensor(joined, dtype=torch.long, device=names.device).reshape(-1, 3).unbind(1)
    return Merges(kept, absorbed, torch.full((len(kept),), height, dtype=torch.float64, device=names.device), size)


def join_nearest(u: Tensor, v: Tensor, linkage: Tensor, sizes: Tensor) -> Merges:
    """Join clusters by single linkage: always along the strongest link that is left.

    Args:
        u: ``[e]`` int64, one end of each link, a cluster's number.
        v: ``[e]`` int64, its other end.
        linkage: ``[e]`` float64, its strength.
        sizes: ``[m]`` int64, the clusters' sizes.

    Returns:
        The merges, named by the clusters' numbers, with linkages instead of heights.
    """
    order = linkage.argsort(stable=True, descending=True)
    ends = torch.stack([u, v])[:, order].cpu().numpy()
    # Ranks instead of strengths, so that none is 0, which scipy takes for "no edge", and none are equal.
    tree = minimum_spanning_tree(coo_matrix((np.arange(1.0, len(order) + 1), tuple(ends)), (len(sizes), len(sizes))))
    strongest = np.sort(tree.data).astype(np.int64) - 1
    above = list(range(len(sizes)))
    size = sizes.tolist()
    joined = []
    for a, b in ends[:, strongest].T.tolist():
        while above[a] != a:
            above[a] = a = above[above[a]]
        while above[b] != b:
            above[b] = b = above[above[b]]
        a, b = min(a, b), max(a, b)
        above[b] = a
        size[a] += size[b]
        joined.append((a, b, size[a]))
    kept, absorbed, merged = torch.tensor(joined, dtype=torch.long, device=u.device).reshape(-1, 3).unbind(1)
    return Merges(kept, absorbed, linkage[order[torch.from_numpy(strongest).to(order.device)]], merged)
