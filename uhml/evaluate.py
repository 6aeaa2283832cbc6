"""Score a network on the classes it never saw: on the whole while it trains, and class by class afterwards."""

import dataclasses
from collections.abc import Iterator

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from uhml import distributed
from uhml.config import Config
from uhml.data.pictures import Pictures, Splits
from uhml.embedding import embed_share
from uhml.hierarchy.geometry import Geometry
from uhml.hierarchy.knn import nearest_neighbors
from uhml.metrics import Embedded, Scores, kmeans_clusters, mean_scores, retrieval, score
from uhml.model import Embedder


def score_unseen(model: Embedder, splits: Splits, config: Config) -> dict[str, Scores] | None:
    """Score the network as it is on the test pictures, or on those held out for validation. A collective.

    Returns:
        "backbone": its features, by cosine; "ball": the embedding as it is deployed, by the ball's distance; "cosine":
        the embedding by cosine. None where no classes are known, so that there is nothing to score.
    """
    if splits.test is None:
        return None
    recall_at, seed = config.eval.recall_at, config.train.seed
    scores = {}
    for name, geometry, queries, gallery in _embedded(model, splits, config):
        scores[name] = score(queries, gallery, geometry, recall_at, seed)
    # Of the ball, which came last.
    return scores | {"cosine": score(queries, gallery, Geometry("cosine"), recall_at, seed)}


@dataclasses.dataclass(frozen=True)
class Neighbors:
    """The k nearest of each query, nearest first.

    Attributes:
        rows: ``[n, k]``, rows of the gallery, or of the queries where these are searched.
        distances: ``[n, k]``, the ball's; infinite where there are fewer than k to find.
    """

    rows: NDArray[np.int32]
    distances: NDArray[np.float64]


@dataclasses.dataclass(frozen=True)
class Evaluation:
    """All that is known of a network on labelled pictures, of which n are queries.

    Attributes:
        scores: "ball" and "backbone", as in :func:`score_unseen`, with R@1 whatever else.
        ami: of the same two: adjusted mutual information of classes and the clusters that NMI is of.
        is_right: ``[n]``, whether the nearest in the ball is of the query's class.
        average_precision: ``[n]``, at R, in the ball; NaN where the query is the only one of its class.
        neighbors: in the ball.
    """

    scores: dict[str, Scores]
    ami: dict[str, float]
    is_right: NDArray[np.bool_]
    average_precision: NDArray[np.float64]
    neighbors: Neighbors


def evaluate(model: Embedder, splits: Splits, config: Config, num_neighbors: int) -> Evaluation:
    """Score the network picture by picture. A collective.

    Args:
        model: left in evaluation mode.
        splits: with a test part.
        config: for everything else.
        num_neighbors: k.
    """
    from sklearn.metrics import adjusted_mutual_info_score

    recall_at, seed = tuple(sorted({1, *config.eval.recall_at})), config.train.seed
    scores, ami = {}, {}
    for name, geometry, queries, gallery in _embedded(model, splits, config):
        recall, average_precision = retrieval(queries, gallery, geometry, recall_at)
        clusters = kmeans_clusters(queries, geometry, seed)
        scores[name] = mean_scores(recall, average_precision, recall_at, queries.labels, clusters)
        ami[name] = float(adjusted_mutual_info_score(queries.labels, clusters))
    # Of the ball, which came last.
    return Evaluation(
        scores={name: scores[name] for name in ("ball", "backbone")},
        ami=ami,
        is_right=recall[:, 0].numpy(),
        average_precision=average_precision.numpy(),
        neighbors=find_neighbors(queries.rows, None if gallery is None else gallery.rows, geometry, num_neighbors),
    )


def find_neighbors(queries: Tensor, gallery: Tensor | None, geometry: Geometry, num_neighbors: int) -> Neighbors:
    """Find the nearest of each query, each rank for its share of them. A collective.

    Args:
        queries: ``[n, d]``, the same on every rank.
        gallery: ``[m, d]`` rows to search, the same on every rank; None searches the other queries.
        geometry: what is near.
        num_neighbors: k.
    """
    own = torch.tensor(distributed.share(len(queries)), dtype=torch.int64, device=queries.device)
    points = geometry.points(queries)
    references = points if gallery is None else geometry.points(gallery)
    # A query that is none of the gallery has an id that none of the gallery has.
    ids = torch.arange(len(references), device=queries.device)
    query_ids = own if gallery is None else own + len(references)
    rows, distances = nearest_neighbors(points[own], query_ids, references, ids, num_neighbors, geometry)
    return Neighbors(
        distributed.all_gather_shares(rows, len(queries)).cpu().numpy(),
        distributed.all_gather_shares(distances, len(queries)).cpu().numpy(),
    )


