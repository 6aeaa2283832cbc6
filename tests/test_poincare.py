import math

import geoopt
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from uhml.poincare import ball, distance_matrix, tangent_norm

curvatures = st.floats(1e-3, 5.0)
seeds = st.integers(0, 2**32 - 1)


def exact_ball(curvature):
    # A curvature in float64: geoopt keeps a plain number in float32.
    return geoopt.PoincareBall(c=torch.tensor(curvature, dtype=torch.float64))


def points_of_ball(number, dim, curvature, seed, least=0.0, greatest=0.95):
    """Points at ``least`` to ``greatest`` of the ball's radius, float64."""
    generator = torch.Generator().manual_seed(seed)
    direction = torch.nn.functional.normalize(torch.randn(number, dim, generator=generator, dtype=torch.float64))
    radius = least + (greatest - least) * torch.rand(number, 1, generator=generator, dtype=torch.float64)
    return direction * radius / math.sqrt(curvature)


@settings(max_examples=50, deadline=None)
@given(curvatures, seeds, st.integers(1, 6), st.integers(1, 6), st.integers(1, 8))
def test_distance_is_geoopts(curvature, seed, n, m, dim):
    points = points_of_ball(n + m, dim, curvature, seed)
    x, y = points[:n], points[n:]
    expected = exact_ball(curvature).dist(x[:, None], y[None])
    torch.testing.assert_close(distance_matrix(x, y, curvature), expected, rtol=1e-8, atol=1e-8)


@settings(max_examples=25, deadline=None)
@given(curvatures, seeds)
def test_distance_near_the_edge(curvature, seed):
    # geoopt cuts its artanh off here and is 8 % short, in float64; the formula by arcosh is exact for far points.
    x = points_of_ball(8, 4, curvature, seed, least=0.999, greatest=0.99999)
    room = 1 - curvature * x.square().sum(1)
    gap = (x[:, None] - x[None]).square().sum(2) / (room[:, None] * room[None])
    expected = torch.acosh(1 + 2 * curvature * gap) / math.sqrt(curvature)
    far = ~torch.eye(8, dtype=torch.bool)
    torch.testing.assert_close(distance_matrix(x, x, curvature)[far], expected[far], rtol=1e-9, atol=0)


