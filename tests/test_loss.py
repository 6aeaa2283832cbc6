import itertools
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from ranks import run_ranks
from torch import nn

from uhml import distributed, poincare
from uhml import loss as loss_module
from uhml.config import LossConfig
from uhml.loss import (
    DISTANCE_FLOOR,
    Batch,
    HierarchicalLogRatioLoss,
    HierarchicalLoss,
    ViewContrast,
    global_loss,
    similarity_levels,
)

omegas = st.floats(0.05, 0.95)
seeds = st.integers(0, 2**32 - 1)


def naive(distances, similarity, is_self, omega):
    """The article's formula, triplet by triplet: the sum over anchors of the mean over triplets, and the anchors."""
    total, anchors = 0.0, 0
    for i in range(len(distances)):
        costs = [
            (math.log(distances[i][j] / distances[i][k]) - (similarity[i][j] - similarity[i][k]) * math.log(omega)) ** 2
            for j, k in itertools.permutations(range(len(distances[i])), 2)
            if not is_self[i][j] and not is_self[i][k] and similarity[i][j] != similarity[i][k]
        ]
        if costs:
            total += sum(costs) / len(costs)
            anchors += 1
    return total, anchors


def batch(num_anchors, num_others, num_levels, seed):
    """Random distances and levels, of which the anchors are the first embeddings."""
    random = np.random.default_rng(seed)
    distances = torch.from_numpy(random.uniform(0.01, 4, (num_anchors, num_anchors + num_others)))
    similarity = torch.from_numpy(random.integers(0, num_levels + 1, distances.shape))
    return distances, similarity, torch.eye(*distances.shape, dtype=torch.bool)


