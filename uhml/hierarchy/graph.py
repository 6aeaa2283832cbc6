"""Average linkage on a sparse graph of nearest neighbours, where an unseen pair counts as similarity 0."""

import heapq
import logging

import torch
from torch import Tensor

from uhml.hierarchy.dendrogram import Dendrogram, Merges

logger = logging.getLogger(__name__)

# Multiplying by an odd number permutes the 64-bit integers: it shuffles the edges to break ties between them.
# (2^64 / golden ratio, as a signed number.)
SHUFFLE = -7046029254386353131


def graph_linkage(neighbors: Tensor, distances: Tensor) -> Dendrogram:
    """Cluster points by the average similarity ``1 - d / D`` of two clusters, in which an unseen pair counts 0.

    That is average linkage (UPGMA) on the full matrix of distances in which every unseen pair has distance D, the
    largest distance seen; heights are in units of distance.

    Reciprocal nearest neighbours are merged all at once, round after round (RAC, arXiv 2105.11653). Average
    linkage is reducible, so the tree is the one that merging the best pair at a time would give. Similarities are
    integers, scaled so that no sum can overflow: the tree does not depend on the order of sums, on threads or device.

    Args:
        neighbors: ``[n, k]`` ids of the points seen from each point, without itself.
        distances: ``[n, k]`` float64; where i sees j and j sees i, their distances are equal.

    Returns:
        The tree. Where the graph falls into parts, they are joined at height D, smallest first.
    """
    n = len(neighbors)
    u, v, distance = _edges(neighbors, distances)
    far = float(distance.max()) if len(distance) else 0.0
    unit = 2.0 ** (62 - max(len(u), 1).bit_length())
    total = ((1 - distance / far) * unit).round().long() if far > 0 else u.new_zeros(len(u))

    sizes = torch.ones(n, dtype=torch.long, device=u.device)
    names = torch.arange(n, device=u.device)
    merges: list[Merges] = []
    while True:
        linked = total > 0
        u, v, total = u[linked], v[linked], total[linked]
        if len(u) == 0:
            break
        linkage = total.double() / (sizes[u] * sizes[v])
        chosen = _reciprocal(u, v, linkage, n)
        kept, absorbed = u[chosen], v[chosen]
        sizes[kept] += sizes[absorbed]
        merges.append(Merges(kept, absorbed, far * (1 - linkage[chosen] / unit), sizes[kept]))
        names[absorbed] = kept
        u, v, total = _add_parallel(names[u], names[v], total, n)
    rest = torch.ones(n, dtype=torch.bool, device=u.device)
    for merge in merges:
        rest[merge.absorbed] = False
    merges.append(_join_rest(rest.nonzero()[:, 0], sizes, far))
    return Dendrogram.from_merges(merges)


def _edges(neighbors: Tensor, distances: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return each seen pair once: ends ``u < v`` and distance, in the order of (u, v)."""
    n, k = neighbors.shape
    i = torch.arange(n, device=neighbors.device).repeat_interleave(k)
    j = neighbors.flatten().long()
    pair, order = (torch.minimum(i, j) * n + torch.maximum(i, j)).sort()
    first = torch.ones_like(pair, dtype=torch.bool)
    first[1:] = pair[1:] != pair[:-1]
    pair = pair[first]
    return pair // n, pair % n, distances.flatten()[order[first]]


def _reciprocal(u: Tensor, v: Tensor, linkage: Tensor, n: int) -> Tensor:
    """Return the edges that are the best edge of both their ends.

    Edges are totally ordered, by linkage and then by a shuffle of their numbers, so the best edge of all is always
    among them; the shuffle keeps a chain of equal edges from merging one pair a round.
    """
    best = linkage.new_zeros(n).scatter_reduce(0, u, linkage, "amax").scatter_reduce(0, v, linkage, "amax")
    best_of_u, best_of_v = linkage == best[u], linkage == best[v]
    rank = torch.arange(len(u), device=u.device) * SHUFFLE
    lowest = torch.full((n,), torch.iinfo(torch.long).min, device=u.device)
    top = lowest.scatter_reduce(0, u[best_of_u], rank[best_of_u], "amax")
    top = top.scatter_reduce(0, v[best_of_v], rank[best_of_v], "amax")
    return (best_of_u & best_of_v & (rank == top[u]) & (rank == top[v])).nonzero()[:, 0]


def _add_parallel(u: Tensor, v: Tensor, total: Tensor, n: int) -> tuple[Tensor, Tensor, Tensor]:
    """Drop loops and add up parallel edges."""
    between = u != v
    u, v, total = u[between], v[between], total[between]
    pair, order = (torch.minimum(u, v) * n + torch.maximum(u, v)).sort()
    pair, where = pair.unique_consecutive(return_inverse=True)
    return pair // n, pair % n, total.new_zeros(len(pair)).index_add_(0, where, total[order])


def _join_rest(names: Tensor, sizes: Tensor, far: float) -> Merges:
    """Join clusters that nothing links, at height ``far``: always the two smallest."""
    heap = [(int(size), int(name)) for size, name in zip(sizes[names].tolist(), names.tolist(), strict=True)]
    heapq.heapify(heap)
    joined = []
    while len(heap) > 1:
        (size_a, a), (size_b, b) = heapq.heappop(heap), heapq.heappop(heap)
        joined.append((min(a, b), max(a, b), size_a + size_b))
        heapq.heappush(heap, (size_a + size_b, min(a, b)))
    kept, absorbed, size = torch.tensor(joined, dtype=torch.long, device=names.device).reshape(-1, 3).unbind(1)
    return Merges(kept, absorbed, torch.full((len(kept),), far, dtype=torch.float64, device=names.device), size)