@pytest.mark.parametrize("curvature", [1e-6, 1e-9, 0.0])
def test_without_curvature_the_distance_is_twice_the_euclidean_one(curvature):
    x, y = torch.randn(2, 5, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    expected = 2 * (x[:, None] - y[None]).norm(dim=-1)
    torch.testing.assert_close(distance_matrix(x, y, curvature), expected, rtol=10 * curvature + 1e-14, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("curvature", [0.0, 0.1, 1.0])
def test_distance_is_a_metric(curvature, dtype):
    x = points_of_ball(12, 5, max(curvature, 0.1), 3).to(dtype)
    d = distance_matrix(x, x, curvature)
    assert torch.equal(d, d.T)
    assert (d.diagonal() == 0).all()
    assert (d[:, :, None] <= d[:, None, :] + d.T[None, :, :] + 1e-4).all()


def test_in_float32_close_points_keep_digits_that_geoopts_form_loses():
    curvature, generator = 0.1, torch.Generator().manual_seed(0)
    x = points_of_ball(200, 16, curvature, 1, least=0.55, greatest=0.63)
    y = x + 1e-3 * torch.randn(x.shape, generator=generator, dtype=torch.float64)
    x, y = x.float(), y.float()
    exact = distance_matrix(x.double(), y.double(), curvature).diagonal()
    ours = distance_matrix(x, y, curvature).diagonal().double()
    theirs = geoopt.PoincareBall(c=curvature).dist(x, y).double()

    def worst(found):
        return float(((found - exact) / exact).abs().max())

    assert worst(ours) < 1e-5
    assert worst(theirs) > 3 * worst(ours)


@pytest.mark.parametrize("curvature", [0.0, 0.1, 1.0])
def test_gradient_is_finite_and_zero_where_points_coincide(curvature):
    x = points_of_ball(4, 3, max(curvature, 0.1), 0).float()
    x[3] = 0
    x = x.requires_grad_()
    twice = torch.cat([x, x.detach()])
    distances = distance_matrix(x, twice, curvature)
    distances.sum().backward()
    assert torch.isfinite(x.grad).all()
    x.grad = None
    same = distance_matrix(x, x, curvature).diagonal() + distance_matrix(x, x.detach(), curvature).diagonal()
    same.sum().backward()
    assert (x.grad == 0).all()


@pytest.mark.parametrize("curvature", [0.0, 0.1, 1.0])
def test_gradient_of_the_distance(curvature):
    points = points_of_ball(5, 3, max(curvature, 0.1), 7)
    x, y = points[:2].requires_grad_(), points[2:].requires_grad_()
    assert torch.autograd.gradcheck(lambda a, b: distance_matrix(a, b, curvature), (x, y))


def test_gradient_in_float32_of_close_points():
    # As close as the loss still tells points apart, and as far out as the clip lets them.
    x = points_of_ball(50, 16, 0.1, 1, least=0.6, greatest=0.62)
    direction = torch.nn.functional.normalize(torch.randn(x.shape, generator=torch.Generator().manual_seed(0)).double())
    y = (x + 1e-3 * direction).float()
    x = x.float()

    def gradient(x):
        x = x.clone().requires_grad_()
        distance_matrix(x, y.to(x.dtype), 0.1).diagonal().log().sum().backward()
        return x.grad

    exact = gradient(x.double())
    assert ((gradient(x) - exact).norm(dim=1) / exact.norm(dim=1)).max() < 1e-3


@settings(max_examples=30, deadline=None)
@given(st.sampled_from([0.0, 1e-3, 0.1, 1.0, 4.0]), seeds)
def test_tangent_norm_inverts_the_exponential_map(curvature, seed):
    generator = torch.Generator().manual_seed(seed)
    tangent = torch.randn(6, 4, generator=generator, dtype=torch.float64)
    if curvature:
        # Shorter than what float64 can tell from the edge.
        tangent = (
            tangent
            / tangent.norm(dim=1, keepdim=True)
            * torch.linspace(0, 4, 6).double()[:, None]
            / math.sqrt(curvature)
        )
    points = exact_ball(curvature).expmap0(tangent)
    found = tangent_norm(points, curvature)
    torch.testing.assert_close(found, tangent.norm(dim=1), rtol=1e-6, atol=1e-12)
    origin = torch.zeros(1, 4, dtype=torch.float64)
    torch.testing.assert_close(found, distance_matrix(points, origin, curvature)[:, 0] / 2, rtol=1e-6, atol=1e-12)


@pytest.mark.parametrize("curvature", [0.01, 0.1, 1.0, 10.0])
def test_tangent_norm_is_finite_at_the_edge(curvature):
    edge = torch.full((1, 1), 1 / math.sqrt(curvature))
    assert torch.isfinite(tangent_norm(edge, curvature)).all()


@pytest.mark.parametrize("curvature", [1e-6, 1e-4, 0.1, 1.0, 80.0])
def test_the_ball_is_geoopts_of_that_curvature(curvature):
    assert isinstance(ball(curvature), geoopt.PoincareBall)
    assert float(ball(curvature).c) == pytest.approx(curvature, rel=1e-5)
    tangent = torch.tensor([[0.3, 0.4]], dtype=torch.float64)
    expected = math.tanh(math.sqrt(curvature) * 0.5) / math.sqrt(curvature) * torch.tensor([[0.6, 0.8]]).double()
    torch.testing.assert_close(ball(curvature).expmap0(tangent), expected, rtol=1e-6, atol=0)


def test_the_flat_ball_has_the_identity_for_an_exponential_map():
    tangent = torch.tensor([[3.0, 4.0], [0.0, 0.0]])
    assert torch.equal(ball(0.0).expmap0(tangent), tangent)


@pytest.mark.parametrize("curvature", [1e-4, 0.1, 1.0, 80.0])
def test_the_greatest_length_that_the_config_allows_is_kept_in_float32(curvature):
    length = 0.999 * math.atanh(0.996) / math.sqrt(curvature)
    points = ball(curvature).expmap0(torch.tensor([[length, 0.0], [0.0, -length]]))
    torch.testing.assert_close(tangent_norm(points, curvature), torch.full((2,), length), rtol=1e-4, atol=0)