@dataclasses.dataclass(frozen=True)
class ClassScore:
    """How well the pictures of one class find each other.

    Attributes:
        name: of the class.
        pictures: how many of its pictures are queries.
        recall_at_1: share of them whose nearest neighbour is of the class.
        map_at_r: mean average precision at R; None where the class has no second picture.
    """

    name: str
    pictures: int
    recall_at_1: float
    map_at_r: float | None


def by_class(
    labels: NDArray[np.int64],
    names: tuple[str, ...],
    is_right: NDArray[np.bool_],
    average_precision: NDArray[np.float64],
) -> list[ClassScore]:
    """Average over the pictures of each class; the class that finds itself worst comes first.

    Args:
        labels: ``[n]``; any grouping of the pictures, such as their super-classes.
        names: of the labels.
        is_right: ``[n]``.
        average_precision: ``[n]``, see :class:`Evaluation`.
    """
    has_relevant = ~np.isnan(average_precision)
    pictures = np.bincount(labels, minlength=len(names))
    queries = np.bincount(labels[has_relevant], minlength=len(names))
    right = np.bincount(labels, is_right, len(names))
    precision = np.bincount(labels[has_relevant], average_precision[has_relevant], len(names))
    scores = [
        ClassScore(
            names[label],
            int(pictures[label]),
            float(right[label] / pictures[label]),
            float(precision[label] / queries[label]) if queries[label] else None,
        )
        for label in np.flatnonzero(pictures)
    ]
    return sorted(scores, key=lambda score: (score.recall_at_1, score.map_at_r or 0.0, score.name))


@dataclasses.dataclass(frozen=True)
class Confusion:
    """Pictures of one class whose nearest neighbour is of another.

    Attributes:
        label: the class.
        taken_for: the class of the neighbours.
        pictures: how many such pictures.
        share: of the pictures of the class.
        example: one of them, a query's row.
    """

    label: int
    taken_for: int
    pictures: int
    share: float
    example: int


def confusions(labels: NDArray[np.int64], nearest: NDArray[np.int64]) -> list[Confusion]:
    """Return which classes are taken for which, the greatest share of a class's pictures first.

    Args:
        labels: ``[n]``, of the queries.
        nearest: ``[n]``, of their nearest neighbours.
    """
    wrong = np.flatnonzero(labels != nearest)
    pairs, first, counts = np.unique(
        np.stack([labels[wrong], nearest[wrong]], 1), axis=0, return_index=True, return_counts=True
    )
    pictures = np.bincount(labels)
    found = [
        Confusion(int(a), int(b), int(count), float(count / pictures[a]), int(wrong[example]))
        for (a, b), example, count in zip(pairs, first, counts, strict=True)
    ]
    return sorted(found, key=lambda pair: (-pair.share, -pair.pictures, pair.label, pair.taken_for))


def _embedded(
    model: Embedder, splits: Splits, config: Config
) -> Iterator[tuple[str, Geometry, Embedded, Embedded | None]]:
    """Yield what there is to score, its queries and its gallery: "backbone" by cosine, and "ball" by its distance."""
    assert splits.test is not None
    queries = _features(model, splits.test, config, config.data.score_on)
    gallery = None if splits.gallery is None else _features(model, splits.gallery, config, "gallery")
    yield "backbone", Geometry("cosine"), queries, gallery
    queries, gallery = _points(model, queries), None if gallery is None else _points(model, gallery)
    yield "ball", Geometry("poincare", config.model.curvature), queries, gallery


def _features(model: Embedder, pictures: Pictures, config: Config, name: str) -> Embedded:
    assert pictures.labels is not None, "test pictures have labels, or there would be no test part"
    own = embed_share(model, pictures, config, f"embed {name} pictures", features=True)
    return Embedded(distributed.all_gather_shares(own, len(pictures)), pictures.labels)


@torch.inference_mode()
def _points(model: Embedder, features: Embedded) -> Embedded:
    return Embedded(model.head(features.rows), features.labels)
