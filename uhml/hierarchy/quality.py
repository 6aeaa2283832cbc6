"""How good the clusters of a cut are: by themselves, and against labels where there are any."""

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from uhml.hierarchy.dendrogram import Dendrogram
from uhml.hierarchy.geometry import Geometry, polar

# Points whose silhouette is taken; its mean is then known to about 0.01.
NUM_SAMPLED = 4096


class Sizes(NamedTuple):
    """The clusters of one cut in numbers: how many, how many of one point, and their median and greatest size."""

    num_clusters: int
    num_singletons: int
    median: float
    largest: int


class Agreement(NamedTuple):
    """Clusters against labels, each 1 where they agree entirely.

    Attributes:
        nmi: normalised mutual information; grows with the number of clusters.
        ami: the same, adjusted so that clusters by chance score 0.
        purity: the share of points whose label is the commonest of their cluster.
    """

    nmi: float
    ami: float
    purity: float


def sizes(clusters: Tensor) -> Sizes:
    """Return the sizes of ``[n]`` clusters."""
    counts = clusters.bincount()
    return Sizes(len(counts), int((counts == 1).sum()), float(np.median(counts)), int(counts.max()))


def agreement(clusters: Tensor, labels: np.ndarray) -> Agreement:
    """Return how ``[n]`` clusters agree with ``[n]`` labels."""
    # Half a second to import, for those alone who have labels.
    from sklearn.metrics import adjusted_mutual_info_score, normalized_mutual_info_score

    found, given = clusters.numpy(), np.unique(labels, return_inverse=True)[1]
    together, counts = np.unique(np.stack([found, given]), axis=1, return_counts=True)
    commonest = np.zeros(found.max() + 1, dtype=int)
    np.maximum.at(commonest, together[0], counts)
    return Agreement(
        normalized_mutual_info_score(given, found),
        adjusted_mutual_info_score(given, found),
        float(commonest.sum() / len(found)),
    )


def dendrogram_purity(tree: Dendrogram, labels: np.ndarray) -> float:
    """Return how well a tree keeps each of its points' classes together, whatever cut one may take.

    It is the mean, over all pairs of points of one class, of that class's share in the smallest cluster that holds
    both (Heller and Ghahramani, ICML 2005): 1 where every class is a subtree, and its share of all points where the
    class is scattered. Exact, in O(n log n): of two clusters the one of fewer classes is counted into the other.

    Args:
        tree: over n points.
        labels: ``[n]``.
    """
    counts: dict[int, dict[int, int]] = {i: {label: 1} for i, label in enumerate(labels.tolist())}
    total = 0.0
    for t, (left, right, _, size) in enumerate(tree.to_scipy().tolist()):
        fewer, more = sorted((counts.pop(int(left)), counts.pop(int(right))), key=len)
        for label, count in fewer.items():
            others = more.get(label, 0)
            total += others * count * (others + count) / size
            more[label] = others + count
        counts[tree.num_points + t] = more
    classes = np.unique(labels, return_counts=True)[1]
    num_pairs = int((classes * (classes - 1) // 2).sum())
    return total / num_pairs if num_pairs else 1.0


def silhouette(points: Tensor, clusters: Tensor, geometry: Geometry) -> float:
    """Return the mean silhouette, from cluster means, of a fixed sample of points.

    For each point it is (b - a) / max(a, b), where a is its mean gap to the others of its cluster and b that to the
    nearest other cluster: 1 where clusters are tight and apart, 0 where they run into each other, and less than 0 for
    points that fit another cluster better. A point by itself counts 0.

    Args:
        points: ``[n, d]`` points.
        clusters: ``[n]`` ids, 0, 1, ...
        geometry: the geometry they are points of.
    """
    points, clusters = points.double(), clusters.long().to(points.device)
    num_clusters = int(clusters.max()) + 1
    if num_clusters < 2:
        return 0.0
    lifted = geometry.lift(points - points.mean(0) if geometry.c == 0 else points)
    counts = clusters.bincount().double()
    means = lifted.new_zeros(num_clusters, lifted.shape[1]).index_add_(0, clusters, lifted) / counts[:, None]
    sample = torch.randperm(len(points), generator=torch.Generator().manual_seed(0))[:NUM_SAMPLED].to(points.device)
    scores = []
    for rows in sample.split(max(1, 2**24 // num_clusters)):
        gaps = (polar(lifted[rows]) @ means.T).clamp(min=0)
        own = clusters[rows][:, None]
        others = counts[own] - 1
        within = gaps.gather(1, own) * counts[own] / others.clamp(min=1)
        nearest = gaps.scatter(1, own, torch.inf).min(1, keepdim=True).values
        score = (nearest - within) / torch.maximum(nearest, within).clamp(min=torch.finfo(torch.float64).tiny)
        scores.append(score.where(others > 0, 0))
    return float(torch.cat(scores).mean())
