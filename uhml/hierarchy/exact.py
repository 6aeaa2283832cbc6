"""Exact average linkage over all pairs, from cluster means alone: O(n d) memory, no n x n matrix."""

import logging
import math
from collections.abc import Iterator

import torch
from torch import Tensor

from uhml.hierarchy.dendrogram import Dendrogram, Merges
from uhml.hierarchy.equal import first_equal, merge_equal, row_hashes
from uhml.hierarchy.geometry import Geometry, polar
from uhml.hierarchy.pairs import SHUFFLE, pair
from uhml.hierarchy.rounds import reported
from uhml.hierarchy.search import exact_search, extremes, rounding, true_float32
from uhml.progress import progress

logger = logging.getLogger(__name__)

# Near clusters remembered for each cluster. More of them spare searches, and cost memory and updates.
NUM_NEAR = 32
# Few enough that the means of all their near clusters stay in the cache.
ROWS_PER_BLOCK = 128
QUERIES_PER_BLOCK = 16384
# Finite, so that no product with it is NaN.
FAR = 1e30


@true_float32()
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
    # Searches are in float32, in which FAR must be far. A power of two changes no digit.
    unit = 2.0 ** math.floor(math.log2(float(points.abs().max()) or 1.0)) if geometry.c == 0 else 1.0
    points = points / unit
    first = first_equal(row_hashes(points))
    names = (first == torch.arange(len(first), device=first.device)).nonzero()[:, 0]
    rounds = merge_nearest(geometry.lift(points[names]), first.bincount(minlength=len(first))[names], names)
    merges = [merge_equal(first), *reported(rounds, len(names), "exact linkage")]
    linkage = Dendrogram.from_merges([merge._replace(heights=merge.heights * unit**2) for merge in merges]).to_scipy()
    # In order by their gaps, of which the smallest are one dissimilarity.
    linkage[:, 2] = geometry.mean_dissimilarity(torch.from_numpy(linkage[:, 2].copy())).numpy()
    return Dendrogram(linkage)


@true_float32()
def merge_nearest(means: Tensor, sizes: Tensor, names: Tensor) -> Iterator[Merges]:
    """Merge clusters until one is left, by the mean gap over all pairs.

    Args:
        means: ``[m, d + 2]`` float64, the clusters' mean lifts; overwritten.
        sizes: ``[m]`` int64, their sizes; overwritten.
        names: ``[m]`` int64, their names.

    Yields:
        The merges of a round; heights are gaps.
    """
    clusters = _Clusters(means, sizes, names)
    yield from clusters.rounds()
    logger.debug("exact linkage: %d searches among all clusters", clusters.num_searches)


def exact_memory(num_points: int, num_dimensions: int) -> int:
    """Return the bytes that :func:`exact_linkage` takes, beyond its argument."""
    return num_points * (6 * 8 * (num_dimensions + 2) + 4 * 8 * NUM_NEAR + 100) + 2**29


