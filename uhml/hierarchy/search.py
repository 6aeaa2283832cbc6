"""Search for the smallest gaps, by matrix products in the points' own precision: exact and approximate."""

import contextlib
import importlib.util
import logging
import math
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from uhml.hierarchy.geometry import Geometry, polar

logger = logging.getLogger(__name__)

# A search takes polar vectors [b, d + 2] and a number k, and returns gaps [b, k] and positions [b, k] among the
# lifted points it was made for. The query itself is not left out. Position -1, at an infinite gap, is "no further".
Search = Callable[[Tensor, int], tuple[Tensor, Tensor]]

# Gaps held at a time: 64 MiB of float32.
BLOCK_ELEMENTS = 2**24
BASE_PER_BLOCK = 16384
# For fewer queries its threads take longer to start than to work.
FAISS_FROM = 512

# More points for each cell to fit centres to, or more rounds of fitting, raise recall little.
SAMPLE_PER_CELL = 32
NUM_FITTING_ROUNDS = 4
# Cells for each square root of the number of points: with fewer, queries meet more points; with more, more centres.
CELLS_PER_ROOT = 4
# Points whose true neighbours are found, to measure recall.
NUM_MEASURED = 1024


@contextlib.contextmanager
def true_float32() -> Iterator[None]:
    """Within it, float32 products are float32 products, whatever a program has allowed for the sake of training.

    TF32 or bfloat16 inside a product would break the bound on its rounding.
    """
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


