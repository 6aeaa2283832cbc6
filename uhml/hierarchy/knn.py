"""Nearest neighbours of points, in any geometry, in an order that does not depend on how the search was done."""

import torch
from torch import Tensor

from uhml.hierarchy.geometry import Geometry, polar
from uhml.hierarchy.inverted_file import approximate_search
from uhml.hierarchy.search import Search, exact_search, extremes, rounding, true_float32
from uhml.progress import progress

# Candidates beyond the asked-for k that the search hands over to be put in order.
SPARE = 4
# Of points equally far from a query, which no rounding tells apart, at most so many are put in the order of their ids.
MOST_CANDIDATES = 256
# Candidates that are asked for at a time, of the queries that need more.
WIDENED_AT_ONCE = 2**22
QUERIES_PER_BLOCK = 65536
# Coordinates of pairs that are float64 at a time. On a CPU 8 MiB: more of them the C library gives back to the system
# each time, so that putting candidates in order takes longer than finding them.
COORDINATES_PER_ORDERING = 2**20
COORDINATES_PER_ORDERING_ON_A_GPU = 2**24
# Points whose true neighbours are found, to measure the recall of approximate search.
NUM_MEASURED = 1024


@true_float32()
def nearest_neighbors(
    queries: Tensor,
    query_ids: Tensor,
    points: Tensor,
    ids: Tensor,
    num_neighbors: int,
    geometry: Geometry,
    *,
    min_recall: float = 1.0,
) -> tuple[Tensor, Tensor]:
    """Find the points nearest to each query.

    Matrix products in the points' precision propose candidates; their gaps are then computed pair by pair in float64.
    In exact search a bound on the products' rounding says where a point that was not proposed might be nearer; those
    queries are searched again in float64, and with more candidates where many are equally far. So the result depends
    neither on blocks nor on ranks or threads, unless more than ``MOST_CANDIDATES`` are as far as the k-th.

    Args:
        queries: ``[m, d]`` points (see :meth:`Geometry.points`).
        query_ids: ``[m]`` int64; a query is not its own neighbour, which is told by id, not by distance.
        points: ``[n, d]`` the points to search.
        ids: ``[n]`` int64, rising.
        num_neighbors: k.
        geometry: what is near.
        min_recall: 1 searches exactly. Less searches fast, and finds at least this share of the neighbours, measured
            on a sample.

    Returns:
        ids ``[m, k]`` int32 and distances ``[m, k]`` float64, nearest first, equal distances by id. Where fewer than k
        were found, the rest are the query's own id at an infinite distance.
    """
    if len(queries) == 0 or len(points) == 0:
        nothing = query_ids[:, None].expand(-1, num_neighbors).int()
        return nothing, torch.full(nothing.shape, torch.inf, dtype=torch.float64, device=queries.device)
    base = _Base(points, ids, num_neighbors, geometry, min_recall)
    blocks = zip(queries.split(QUERIES_PER_BLOCK), query_ids.split(QUERIES_PER_BLOCK), strict=True)
    num_blocks = -(-len(queries) // QUERIES_PER_BLOCK)
    found = [base.neighbors(*block) for block in progress(blocks, "nearest neighbours", total=num_blocks, unit="block")]
    near_ids, gaps = (torch.cat(column) for column in zip(*found, strict=True))
    return near_ids.int(), geometry.distance(gaps)


def search_memory(num_queries: int, num_points: int, d: int, num_neighbors: int, bytes_per_number: int) -> int:
    """Return the bytes that a search among points ``[num_points, d]`` takes, beyond the points."""
    lifted = (d + 2) * bytes_per_number
    # Points and their lift, copied once in the order of the search; the rest is blocks, and what is found, twice.
    return num_points * (3 * lifted + 64) + 2**29 + num_queries * num_neighbors * 32


def nearer(a: tuple[Tensor, Tensor], b: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """Merge what :func:`nearest_neighbors` found for the same queries among two sets of points."""
    return _first(torch.cat([a[0], b[0]], 1), torch.cat([a[1], b[1]], 1), a[0].shape[1])


class _Base:
    """Points made ready to be searched."""

    def __init__(self, points: Tensor, ids: Tensor, num_neighbors: int, geometry: Geometry, min_recall: float) -> None:
        self._ids, self._points, self._num_neighbors, self._geometry = ids, points, num_neighbors, geometry
        self._weights = geometry.weights(points)
        # Gaps in flat geometries do not change when everything is moved: near the origin they cancel least.
        self._origin = points.mean(0, dtype=torch.float64).to(points.dtype) if geometry.c == 0 else points.new_zeros(1)
        lifted = geometry.lift(points - self._origin)
        self._extremes = extremes(lifted)
        self._search64: Search | None = None
        self._search, self._is_exact = exact_search(lifted), True
        if min_recall < 1:
            # Drawn on the CPU: the same for every device and rank.
            measured = torch.randperm(len(points), generator=torch.Generator().manual_seed(1))[:NUM_MEASURED]
            measured = measured.to(points.device)
            true_ids, _ = self.neighbors(points[measured], ids[measured])
            true = torch.searchsorted(ids, true_ids.contiguous())
            found = approximate_search(lifted, measured, true, min_recall, geometry)
            if found is not None:
                self._search, self._is_exact = found, False

    def neighbors(self, queries: Tensor, query_ids: Tensor) -> tuple[Tensor, Tensor]:
        """Return the ids and gaps, ``[m, k]``, of the points nearest to ``[m, d]`` queries."""
        num_candidates = min(self._num_neighbors + 1 + SPARE, len(self._points))
        ids, gaps, is_doubtful = self._nearest(self._search, queries, query_ids, num_candidates, queries.dtype)
        rows = is_doubtful.nonzero()[:, 0] if self._is_exact else query_ids[:0]
        may_widen = queries.dtype == torch.float64
        while len(rows) > 0 and (not may_widen or num_candidates < MOST_CANDIDATES):
            if self._search64 is None:
                self._search64 = exact_search(self._geometry.lift(self._points.double() - self._origin))
            num_candidates = min(2 * num_candidates, len(self._points)) if may_widen else num_candidates
            doubtful = []
            for part in rows.split(max(1, WIDENED_AT_ONCE // num_candidates)):
                ids[part], gaps[part], is_doubtful = self._nearest(
                    self._search64, queries[part], query_ids[part], num_candidates, torch.float64
                )
                doubtful.append(part[is_doubtful])
            rows, may_widen = torch.cat(doubtful), True
        return ids, gaps

    def _nearest(
        self, search: Search, queries: Tensor, query_ids: Tensor, num_candidates: int, dtype: torch.dtype
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return ids and gaps, ``[m, k]``, and where a point that was not proposed may belong to them, ``[m]`` bool."""
        polars = polar(self._geometry.lift(queries.to(dtype) - self._origin))
        screened, positions = search(polars, num_candidates)
        ids, gaps = self._ordered(queries, query_ids, self._geometry.weights(queries), positions)
        if num_candidates == len(self._points):
            return ids, gaps, torch.zeros_like(query_ids, dtype=torch.bool)
        # What was not proposed has a product of at least the last proposed one, and a gap less by rounding at most.
        return ids, gaps, gaps[:, -1] >= screened[:, -1] - rounding(polars, self._extremes)

    def _ordered(self, queries: Tensor, query_ids: Tensor, weights: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
        """Return the ids and gaps of the ``[m, k]`` nearest of ``[m, k + 1 + SPARE]`` candidates."""
        ids, gaps = self._ids[positions], weights.new_empty(positions.shape)
        on_cpu = queries.device.type == "cpu"
        coordinates = COORDINATES_PER_ORDERING if on_cpu else COORDINATES_PER_ORDERING_ON_A_GPU
        step = max(1, coordinates // (positions.shape[1] * queries.shape[1]))
        for start in range(0, len(queries), step):
            block = slice(start, start + step)
            at = positions[block]
            # Position -1 stands for any point till it is masked.
            near = self._points.index_select(0, at.flatten().clamp(min=0)).view(*at.shape, -1)
            gaps[block] = self._geometry.gap(queries[block][:, None], near, weights[block][:, None], self._weights[at])
        own = (positions < 0) | (ids == query_ids[:, None])
        near = torch.where(own, query_ids[:, None], ids)
        gaps.masked_fill_(own, torch.inf)
        # Too few points: the rest are the query itself, infinitely far.
        lack = max(0, self._num_neighbors - near.shape[1])
        near = torch.cat([near, query_ids[:, None].expand(-1, lack)], 1)
        gaps = torch.nn.functional.pad(gaps, (0, lack), value=torch.inf)
        return _first(near, gaps, self._num_neighbors)


def _first(ids: Tensor, gaps: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Return the k smallest gaps of each row and their ids, ordered by gap, then id."""
    ids, by_id = ids.sort(dim=1)
    gaps, by_gap = gaps.gather(1, by_id).sort(dim=1, stable=True)
    return ids.gather(1, by_gap)[:, :k], gaps[:, :k]
