"""Approximate search: points are parted into cells, and a query looks only into the cells nearest to it."""

import importlib.util
import logging
import math
from typing import Any, Protocol

import torch
from torch import Tensor

from uhml.hierarchy.geometry import Geometry, polar
from uhml.hierarchy.search import BLOCK_ELEMENTS, Search

logger = logging.getLogger(__name__)

# Cells for each square root of the number of points: with fewer, queries meet more points; with more, more centres.
CELLS_PER_ROOT = 2
# More points for each cell to fit centres to, or more rounds of fitting, raise recall little.
SAMPLE_PER_CELL = 32
NUM_FITTING_ROUNDS = 4
# The search is widened by so much at a time, from so many cells on.
FIRST_PROBES = 1
WIDENING = 1.2
# Points that faiss's codes can be fitted to.
FAISS_FROM_POINTS = 4096
# A query that looks into more of the cells than this, or has more of the points on its list, costs as much as one that
# meets all points in a product: so it was with 32,460 points of 512 dimensions, by faiss and by torch.
MOST_OF_CELLS = 1 / 4
MOST_OF_POINTS = 1 / 32
# Few enough that their coordinates stay in the cache.
PAIRS_PER_REFINEMENT = 2**12


class InvertedFile(Protocol):
    """Points in cells."""

    num_cells: int
    first_shortlist: int
    """Points on a query's shortlist, for each neighbour asked for, to begin with."""

    def shortlist(self, polars: Tensor, num_probes: int, length: int) -> Tensor:
        """Return the points nearest to each query in its ``num_probes`` nearest cells, ``[b, length]``.

        Positions, -1 for "no further". They may be nearest only by a rough measure, and in any order.
        """


