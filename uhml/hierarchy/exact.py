"""Exact average linkage over all pairs, from cluster means alone: O(n d) memory, no n x n matrix."""

import logging
from collections.abc import Iterator

import torch
from torch import Tensor

from uhml.hierarchy.dendrogram import Dendrogram, Merges
from uhml.hierarchy.equal import first_equal, merge_equal, row_hashes
from uhml.hierarchy.geometry import Geometry, polar
from uhml.hierarchy.pairs import SHUFFLE, pair
from uhml.hierarchy.rounds import reported
from uhml.hierarchy.search import exact_search, rounding

logger = logging.getLogger(__name__)

# Near clusters remembered for each cluster. More of them spare searches, and cost memory and updates.
NUM_NEAR = 32
# Few enough that the means of all their near clusters stay in the cache.
ROWS_PER_BLOCK = 128


def exact_linkage(points: Tensor, geometry: Geometry) -> Dendrogram:
    """Cluster points by the mean, over all pairs of two clusters, of a dissimilarity that cluster means can give.

    That is ``1 - cosine``, squared Euclidean distance, or ``cosh(sqrt(c) d)``: each is linear in the gap, which is
    bilinear in the lift, so the mean over pairs is the gap of the clusters' mean lifts.

    Reciprocal nearest clusters are merged all at once, round after round (RAC, arXiv 2105.11653).

    Args:
        points: ``[n, d]`` points; computed in float64 whatever their type.
        geometry: the geometry they are points of.

    Returns:
        The tree; heights are means of the dissimilarity.
    """
    points = points.double()
    if geometry.c == 0:
        points = points - points.mean(0)  # gaps stay, and cancel least near the origin
    first = first_equal(row_hashes(points))
    names = (first == torch.arange(len(first), device=first.device)).nonzero()[:, 0]
    clusters = _Clusters(geometry.lift(points[names]), first.bincount(minlength=len(first))[names], names)
    merges = [merge_equal(first), *reported(clusters.rounds(), len(names), "exact linkage")]
    logger.debug("exact linkage: %d searches among all clusters", clusters.num_searches)
    return Dendrogram.from_merges(
        [merge._replace(heights=geometry.mean_dissimilarity(merge.heights)) for merge in merges]
    )


def exact_memory(num_points: int, num_dimensions: int) -> int:
    """Return the bytes that :func:`exact_linkage` takes, beyond its argument."""
    return num_points * (6 * 8 * (num_dimensions + 2) + 4 * 8 * NUM_NEAR + 100) + 2**29


