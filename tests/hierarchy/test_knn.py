import logging
import re

import pytest
import torch
from reference import CURVATURE, ball, brute_neighbors, distances, mixture

from uhml.hierarchy import knn, search
from uhml.hierarchy.geometry import GEOMETRIES, Geometry
from uhml.hierarchy.knn import nearer, nearest_neighbors


def neighbors(x, k, geometry, **options):
    space = Geometry(geometry, CURVATURE)
    points = space.points(x)
    ids = torch.arange(len(x))
    return nearest_neighbors(points, ids, points, ids, k, space, **options)


@pytest.fixture(params=["faiss", "torch"])
def backend(request, monkeypatch):
    if request.param == "torch":
        monkeypatch.setattr(search.importlib.util, "find_spec", lambda name: None)
        monkeypatch.setattr(search, "BASE_PER_BLOCK", 100)
    else:
        pytest.importorskip("faiss")


@pytest.mark.usefixtures("backend")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("geometry", GEOMETRIES)
def test_exact_neighbors(geometry, dtype):
    x = ball(0, 700).to(dtype)
    matrix = distances(Geometry(geometry, CURVATURE).points(x).double(), geometry)
    ids, found = neighbors(x, 7, geometry)
    true = brute_neighbors(matrix, 7)
    assert ids.dtype == torch.int32
    assert torch.equal(ids.long(), true)
    torch.testing.assert_close(found, matrix.gather(1, true), atol=1e-6, rtol=0)


@pytest.mark.usefixtures("backend")
@pytest.mark.parametrize("geometry", GEOMETRIES)
def test_exact_where_float32_products_are_noise(geometry):
    # Tight groups far from the origin: gaps of 1e-12 and products of 1.
    x = (torch.tensor([[1.0, 0, 0], [0, 1, 0], [0, 0, 1]]).repeat(100, 1) + 1e-5 * ball(1, 300, d=3)).float()
    points = Geometry(geometry, CURVATURE).points(x)
    space = Geometry(geometry, CURVATURE)
    w = space.weights(points)
    gaps = space.gap(points[:, None], points[None], w[:, None], w[None])
    ids, _ = neighbors(x, 5, geometry)
    assert torch.equal(ids.long(), brute_neighbors(gaps, 5))


@pytest.mark.usefixtures("backend")
@pytest.mark.parametrize("spread", [1e-5, 1e-4, 1e-3])
@pytest.mark.parametrize("n", [10, 100])
def test_exact_where_rounding_of_products_is_as_large_as_gaps(spread, n):
    generator = torch.Generator().manual_seed(n)
    space = Geometry("poincare", 0.3)
    for _ in range(5):
        x = space.points(torch.tensor([0.5 / 0.3**0.5, 0, 0]) - spread * torch.rand(n, 3, generator=generator))
        w = space.weights(x)
        true = brute_neighbors(space.gap(x[:, None], x[None], w[:, None], w[None]), 2)
        assert torch.equal(nearest_neighbors(x, torch.arange(n), x, torch.arange(n), 2, space)[0].long(), true)


def brute(x, k, space):
    points = space.points(x)
    w = space.weights(points)
    return brute_neighbors(space.gap(points[:, None], points[None], w[:, None], w[None]), k)


@pytest.mark.usefixtures("backend")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("geometry", GEOMETRIES)
@pytest.mark.parametrize("name", ["equal rows", "one-hot rows", "corners of a cube"])
def test_of_many_that_are_equally_far_the_first_are_taken(name, geometry, dtype):
    rows = {
        "equal rows": torch.full((60, 3), 0.25),
        "one-hot rows": 0.5 * torch.eye(60),
        "corners of a cube": 0.25 * (torch.cartesian_prod(*[torch.arange(2)] * 8) * 2.0 - 1),
    }
    x, space = rows[name].to(dtype), Geometry(geometry, CURVATURE)
    points, ids = space.points(x), torch.arange(len(x))
    expected = brute(x, 5, space)
    assert torch.equal(neighbors(x, 5, geometry)[0].long(), expected)
    # Whichever ranks do it.
    for rank in range(3):
        own = ids[rank::3]
        found, _ = nearest_neighbors(points[own], own, points, ids, 5, space)
        assert torch.equal(found.long(), expected[own])


