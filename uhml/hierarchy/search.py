"""Search for the smallest gaps, by matrix products in the points' own precision."""

import contextlib
import importlib.util
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

# A search takes polar vectors [b, d + 2] and a number k, and returns gaps [b, k] and positions [b, k] among the
# lifted points it was made for. The query itself is not left out. Position -1, at an infinite gap, is "no further".
Search = Callable[[Tensor, int], tuple[Tensor, Tensor]]

# Gaps held at a time: 64 MiB of float32.
BLOCK_ELEMENTS = 2**24
BASE_PER_BLOCK = 16384
# For fewer queries its threads take longer to start than to work.
FAISS_FROM = 512


@contextlib.contextmanager
def true_float32() -> Iterator[None]:
    """Within it, float32 products are float32 products, whatever a program has allowed for the sake of training.

    TF32 or bfloat16 inside a product would break the bound on its rounding.
    """
    # A program says it in either of two ways, and after the newer torch refuses to tell what the older would be.
    mkldnn: Any = torch.backends.mkldnn
    backends = torch.backends.cuda.matmul, mkldnn.matmul
    newer = [backend.fp32_precision for backend in backends]
    try:
        older = torch.get_float32_matmul_precision()
    except RuntimeError:
        older = None
    torch.set_float32_matmul_precision("highest")
    try:
        yield
    finally:
        if older is not None:
            torch.set_float32_matmul_precision(older)
        else:
            for backend, before in zip(backends, newer, strict=True):
                backend.fp32_precision = before


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


def magnitude(polars: Tensor, extremes: Tensor) -> Tensor:
    """Return a bound, ``[b]`` float64, on the sum of the terms' sizes in products with points of these extremes."""
    w, w_square, w_x = extremes
    return polars[:, 0] * w + polars[:, 1] * w_square + torch.linalg.vector_norm(polars[:, 2:], dim=1) * w_x


def rounding(polars: Tensor, extremes: Tensor) -> Tensor:
    """Return a bound, ``[b]`` float64, on how far off the gaps products with points of these extremes are."""
    # As many roundings as terms, and a few for the lift itself; what is tiny has fewer digits.
    kind = torch.finfo(polars.dtype)
    return (magnitude(polars, extremes) * kind.eps + kind.tiny) * (polars.shape[1] + 4)