def tree_levels(n, random, num_cuts):
    """Nested clusters, ``[num_cuts, n]``, finest first, with arbitrary names."""
    levels = [random.integers(0, max(1, n // 2), n)]
    for _ in range(num_cuts - 1):
        levels.append(random.integers(0, max(1, levels[-1].max()), levels[-1].max() + 1)[levels[-1]])
    return torch.from_numpy(np.stack(levels).astype(np.int32))


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 6), st.integers(1, 6), st.integers(0, 4), omegas, seeds)
def test_equals_the_loop_over_triplets(num_anchors, num_others, num_levels, omega, seed):
    distances, similarity, is_self = batch(num_anchors, num_others, num_levels, seed)
    total, anchors = HierarchicalLogRatioLoss(omega, num_levels)(distances, similarity, is_self)
    expected_total, expected_anchors = naive(distances.tolist(), similarity.tolist(), is_self.tolist(), omega)
    assert total.dtype == torch.float64
    assert float(total) == pytest.approx(expected_total, rel=1e-10, abs=1e-12)
    assert int(anchors) == expected_anchors


def test_equals_the_loop_over_triplets_in_float32():
    # Distances far from 1 with a small spread: what cancels if the logarithms are not centred.
    distances, similarity, is_self = batch(8, 24, 3, 0)
    distances = 1000 + distances
    expected, _ = naive(distances.tolist(), similarity.tolist(), is_self.tolist(), 0.99)
    total, _ = HierarchicalLogRatioLoss(0.99, 3)(distances.float(), similarity, is_self)
    assert float(total) == pytest.approx(expected, rel=2e-3)


@settings(max_examples=40, deadline=None)
@given(st.integers(3, 12), st.integers(1, 4), omegas, st.floats(0.1, 10), seeds)
def test_least_where_distances_are_proportional_to_omega_to_the_level(n, num_cuts, omega, unit, seed):
    random = np.random.default_rng(seed)
    levels, pictures = tree_levels(n, random, num_cuts), torch.arange(n)
    similarity = similarity_levels(levels, pictures, pictures)
    loss = HierarchicalLogRatioLoss(omega, num_cuts + 1)
    distances = (unit * omega ** similarity.double()).clamp_min(2 * DISTANCE_FLOOR)
    reached = unit * omega**num_cuts > 2 * DISTANCE_FLOOR
    eye = torch.eye(n, dtype=torch.bool)
    total, anchors = loss(distances, similarity, eye)
    if reached:
        assert abs(float(total)) < 1e-12
    if anchors:
        # And only there.
        distances[:, 0] *= 1.5
        expected, _ = naive(distances.tolist(), similarity.tolist(), eye.tolist(), omega)
        assert float(loss(distances, similarity, eye)[0]) == pytest.approx(expected, rel=1e-9, abs=1e-12)
        assert expected > 0.01


@pytest.mark.parametrize("omega", [0.3, 0.8])
def test_pulls_nearer_what_shares_more_levels(omega):
    # One anchor, one picture of its cluster, one of another, all at the same distance.
    distances = torch.tensor([[0.0, 1.0, 1.0]], dtype=torch.float64, requires_grad=True)
    similarity, is_self = torch.tensor([[2, 1, 0]]), torch.tensor([[True, False, False]])
    HierarchicalLogRatioLoss(omega, 2)(distances, similarity, is_self)[0].backward()
    assert distances.grad[0, 1] > 0 > distances.grad[0, 2]
    assert distances.grad[0, 0] == 0


def test_gradient_of_the_loss():
    distances, similarity, is_self = batch(4, 5, 3, 1)
    loss = HierarchicalLogRatioLoss(0.7, 3)
    assert torch.autograd.gradcheck(lambda d: loss(d, similarity, is_self)[0], distances.requires_grad_())


@pytest.mark.parametrize("curvature", [0.0, 0.1])
def test_duplicates_have_a_finite_loss_and_gradient(curvature):
    points = torch.tensor([[0.1, 0.2], [0.1, 0.2], [0.1, 0.2], [0.5, 0.0]], requires_grad=True)
    distances = poincare.distance_matrix(points, points, curvature)
    pictures = torch.tensor([0, 0, 1, 2])
    similarity = similarity_levels(torch.tensor([[0, 0, 1]]), pictures, pictures)
    total, anchors = HierarchicalLogRatioLoss(0.8, 2)(distances, similarity, torch.eye(4, dtype=torch.bool))
    total.backward()
    assert anchors == 3  # the last picture has all others on one level
    assert math.isfinite(total.detach())
    assert torch.isfinite(points.grad).all()
    assert points.grad[3].norm() > 0
    floored = distances.detach().double().clamp_min(DISTANCE_FLOOR)
    expected, _ = naive(floored.tolist(), similarity.tolist(), torch.eye(4).bool().tolist(), 0.8)
    assert float(total.detach()) == pytest.approx(expected, rel=1e-5)


def test_a_distance_of_0_counts_as_a_thousandth():
    similarity, is_self = torch.tensor([[2, 1, 0]]), torch.tensor([[True, False, False]])
    duplicate, near, less_near = (
        float(HierarchicalLogRatioLoss(0.8, 2)(torch.tensor([[0.0, d, 1.0]]), similarity, is_self)[0])
        for d in (0.0, 1e-3, 2e-3)
    )
    assert duplicate == near > less_near


@pytest.mark.parametrize("level", [0, 2])
def test_anchors_without_triplets_cost_nothing(level):
    distances = torch.rand(3, 3, dtype=torch.float64) + 0.1
    distances.requires_grad_()
    similarity = torch.full((3, 3), level) + torch.eye(3, dtype=torch.int64) * (3 - level)
    total, anchors = HierarchicalLogRatioLoss(0.8, 3)(distances, similarity, torch.eye(3, dtype=torch.bool))
    total.backward()
    assert (float(total.detach()), int(anchors)) == (0, 0)
    assert (distances.grad == 0).all()


@pytest.mark.parametrize("omega", [-0.5, 0.0, 1.0, 1.25, math.inf, math.nan])
def test_omega_outside_0_to_1_is_refused(omega):
    with pytest.raises(ValueError, match="omega must lie between 0 and 1"):
        HierarchicalLogRatioLoss(omega, 3)


@settings(max_examples=40, deadline=None)
@given(st.integers(2, 10), st.integers(1, 4), st.integers(1, 8), st.integers(1, 8), seeds)
def test_similarity_counts_the_cuts_that_two_pictures_share(n, num_cuts, a, b, seed):
    random = np.random.default_rng(seed)
    levels = tree_levels(n, random, num_cuts)
    anchors, pictures = (torch.from_numpy(random.integers(0, n, k)) for k in (a, b))
    found = similarity_levels(levels, anchors, pictures)
    for row, i in enumerate(anchors.tolist()):
        for column, j in enumerate(pictures.tolist()):
            shared = sum(int(level[i]) == int(level[j]) for level in levels)
            # Two views of one picture: one level more than its nearest relatives.
            assert int(found[row, column]) == (num_cuts + 1 if i == j else shared)


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 3))

    def forward(self, x):
        return poincare.ball(0.5).expmap0(self.layers(x))


