"""Retrieval and clustering scores on classes never seen in training: Recall@K, MAP@R, NMI.

Every score is a mean over all queries, each exactly once, whatever the number of ranks. A query is left out of its own
neighbours by its index, not by being nearest. Distances are computed in float64, and those that are equal in float32
are ranked by index, so exact duplicates among the pictures make no difference between one run and another.
"""

import dataclasses
from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from uhml import distributed, poincare
from uhml.hierarchy.geometry import Geometry, polar
from uhml.hierarchy.search import extremes, magnitude

# Gaps are rounded to multiples of this share of the terms that they are sums of; the rounding of such a sum in float64
# stays far below. Near the ball's edge the terms are large.
TIE = 2.0**-40
# Bytes of a block of the distance matrix.
BLOCK_BYTES = 2**27
KMEANS_ITERATIONS = 20


@dataclasses.dataclass(frozen=True)
class Scores:
    """How well an embedding tells unseen classes apart.

    Attributes:
        recall_at_k: for each K, the share of queries with one of their class among the K nearest.
        map_at_r: mean average precision at R (Musgrave et al., ECCV 2020), over queries whose class has R >= 1 others.
        nmi: normalised mutual information of k-means clusters and classes, with as many clusters as classes.
    """

    recall_at_k: dict[str, float]
    map_at_r: float
    nmi: float


@dataclasses.dataclass(frozen=True)
class Embedded:
    """Embedded pictures and their classes.

    Attributes:
        rows: ``[n, d]``.
        labels: ``[n]``.
    """

    rows: Tensor
    labels: NDArray[np.int64]


def score(
    queries: Embedded, gallery: Embedded | None, geometry: Geometry, recall_at: Sequence[int], seed: int
) -> Scores:
    """Score an embedding. A collective; every rank brings the same arguments and gets the same scores.

    Args:
        queries: the n test pictures, as points of ``geometry``.
        gallery: what the queries search, with the same class numbers; None searches the other queries.
        geometry: what is near.
        recall_at: the K of Recall@K.
        seed: of the k-means clusters.
    """
    recall, average_precision = retrieval(queries, gallery, geometry, recall_at)
    clusters = kmeans_clusters(queries, geometry, seed)
    return mean_scores(recall, average_precision, recall_at, queries.labels, clusters)


def mean_scores(
    recall: Tensor,
    average_precision: Tensor,
    recall_at: Sequence[int],
    labels: NDArray[np.int64],
    clusters: NDArray[np.int32],
) -> Scores:
    """Put together what :func:`retrieval` and :func:`kmeans_clusters` found. No collective.

    Args:
        recall: ``[n, len(recall_at)]``.
        average_precision: ``[n]``.
        recall_at: the K of Recall@K.
        labels: ``[n]``, the queries' classes.
        clusters: ``[n]``.
    """
    # Half a second to import, for those alone who have labels.
    from sklearn.metrics import normalized_mutual_info_score

    has_relevant = ~average_precision.isnan()
    return Scores(
        recall_at_k={str(k): float(column.double().mean()) for k, column in zip(recall_at, recall.T, strict=True)},
        map_at_r=float(average_precision[has_relevant].mean()) if has_relevant.any() else 0.0,
        nmi=float(normalized_mutual_info_score(labels, clusters)),
    )


