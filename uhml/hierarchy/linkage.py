"""The doors of the engine: cluster in one process, or with the neighbour search spread over ranks."""

import dataclasses
import logging
import warnings
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from uhml import distributed
from uhml.errors import UserError, did_you_mean
from uhml.hierarchy.dendrogram import Dendrogram
from uhml.hierarchy.dense import MAX_POINTS, dense_linkage, dense_memory
from uhml.hierarchy.equal import first_equal, row_hashes
from uhml.hierarchy.exact import exact_linkage, exact_memory
from uhml.hierarchy.geometry import Geometry
from uhml.hierarchy.graph import graph_linkage, graph_memory
from uhml.hierarchy.joining import MAX_PARTS, sums_of_parts
from uhml.hierarchy.knn import nearer, nearest_neighbors, search_memory
from uhml.hierarchy.memory import GIB, require

logger = logging.getLogger(__name__)

MODES = ("graph", "exact", "dense")
EXACT_SEARCH_UP_TO = 200_000
MIN_RECALL = 0.9
GATHER_UP_TO = 4 * GIB
FEWER = "Use fewer points, fewer neighbours (num_neighbors), more memory, or spread the search over more ranks."


def average_linkage(
    embeddings: Tensor | np.ndarray,
    *,
    mode: str = "graph",
    geometry: str = "poincare",
    curvature: float = 0.1,
    num_neighbors: int = 20,
    exact_search_up_to: int = EXACT_SEARCH_UP_TO,
    min_recall: float = MIN_RECALL,
    device: torch.device | str | None = None,
) -> Dendrogram:
    """Cluster points by average linkage, in this process alone.

    Args:
        embeddings: ``[n, d]`` floats, n >= 1; for "poincare" points of the ball ``curvature * |x|^2 < 1``.
        mode: "graph", "exact" or "dense"; see :mod:`uhml.hierarchy`.
        geometry: "poincare", "cosine" or "euclidean".
        curvature: the ball's c (it curves by -c), for "poincare". 0 is the limit of a flat space, where the distance
            is ``2 |x - y|``.
        num_neighbors: k of the graph of nearest neighbours, at least 1; n - 1 if there are fewer others. This and the
            next two concern mode "graph" only.
        exact_search_up_to: the number of points up to which neighbours are found exactly.
        min_recall: above it, the share of the true neighbours to find at least, in (0, 1], measured on a sample.
        device: where to compute; by default where the embeddings are.

    Returns:
        The tree. Its heights are, in mode "graph" and "dense", mean distances (hyperbolic, ``1 - cosine`` or
        Euclidean); in mode "exact" means of ``cosh(sqrt(c) d)``, ``1 - cosine`` or squared Euclidean distance.

    Raises:
        UserError: an option or a row of the embeddings is not usable, or memory does not suffice.
    """
    space = _check(mode, geometry, curvature, num_neighbors, min_recall)
    points = space.points(_precise(_tensor(embeddings, device), mode))
    _check_not_empty(len(points))
    return _alone(points, space, mode, num_neighbors, _recall(len(points), exact_search_up_to, min_recall))


def _alone(points: Tensor, space: Geometry, mode: str, num_neighbors: int, recall: float) -> Dendrogram:
    """Cluster points of a geometry in one process."""
    if mode != "graph":
        return _of_all_pairs(points, space, mode)
    n, device = len(points), points.device
    needed = search_memory(n, n, points.shape[1], num_neighbors, points.element_size())
    require(needed + graph_memory(n, num_neighbors), device, _graph(n), FEWER)
    first = first_equal(row_hashes(points))
    ids = torch.arange(n, device=device)
    distinct = (first == ids).nonzero()[:, 0]

    def search(queries: Tensor, query_ids: Tensor, k: int) -> tuple[Tensor, Tensor]:
        return nearest_neighbors(queries, query_ids, points[distinct], distinct, k, space, min_recall=recall)

    return _of_graph((*_of_first(points, ids, first, num_neighbors, search), first), points, space)


