"""Average linkage on a sparse graph of nearest neighbours, where an unseen pair counts as similarity 0."""

import logging
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from uhml.hierarchy.dendrogram import Dendrogram, Merges
from uhml.hierarchy.equal import merge_equal
from uhml.hierarchy.joining import join_nearest, join_parts, join_smallest
from uhml.hierarchy.pairs import SHUFFLE, UNSHUFFLE, ends, pair
from uhml.hierarchy.rounds import reported

logger = logging.getLogger(__name__)

NOTHING = torch.iinfo(torch.long).min
# Work, in edges looked at, after which the rounds are given up: so much for each edge, and so much besides.
ROUNDS_OF_ALL_EDGES = 300
LEAST_WORK = 5 * 10**8
# A round takes at least as long as looking at so many edges.
EDGES_PER_ROUND = 20_000


class Forest(NamedTuple):
    """What merging over a graph gives: a tree for each part of it.

    Attributes:
        merges: the merges, with heights in units of distance.
        part: ``[n]`` int64, the number of the part that each point is in; 0, 1, ...
        names: ``[p]`` int64, the names by which the merges leave the parts.
        far: D, the largest distance seen.
    """

    merges: list[Merges]
    part: Tensor
    names: Tensor
    far: float

    def join(self, sums: Tensor | None = None) -> Dendrogram:
        """Join the parts at height D, and return the tree.

        Args:
            sums: of the points of each part (:func:`uhml.hierarchy.joining.sums_of_parts`), to join those first that
                are near to each other; by default the smallest are joined first.
        """
        sizes = self.part.bincount(minlength=len(self.names))
        if sums is None:
            return Dendrogram.from_merges([*self.merges, join_smallest(self.names, sizes, self.far)])
        return Dendrogram.from_merges([*self.merges, join_parts(sums, self.names, sizes, self.far)])


def graph_linkage(neighbors: Tensor, distances: Tensor, first_equal: Tensor | None = None) -> Forest:
    """Cluster points by the average similarity ``1 - d / D`` of two clusters, in which an unseen pair counts 0.

    That is average linkage (UPGMA) on the full matrix of distances in which every unseen pair has distance D, the
    largest distance seen; heights are in units of distance.

    Reciprocal nearest neighbours are merged all at once, round after round (RAC, arXiv 2105.11653). Average
    linkage is reducible, so the tree is the one that merging the best pair at a time would give. Similarities are
    integers, in units so small that no sum can overflow: the tree does not depend on the order of sums, on threads or
    device. Equal linkages are ordered by a shuffle of the pairs of clusters.

    Rounds that merge next to nothing, as around a hub that is everybody's nearest, are given up after the work that
    hundreds of ordinary rounds take, with a warning; single linkage of the clusters' linkages then ends the tree.

    Args:
        neighbors: ``[n, k]`` ids of the points seen from each point; its own id is passed over.
        distances: ``[n, k]`` float64; where i sees j and j sees i, their distances are equal.
        first_equal: ``[n]`` int64, for each point the first point that equals it; by default all differ. Equal points
            are merged first, at height 0, and share the neighbours of the first; theirs are passed over.

    Returns:
        A tree for each part of the graph.
    """
    n, device = len(neighbors), neighbors.device
    names = torch.arange(n, device=device)
    sizes = torch.ones(n, dtype=torch.long, device=device)
    merges = []
    if first_equal is not None:
        merges.append(merge_equal(first_equal))
        sizes = first_equal.bincount(minlength=n)
        own = names.to(neighbors.dtype)[:, None]
        neighbors = torch.where((first_equal == names)[:, None], neighbors, own)
    u, v, total, unit, far = _similarities(neighbors, distances, sizes)
    rounds = _rounds(u, v, total, sizes)
    del u, v, total  # the rounds shrink them
    for merge in reported(rounds, n, "graph linkage"):
        merges.append(merge._replace(heights=far * (1 - merge.heights / unit)))
    above = names.clone()
    for merge in merges:
        above[merge.absorbed] = merge.kept
    while not torch.equal(above[above], above):
        above = above[above]
    rest, part = above.unique(return_inverse=True)
    return Forest(merges, part, rest, far)


def graph_memory(num_points: int, num_neighbors: int) -> int:
    """Return the bytes that :func:`graph_linkage` takes, with its arguments."""
    return num_points * (num_neighbors * 80 + 250)


def _similarities(neighbors: Tensor, distances: Tensor, sizes: Tensor) -> tuple[Tensor, Tensor, Tensor, float, float]:
    """Return the ends ``u < v`` of each seen pair, its similarity as an integer, the unit of that, and D."""
    n, k = neighbors.shape
    i = torch.arange(n, device=neighbors.device).repeat_interleave(k)
    pairs, order = pair(i, neighbors.flatten().long()).sort()
    del i
    first = pairs != (pairs >> 32) * (2**32 + 1)  # not with itself
    first[1:] &= pairs[1:] != pairs[:-1]
    at = first.nonzero()[:, 0]
    u, v = ends(pairs.index_select(0, at))
    distance = distances.flatten().index_select(0, order.index_select(0, at))
    far = float(distance.max()) if len(distance) else 0.0
    # Every edge stands for the pairs of the points that equal its ends.
    num_pairs = sizes.index_select(0, u) * sizes.index_select(0, v)
    unit = 2.0 ** (62 - max(1, int(num_pairs.sum())).bit_length())
    total = ((1 - distance / far) * unit).round().long() * num_pairs if far > 0 else torch.zeros_like(u)
    linked = total.nonzero()[:, 0]
    return u.index_select(0, linked), v.index_select(0, linked), total.index_select(0, linked), unit, far


