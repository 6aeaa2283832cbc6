import itertools
import math

import numpy as np
import pytest
import torch

from uhml.explorer.drawing import AREA, draw, places
from uhml.explorer.levels import level_counts, shown_levels
from uhml.hierarchy import average_linkage
from uhml.hierarchy.geometry import Geometry


@pytest.fixture(scope="module")
def drawn():
    """700 points of the ball around 40 centres, their tree and its drawing."""
    random = np.random.default_rng(0)
    centers = random.normal(size=(40, 8))
    x = centers[random.integers(0, 40, 700)] + 0.3 * random.normal(size=(700, 8))
    points = torch.from_numpy(x / np.linalg.norm(x, axis=1, keepdims=True) * random.uniform(0.5, 2.5, (700, 1)))
    tree = average_linkage(points, curvature=0.1)
    return tree, draw(tree, points, Geometry("poincare", 0.1))


def test_every_cluster_is_a_sector(drawn):
    tree, drawing = drawn
    place = np.empty(700, int)
    place[drawing.order] = np.arange(700)
    for level in tree.cut(counts=[300, 100, 30, 10, 3]).numpy():
        for cluster in range(level.max() + 1):
            members = np.flatnonzero(level == cluster)
            start, end = place[members].min(), place[members].max() + 1
            assert end - start == len(members)
            # But the one that may stand for a greater cluster, in whose middle it lies then.
            outside = (700 * drawing.turn[members] < start) | (700 * drawing.turn[members] > end)
            assert outside.sum() <= 1


def test_the_disk_is_filled_evenly_from_the_centre(drawn):
    _, drawing = drawn
    assert sorted(drawing.rank) == list(range(700))
    disk = places(drawing.turn, drawing.rank).astype(float)
    radius = 2 * np.arctanh(np.linalg.norm(disk, axis=1))
    assert radius.min() == 0
    assert np.linalg.norm(disk, axis=1).max() < 1
    np.testing.assert_allclose(np.argsort(radius), np.argsort(drawing.rank))
    # A hyperbolic disk has the area 2 pi (cosh r - 1).
    np.testing.assert_allclose(2 * math.pi * (np.cosh(np.sort(radius)) - 1), AREA * np.arange(700), rtol=1e-3)


def test_near_the_centre_is_who_stands_for_many(drawn):
    tree, drawing = drawn
    # Each of the ten greatest clusters has one of the pictures nearest to the centre.
    level = tree.cut(counts=[10])[0].numpy()
    assert len(set(level[np.argsort(drawing.rank)[:40]])) == 10
    sizes = np.ones(700, int)
    for merge, picture in enumerate(drawing.standing):
        sizes[picture] = tree.to_scipy()[merge, 3]
    assert (np.diff(sizes[np.argsort(drawing.rank)]) <= 0).all()


def test_like_lies_beside_like(drawn):
    """On a line, the only order that follows it is the right one."""
    line = torch.linspace(-2, 2, 300, dtype=torch.float64)[:, None] * torch.ones(1, 2)
    tree = average_linkage(line, geometry="euclidean", num_neighbors=5)
    order = draw(tree, line, Geometry("euclidean")).order
    assert np.abs(np.diff(order)).mean() < 2


@pytest.mark.parametrize(
    ("n", "counts"),
    [
        (10, [2]),
        (20, [4]),
        (60, [10]),
        (160, [10, 30]),
        (2_476, [10, 70, 500]),
        (32_460, [10, 90, 700, 6_000]),
        (60_000, [10, 60, 300, 2_000, 10_000]),
    ],
)
def test_counts_rise_evenly_from_ten_to_handfuls(n, counts):
    assert level_counts(n) == counts


@pytest.mark.parametrize("n", [10, 11, 49, 50, 51, 133, 500, 5_000, 20_000, 60_000, 1_000_000])
def test_counts_are_rising_and_fit(n):
    counts = level_counts(n)
    assert counts == sorted(set(counts))
    assert 2 <= counts[0] <= 10
    assert n / 7 <= counts[-1] <= n / 4 or n < 133
    assert all(2.5 < fine / coarse < 20 for coarse, fine in itertools.pairwise(counts))


def test_clusters_are_numbered_by_what_is_shown(drawn):
    tree, drawing = drawn
    shown = drawing.order[::3]
    levels = shown_levels(tree, [5, 50], shown)
    assert levels.shape == (2, len(shown))
    for level in levels:
        assert (np.diff(np.bincount(level)) <= 0).all()
    assert levels[0].max() < levels[1].max()