def average_linkage_over_ranks(
    own_embeddings: Tensor,
    num_points: int,
    *,
    mode: str = "graph",
    geometry: str = "poincare",
    curvature: float = 0.1,
    num_neighbors: int = 20,
    exact_search_up_to: int = EXACT_SEARCH_UP_TO,
    min_recall: float = MIN_RECALL,
    gather_up_to: int = GATHER_UP_TO,
) -> Dendrogram | None:
    """Cluster points whose rows are spread over the ranks: the tree of :func:`average_linkage`. A collective.

    In mode "graph" each rank finds the neighbours of its own rows; rank 0 merges while the others wait. The other
    modes work on rank 0 alone.

    Args:
        own_embeddings: ``[len(distributed.share(num_points)), d]``, this rank's rows, on its device.
        num_points: the number of rows over all ranks.
        mode: as in :func:`average_linkage`, and so are the next five.
        geometry: see there.
        curvature: see there.
        num_neighbors: see there.
        exact_search_up_to: see there.
        min_recall: see there.
        gather_up_to: up to so many bytes of embeddings every rank holds all of them; larger ones go round the ranks,
            a share at a time.

    Returns:
        The tree on rank 0, None elsewhere.

    Raises:
        UserError: on every rank, if an option or a row on any rank is not usable, or memory does not suffice.
    """
    space = _check(mode, geometry, curvature, num_neighbors, min_recall)
    own, own_points = _own_points(own_embeddings, num_points, space, mode)
    device = own_points.device
    if mode != "graph":
        points = distributed.gather_shares_on_main(own_points, num_points)
        return distributed.on_main(lambda: None if points is None else _of_all_pairs(points.to(device), space, mode))

    merging = graph_memory(num_points, num_neighbors)
    recall = _recall(num_points, exact_search_up_to, min_recall)
    found = _neighbors_over_ranks(own_points, num_points, space, num_neighbors, recall, gather_up_to, merging)
    forest = distributed.on_main(lambda: graph_linkage(*found))
    part = distributed.broadcast_from_main(forest.part if forest else None, device)
    sums = None
    if num_parts := _to_join(part, num_neighbors):
        own_parts = part[torch.arange(own.start, own.stop, own.step, device=device)]
        sums = distributed.all_reduce_sum(sums_of_parts(own_points, own_parts, num_parts, space))
    return distributed.on_main(lambda: forest.join(sums) if forest else None)


@dataclasses.dataclass(frozen=True)
class Merging:
    """The part of a clustering that is one process's alone, with all it takes, on the CPU: for another process to do.

    Attributes:
        points: ``[n, d]``.
        space: the geometry they are points of.
        mode: "graph", "exact" or "dense".
        num_neighbors: of each point, in mode "graph".
        recall: share of the true neighbours to find at least.
        graph: what :func:`uhml.hierarchy.graph.graph_linkage` takes; None where nothing was done together.
    """

    points: Tensor
    space: Geometry
    mode: str
    num_neighbors: int
    recall: float
    graph: tuple[Tensor, ...] | None

    def __call__(self) -> Dendrogram:
        """Return the tree.

        Raises:
            UserError: memory does not suffice.
        """
        if self.graph is None:
            return _alone(self.points, self.space, self.mode, self.num_neighbors, self.recall)
        n, k = self.graph[0].shape
        require(graph_memory(n, k), self.points.device, _graph(n), FEWER)
        return _of_graph(self.graph, self.points, self.space)


def merging_over_ranks(
    own_embeddings: Tensor,
    num_points: int,
    *,
    mode: str = "graph",
    geometry: str = "poincare",
    curvature: float = 0.1,
    num_neighbors: int = 20,
    exact_search_up_to: int = EXACT_SEARCH_UP_TO,
    min_recall: float = MIN_RECALL,
    gather_up_to: int = GATHER_UP_TO,
) -> Merging | None:
    """Do of :func:`average_linkage_over_ranks` what all ranks do, and return on rank 0 what is left. A collective.

    Arguments and errors as there.
    """
    space = _check(mode, geometry, curvature, num_neighbors, min_recall)
    _, own_points = _own_points(own_embeddings, num_points, space, mode)
    graph, recall = None, _recall(num_points, exact_search_up_to, min_recall)
    if mode == "graph" and not left_whole(distributed.world_size(), own_points.device.type):
        found = _neighbors_over_ranks(own_points, num_points, space, num_neighbors, recall, gather_up_to, 0)
        graph = tuple(tensor.cpu() for tensor in found) if distributed.is_main() else None
    points = distributed.gather_shares_on_main(own_points, num_points)
    return None if points is None else Merging(points, space, mode, num_neighbors, recall, graph)