class _Clusters:
    """The clusters that are left, the clusters near to each of them, and its nearest.

    Arrays are over m slots: those of clusters, and of clusters that have been merged into another since the clusters
    were last numbered.

    ``near[i]`` lists clusters, and ``radius[i]`` is at most the gap from i to any cluster that is not listed. So the
    nearest cluster on the list is the nearest of all if its gap is no more than the radius; else all are searched.
    The lists stay true when clusters merge, with every cluster standing for its parts, since a mean gap is the mean of
    the parts' mean gaps weighted by their sizes: the gap to a cluster none of whose parts is listed is still at least
    the radius; and the radius of a merged cluster, whose list is both its parts', is the weighted mean of theirs.
    """

    def __init__(self, means: Tensor, sizes: Tensor, names: Tensor) -> None:
        m, device = len(names), names.device
        self.num_left, self.num_searches = m, 0
        self.means, self.sizes, self.names = means, sizes, names
        self.means32 = means.float()
        self.left = torch.ones(m, dtype=torch.bool, device=device)
        self.merged_into = torch.arange(m, device=device)
        self.near = self.merged_into[:, None].repeat(1, NUM_NEAR)
        self.radius = means.new_full((m,), -torch.inf)
        self.nearest = torch.zeros_like(names)
        self.gaps = means.new_full((m,), torch.inf)
        # No mean of lifted points exceeds the greatest of them.
        self.extremes = extremes(means)
        self.changed = self.merged_into
        self._search_all(self.changed)

    def rounds(self) -> Iterator[Merges]:
        """Merge until one is left. Heights are gaps."""
        while self.num_left > 1:
            yield self._merge()
            if self.num_left < len(self.names) // 2:
                self._number()

    def _merge(self) -> Merges:
        """Merge all pairs of clusters that are each other's nearest."""
        # One of the two has changed, or they would have merged before.
        mutual = self.changed[self.nearest[self.nearest[self.changed]] == self.changed]
        kept = torch.minimum(mutual, self.nearest[mutual]).unique()
        absorbed = self.nearest[kept]
        gaps = self.gaps[kept]
        if len(kept) == 0:
            # Equal gaps, of which lists hold some, can send a to b, b to c and c to a. Then the nearest pair merges.
            best = self.gaps.argmin()[None]
            kept, absorbed = torch.minimum(best, self.nearest[best]), torch.maximum(best, self.nearest[best])
            gaps = self.gaps[best]
        weight = self.sizes[absorbed] / (self.sizes[kept] + self.sizes[absorbed]).double()
        self.means[kept] += weight[:, None] * (self.means[absorbed] - self.means[kept])
        self.means32[kept] = self.means[kept].float()
        self.sizes[kept] += self.sizes[absorbed]

        self.num_left -= len(kept)
        self.left[absorbed] = False
        self.gaps[absorbed] = torch.inf
        # As a lifted point, farther from any other than any other.
        self.means32[absorbed] = 0
        self.means32[absorbed, 1] = FAR
        self.merged_into[absorbed] = kept
        self.merged_into = self.merged_into[self.merged_into]

        merged = torch.zeros_like(self.left)
        merged[kept] = merged[absorbed] = True
        lost = (merged[self.nearest] & self.left & ~merged).nonzero()[:, 0]
        radius = (1 - weight) * self.radius[kept] + weight * self.radius[absorbed]
        self._choose(kept, self.merged_into[torch.cat([self.near[kept], self.near[absorbed]], 1)], radius)
        self._choose(lost, self.merged_into[self.near[lost]], self.radius[lost])
        self.changed = torch.cat([kept, lost])
        self._search_all(self.changed[self.gaps[self.changed] > self.radius[self.changed]])
        return Merges(self.names[kept], self.names[absorbed], gaps, self.sizes[kept])

    def _number(self) -> None:
        """Give slots to the clusters that are left only."""
        number = self.left.cumsum(0) - 1
        self.near = number[self.merged_into[self.near[self.left]]]
        self.nearest = number[self.nearest[self.left]]
        self.changed = number[self.changed]
        for name in ("means", "means32", "sizes", "names", "radius", "gaps"):
            setattr(self, name, getattr(self, name)[self.left])
        self.left = self.left[self.left]
        self.merged_into = torch.arange(self.num_left, device=self.names.device)

    def _search_all(self, rows: Tensor) -> None:
        """List the nearest of all clusters: proposed in float32, and where its rounding leaves doubt in float64."""
        num_listed = min(NUM_NEAR + 1, self.num_left)
        for in_float32 in (True, False):
            if len(rows) == 0 or self.num_left == 1:
                return
            self.num_searches += len(rows)
            slots = self.merged_into if in_float32 else self.left.nonzero()[:, 0]
            means = self.means32 if in_float32 else self.means
            search = exact_search(means if in_float32 else means[slots])
            blocks = rows.split(QUERIES_PER_BLOCK)
            for block in progress(blocks, "nearest clusters", unit="block"):
                polars = polar(means[block])
                products, listed = search(polars, num_listed)
                radius = products[:, -1].double() - rounding(polars, self.extremes)
                if num_listed == self.num_left:
                    radius.fill_(torch.inf)
                self._choose(block, slots[listed], radius)
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