@pytest.mark.usefixtures("backend")
@pytest.mark.parametrize("geometry", GEOMETRIES)
def test_exact_where_float64_products_are_noise(geometry):
    x = (torch.eye(3).double().repeat(100, 1) + 1e-9 * ball(1, 300, d=3).double()) / 2
    space = Geometry(geometry, CURVATURE)
    assert torch.equal(neighbors(x, 5, geometry)[0].long(), brute(x, 5, space))


@pytest.mark.usefixtures("backend")
@pytest.mark.parametrize("geometry", ["euclidean", "poincare"])
def test_exact_where_products_underflow(geometry):
    x = 1e-22 * torch.randn(400, 3, generator=torch.Generator().manual_seed(0))
    found, space = neighbors(x, 3, geometry)[0].long(), Geometry(geometry, CURVATURE)
    assert torch.equal(found, brute(x, 3, space))


def test_what_is_equally_far_is_not_looked_at_without_end(monkeypatch):
    monkeypatch.setattr(knn, "MOST_CANDIDATES", 40)
    monkeypatch.setattr(knn, "WIDENED_AT_ONCE", 200)
    most = []
    searches = knn.exact_search

    def noted(lifted):
        search = searches(lifted)
        return lambda polars, k: (most.append(k * len(polars)) or most.append(k), search(polars, k))[1]

    monkeypatch.setattr(knn, "exact_search", noted)
    ids, found = neighbors(torch.full((300, 3), 0.25).double(), 3, "poincare")
    assert (found == 0).all()
    assert (ids != torch.arange(300)[:, None]).all()
    assert max(most[3::2]) <= 80
    assert max(most[2::2]) <= 200


def test_a_row_is_left_out_by_its_number():
    x = torch.zeros(4, 2)
    ids, found = neighbors(x, 3, "euclidean")
    assert ids.tolist() == [[1, 2, 3], [0, 2, 3], [0, 1, 3], [0, 1, 2]]
    assert (found == 0).all()


def test_parts_together_give_the_whole():
    space = Geometry("poincare", CURVATURE)
    x, ids = ball(2, 300), torch.arange(300)
    whole = nearest_neighbors(x, ids, x, ids, 6, space)
    parts = [nearest_neighbors(x, ids, x[part], part, 6, space) for part in (ids[:3], ids[3:200], ids[200:])]
    together = nearer(nearer(parts[2], parts[0]), parts[1])
    assert torch.equal(whole[0], together[0])
    assert torch.equal(whole[1], together[1])


def test_parts_together_give_the_whole_where_distances_are_equal():
    space = Geometry("euclidean")
    x = torch.cartesian_prod(torch.arange(6.0), torch.arange(6.0))
    ids = torch.arange(36)
    whole = nearest_neighbors(x, ids, x, ids, 6, space)
    parts = [nearest_neighbors(x, ids, x[part], part, 6, space) for part in (ids[::3], ids[1::3], ids[2::3])]
    for first, second, third in ((0, 1, 2), (2, 1, 0), (1, 2, 0)):
        together = nearer(nearer(parts[first], parts[second]), parts[third])
        assert torch.equal(whole[0], together[0])
        assert torch.equal(whole[1], together[1])


def test_too_few_points_leave_the_query_itself_infinitely_far():
    space = Geometry("euclidean")
    x = torch.tensor([[0.0], [1.0], [3.0]])
    ids, found = nearest_neighbors(x, torch.tensor([0, 1, 2]), x[:2], torch.tensor([0, 1]), 2, space)
    assert ids.tolist() == [[1, 0], [0, 1], [1, 0]]
    assert found.tolist() == [[1, torch.inf], [1, torch.inf], [2, 3]]


