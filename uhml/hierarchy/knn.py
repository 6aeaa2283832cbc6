"""Exact nearest neighbours in any geometry."""

import torch
from torch import Tensor

from uhml.hierarchy.geometry import Geometry, polar
from uhml.progress import progress

# Neighbours beyond the asked-for k that the float32 search hands over to be put in order in float64, so that its
# rounding does not decide which of two nearly equal distances is the k-th.
SPARE = 4
QUERIES_PER_BLOCK = 1024
BASE_PER_BLOCK = 16384


def nearest_neighbors(
    queries: Tensor, query_ids: Tensor, base: Tensor, num_neighbors: int, geometry: Geometry
) -> tuple[Tensor, Tensor]:
    """Find the nearest other points of each query point.

    Args:
        queries: ``[m, d]`` points (see :meth:`Geometry.points`), rows ``query_ids`` of ``base``.
        query_ids: ``[m]`` int64; a query is not its own neighbour, which is told by this id, not by distance.
        base: ``[n, d]`` points.
        num_neighbors: k, at most n - 1.
        geometry: what is near.

    Returns:
        ids ``[m, k]`` int32 and distances ``[m, k]`` float64, nearest first, equal distances by id.
    """
    num_candidates = min(num_neighbors + SPARE, len(base) - 1)
    # Gaps in flat geometries do not change when everything is moved: near the origin they cancel least.
    origin = base.mean(0, dtype=torch.float64).to(base.dtype) if geometry.c == 0 else torch.zeros_like(base[0])
    lifted = geometry.lift(base - origin)
    weights = geometry.weights(base)
    ids, distances = [], []
    blocks = range(0, len(queries), QUERIES_PER_BLOCK)
    for start in progress(blocks, "nearest neighbours", unit="block"):
        block = slice(start, start + QUERIES_PER_BLOCK)
        own = query_ids[block]
        candidates = _search(polar(lifted[own]), own, lifted, num_candidates)
        gaps = geometry.gap(queries[block][:, None], base[candidates], weights[own][:, None], weights[candidates])
        # Sort by id first, then stably by gap: a total order.
        candidates, by_id = candidates.sort(1)
        gaps, by_gap = gaps.gather(1, by_id).sort(dim=1, stable=True)
        ids.append(candidates.gather(1, by_gap)[:, :num_neighbors].int())
        distances.append(geometry.distance(gaps[:, :num_neighbors]))
    return torch.cat(ids), torch.cat(distances)


def _search(polars: Tensor, own: Tensor, lifted: Tensor, num_candidates: int) -> Tensor:
    """Return the ids ``[b, num_candidates]`` of the smallest products, all but ``own``."""
    best = polars.new_empty(len(polars), 0)
    ids = own.new_empty(len(polars), 0)
    for start in range(0, len(lifted), BASE_PER_BLOCK):
        gaps = polars @ lifted[start : start + BASE_PER_BLOCK].T
        here = ((own >= start) & (own < start + BASE_PER_BLOCK)).nonzero()[:, 0]
        gaps[here, own[here] - start] = torch.inf
        nearest, found = gaps.topk(min(num_candidates, gaps.shape[1]), largest=False)
        best, ids = torch.cat([best, nearest], 1), torch.cat([ids, found + start], 1)
        best, keep = best.topk(min(num_candidates, best.shape[1]), largest=False)
        ids = ids.gather(1, keep)
    return ids