def exact_search(lifted: Tensor) -> Search:
    """Return the search that compares a query with every one of the ``[n, d + 2]`` lifted points.

    On a CPU, in float32, faiss does it for many queries where it is installed: it fuses product and selection, and
    needs half the time. The result is the same but for the rounding of gaps.
    """
    with_faiss = lifted.device.type == "cpu" and lifted.dtype == torch.float32 and importlib.util.find_spec("faiss")

    def search(polars: Tensor, k: int) -> tuple[Tensor, Tensor]:
        if with_faiss and len(polars) >= FAISS_FROM:
            return _search_with_faiss(lifted, polars, k)
        parts = [_search_with_torch(lifted, part, k) for part in polars.split(BLOCK_ELEMENTS // BASE_PER_BLOCK)]
        return torch.cat([gaps for gaps, _ in parts]), torch.cat([positions for _, positions in parts])

    return search


def _search_with_torch(lifted: Tensor, polars: Tensor, k: int) -> tuple[Tensor, Tensor]:
    gaps = polars.new_empty(len(polars), 0)
    positions = torch.empty(len(polars), 0, dtype=torch.long, device=polars.device)
    for start in range(0, len(lifted), BASE_PER_BLOCK):
        block = polars @ lifted[start : start + BASE_PER_BLOCK].T
        block, found = block.topk(min(k, block.shape[1]), largest=False)
        gaps, positions = torch.cat([gaps, block], 1), torch.cat([positions, found + start], 1)
        gaps, keep = gaps.topk(min(k, gaps.shape[1]), largest=False)
        positions = positions.gather(1, keep)
    return gaps, positions


def _search_with_faiss(lifted: Tensor, polars: Tensor, k: int) -> tuple[Tensor, Tensor]:
    import faiss

    # faiss has its own idea of the number of threads, which ranks on one machine would fight over.
    faiss.omp_set_num_threads(torch.get_num_threads())
    products, positions = faiss.knn((-polars).numpy(), lifted.numpy(), k, metric=faiss.METRIC_INNER_PRODUCT)
    return -torch.from_numpy(products), torch.from_numpy(positions)


def extremes(lifted: Tensor) -> Tensor:
    """Return the greatest ``w``, ``w|x|^2`` and ``|w x|`` of lifted points, ``[3]`` float64, for :func:`rounding`."""
    norms = torch.linalg.vector_norm(lifted[:, 2:], dim=1)
    return torch.stack([lifted[:, 0].max(), lifted[:, 1].max(), norms.max()]).double()


def rounding(polars: Tensor, extremes: Tensor) -> Tensor:
    """Return a bound, ``[b]`` float64, on how far off the gaps products with points of these extremes are."""
    w, w_square, w_x = extremes
    size = polars[:, 0] * w + polars[:, 1] * w_square + torch.linalg.vector_norm(polars[:, 2:], dim=1) * w_x
    # As many roundings as terms, and a few for the lift itself.
    return size * (torch.finfo(polars.dtype).eps * (polars.shape[1] + 4))


def approximate_search(lifted: Tensor, k: int, min_recall: float, geometry: Geometry) -> Search:
    """Return a search that looks only into the cells nearest to a query: an inverted file.

    Points are parted into cells by their nearest centre (k-means in the given geometry). Queries are compared cell by
    cell, all queries that look into a cell with all its points in one matrix product. How many cells a query looks
    into is not guessed: for a sample of points the true neighbours are found, and the least number is taken whose cells
    hold at least ``min_recall`` of them. Two standard errors are allowed for. The number and the recall are
    logged.

    Args:
        lifted: ``[n, d + 2]`` lifted points.
        k: the number of neighbours for which recall is measured.
        min_recall: the share of true neighbours to find at least, up to 1.
        geometry: the geometry they are points of.
    """
    n, device = len(lifted), lifted.device
    num_cells = min(n, round(CELLS_PER_ROOT * math.sqrt(n)))
    # Drawn on the CPU: the same for every device and rank.
    shuffled = torch.randperm(n, generator=torch.Generator().manual_seed(0)).to(device)
    centers = _fit_centers(lifted[shuffled[: SAMPLE_PER_CELL * num_cells]], num_cells, geometry)
    cell = _nearest(lifted, centers, 1)[:, 0]
    ends = cell.bincount(minlength=num_cells).cumsum(0).tolist()
    members = cell.sort(stable=True).indices
    stored = lifted[members]

    measured = shuffled[-NUM_MEASURED:]  # the first are centres, and would flatter them
    _, true = exact_search(lifted)(polar(lifted[measured]), min(k + 1, n))
    order = _nearest(lifted[measured], centers, num_cells)
    rank = torch.empty_like(order).scatter_(1, order, torch.arange(num_cells, device=device).expand_as(order))
    is_other = true != measured[:, None]
    cells_to_reach = rank.gather(1, cell[true]) + 1
    num_probes, recall, error = 0, 0.0, 0.0
    while num_probes < num_cells and recall - 2 * error < min_recall:
        num_probes += 1
        found = ((cells_to_reach <= num_probes) & is_other).sum(1) / is_other.sum(1)
        recall, error = float(found.mean()), float(found.std()) / math.sqrt(len(found))
    logger.info(
        "approximate neighbours: looking into %d of %d cells finds %.1f ± %.1f %% of the true %d nearest",
        num_probes,
        num_cells,
        100 * recall,
        200 * error,
        k,
    )

    def search(polars: Tensor, k: int) -> tuple[Tensor, Tensor]:
        visits = torch.cat(
            [
                (part @ centers.T).topk(num_probes, largest=False).indices
                for part in polars.split(BLOCK_ELEMENTS // num_cells)
            ]
        ).flatten()
        by_cell = visits.sort(stable=True).indices
        visit_ends = visits.bincount(minlength=num_cells).cumsum(0).tolist()
        gaps = polars.new_full((len(visits), k), torch.inf)
        positions = visits.new_full((len(visits), k), -1)
        for c in range(num_cells):
            first, last = (ends[c - 1] if c else 0), ends[c]
            here = by_cell[(visit_ends[c - 1] if c else 0) : visit_ends[c]]
            if len(here) == 0 or first == last:
                continue
            found = (polars[here // num_probes] @ stored[first:last].T).topk(min(k, last - first), largest=False)
            gaps[here, : found.values.shape[1]] = found.values
            positions[here, : found.values.shape[1]] = found.indices + first
        gaps, keep = gaps.view(len(polars), -1).topk(k, largest=False)
        positions = positions.view(len(polars), -1).gather(1, keep)
        return gaps, torch.where(positions >= 0, members[positions], -1)

    def in_blocks(polars: Tensor, k: int) -> tuple[Tensor, Tensor]:
        parts = [search(part, k) for part in polars.split(max(1, 2 * BLOCK_ELEMENTS // (num_probes * k)))]
        return torch.cat([gaps for gaps, _ in parts]), torch.cat([positions for _, positions in parts])

    return in_blocks


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