@pytest.mark.usefixtures("backend")
@pytest.mark.parametrize("geometry", GEOMETRIES)
@pytest.mark.parametrize(("spread", "shares"), [(0.2, (0.5, 0.9, 0.99)), (1.0, (0.5, 0.7, 0.8))])
def test_approximate_neighbors_have_the_recall_they_say(geometry, spread, shares, caplog):
    x = mixture(3, 5000, classes=200, spread=spread)[0]
    truth, _ = neighbors(x, 10, geometry)
    probes = []
    for least in shares:
        with caplog.at_level(logging.INFO):
            ids, found = neighbors(x, 10, geometry, min_recall=least)
        recall = (ids[:, :, None] == truth[:, None]).any(2).double().mean()
        cells, said = re.findall(r"into (\d+) of 141 cells finds ([\d.]+)", caplog.text)[-1]
        probes.append(int(cells))
        assert recall > least - 0.01
        assert abs(recall - float(said) / 100) < 0.03
        assert (found.diff(dim=1)[found[:, 1:].isfinite()] >= 0).all()
    assert probes == sorted(probes)
    assert probes[0] < 30 < 141


@pytest.mark.usefixtures("backend")
def test_the_recall_is_sure_to_two_standard_errors(monkeypatch, caplog):
    monkeypatch.setattr(knn, "NUM_MEASURED", 16)  # so that the errors are large
    with caplog.at_level(logging.INFO):
        neighbors(mixture(3, 5000, classes=200, spread=0.2)[0], 10, "euclidean", min_recall=0.88)
    recall, error = re.findall(r"finds ([\d.]+) ± ([\d.]+) %", caplog.text)[-1]
    assert float(recall) - float(error) > 88 - 0.15


@pytest.mark.usefixtures("backend")
def test_recall_where_codes_cannot_tell_points_apart(caplog):
    # Ten heaps, each so small beside the distance to the next that all its points have one code.
    x = mixture(5, 5000, classes=10, spread=1e-5)[0]
    truth, _ = neighbors(x, 10, "euclidean")
    with caplog.at_level(logging.INFO):
        ids, _ = neighbors(x, 10, "euclidean", min_recall=0.9)
    assert (ids[:, :, None] == truth[:, None]).any(2).double().mean() > 0.89


@pytest.mark.usefixtures("backend")
def test_points_that_no_cells_part_are_searched_exactly(caplog):
    x = torch.randn(5000, 64, generator=torch.Generator().manual_seed(6))
    with caplog.at_level(logging.INFO):
        ids, found = neighbors(x, 10, "cosine", min_recall=0.9)
    assert "looking at all points takes no longer" in caplog.text
    true_ids, true_found = neighbors(x, 10, "cosine")
    assert torch.equal(ids, true_ids)
    assert torch.equal(found, true_found)


@pytest.mark.usefixtures("backend")
@pytest.mark.parametrize("d", [17, 32])
def test_approximate_distances_are_those_of_the_points_that_are_named(d):
    """Groups of four, of which few cells have ten: what is not found is infinitely far, and nothing else is."""
    middle = torch.randn(1250, d, generator=torch.Generator().manual_seed(7))
    x = middle.repeat_interleave(4, 0) + 0.01 * torch.randn(5000, d, generator=torch.Generator().manual_seed(8))
    ids, found = neighbors(x, 10, "euclidean", min_recall=0.3)
    true = (x[:, None] - x[ids.long()]).double().norm(dim=2)
    there = found.isfinite()
    assert there.any()
    assert not there.all()
    torch.testing.assert_close(found[there].double(), true[there], rtol=1e-4, atol=1e-5)


@pytest.mark.usefixtures("backend")
def test_approximate_search_gives_the_same_again():
    x = mixture(4, 5000, classes=100)[0]
    a, b = (neighbors(x, 5, "poincare", min_recall=0.9) for _ in range(2))
    assert torch.equal(a[0], b[0])
