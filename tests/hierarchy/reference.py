"""What the engine is held against: slow and obvious."""

import itertools

import numpy as np
import scipy.cluster.hierarchy
import torch
from scipy.spatial.distance import squareform

CURVATURE = 0.3


def ball(seed, n, d=5, largest=0.95, curvature=CURVATURE):
    """n float64 points of the ball, up to a share of its radius."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(n, d, generator=generator, dtype=torch.float64)
    radius = largest * torch.rand(n, 1, generator=generator, dtype=torch.float64) / curvature**0.5
    return x / x.norm(dim=1, keepdim=True) * radius


def mixture(seed, n, d=16, classes=10, spread=0.3, dtype=torch.float32):
    """n points of a mixture of Gaussians, scaled to lie well within the ball, and their classes."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(classes, (n,), generator=generator)
    x = torch.randn(classes, d, generator=generator)[labels] + spread * torch.randn(n, d, generator=generator)
    return (x / d**0.5 / 2).to(dtype), labels


def cosh_of_distance(x, curvature=CURVATURE):
    """cosh(sqrt(c) d), [n, n], by the textbook's lift to the hyperboloid."""
    r = curvature * x.square().sum(1)
    x0, xs = (1 + r) / (1 - r), 2 * curvature**0.5 * x / (1 - r)[:, None]
    return (x0[:, None] * x0 - xs @ xs.T).clamp(min=1)


def distances(x, geometry, curvature=CURVATURE):
    """The distance of each geometry, [n, n] float64."""
    if geometry == "cosine":
        unit = x / x.norm(dim=1, keepdim=True)
        d = 1 - unit @ unit.T
    elif geometry == "euclidean":
        d = torch.cdist(x, x, compute_mode="donot_use_mm_for_euclid_dist")
    else:
        d = cosh_of_distance(x, curvature).arccosh() / curvature**0.5
    return d.fill_diagonal_(0)


def dissimilarities(x, geometry, curvature=CURVATURE):
    """What mode "exact" averages, [n, n] float64."""
    if geometry == "cosine":
        return distances(x, geometry)
    return distances(x, geometry) ** 2 if geometry == "euclidean" else cosh_of_distance(x, curvature).fill_diagonal_(0)


def scipy_tree(matrix):
    """scipy's average linkage of a full matrix."""
    return scipy.cluster.hierarchy.linkage(squareform(((matrix + matrix.T) / 2).numpy(), checks=False), "average")


def capped(matrix, neighbors):
    """The matrix in which every pair that is no edge of the graph has the greatest distance seen, and that distance."""
    n = len(matrix)
    seen = torch.zeros(n, n, dtype=torch.bool)
    seen[torch.arange(n)[:, None], neighbors.long()] = True
    seen |= seen.T.clone()
    seen.fill_diagonal_(False)
    far = float(matrix[seen].max())
    return torch.where(seen, matrix, far).fill_diagonal_(0), far


def brute_neighbors(matrix, k):
    """The k nearest others, by distance and then by number."""
    matrix = matrix.clone().fill_diagonal_(torch.inf)
    return matrix.sort(dim=1, stable=True).indices[:, :k]


def assert_same_tree(ours, theirs, rtol=0, atol=1e-12):
    """Heights agree, and so do the partitions at every cut that does not split a tie."""
    np.testing.assert_allclose(ours[:, 2], theirs[:, 2], rtol=rtol, atol=atol)
    n = len(ours) + 1
    for count in range(1, n):
        t = n - count
        if t < n - 1 and theirs[t, 2] - theirs[t - 1, 2] <= 2 * atol + rtol * theirs[t, 2]:
            continue
        a, b = partition(ours, t), partition(theirs, t)
        assert np.array_equal(a, b), f"partitions into {count} differ"


def partition(linkage, num_merges):
    """The clusters after some merges, each named by its smallest point."""
    n = len(linkage) + 1
    members = {i: [i] for i in range(n)}
    for t in range(num_merges):
        members[n + t] = members.pop(int(linkage[t, 0])) + members.pop(int(linkage[t, 1]))
    names = np.empty(n, int)
    for points in members.values():
        names[points] = min(points)
    return names


def assert_valid(tree, n):
    """The invariants of any dendrogram: n - 1 merges, ids used once, sizes that add up, heights that never fall."""
    linkage = tree.to_scipy()
    assert linkage.shape == (n - 1, 4)
    assert linkage.dtype == np.float64
    assert np.isfinite(linkage).all()
    children = linkage[:, :2].astype(int)
    assert sorted(children.flatten()) == list(range(2 * n - 2))
    assert (children[:, 0] < children[:, 1]).all()
    assert (children[:, 1] < n + np.arange(n - 1)).all()
    sizes = np.concatenate([np.ones(n), linkage[:, 3]])
    assert np.array_equal(sizes[children].sum(1), linkage[:, 3])
    assert (np.diff(linkage[:, 2]) >= 0).all()
    levels = tree.cut(counts=[max(1, n // 2), 3, 1])
    assert levels.dtype == torch.int32
    for finer, coarser in itertools.pairwise(levels):
        assert len(set(zip(finer.tolist(), coarser.tolist(), strict=True))) == len(finer.unique())
