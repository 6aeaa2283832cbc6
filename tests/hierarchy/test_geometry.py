import geoopt
import pytest
import torch
from reference import CURVATURE, ball, cosh_of_distance, distances

from uhml.errors import UserError
from uhml.hierarchy.geometry import EDGE, GEOMETRIES, Geometry, polar


@pytest.mark.parametrize("geometry", GEOMETRIES)
def test_distance_of_gap(geometry):
    space = Geometry(geometry, CURVATURE)
    x = space.points(ball(0, 50))
    w = space.weights(x)
    ours = space.distance(space.gap(x[:, None], x[None], w[:, None], w[None]))
    torch.testing.assert_close(ours, distances(x, geometry), atol=1e-7, rtol=1e-9)  # the reference cancels


def test_hyperbolic_distance_is_geoopts():
    x = ball(1, 60)
    space = Geometry("poincare", CURVATURE)
    w = space.weights(x)
    theirs = geoopt.PoincareBall(torch.tensor(CURVATURE, dtype=torch.float64)).dist(x[:30], x[30:])
    torch.testing.assert_close(space.distance(space.gap(x[:30], x[30:], w[:30], w[30:])), theirs, atol=1e-9, rtol=1e-9)


def test_curvature_zero_is_the_limit():
    x = ball(2, 20, curvature=1.0)
    flat, nearly = Geometry("poincare", 0.0), Geometry("poincare", 1e-9)
    gap = flat.gap(x[:10], x[10:], flat.weights(x[:10]), flat.weights(x[10:]))
    torch.testing.assert_close(flat.distance(gap), 2 * (x[:10] - x[10:]).norm(dim=1))
    torch.testing.assert_close(flat.distance(gap), nearly.distance(gap), rtol=1e-6, atol=0)


@pytest.mark.parametrize("geometry", GEOMETRIES)
def test_products_of_lifts_are_gaps(geometry):
    space = Geometry(geometry, CURVATURE)
    x = space.points(ball(3, 40))
    w = space.weights(x)
    gaps = space.gap(x[:, None], x[None], w[:, None], w[None])
    lifted = space.lift(x)
    torch.testing.assert_close(polar(lifted) @ lifted.T, gaps, atol=1e-10, rtol=0)
    if geometry == "poincare":
        torch.testing.assert_close(space.mean_dissimilarity(gaps), cosh_of_distance(x), atol=1e-10, rtol=1e-10)


def test_points_on_the_edge_are_pulled_back():
    x = torch.eye(3) / CURVATURE**0.5
    points = Geometry("poincare", CURVATURE).points(x)
    assert (CURVATURE * points.double().square().sum(1) <= (1 - EDGE) ** 2 + 1e-6).all()
    with pytest.raises(UserError, match="outside the ball"):
        Geometry("poincare", CURVATURE).points(1.01 * x)


@pytest.mark.parametrize(
    ("embeddings", "geometry", "message"),
    [
        (torch.tensor([[0.1, 0], [0, torch.nan]]), "poincare", "Row 1 .* NaN"),
        (torch.tensor([[0.1, 0], [torch.inf, 0]]), "cosine", "Row 1 .* infinity"),
        (torch.tensor([[0.1, 0], [torch.inf, -torch.inf]]), "euclidean", "Row 1 .* infinity"),
        (torch.tensor([[0.0, 0], [0, 0.1]]), "cosine", "Row 0 .* zero"),
        (torch.tensor([[0.1, 0], [0, 9.0]]), "poincare", "Row 1 .* outside the ball"),
        (torch.zeros(3), "euclidean", "matrix of floats"),
        (torch.zeros(3, 0), "euclidean", "matrix of floats"),
        (torch.zeros(3, 2, dtype=torch.int32), "euclidean", "matrix of floats"),
    ],
)
def test_what_is_refused(embeddings, geometry, message):
    with pytest.raises(UserError, match=message):
        Geometry(geometry).points(embeddings)


def test_large_finite_rows_are_no_infinity():
    x = torch.full((2, 4), 3e38)
    assert torch.equal(Geometry("cosine").points(x), torch.full((2, 4), 0.5))


def test_rows_of_any_length_have_unit_cosine_points():
    x = torch.randn(50, 4, generator=torch.Generator().manual_seed(0))
    for scale in (1e-40, 1e-20, 1.0, 3.0, 3e37):
        points = Geometry("cosine").points(x * scale).double()
        torch.testing.assert_close(points.norm(dim=1), torch.ones(50).double(), rtol=1e-6, atol=0)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_taken(dtype):
    assert Geometry("euclidean").points(torch.ones(2, 2, dtype=dtype)).dtype == torch.float32


def test_unknown_names_and_curvatures():
    with pytest.raises(UserError, match="Did you mean 'poincare'"):
        Geometry("poincaré")
    with pytest.raises(UserError, match="curvature=-1"):
        Geometry("poincare", -1)


@pytest.mark.parametrize(
    ("space", "dtype", "length"),
    [
        (Geometry("euclidean"), torch.float32, 1e17),
        (Geometry("euclidean"), torch.float64, 1e152),
        (Geometry("poincare", 0.0), torch.float32, 1e17),
        (Geometry("cosine"), torch.float64, 1e152),
    ],
)
def test_rows_too_long_to_be_squared_are_refused(space, dtype, length):
    rows = torch.eye(3, dtype=dtype)
    assert torch.equal(space.points(rows), rows)
    rows[1] *= length
    with pytest.raises(UserError, match=r"Row 1 of the embeddings is longer than .*: scale all rows \(1 such rows"):
        space.points(rows)