def left_whole(world_size: int, device: str) -> bool:
    """Return whether :func:`merging_over_ranks` leaves the search for neighbours, too.

    It does on one rank with a CPU: other ranks would share the search, and a GPU is quicker than the CPU beside it.
    """
    return world_size == 1 and device == "cpu"


def _own_points(own_embeddings: Tensor, num_points: int, space: Geometry, mode: str) -> tuple[range, Tensor]:
    """Return the numbers of this rank's rows, and its points. A collective, so that all refuse what one does."""
    _check_not_empty(num_points)
    own = distributed.share(num_points)
    return own, distributed.on_every_rank(lambda: space.points(_precise(own_embeddings, mode), own))


def _neighbors_over_ranks(
    own_points: Tensor,
    num_points: int,
    space: Geometry,
    num_neighbors: int,
    recall: float,
    gather_up_to: int,
    more_on_main: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return, on every rank, all points' neighbours, their distances and the points that equal them. A collective.

    Args:
        own_points: ``[len(distributed.share(num_points)), d]``, this rank's rows.
        num_points: the number of rows over all ranks.
        space: the geometry they are points of.
        num_neighbors: of each point.
        recall: share of the true neighbours to find at least.
        gather_up_to: as for :func:`average_linkage_over_ranks`.
        more_on_main: bytes that rank 0 is to have left on the device.
    """
    own, device = distributed.share(num_points), own_points.device
    gathers = num_points * own_points.shape[1] * own_points.element_size() <= gather_up_to
    num_searched = num_points if gathers else 2 * len(own)
    needed = search_memory(len(own), num_searched, own_points.shape[1], num_neighbors, own_points.element_size())
    needed += max(more_on_main if distributed.is_main() else 0, 12 * num_points * num_neighbors)
    distributed.on_every_rank(lambda: require(needed, device, _graph(num_points), FEWER))

    first = first_equal(distributed.all_gather_shares(row_hashes(own_points), num_points))
    own_ids = torch.arange(own.start, own.stop, own.step, device=device)

    def search(queries: Tensor, query_ids: Tensor, k: int) -> tuple[Tensor, Tensor]:
        found = None
        parts = [(distributed.all_gather_shares(own_points, num_points), range(num_points))] if gathers else None
        for part, rows in parts or distributed.shares_in_turn(own_points, num_points):
            ids = torch.arange(rows.start, rows.stop, rows.step, device=device)
            distinct = first[ids] == ids

            # A failure here must reach the ranks that would wait for this one in the next exchange.
            def search_part(part: Tensor = part[distinct], ids: Tensor = ids[distinct]) -> tuple[Tensor, Tensor]:
                return nearest_neighbors(queries, query_ids, part, ids, k, space, min_recall=recall)

            here = distributed.on_every_rank(search_part)
            found = here if found is None else nearer(found, here)
        assert found is not None
        return found

    own_neighbors, own_distances = _of_first(own_points, own_ids, first, num_neighbors, search)
    neighbors = distributed.all_gather_shares(own_neighbors, num_points)
    distances = distributed.all_gather_shares(own_distances, num_points)
    return neighbors, distances, first


def _of_graph(graph: tuple[Tensor, ...], points: Tensor, geometry: Geometry) -> Dendrogram:
    """Merge over a graph, and join the parts that it falls into, in one process."""
    forest = graph_linkage(*graph)
    num_parts = _to_join(forest.part, graph[0].shape[1])
    return forest.join(sums_of_parts(points, forest.part, num_parts, geometry) if num_parts else None)


def _to_join(part: Tensor, num_neighbors: int) -> int:
    """Return the number of parts of a graph if they are to be joined by their points, else 0."""
    num_parts = int(part.max()) + 1
    # Those linked at the greatest distance alone are parts, too, though there may be no other neighbours to link them.
    if num_parts > 1 and num_neighbors < len(part) - 1 and distributed.is_main():
        logger.info(
            "the graph falls into %d parts, joined at one height at the top; more num_neighbors link more",
            num_parts,
        )
    return num_parts if 1 < num_parts <= MAX_PARTS else 0


def _of_all_pairs(points: Tensor, geometry: Geometry, mode: str) -> Dendrogram:
    n, d = points.shape
    work = f"mode={mode} on {n:,} points"
    if mode == "exact":
        require(exact_memory(n, d), points.device, work, "Use fewer points, or mode=graph with fewer neighbours.")
        return exact_linkage(points, geometry)
    if n > MAX_POINTS:
        raise UserError(
            f"{work} would keep all {n * (n - 1) // 2:,} distances; it stops at {MAX_POINTS:,} points. "
            "Use mode=exact or mode=graph, or fewer points."
        )
    require(dense_memory(n), torch.device("cpu"), work, "Use mode=exact or mode=graph, or fewer points.")
    return dense_linkage(points, geometry)


def _of_first(
    points: Tensor,
    ids: Tensor,
    first: Tensor,
    num_neighbors: int,
    search: Callable[[Tensor, Tensor, int], tuple[Tensor, Tensor]],
) -> tuple[Tensor, Tensor]:
    """Search for those points only that no earlier point equals; the others get themselves as neighbours."""
    num_distinct = int((first == torch.arange(len(first), device=first.device)).sum())
    k = min(num_neighbors, num_distinct - 1)
    neighbors = ids[:, None].expand(-1, k).int().contiguous()
    distances = torch.full(neighbors.shape, torch.inf, dtype=torch.float64, device=ids.device)
    is_first = first[ids] == ids
    neighbors[is_first], distances[is_first] = search(points[is_first], ids[is_first], k)
    return neighbors, distances


def _tensor(embeddings: Tensor | np.ndarray, device: torch.device | str | None) -> Tensor:
    if not isinstance(embeddings, Tensor):
        if isinstance(embeddings, np.ma.MaskedArray):
            raise UserError("Embeddings must be a plain array: leave out the rows of a masked one, or fill them.")
        embeddings = np.asarray(embeddings)
        if embeddings.dtype.kind not in "fiub" or embeddings.dtype.itemsize > 8:
            raise UserError(f"Embeddings must be floats of at most 64 bits; these are {embeddings.dtype}.")
        # torch has no array that runs backwards, and none of another machine's order of bytes.
        embeddings = embeddings.astype(embeddings.dtype.newbyteorder("="), copy=False)
        if min(embeddings.strides, default=0) < 0:
            embeddings = np.ascontiguousarray(embeddings)
    with warnings.catch_warnings():
        # Of arrays that may not be written to, such as memory-mapped files; nothing here writes to them.
        warnings.filterwarnings("ignore", "The given NumPy array is not writable")
        tensor = torch.as_tensor(embeddings)
    try:
        return tensor.to(device)
    except (RuntimeError, AssertionError) as e:
        raise UserError(f"device={device} cannot be used here: {str(e).splitlines()[0]}") from e


def _precise(embeddings: Tensor, mode: str) -> Tensor:
    """Give exact means their exact points: unit vectors rounded to float32 would be off by 1e-8."""
    return embeddings.double() if mode != "graph" and embeddings.is_floating_point() else embeddings


def _recall(num_points: int, exact_search_up_to: int, min_recall: float) -> float:
    return 1.0 if num_points <= exact_search_up_to else min_recall


def _graph(num_points: int) -> str:
    return f"mode=graph on {num_points:,} points"


def _check_not_empty(num_points: int) -> None:
    if num_points == 0:
        raise UserError("There is nothing to cluster: the embeddings have no rows.")


def _check(mode: str, geometry: str, curvature: float, num_neighbors: int, min_recall: float) -> Geometry:
    if mode not in MODES:
        raise UserError(f"mode={mode!r} is not one of {', '.join(MODES)}.{did_you_mean(mode, MODES)}")
    if not isinstance(num_neighbors, int | np.integer) or num_neighbors < 1:
        raise UserError(f"num_neighbors={num_neighbors} must be a whole number, at least 1.")
    if not 0 < min_recall <= 1:
        raise UserError(f"min_recall={min_recall} must be more than 0, and 1 at most.")
    return Geometry(geometry, curvature)
