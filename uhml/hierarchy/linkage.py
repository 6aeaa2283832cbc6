"""The two doors of the engine: cluster in one process, or with the neighbour search spread over ranks."""

import numpy as np
import torch
from torch import Tensor

from uhml import distributed
from uhml.errors import UserError, did_you_mean
from uhml.hierarchy.dendrogram import Dendrogram
from uhml.hierarchy.dense import dense_linkage
from uhml.hierarchy.exact import exact_linkage
from uhml.hierarchy.geometry import Geometry
from uhml.hierarchy.graph import graph_linkage
from uhml.hierarchy.knn import nearest_neighbors

MODES = ("graph", "exact", "dense")


def average_linkage(
    embeddings: Tensor | np.ndarray,
    *,
    mode: str = "graph",
    geometry: str = "poincare",
    curvature: float = 0.1,
    num_neighbors: int = 20,
    device: torch.device | str | None = None,
) -> Dendrogram:
    """Cluster points by average linkage, in this process alone.

    Args:
        embeddings: ``[n, d]`` floats, n >= 1; for "poincare" points of the ball ``curvature * |x|^2 < 1``.
        mode: "graph", "exact" or "dense"; see :mod:`uhml.hierarchy`.
        geometry: "poincare", "cosine" or "euclidean".
        curvature: the ball's c (it curves by -c), for "poincare". 0 is the limit of a flat space, where the distance
            is ``2 |x - y|``.
        num_neighbors: k of the graph of nearest neighbours, at least 1; n - 1 if there are fewer others. Of the modes
            only "graph" uses it.
        device: where to compute; by default where the embeddings are.

    Returns:
        The tree. Its heights are, in mode "graph" and "dense", mean distances (hyperbolic, ``1 - cosine`` or
        Euclidean); in mode "exact" means of ``cosh(sqrt(c) d)``, ``1 - cosine`` or squared Euclidean distance.

    Raises:
        UserError: an option or a row of the embeddings is not usable.
    """
    space = _check(mode, geometry, curvature, num_neighbors)
    points = space.points(torch.as_tensor(embeddings, device=device))
    if len(points) == 0:
        raise UserError("There is nothing to cluster: the embeddings have no rows.")
    if mode == "dense":
        return dense_linkage(points, space)
    if mode == "exact":
        return exact_linkage(points, space)
    ids = torch.arange(len(points), device=points.device)
    return graph_linkage(*nearest_neighbors(points, ids, points, min(num_neighbors, len(points) - 1), space))


def average_linkage_over_ranks(
    own_embeddings: Tensor,
    num_points: int,
    *,
    mode: str = "graph",
    geometry: str = "poincare",
    curvature: float = 0.1,
    num_neighbors: int = 20,
) -> Dendrogram | None:
    """Cluster points whose rows are spread over the ranks: the tree of :func:`average_linkage`. A collective.

    Args:
        own_embeddings: ``[len(distributed.share(num_points)), d]``, this rank's rows, on its device.
        num_points: the number of rows over all ranks.
        mode: as in :func:`average_linkage`, and so are the others.
        geometry: see there.
        curvature: see there.
        num_neighbors: see there.

    Returns:
        The tree on rank 0, None elsewhere.

    Raises:
        UserError: on every rank, if an option or a row on any rank is not usable.
    """
    space = _check(mode, geometry, curvature, num_neighbors)
    if num_points == 0:
        raise UserError("There is nothing to cluster: the embeddings have no rows.")
    own = distributed.share(num_points)
    own_points = distributed.on_every_rank(lambda: space.points(own_embeddings, own))
    points = distributed.all_gather_shares(own_points, num_points)
    if mode == "dense":
        return distributed.on_main(lambda: dense_linkage(points, space))
    if mode == "exact":
        return distributed.on_main(lambda: exact_linkage(points, space))
    k = min(num_neighbors, num_points - 1)
    own_ids = torch.arange(own.start, own.stop, own.step, device=points.device)
    own_neighbors, own_distances = distributed.on_every_rank(
        lambda: nearest_neighbors(own_points, own_ids, points, k, space)
    )
    neighbors = distributed.all_gather_shares(own_neighbors, num_points)
    distances = distributed.all_gather_shares(own_distances, num_points)
    return distributed.on_main(lambda: graph_linkage(neighbors, distances))


def _check(mode: str, geometry: str, curvature: float, num_neighbors: int) -> Geometry:
    if mode not in MODES:
        raise UserError(f"mode={mode!r} is not one of {', '.join(MODES)}.{did_you_mean(mode, MODES)}")
    if num_neighbors < 1:
        raise UserError(f"num_neighbors={num_neighbors} must be at least 1.")
    return Geometry(geometry, curvature)