class _Clusters:
    """The m clusters that are left, the clusters near to each of them, and its nearest.

    ``near[i]`` lists clusters, and ``radius[i]`` is at most the gap from i to any cluster that is not listed. So the
    nearest cluster on the list is the nearest of all if its gap is no more than the radius; else all are searched.
    The lists stay true when clusters merge, with every cluster standing for its parts, since a mean gap is the mean of
    the parts' mean gaps weighted by their sizes: the gap to a cluster none of whose parts is listed is still at least
    the radius; and the radius of a merged cluster, whose list is both its parts', is the weighted mean of theirs.
    """

    def __init__(self, means: Tensor, sizes: Tensor, names: Tensor) -> None:
        m = len(names)
        self.means, self.sizes, self.names = means, sizes, names
        self.near = torch.arange(m, device=names.device)[:, None].repeat(1, NUM_NEAR)
        self.radius = means.new_full((m,), -torch.inf)
        self.nearest = torch.zeros_like(names)
        self.gaps = means.new_full((m,), torch.inf)
        self.num_searches = 0
        self._search_all(torch.arange(m, device=names.device))

    def rounds(self) -> Iterator[Merges]:
        """Merge until one is left. Heights are gaps."""
        while len(self.names) > 1:
            yield self._merge()

    def _merge(self) -> Merges:
        """Merge all pairs of clusters that are each other's nearest."""
        numbers = torch.arange(len(self.names), device=self.names.device)
        kept = ((self.nearest[self.nearest] == numbers) & (numbers < self.nearest)).nonzero()[:, 0]
        absorbed = self.nearest[kept]
        if len(kept) == 0:
            # Equal gaps, of which lists hold some, can send a to b, b to c and c to a. Then the nearest pair merges.
            best = self.gaps.argmin()[None]
            kept, absorbed = torch.minimum(best, self.nearest[best]), torch.maximum(best, self.nearest[best])
            self.gaps[kept] = self.gaps[best]
        weight = self.sizes[absorbed] / (self.sizes[kept] + self.sizes[absorbed]).double()
        self.means[kept] += weight[:, None] * (self.means[absorbed] - self.means[kept])
        self.sizes[kept] += self.sizes[absorbed]
        merges = Merges(self.names[kept], self.names[absorbed], self.gaps[kept], self.sizes[kept])

        merged = torch.zeros_like(numbers, dtype=torch.bool)
        merged[kept] = merged[absorbed] = True
        lost = merged[self.nearest] & ~merged
        near_merged = torch.cat([self.near[kept], self.near[absorbed]], 1)
        radius_merged = (1 - weight) * self.radius[kept] + weight * self.radius[absorbed]
        left = torch.ones_like(merged)
        left[absorbed] = False
        number = left.cumsum(0) - 1
        number[absorbed] = number[kept]
        for name in ("means", "sizes", "names", "radius", "gaps"):
            setattr(self, name, getattr(self, name)[left])
        self.near, self.nearest = number[self.near[left]], number[self.nearest[left]]

        merged, lost = number[kept], number[lost]
        self._choose(merged, number[near_merged], radius_merged)
        self._choose(lost, self.near[lost], self.radius[lost])
        changed = torch.cat([merged, lost])
        self._search_all(changed[self.gaps[changed] > self.radius[changed]])
        return merges

    def _search_all(self, rows: Tensor) -> None:
        """List the nearest of all clusters: proposed in float32, and where its rounding leaves doubt in float64."""
        num_listed = min(NUM_NEAR + 1, len(self.names))
        for precision in (torch.float32, torch.float64):
            if len(rows) == 0 or len(self.names) == 1:
                return
            self.num_searches += len(rows)
            lifted = self.means.to(precision)
            polars = polar(lifted[rows])
            products, listed = exact_search(lifted)(polars, num_listed)
            radius = products[:, -1].double() - rounding(polars, lifted)
            if num_listed == len(self.names):
                radius.fill_(torch.inf)
            self._choose(rows, listed, radius)
            rows = rows[self.gaps[rows] > self.radius[rows]]

    def _choose(self, rows: Tensor, listed: Tensor, radius: Tensor) -> None:
        """List the nearest of some clusters ``[b, l]`` that hold all within ``radius [b]`` of ``rows [b]``."""
        listed = listed.sort(dim=1).values
        blocks = zip(rows.split(ROWS_PER_BLOCK), listed.split(ROWS_PER_BLOCK), strict=True)
        gaps = torch.cat([self._gaps(*block) for block in blocks])
        gaps.masked_fill_(listed == rows[:, None], torch.inf)
        gaps[:, 1:].masked_fill_(listed[:, 1:] == listed[:, :-1], torch.inf)
        # Order by gap, and equal gaps by the shuffled pair.
        shuffled = (pair(listed, rows[:, None].expand_as(listed)) * SHUFFLE).argsort(dim=1)
        gaps, by_gap = gaps.gather(1, shuffled).sort(dim=1, stable=True)
        listed = listed.gather(1, shuffled.gather(1, by_gap))
        if listed.shape[1] > NUM_NEAR:
            radius = torch.minimum(radius, gaps[:, NUM_NEAR])
        listed = listed[:, :NUM_NEAR]
        self.near[rows] = torch.cat([listed, rows[:, None].expand(-1, NUM_NEAR - listed.shape[1])], 1)
        self.radius[rows], self.nearest[rows], self.gaps[rows] = radius, listed[:, 0], gaps[:, 0]

    def _gaps(self, rows: Tensor, listed: Tensor) -> Tensor:
        """Return the gaps ``[b, l]``, symmetric to the last bit."""
        x, y = self.means[rows][:, None], self.means[listed]
        ends = x[..., 0] * y[..., 1] + x[..., 1] * y[..., 0]
        return (ends - 2 * (x[..., 2:] * y[..., 2:]).sum(-1)).clamp(min=0)
