"""The guards ring where an embedding has collapsed, and only there."""

import numpy as np
import pytest
import torch

from uhml import poincare
from uhml.config import ModelConfig
from uhml.reporting.guards import GUARDS, watch

CONFIG = ModelConfig(embedding_dim=16)


def points_of(tangent):
    return poincare.ball(CONFIG.curvature).expmap0(tangent)


def healthy(n=400):
    return 1.5 * torch.randn(n, 16, generator=torch.Generator().manual_seed(0)) / 4


def even_levels(n=400):
    return torch.stack([torch.arange(n) % 40, torch.arange(n) % 4])


def rings(points, levels):
    found = watch(points, levels, CONFIG)
    assert tuple(guard.name for guard in found) == GUARDS
    return {guard.name for guard in found if guard.rings}


def test_a_healthy_embedding_rings_nothing():
    assert rings(points_of(healthy()), even_levels()) == set()


def test_points_on_a_line():
    line = healthy()[:, :1] * torch.ones(1, 16) / 4
    assert rings(points_of(line), even_levels()) == {"effective_rank"}


def test_points_that_are_equally_far_out():
    sphere = healthy()
    assert rings(points_of(2 * sphere / sphere.norm(dim=1, keepdim=True)), even_levels()) == {"radius_spread"}


def test_one_cluster_that_holds_most():
    levels = even_levels()
    levels[1, :250] = 0
    assert rings(points_of(healthy()), levels) == {"largest_cluster"}


def test_figures_are_those_of_numpy():
    points = points_of(healthy())
    found = {guard.name: guard.value for guard in watch(points, even_levels(), CONFIG)}
    singular = np.linalg.svd((points - points.mean(0)).double().numpy(), compute_uv=False)
    shares = singular / singular.sum()
    assert found["effective_rank"] == pytest.approx(np.exp(-(shares * np.log(shares)).sum()), rel=1e-5)
    radii = np.sort(healthy().norm(dim=1).numpy()) / CONFIG.clip_radius
    assert found["radius_spread"] == pytest.approx(radii[-21] - radii[20], rel=1e-4)
    assert found["largest_cluster"] == 0.25
