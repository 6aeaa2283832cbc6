"""Exact average linkage over all pairs, from cluster means alone: O(n d) memory, no n x n matrix."""

import torch
from torch import Tensor

from uhml.hierarchy.dendrogram import Dendrogram, Merges
from uhml.hierarchy.geometry import Geometry, polar

# One block of gaps, rows times all clusters, takes at most this many float64.
BLOCK_ELEMENTS = 2**25


def exact_linkage(points: Tensor, geometry: Geometry) -> Dendrogram:
    """Cluster points by the mean, over all pairs of two clusters, of a dissimilarity that cluster means can give.

    That is ``1 - cosine``, squared Euclidean distance, or ``cosh(sqrt(c) d)``: each is linear in the gap, which is
    bilinear in the lift, so the mean over pairs is the gap of the clusters' mean lifts.

    Reciprocal nearest clusters are merged all at once, round after round. Average linkage is reducible: a merge
    brings no cluster nearer to a third than the nearer of its parts was. So only clusters that merged, or whose
    nearest neighbour did, have to search again.

    Args:
        points: ``[n, d]`` points; computed in float64 whatever their type.
        geometry: the geometry they are points of.

    Returns:
        The tree; heights are means of the dissimilarity.
    """
    points = points.double()
    if geometry.c == 0:
        points = points - points.mean(0)  # gaps stay, and cancel least near the origin
    n = len(points)
    means = geometry.lift(points)
    device = points.device
    names = torch.arange(n, device=device)
    sizes = torch.ones(n, dtype=torch.long, device=device)
    nearest = torch.zeros(n, dtype=torch.long, device=device)
    gaps = torch.full((n,), torch.inf, dtype=torch.float64, device=device)
    dirty = torch.arange(n, device=device)
    merges: list[Merges] = []
    while len(names) > 1:
        # All arrays are over the clusters that are left; `names` are their smallest points.
        nearest[dirty], gaps[dirty] = _search(means, dirty)
        kept = _reciprocal(nearest, gaps)
        absorbed = nearest[kept]
        height = (polar(means[kept]) * means[absorbed]).sum(1).clamp(min=0)
        share = (sizes[absorbed].double() / (sizes[kept] + sizes[absorbed]))[:, None]
        means[kept] += share * (means[absorbed] - means[kept])
        sizes[kept] += sizes[absorbed]
        merges.append(Merges(names[kept], names[absorbed], geometry.mean_dissimilarity(height), sizes[kept]))

        merged = torch.zeros_like(names, dtype=torch.bool)
        merged[kept] = merged[absorbed] = True
        stale = merged | merged[nearest]
        left = torch.ones_like(merged)
        left[absorbed] = False
        moved_to = left.cumsum(0) - 1
        nearest = moved_to[nearest[left]]
        names, sizes, means, gaps = names[left], sizes[left], means[left], gaps[left]
        dirty = stale[left].nonzero()[:, 0]
    return Dendrogram.from_merges(merges)


def _search(means: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
    """Return the nearest other cluster of each of ``rows`` and its gap."""
    nearest, gaps = torch.empty_like(rows), means.new_empty(len(rows))
    block = max(1, BLOCK_ELEMENTS // len(means))
    for start in range(0, len(rows), block):
        own = rows[start : start + block]
        to_all = polar(means[own]) @ means.T
        to_all[torch.arange(len(own), device=own.device), own] = torch.inf
        gaps[start : start + block], nearest[start : start + block] = to_all.min(1)
    return nearest, gaps


def _reciprocal(nearest: Tensor, gaps: Tensor) -> Tensor:
    """Return the clusters that are their nearest neighbour's nearest neighbour, the first of each pair."""
    numbers = torch.arange(len(nearest), device=nearest.device)
    mutual = ((nearest[nearest] == numbers) & (numbers < nearest)).nonzero()[:, 0]
    if len(mutual) == 0:
        # Rounding of equal gaps can send a to b, b to c and c to a. Then merge the nearest pair, never loop for ever.
        best = gaps.argmin()
        mutual = torch.minimum(best, nearest[best])[None]
        nearest[mutual] = torch.maximum(best, nearest[best])
    return mutual