def _rounds(u: Tensor, v: Tensor, total: Tensor, sizes: Tensor) -> Iterator[Merges]:
    """Merge reciprocal nearest neighbours, round after round, until no edge is left.

    Only edges of clusters that merged, or whose nearest neighbour did, are looked at again: a merge brings no cluster
    nearer to a third than the nearer of its parts was.

    Args:
        u: ``[e]`` int64, one end of each edge; overwritten.
        v: ``[e]`` int64, the other, greater one; overwritten.
        total: ``[e]`` int64, the sum of the edge's similarities, positive; overwritten.
        sizes: ``[n]`` int64, the sizes of clusters; brought up to date.

    Yields:
        The merges of a round, with linkages instead of heights.
    """
    device = u.device
    # Of each edge, its mean similarity.
    linkage = total.double() / (sizes.index_select(0, u) * sizes.index_select(0, v))
    names = torch.arange(len(sizes), device=device)
    num_edges, gone, renumber = len(u), len(names), True
    work_left = ROUNDS_OF_ALL_EDGES * num_edges + LEAST_WORK
    while num_edges > 0:
        work_left -= len(u) + EDGES_PER_ROUND
        if renumber:
            # Number the clusters that still have edges 0, 1, ...: what is used together then lies together.
            still = (u < gone).nonzero()[:, 0]
            u, v, total, linkage = (column.index_select(0, still) for column in (u, v, total, linkage))
            has_edges = torch.zeros(gone + 1, dtype=torch.bool, device=device)
            has_edges[u] = has_edges[v] = True
            number = has_edges.cumsum(0) - 1
            u, v, names = number.index_select(0, u), number.index_select(0, v), names[has_edges[:gone]]
            gone = len(names)  # the number of the ends of edges that are no more
            size = torch.cat([sizes[names], names.new_ones(1)]).double()
            merged_into = torch.arange(gone + 1, device=device)
            alive = merged_into[:gone]
            best = size.new_zeros(gone + 1)
            choice = merged_into.new_full((gone + 1,), NOTHING)
            dirty = torch.ones(gone + 1, dtype=torch.bool, device=device)
            dirty[gone] = False
        if work_left < 0:
            still = (u < gone).nonzero()[:, 0]
            u, v = u[still], v[still]
            merges = join_nearest(u, v, linkage[still], size[:gone].long())
            logger.warning(
                "graph linkage: %d clusters still linked after very many rounds are joined by their strongest links. "
                "Are the embeddings collapsed, or is a point everybody's nearest?",
                len(merges.kept) + 1,
            )
            yield merges._replace(kept=names[merges.kept], absorbed=names[merges.absorbed])
            return

        # The best edge of each dirty cluster: of greatest linkage, then of greatest shuffled pair.
        end, other, near = u, v, linkage
        if not renumber:
            at = _touching(dirty, u, v)
            end, other, near = (column.index_select(0, at) for column in (u, v, linkage))
        best.masked_fill_(dirty, 0).scatter_reduce_(0, end, near, "amax").scatter_reduce_(0, other, near, "amax")
        choice.masked_fill_(dirty, NOTHING)
        for side in (end, other):
            tops = (near == best.index_select(0, side)).nonzero()[:, 0]
            shuffled = pair(end.index_select(0, tops), other.index_select(0, tops)) * SHUFFLE
            choice.scatter_reduce_(0, side.index_select(0, tops), shuffled, "amax")

        alive = alive[choice[alive] != NOTHING]
        chosen = choice[alive]
        first, second = ends(chosen * UNSHUFFLE)
        mutual = (alive == first) & (choice[second] == chosen)
        kept, absorbed = first[mutual], second[mutual]
        if len(kept) == 0:
            # A last bit in a quotient has made a merged cluster nearer than its parts: look at every edge again. In
            # one order of all edges the first is the choice of both its ends, so that something merges then.
            dirty[:gone] = True
            continue
        size[kept] += size[absorbed]
        sizes[names[kept]] = size[kept].long()
        yield Merges(names[kept], names[absorbed], best[kept], sizes[names[kept]])

        merged_into[absorbed] = kept
        merged = torch.zeros_like(dirty)
        merged[kept] = merged[absorbed] = True
        dirty = torch.zeros_like(dirty)
        dirty[alive] = merged[first] | merged[second]
        dirty[absorbed] = False
        choice[absorbed] = NOTHING

        # Relabel the edges of merged clusters and add up those that have become parallel.
        at = _touching(merged, u, v)
        end, other = (merged_into.index_select(0, side.index_select(0, at)) for side in (u, v))
        between = (end != other).nonzero()[:, 0]
        pairs, order = pair(end.index_select(0, between), other.index_select(0, between)).sort()
        pairs, where = pairs.unique_consecutive(return_inverse=True)
        summands = total.index_select(0, at.index_select(0, between.index_select(0, order)))
        slots, free = at[: len(pairs)], at[len(pairs) :]
        end, other = ends(pairs)
        sums = total.new_zeros(len(pairs)).index_add_(0, where, summands)
        u[slots], v[slots], total[slots] = end, other, sums
        linkage[slots] = sums.double() / (size.index_select(0, end) * size.index_select(0, other))
        u[free] = v[free] = gone
        num_edges -= len(free)
        renumber = num_edges < len(u) * 3 // 4


def _touching(clusters: Tensor, u: Tensor, v: Tensor) -> Tensor:
    """Return the edges with an end in a set of clusters, given as a mask."""
    return (clusters.index_select(0, u) | clusters.index_select(0, v)).nonzero()[:, 0]