def retrieval(
    queries: Embedded, gallery: Embedded | None, geometry: Geometry, recall_at: Sequence[int]
) -> tuple[Tensor, Tensor]:
    """Rank the references of each query; arguments as for :func:`score`. A collective.

    Returns:
        Whether one of the K nearest is of the query's class, ``[n, len(recall_at)]`` bool, and average precision at R,
        ``[n]`` float64, NaN where R is 0: both on the CPU, for all queries.
    """
    within = gallery is None
    references = gallery or queries
    device, num_queries = queries.rows.device, len(queries.rows)
    labels = torch.from_numpy(queries.labels).to(device)
    reference_labels = torch.from_numpy(references.labels).to(device)
    relevant = torch.bincount(reference_labels, minlength=int(labels.max()) + 1)[labels] - int(within)

    points, reference_points = _points(geometry, queries.rows, references.rows)
    lifted = geometry.lift(reference_points)
    greatest = extremes(lifted)
    depth = min(len(lifted) - int(within), max(*recall_at, int(relevant.max())))
    own = torch.tensor(distributed.share(num_queries), device=device, dtype=torch.int64)
    recall = torch.zeros(len(own), len(recall_at), dtype=torch.bool, device=device)
    average_precision = torch.zeros(len(own), dtype=torch.float64, device=device)
    for block in torch.arange(len(own), device=device).split(max(1, BLOCK_BYTES // (8 * len(lifted)))):
        rows = own[block]
        products_with = polar(geometry.lift(points[rows]))
        gaps = products_with @ lifted.T
        if within:
            gaps[torch.arange(len(rows), device=device), rows] = torch.inf
        tie = (TIE * magnitude(products_with, greatest)).clamp_min(torch.finfo(torch.float64).tiny)[:, None]
        hits = reference_labels[_smallest(gaps, tie, depth)] == labels[rows, None]
        recall[block] = torch.stack([hits[:, :k].any(1) for k in recall_at], 1)
        average_precision[block] = _average_precision_at_r(hits, relevant[rows])
    return (
        distributed.all_gather_shares(recall, num_queries).cpu(),
        distributed.all_gather_shares(average_precision, num_queries).cpu(),
    )


def _points(geometry: Geometry, *embeddings: Tensor) -> list[Tensor]:
    """Return the embeddings as points of ``geometry``, in float64.

    A flat picture's features may all be zero, which have no cosine. An axis of their own makes such rows equal to each
    other and unlike everything else.
    """
    rows = [embedding.double() for embedding in embeddings]
    if geometry.name == "cosine":
        is_zero = [~embedding.any(1, keepdim=True) for embedding in embeddings]
        if any(bool(zero.any()) for zero in is_zero):
            rows = [torch.cat([own, zero], 1) for own, zero in zip(rows, is_zero, strict=True)]
    return [geometry.points(own) for own in rows]


def _smallest(gaps: Tensor, tie: Tensor, depth: int) -> Tensor:
    """Return the columns ``[b, depth]`` of the smallest gaps of each row, in order; less than ``tie`` apart by column.

    A non-negative float orders as its bits do. With the column in the low half of a 64-bit key no two keys are equal,
    and ``topk``, which breaks ties as it likes, has none to break.
    """
    # abs_, for the clamp leaves -0, which has the bits of a huge negative number.
    steps = (gaps / tie).round_().clamp_min_(0).abs_().float()
    columns = torch.arange(gaps.shape[1], device=gaps.device)
    keys = (steps.view(torch.int32).long() << 32) | columns
    return keys.topk(depth, dim=1, largest=False).values & 0xFFFFFFFF


def _average_precision_at_r(hits: Tensor, relevant: Tensor) -> Tensor:
    """Mean over the R first ranks of (precision there if it is a hit, else 0); NaN where R is 0."""
    rank = torch.arange(1, hits.shape[1] + 1, device=hits.device)
    within_r = rank[None, :] <= relevant[:, None]
    precision = hits.cumsum(1).double() / rank
    return (precision * hits * within_r).sum(1) / relevant


def kmeans_clusters(embedded: Embedded, geometry: Geometry, seed: int) -> NDArray[np.int32]:
    """Cluster by k-means, on one rank, in the tangent space at the origin or on the unit sphere. A collective.

    Returns:
        ``[n]``, as many clusters as classes; the same on every rank.
    """

    def cluster() -> NDArray[np.int32]:
        from sklearn.cluster import KMeans

        (rows,) = _points(geometry, embedded.rows)
        if geometry.c > 0:
            rows = poincare.ball(geometry.c).logmap0(rows)
        num_classes = len(np.unique(embedded.labels))
        kmeans = KMeans(num_classes, init="random", n_init=1, max_iter=KMEANS_ITERATIONS, random_state=seed)
        return kmeans.fit_predict(rows.float().cpu().numpy())

    return distributed.from_main(cluster)