B, CUTS, CURVATURE = 16, 3, 0.5


def _problem():
    random = np.random.default_rng(4)
    torch.manual_seed(4)
    levels = tree_levels(12, random, CUTS)
    pictures = torch.from_numpy(np.repeat(random.permutation(12)[: B // 2], 2))
    images = torch.randn(B, 6, dtype=torch.float64)
    images[5] = images[4]  # two views that look the same
    return Net().double(), images, pictures, levels, HierarchicalLogRatioLoss(0.8, CUTS + 1)


def _gradients_over_ranks(pairs_at_once):
    """The recipe of the trainer: the loss of the whole batch, back through the points that this rank brought."""
    loss_module.PAIRS_AT_ONCE = pairs_at_once
    model, images, pictures, levels, loss_function = _problem()
    b = B // distributed.world_size()
    own = slice(distributed.rank() * b, (distributed.rank() + 1) * b)
    parallel = distributed.data_parallel(model)
    points = parallel(images[own])
    batch = Batch.over_ranks(points, pictures[own])
    found = global_loss(loss_function, batch, levels, CURVATURE)
    points.backward(distributed.world_size() * found.gradient)
    return float(found.loss), float(found.own), [p.grad for p in model.parameters()]


@pytest.mark.ddp
@pytest.mark.parametrize(("world_size", "pairs_at_once"), [(1, 2**20), (1, 5 * B), (2, 2**20), (2, 3), (4, 2**20)])
def test_value_and_gradient_over_ranks_and_blocks_are_those_of_one_matrix(world_size, pairs_at_once):
    model, images, pictures, levels, loss_function = _problem()
    points = model(images)
    distances = poincare.distance_matrix(points, points, CURVATURE)
    similarity = similarity_levels(levels, pictures, pictures)
    total, anchors = loss_function(distances, similarity, torch.eye(B, dtype=torch.bool))
    loss = total / anchors
    loss.backward()
    expected = [p.grad for p in model.parameters()]
    assert all(gradient.abs().max() > 1e-3 for gradient in expected)
    found = run_ranks(_gradients_over_ranks, world_size, pairs_at_once)
    assert sum(own for _, own, _ in found) == pytest.approx(loss.item(), rel=1e-12)
    for found_loss, _, gradients in found:
        assert found_loss == pytest.approx(loss.item(), rel=1e-12)
        for a, b in zip(gradients, expected, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_numbers_of_pictures_travel_exactly_with_their_points(dtype):
    points, numbers = torch.rand(4, 3, dtype=dtype), torch.tensor([0, 2**24 + 1, 2**30 + 7, 2**31 - 1])
    batch = Batch.over_ranks(points, numbers)
    assert torch.equal(batch.indices, numbers)
    assert torch.equal(batch.points, points)


def test_blocks_are_each_row_once_and_no_larger_than_asked(monkeypatch):
    for pairs_at_once, size in ((1, 1), (16, 1), (47, 2), (80, 5), (10**6, 6)):
        monkeypatch.setattr(loss_module, "PAIRS_AT_ONCE", pairs_at_once)
        blocks = list(Batch(torch.zeros(16, 2), torch.zeros(16), range(6, 12)).blocks())
        assert [row for rows in blocks for row in rows] == list(range(6, 12))
        assert max(map(len, blocks)) == size


@settings(max_examples=40, deadline=None)
@given(st.integers(2, 8), st.floats(0.5, 20), seeds)
def test_contrast_of_views_is_cross_entropy_against_pictures_of_other_finest_clusters(num_pictures, sharpness, seed):
    random = np.random.default_rng(seed)
    pictures = torch.from_numpy(random.permutation(np.repeat(np.arange(num_pictures), 2)))
    distances = torch.from_numpy(random.uniform(0.01, 4, (len(pictures), len(pictures))))
    similarity = similarity_levels(tree_levels(num_pictures, random, 2), pictures, pictures)
    expected = 0.0
    for i, picture in enumerate(pictures):
        (view,) = [j for j in range(len(pictures)) if j != i and pictures[j] == picture]
        others = [j for j, level in enumerate(similarity[i]) if level < 2]
        logits = -sharpness * torch.stack([distances[i, view], *distances[i][others]]).log()
        expected += float(nn.functional.cross_entropy(logits[None], torch.tensor([0])))
    found = ViewContrast(sharpness, 3)(distances, similarity, torch.eye(len(pictures), dtype=torch.bool))
    assert float(found) == pytest.approx(expected, rel=1e-9)


def test_contrast_is_the_mean_over_a_pictures_other_views():
    # Three views of the anchor's picture, itself the first, and one other picture.
    distances, similarity = torch.tensor([[0.0, 1.0, 2.0, 4.0]]), torch.tensor([[2, 2, 2, 0]])
    found = ViewContrast(1.0, 2)(distances, similarity, torch.tensor([[True, False, False, False]]))
    assert float(found) == pytest.approx((math.log(1 + 1 / 4) + math.log(1 + 2 / 4)) / 2)


def test_contrast_is_nothing_where_a_picture_has_one_view():
    distances, _, is_self = batch(4, 0, 3, 0)
    found = ViewContrast(10.0, 3)(distances.requires_grad_(), 3 * is_self.long(), is_self)
    found.backward()
    assert float(found.detach()) == 0
    assert not distances.grad.any()


def test_contrast_has_a_finite_gradient_where_a_picture_is_compared_with_itself():
    """As in every real batch, whose own distances are 0."""
    points = (0.1 * torch.randn(4, 3, generator=torch.Generator().manual_seed(0))).requires_grad_()
    picture, place = torch.tensor([0, 0, 1, 1]), torch.eye(4, dtype=torch.bool)
    distances = poincare.distance_matrix(points, points, 0.1)
    ViewContrast(10.0, 2)(distances, 2 * (picture[:, None] == picture).long(), place).backward()
    assert points.grad.isfinite().all()
    assert points.grad.any()


def test_a_batch_all_on_one_level_costs_nothing():
    points = 0.1 * torch.randn(4, 3, generator=torch.Generator().manual_seed(0))
    one_level = Batch(points, torch.arange(4), range(4))
    found = global_loss(HierarchicalLogRatioLoss(0.8, 1), one_level, torch.zeros(1, 4, dtype=torch.int32), 0.1)
    assert float(found.loss) == float(found.own) == 0
    assert torch.equal(found.gradient, torch.zeros(4, 3))


def test_the_loss_is_the_log_ratio_loss_and_so_much_contrast():
    distances, _, is_self = batch(6, 0, 3, 0)
    picture = torch.tensor([0, 0, 1, 1, 2, 2])
    similarity = 4 * (picture[:, None] == picture).long()
    options = LossConfig(omega=0.7, view_weight=0.4, view_sharpness=6.0)
    log_ratio, anchors = HierarchicalLogRatioLoss(0.7, 4)(distances, similarity, is_self)
    contrast = ViewContrast(6.0, 4)(distances, similarity, is_self)
    total, count = HierarchicalLoss(options, num_cuts=3, num_views=2)(distances, similarity, is_self)
    assert float(total) == pytest.approx(float(log_ratio + 0.4 * contrast))
    assert count == anchors
    without, _ = HierarchicalLoss(options, num_cuts=4, num_views=1)(distances, similarity, is_self)
    assert float(without) == pytest.approx(float(log_ratio))