def approximate_search(
    lifted: Tensor, measured: Tensor, true_neighbors: Tensor, min_recall: float, geometry: Geometry
) -> Search | None:
    """Return a search that looks only into the cells nearest to a query, and puts a shortlist from them in order.

    How many cells a query looks into is not guessed: the search is widened until, of the true neighbours of a sample
    of points, it finds at least ``min_recall``, two standard errors allowed for. Where more cells do not help, the
    shortlist is made longer. The width and the recall are logged. None, where a search of that width would take longer
    than one among all points: of few points, or of points that no cells part, such as random ones.

    On a CPU faiss keeps the points in cells where it is installed, elsewhere torch does.

    Args:
        lifted: ``[n, d + 2]`` lifted points.
        measured: positions of the sample.
        true_neighbors: ``[m, k]`` positions of each one's nearest others; its own for "no further".
        min_recall: the share of true neighbours to find at least, up to 1.
        geometry: the geometry they are points of.
    """
    n, k, device = len(lifted), true_neighbors.shape[1], lifted.device
    num_cells = min(n, round(CELLS_PER_ROOT * math.sqrt(n)))
    # Drawn on the CPU: the same for every device and rank.
    shuffled = torch.randperm(n, generator=torch.Generator().manual_seed(0)).to(device)
    sample = lifted[shuffled[: SAMPLE_PER_CELL * num_cells]]
    has_faiss = device.type == "cpu" and n >= FAISS_FROM_POINTS and importlib.util.find_spec("faiss")
    file: InvertedFile = (_Coded if has_faiss else _Plain)(lifted, sample, num_cells, geometry)
    points, weights = lifted[:, 2:] / lifted[:, :1], lifted[:, 0].contiguous()

    def search(polars: Tensor, k: int, num_probes: int, length: int) -> tuple[Tensor, Tensor]:
        length = max(length, k)
        parts = [
            _nearest_listed(points, weights, part, file.shortlist(part, num_probes, length), k)
            for part in polars.split(max(1, 2 * BLOCK_ELEMENTS // (num_probes * length)))
        ]
        return torch.cat([gaps for gaps, _ in parts]), torch.cat([positions for _, positions in parts])

    polars, is_other = polar(lifted[measured]), true_neighbors != measured[:, None]
    num_probes, length, before = min(FIRST_PROBES, num_cells), min(file.first_shortlist * (k + 1), n), 0.0
    while True:
        _, found = search(polars, min(k + 1, n), num_probes, length)
        hits = (true_neighbors[:, :, None] == found[:, None]).any(2) & is_other
        shares = hits.sum(1) / is_other.sum(1)
        recall, error = float(shares.mean()), float(shares.std()) / math.sqrt(len(shares))
        if recall - 2 * error >= min_recall:
            break
        if num_probes > MOST_OF_CELLS * num_cells or length > MOST_OF_POINTS * n:
            logger.info(
                "approximate neighbours: looking into %d of %d cells finds %.1f %% of the true %d nearest; "
                "looking at all points takes no longer than finding more",
                num_probes,
                num_cells,
                100 * recall,
                k,
            )
            return None
        more_cells_help = recall - before > (min_recall - recall + 2 * error) / 10
        if more_cells_help:
            num_probes, before = math.ceil(WIDENING * num_probes), recall
        else:
            length, before = 2 * length, 0.0
    logger.info(
        "approximate neighbours: looking into %d of %d cells finds %.1f ± %.1f %% of the true %d nearest",
        num_probes,
        num_cells,
        100 * recall,
        200 * error,
        k,
    )
    return lambda polars, k: search(polars, k, num_probes, length)


def _nearest_listed(points: Tensor, weights: Tensor, polars: Tensor, listed: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Return the gaps and positions, ``[b, k]``, of the nearest on the lists ``[b, l]``.

    From differences, not products: these would round away the differences within a tight heap.
    """
    gaps = polars.new_empty(listed.shape)
    queries = polars[:, 2:] / (-2 * polars[:, 1:2])
    for start in range(0, len(polars), step := max(1, PAIRS_PER_REFINEMENT // listed.shape[1])):
        block = slice(start, start + step)
        # index_select takes a third of the time of points[...]; -1 stands for any point till it is masked.
        at = listed[block].flatten().clamp(min=0)
        near = points.index_select(0, at).view(*listed[block].shape, -1).sub_(queries[block, None]).square_()
        gaps[block] = near.sum(2).mul_(weights.index_select(0, at).view_as(listed[block]))
    gaps.mul_(polars[:, 1:2]).masked_fill_(listed < 0, torch.inf)
    gaps, keep = gaps.topk(k, largest=False)
    return gaps, listed.gather(1, keep)


class _Coded:
    """faiss's inverted file, in which a code of four bits stands for each two coordinates of a point.

    It compares coordinates, not gaps. Near a point the ball's geometry is the flat one but for scale, so those nearest
    in coordinates are the candidates for those nearest in the ball.
    """

    first_shortlist = 3

    def __init__(self, lifted: Tensor, sample: Tensor, num_cells: int, geometry: Geometry) -> None:
        import faiss

        self._faiss, self.num_cells = faiss, num_cells
        self._odd = lifted.shape[1] % 2
        width = lifted.shape[1] - 2 + self._odd
        self._index = faiss.index_factory(width, f"IVF{num_cells},PQ{width // 2}x4fs")
        inverted: Any = faiss.extract_index_ivf(self._index)
        inverted.cp.niter, inverted.cp.min_points_per_centroid = NUM_FITTING_ROUNDS, 1
        # faiss has its own idea of the number of threads, which ranks on one machine would fight over.
        faiss.omp_set_num_threads(torch.get_num_threads())
        self._index.train(self._rows(sample[:, 2:] / sample[:, :1]))
        for block in lifted.split(max(1, BLOCK_ELEMENTS // width)):
            self._index.add(self._rows(block[:, 2:] / block[:, :1]))
        self._inverted = inverted

    def shortlist(self, polars: Tensor, num_probes: int, length: int) -> Tensor:
        self._faiss.omp_set_num_threads(torch.get_num_threads())
        self._inverted.nprobe = num_probes
        _, positions = self._index.search(self._rows(polars[:, 2:] / (-2 * polars[:, 1:2])), length)
        return torch.from_numpy(positions)

    def _rows(self, coordinates: Tensor) -> Any:
        """Return coordinates, padded to an even number of them, as faiss takes them."""
        return torch.nn.functional.pad(coordinates.float(), (0, self._odd)).numpy()


class _Plain:
    """Points in cells by torch, on any device: all queries that look into a cell meet its points in one product."""

    first_shortlist = 1

    def __init__(self, lifted: Tensor, sample: Tensor, num_cells: int, geometry: Geometry) -> None:
        self.num_cells = num_cells
        self._centers = _fit_centers(sample, num_cells, geometry)
        cell = _nearest(lifted, self._centers, 1)[:, 0]
        self._ends = cell.bincount(minlength=num_cells).cumsum(0).tolist()
        self._members = cell.sort(stable=True).indices
        self._stored = lifted[self._members]

    def shortlist(self, polars: Tensor, num_probes: int, length: int) -> Tensor:
        visits = torch.cat(
            [
                (part @ self._centers.T).topk(num_probes, largest=False).indices
                for part in polars.split(max(1, BLOCK_ELEMENTS // self.num_cells))
            ]
        ).flatten()
        by_cell = visits.sort(stable=True).indices
        visit_ends = visits.bincount(minlength=self.num_cells).cumsum(0).tolist()
        gaps = polars.new_full((len(visits), length), torch.inf)
        positions = visits.new_full((len(visits), length), -1)
        for c in range(self.num_cells):
            first, last = (self._ends[c - 1] if c else 0), self._ends[c]
            here = by_cell[(visit_ends[c - 1] if c else 0) : visit_ends[c]]
            if len(here) == 0 or first == last:
                continue
            products = polars[here // num_probes] @ self._stored[first:last].T
            found = products.topk(min(length, last - first), largest=False)
            gaps[here, : found.values.shape[1]] = found.values
            positions[here, : found.values.shape[1]] = found.indices + first
        _, keep = gaps.view(len(polars), -1).topk(length, largest=False)
        positions = positions.view(len(polars), -1).gather(1, keep)
        return torch.where(positions >= 0, self._members[positions], -1)


def _fit_centers(sample: Tensor, num_cells: int, geometry: Geometry) -> Tensor:
    """Return ``[num_cells, d + 2]`` lifted centres of lifted points."""
    centers = sample[:num_cells]
    for _ in range(NUM_FITTING_ROUNDS):
        cell = _nearest(sample, centers, 1)[:, 0]
        sums = torch.zeros_like(centers, dtype=torch.float64).index_add_(0, cell, sample.double())
        # The mean weighted by w = 1 / (1 - c|x|^2) lies in the ball. An empty cell keeps its centre.
        means = geometry.lift(sums[:, 2:] / sums[:, :1].clamp(min=1)).to(sample.dtype)
        centers = torch.where(sums[:, :1] > 0, means, centers)
    return centers


def _nearest(lifted: Tensor, centers: Tensor, k: int) -> Tensor:
    """Return the k nearest centres of each lifted point, nearest first, ``[n, k]`` int64."""
    blocks = (polar(part) @ centers.T for part in lifted.split(max(1, BLOCK_ELEMENTS // len(centers))))
    return torch.cat([b.argmin(1, keepdim=True) if k == 1 else b.topk(k, largest=False).indices for b in blocks])
