"""Each mode against its oracle, and what holds for all."""

import logging
import re
import subprocess
import sys

import fastcluster
import numpy as np
import pytest
import scipy.cluster.hierarchy
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from reference import (
    CURVATURE,
    assert_same_tree,
    assert_valid,
    ball,
    brute_neighbors,
    capped,
    cosh_of_distance,
    dissimilarities,
    distances,
    mixture,
    scipy_tree,
)
from scipy.cluster.hierarchy import fcluster
from scipy.sparse import coo_matrix
from scipy.spatial.distance import squareform
from sklearn.datasets import load_digits
from sklearn.metrics import adjusted_rand_score
from sknetwork.hierarchy import Paris

from uhml.errors import UserError
from uhml.hierarchy import average_linkage, exact, graph, knn, linkage, memory, merging_over_ranks, rounds
from uhml.hierarchy.geometry import GEOMETRIES, Geometry
from uhml.hierarchy.graph import graph_linkage

MODES = linkage.MODES
geometries = st.sampled_from(GEOMETRIES)
seeds = st.integers(0, 10**6)


def tree_of(x, mode, geometry, **options):
    return average_linkage(x, mode=mode, geometry=geometry, curvature=CURVATURE, **options)


@settings(max_examples=40, deadline=None)
@given(seeds, st.integers(2, 40), geometries, st.sampled_from(MODES))
def test_all_pairs_are_scipys(seed, n, geometry, mode):
    x = ball(seed, n)
    matrix = dissimilarities(x, geometry) if mode == "exact" else distances(x, geometry)
    tree = tree_of(x, mode, geometry, num_neighbors=n)
    assert_valid(tree, n)
    # The reference's own rounding, near arccosh(1), is the larger one.
    exact_reference = geometry != "poincare" or mode == "exact"
    assert_same_tree(tree.to_scipy(), scipy_tree(matrix), rtol=1e-12, atol=1e-12 if exact_reference else 1e-7)


@settings(max_examples=40, deadline=None)
@given(seeds, st.integers(5, 40), st.integers(1, 6), geometries)
def test_a_graph_is_scipys_with_unseen_pairs_at_the_greatest_distance(seed, n, k, geometry):
    x = ball(seed, n)
    matrix = distances(x, geometry)
    full, far = capped(matrix, brute_neighbors(matrix, k))
    ours, theirs = tree_of(x, "graph", geometry, num_neighbors=k).to_scipy(), scipy_tree(full)
    np.testing.assert_allclose(ours[:, 2], theirs[:, 2], atol=1e-7)
    linked = theirs[:, 2] < far - 1e-6
    assert_same_tree(ours, theirs, atol=1e-7) if linked.all() else None


@settings(max_examples=20, deadline=None)
@given(seeds, st.integers(20, 80), st.integers(3, 6))
def test_a_graph_is_the_paris_of_scikit_network(seed, n, k):
    x = ball(seed, n)
    matrix = distances(x, "euclidean")
    full, far = capped(matrix, brute_neighbors(matrix, k))
    u, v = torch.triu(full < far, 1).nonzero(as_tuple=True)
    sim = 1 - full[u, v] / far
    ours = tree_of(x, "graph", "euclidean", num_neighbors=k).to_scipy()
    graph = coo_matrix((torch.cat([sim, sim]), (torch.cat([u, v]), torch.cat([v, u]))), (n, n)).tocsr()
    theirs = Paris(weights="uniform", reorder=True).fit_predict(graph)
    # Its height is the product of sizes over the similarity between, in a unit of its own: 1 / linkage.
    linked = ours[:, 2] < far * (1 - 1e-9)
    similarity = 1 / theirs[: linked.sum(), 2]
    mine = 1 - ours[linked, 2] / far
    np.testing.assert_allclose(similarity / similarity[0], mine / mine[0], rtol=1e-6)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("geometry", GEOMETRIES)
def test_order_of_points_does_not_matter(mode, geometry):
    x = ball(5, 200)
    order = torch.randperm(200, generator=torch.Generator().manual_seed(0))
    a, b = (tree_of(points, mode, geometry, num_neighbors=8) for points in (x, x[order]))
    np.testing.assert_allclose(a.to_scipy()[:, 2:], b.to_scipy()[:, 2:], atol=1e-12)
    ours, theirs = a.cut(counts=[50, 9])[:, order], b.cut(counts=[50, 9])
    assert torch.equal(ours[:, :, None] == ours[:, None], theirs[:, :, None] == theirs[:, None])


@pytest.mark.parametrize("geometry", GEOMETRIES)
def test_exact_at_some_size_in_float32(geometry):
    x = mixture(0, 2000, classes=40)[0]
    tree = tree_of(x, "exact", geometry)
    matrix = dissimilarities(x.double(), geometry)
    theirs = fastcluster.linkage(matrix[tuple(torch.triu_indices(2000, 2000, 1))].numpy(), "average")
    np.testing.assert_allclose(tree.to_scipy()[:, 2:], theirs[:, 2:], atol=1e-9)


@pytest.mark.parametrize(
    ("mode", "options"),
    [("graph", {}), ("graph", {"exact_search_up_to": 100}), ("exact", {}), ("dense", {})],
)
def test_same_tree_for_any_number_of_threads(mode, options):
    x = mixture(1, 1000)[0]
    before = torch.get_num_threads()
    try:
        trees = []
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            trees.append(tree_of(x, mode, "poincare", **options).to_scipy())
    finally:
        torch.set_num_threads(before)
    assert all(np.array_equal(tree, trees[0]) for tree in trees)


def test_same_tree_for_any_order_of_edges():
    space = Geometry("euclidean")
    x = mixture(2, 1000)[0]
    ids = torch.arange(1000)
    neighbors, distance = knn.nearest_neighbors(x, ids, x, ids, 10, space)
    order = torch.rand(1000, 10).argsort(1)
    shuffled = graph_linkage(neighbors.gather(1, order), distance.gather(1, order)).join()
    assert np.array_equal(graph_linkage(neighbors, distance).join().to_scipy(), shuffled.to_scipy())


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("n", [1, 2, 3, 4])
def test_few_points(mode, n):
    for geometry in GEOMETRIES:
        tree = tree_of(ball(0, n), mode, geometry)
        assert tree.num_points == n
        assert_valid(tree, n)
        assert tree.cut(quantiles=[0.5, 1]).shape == (2, n)


def test_no_points():
    with pytest.raises(UserError, match="no rows"):
        average_linkage(torch.zeros(0, 3))


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("geometry", GEOMETRIES)
def test_equal_points(mode, geometry):
    x = mixture(3, 30)[0].repeat(50, 1)
    tree = tree_of(x, mode, geometry, num_neighbors=5)
    assert_valid(tree, 1500)
    levels = tree.cut(counts=[30])[0]
    assert torch.equal(levels, torch.arange(30, dtype=torch.int32).repeat(50))
    # Fifty of each are one of weight fifty: what merges above is the tree of the thirty.
    single = tree_of(x[:30], mode, geometry, num_neighbors=5)
    np.testing.assert_allclose(tree.heights[-29:], single.heights, atol=1e-6)


@pytest.mark.parametrize("mode", MODES)
def test_all_points_equal(mode):
    tree = average_linkage(torch.full((100, 3), 0.1), mode=mode)
    assert_valid(tree, 100)
    lowest = 1.0 if mode == "exact" else 0.0  # cosh(0)
    assert (tree.heights == lowest).all()


HARD = {
    "noise": lambda g, n: torch.randn(n, 64, generator=g) / 16,
    "collapsed": lambda g, n: 0.5 + 1e-6 * torch.randn(n, 8, generator=g),
    "equal steps": lambda g, n: torch.arange(n)[:, None] / n,
    "growing steps": lambda g, n: torch.linspace(0, 1, n, dtype=torch.float64)[:, None] ** 1.1,
    "star": lambda g, n: torch.cat([torch.zeros(1, n // 10), torch.eye(n // 10).repeat(10, 1) * torch.rand(n, 1)])[:n],
    "edge of the ball": lambda g, n: torch.nn.functional.normalize(torch.randn(n, 8, generator=g)) / CURVATURE**0.5,
    "far apart": lambda g, n: torch.randn(n, 4, generator=g) / 1e5 + torch.arange(n)[:, None] % 7 / 10,
    "grid": lambda g, n: torch.cartesian_prod(*[torch.arange(7.0) / 10] * 4)[:n],
}


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("case", HARD)
def test_hard_cases(case, mode):
    x = HARD[case](torch.Generator().manual_seed(0), 600)
    tree = tree_of(x, mode, "poincare", num_neighbors=10)
    assert_valid(tree, 600)
    again = tree_of(x, mode, "poincare", num_neighbors=10)
    assert np.array_equal(tree.to_scipy(), again.to_scipy())
    if mode == "exact" and case != "grid":  # where ties decide, average linkages differ
        theirs = scipy_tree(dissimilarities(Geometry("poincare", CURVATURE).points(x.double()), "poincare"))
        if case not in ("equal steps", "star"):
            np.testing.assert_allclose(tree.heights, theirs[:, 2], rtol=1e-5, atol=1e-9)


def test_a_disconnected_graph_has_one_root():
    parts = torch.arange(5.0).repeat_interleave(20)[:, None] * 10
    x = torch.cat([parts + torch.rand(100, 1, generator=torch.Generator().manual_seed(0)), parts], 1)
    tree = average_linkage(x, mode="graph", geometry="euclidean", num_neighbors=10)
    assert_valid(tree, 100)
    assert torch.equal(tree.cut(counts=[5])[0], torch.arange(5, dtype=torch.int32).repeat_interleave(20))
    assert (tree.heights[-4:] == tree.heights[-1]).all()


def test_parts_that_nothing_links_are_joined_by_their_points():
    # Twenty tight classes in four heaps; with five neighbours no class sees another.
    generator = torch.Generator().manual_seed(0)
    heaps = torch.randn(4, 8, generator=generator, dtype=torch.float64)
    classes = heaps.repeat_interleave(5, 0) + 0.2 * torch.randn(20, 8, generator=generator, dtype=torch.float64)
    x = classes.repeat_interleave(30, 0) + 0.005 * torch.randn(600, 8, generator=generator, dtype=torch.float64)
    x[7] = x[3]  # equal points weigh as many
    order = torch.randperm(600, generator=generator)
    tree = tree_of(0.2 * x[order], "graph", "poincare", num_neighbors=5)
    assert_valid(tree, 600)
    assert (tree.heights[-19:] == tree.heights[-1]).all()
    theirs = scipy_tree(cosh_of_distance(0.2 * x))
    for count in (20, 12, 4, 2):
        ours = tree.cut(counts=[count])[0]
        assert adjusted_rand_score(fcluster(theirs, count, "maxclust")[order.numpy()], ours) == 1


def test_parts_too_many_are_joined_smallest_first(monkeypatch):
    monkeypatch.setattr(linkage, "MAX_PARTS", 3)
    x = torch.arange(5.0).repeat_interleave(torch.tensor([20, 30, 10, 15, 25]))[:, None] * 10
    x = x + torch.rand(100, 1, generator=torch.Generator().manual_seed(0))
    clusters = average_linkage(x, mode="graph", geometry="euclidean", num_neighbors=9).cut(counts=[4, 3])
    assert sorted(clusters[0].bincount().tolist()) == [20, 25, 25, 30]
    assert sorted(clusters[1].bincount().tolist()) == [25, 30, 45]


@settings(max_examples=20, deadline=None)
@given(seeds, st.integers(3, 60), st.integers(1, 6))
def test_rounds_given_up_end_in_single_linkage(seed, n, k):
    x = ball(seed, n)
    matrix = distances(x, "euclidean")
    full, _ = capped(matrix, brute_neighbors(matrix, k))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(graph, "LEAST_WORK", -(10**9))
        tree = tree_of(x, "graph", "euclidean", num_neighbors=k)
    assert_valid(tree, n)
    single = scipy.cluster.hierarchy.linkage(squareform(full.numpy(), checks=False), "single")
    np.testing.assert_allclose(tree.heights, single[:, 2], atol=1e-7)


def test_rounds_given_up_half_way_are_told(monkeypatch, caplog):
    x = mixture(0, 500)[0]
    whole = average_linkage(x)
    monkeypatch.setattr(graph, "ROUNDS_OF_ALL_EDGES", 0)
    monkeypatch.setattr(graph, "LEAST_WORK", 5 * graph.EDGES_PER_ROUND)
    tree = average_linkage(x)
    assert_valid(tree, 500)
    assert "clusters still linked after very many rounds" in caplog.text
    # The rounds that were done are those of the whole tree.
    done = int((tree.to_scipy()[:, :3] == whole.to_scipy()[:, :3]).all(1).argmin())
    assert 20 < done < 480


def test_more_neighbors_than_points():
    x = mixture(4, 15)[0]
    a, b = (average_linkage(x, num_neighbors=k).to_scipy() for k in (14, 500))
    assert np.array_equal(a, b)


@pytest.mark.parametrize("mode", MODES)
def test_numpy_and_half_precision(mode):
    x = mixture(5, 100)[0]
    a = average_linkage(x.half(), mode=mode).to_scipy()
    assert np.array_equal(a, average_linkage(x.half().numpy(), mode=mode).to_scipy())
    assert np.array_equal(a, average_linkage(x.half().float(), mode=mode).to_scipy())


@pytest.mark.parametrize("mode", MODES)
def test_curvature_zero_is_twice_the_euclidean(mode):
    x = mixture(6, 100, dtype=torch.float64)[0]
    flat = average_linkage(x, mode=mode, geometry="poincare", curvature=0).to_scipy()
    euclidean = average_linkage(x, mode=mode, geometry="euclidean").to_scipy()
    assert np.array_equal(flat[:, [0, 1, 3]], euclidean[:, [0, 1, 3]])
    np.testing.assert_allclose(flat[:, 2], euclidean[:, 2] * (4 if mode == "exact" else 2))


def test_points_that_are_all_neighbours_need_no_more_of_them(caplog):
    caplog.set_level(logging.INFO)
    average_linkage(np.eye(2), geometry="cosine")
    assert "parts" not in caplog.text
    average_linkage(
        np.repeat(np.eye(3), 30, axis=0) + 1e-3 * np.arange(90)[:, None], num_neighbors=2, geometry="euclidean"
    )
    assert "the graph falls into" in caplog.text


def test_an_array_that_runs_backwards():
    x = np.random.default_rng(0).normal(size=(30, 4))
    backwards, same = (average_linkage(y, geometry="euclidean", mode="exact") for y in (x[::-1], x[::-1].copy()))
    assert np.array_equal(backwards.to_scipy(), same.to_scipy())


@pytest.mark.filterwarnings("error")
def test_memory_mapped_embeddings(tmp_path):
    np.save(tmp_path / "x.npy", mixture(5, 100)[0].numpy())
    mapped = np.load(tmp_path / "x.npy", mmap_mode="r")
    assert average_linkage(mapped).num_points == 100


@pytest.mark.parametrize("seed", range(3))
def test_exact_where_rounding_of_products_is_as_large_as_gaps(seed):
    x = 0.5 + 1e-3 * torch.rand(200, 3, generator=torch.Generator().manual_seed(seed))
    space = Geometry("poincare", 0.3)
    points = space.points(x).double()
    w = space.weights(points)
    upper = np.triu_indices(len(x), 1)
    gaps = space.mean_dissimilarity(space.gap(points[:, None], points[None], w[:, None], w[None])).numpy()[upper]
    expected = scipy.cluster.hierarchy.linkage(gaps, "average")[:, 2]
    found = average_linkage(x, mode="exact", geometry="poincare", curvature=0.3).heights
    # Of what cosh has above 1, which is all that tells these points apart.
    np.testing.assert_allclose(found - 1, expected - 1, rtol=1e-3)


@pytest.mark.parametrize("scale", [1e-150, 1e-30, 1.0, 1e17, 1e30, 1e100])
def test_exact_trees_do_not_depend_on_the_unit(scale):
    x = mixture(3, 120)[0].double()
    expected = scipy.cluster.hierarchy.linkage(
        squareform(torch.cdist(x, x).square().fill_diagonal_(0).numpy(), checks=False), "average"
    )
    found = average_linkage(x * scale, mode="exact", geometry="euclidean").to_scipy()
    found[:, 2] /= scale**2
    assert_same_tree(found, expected, rtol=1e-9)


@pytest.mark.parametrize("curvature", [1e-18, 1e-12, 0.1])
def test_exact_trees_are_in_order_where_the_heights_are_one_number(curvature):
    x = mixture(4, 120)[0]
    expected = average_linkage(x, mode="exact", geometry="euclidean").cut(counts=[60, 12])
    found = average_linkage(x / x.norm(dim=1).max() * 1e-3, mode="exact", curvature=curvature).cut(counts=[60, 12])
    assert torch.equal(found, expected)


def test_products_are_true_float32_whatever_training_allows(monkeypatch):
    x, precisions = mixture(8, 1000)[0], set()
    expected = average_linkage(x, mode="exact").to_scipy()
    torch.set_float32_matmul_precision("medium")
    searches = knn.exact_search

    def noted(lifted):
        search = searches(lifted)
        return lambda *options: (precisions.add(torch.get_float32_matmul_precision()), search(*options))[1]

    monkeypatch.setattr(knn, "exact_search", noted)
    try:
        average_linkage(x, num_neighbors=5)
        assert precisions == {"highest"}
        assert np.array_equal(average_linkage(x, mode="exact").to_scipy(), expected)
        assert torch.get_float32_matmul_precision() == "medium"
    finally:
        torch.set_float32_matmul_precision("highest")


def test_products_are_true_float32_however_it_was_allowed():
    """In a process of its own: after this way to say it, torch does not answer as above any more."""
    program = (
        "import torch\n"
        "from uhml.hierarchy.search import true_float32\n"
        "parts = torch.backends.cuda.matmul, torch.backends.mkldnn.matmul\n"
        "parts[0].fp32_precision, parts[1].fp32_precision = 'tf32', 'bf16'\n"
        "with true_float32():\n"
        "    print(*(part.fp32_precision for part in parts))\n"
        "print(*(part.fp32_precision for part in parts))\n"
    )
    ended = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120, check=True)
    assert ended.stdout == "ieee ieee\ntf32 bf16\n"


@pytest.mark.parametrize(
    ("embeddings", "message"),
    [
        (None, "must be floats of at most 64 bits; these are object"),
        (np.array([["a"], ["b"]]), "these are <U1"),
        (np.zeros((3, 2), np.longdouble), "these are (float128|longdouble)"),
        (np.ma.masked_array(np.eye(3), mask=np.eye(3)), "leave out the rows of a masked one"),
        (np.eye(3, dtype=int), "must be a matrix of floats"),
    ],
)
def test_what_is_no_matrix_of_floats_is_refused(embeddings, message):
    with pytest.raises(UserError, match=message):
        average_linkage(embeddings)


def test_arrays_of_another_machine_and_lists_are_taken():
    x = mixture(0, 40)[0].numpy()
    expected = average_linkage(x).to_scipy()
    for same in (x.astype(x.dtype.newbyteorder(">")), x.tolist(), np.asfortranarray(x)):
        assert np.array_equal(average_linkage(same).to_scipy()[:, :2], expected[:, :2])


no_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="for machines without a GPU")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"mode": "grpah"}, "mode='grpah' is not one of .*Did you mean 'graph'"),
        ({"geometry": "lorentz"}, "geometry='lorentz' is not one of"),
        ({"curvature": float("nan")}, "curvature=nan"),
        ({"num_neighbors": 0}, "num_neighbors=0"),
        ({"num_neighbors": 2.5}, "num_neighbors=2.5 must be a whole number"),
        pytest.param({"device": "cuda"}, "device=cuda cannot be used here", marks=no_gpu),
        ({"min_recall": 90}, "min_recall=90"),
    ],
)
def test_options_refused(options, message):
    with pytest.raises(UserError, match=message):
        average_linkage(torch.zeros(3, 2), **options)


def test_what_was_read_from_files_counts_as_free(tmp_path, monkeypatch):
    """A container of 3 MiB, 2 of which are taken: half of that by files that were read, and are no longer needed."""
    mib = 2**20
    v1 = tmp_path / "memory"
    v1.mkdir()
    for folder, names, prefix in (
        (tmp_path, ("memory.max", "memory.current"), ""),
        (v1, ("memory.limit_in_bytes", "memory.usage_in_bytes"), "total_"),
    ):
        monkeypatch.setattr(memory, "CGROUPS", tmp_path)
        for name, value in zip(names, (3 * mib, 2 * mib), strict=True):
            (folder / name).write_text(f"{value}\n")
        (folder / "memory.stat").write_text(f"anon 7\n{prefix}inactive_file {mib}\n{prefix}active_file 9\n")
        assert memory.available(torch.device("cpu")) == 2 * mib
        (folder / "memory.stat").unlink()
        assert memory.available(torch.device("cpu")) == mib
        (folder / names[0]).write_text("max\n")
        assert memory.available(torch.device("cpu")) != 2 * mib


def test_what_torch_keeps_of_a_gpus_memory_is_there_to_be_taken(monkeypatch):
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (5, 80))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: 60)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: 20)
    assert memory.available(torch.device("cuda", 0)) == 45


@pytest.mark.parametrize("mode", MODES)
def test_one_rank_without_a_gpu_leaves_all_of_a_clustering_to_the_other_process(mode, monkeypatch):
    points, search = mixture(0, 300)[0], linkage.nearest_neighbors
    monkeypatch.setattr(linkage, "nearest_neighbors", lambda *_, **__: pytest.fail("it searches here"))
    merging = merging_over_ranks(points, 300, mode=mode, num_neighbors=4)
    monkeypatch.setattr(linkage, "nearest_neighbors", search)
    assert np.array_equal(merging().to_scipy(), average_linkage(points, mode=mode, num_neighbors=4).to_scipy())


def test_what_one_rank_leaves_is_searched_as_was_asked_for(monkeypatch):
    merging = merging_over_ranks(mixture(0, 300)[0], 300, num_neighbors=4, exact_search_up_to=200, min_recall=0.95)
    asked = []
    monkeypatch.setattr(linkage, "nearest_neighbors", lambda *_, min_recall: asked.append(min_recall) or 1 / 0)
    with pytest.raises(ZeroDivisionError):
        merging()
    assert asked == [0.95]


@pytest.mark.parametrize("whole", [False, True])
@pytest.mark.parametrize("limit", [None, 2**10])
def test_merging_in_a_process_of_its_own_is_refused_before_it_takes_memory(limit, whole, monkeypatch):
    monkeypatch.setattr(linkage, "left_whole", lambda *_: whole)
    merging = merging_over_ranks(ball(0, 50), 50, num_neighbors=3)
    if limit is None:
        assert merging().num_points == 50
        return
    monkeypatch.setattr(memory, "available", lambda device: limit)
    with pytest.raises(UserError, match=r"needs about .* GiB of memory on cpu"):
        merging()


def test_dense_stops_where_memory_would():
    with pytest.raises(UserError, match=r"mode=dense on 30,001 points .* Use mode=exact or mode=graph"):
        average_linkage(torch.zeros(30_001, 1), mode="dense")


@pytest.mark.parametrize("mode", MODES)
def test_memory_is_refused_before_it_is_taken(mode, monkeypatch):
    monkeypatch.setattr(memory, "available", lambda device: 2**20)
    with pytest.raises(UserError, match=rf"mode={mode} on 1,000 points needs about [\d.]+ GiB .* 0.0 GiB are free"):
        average_linkage(mixture(0, 1000)[0], mode=mode)


def test_unusually_many_rounds_are_warned_of(monkeypatch, caplog):
    monkeypatch.setattr(rounds, "UNUSUALLY_MANY", 3)
    average_linkage(mixture(0, 300)[0])
    assert re.search(r"graph linkage took \d+ rounds for 300 points: are the embeddings collapsed", caplog.text)


def test_the_engine_finds_the_classes_of_a_mixture():
    x, labels = mixture(7, 2000, d=32, classes=20, spread=0.4)
    found = average_linkage(x, num_neighbors=10).cut(counts=[20])[0]
    pairs = torch.stack([labels, found.long()]).unique(dim=1)
    assert pairs.shape[1] == 20


def test_a_graph_finds_the_classes_of_handwritten_digits_where_all_pairs_do_not():
    x, labels = load_digits(return_X_y=True)
    x = torch.from_numpy(x / 16)
    sparse, exact_mode = (average_linkage(x, mode=mode, geometry="euclidean").cut(counts=[10])[0] for mode in MODES[:2])
    assert adjusted_rand_score(labels, sparse) > 0.75
    assert adjusted_rand_score(labels, exact_mode) < 0.65


def test_exact_falls_back_to_float64_where_float32_cannot_tell(monkeypatch):
    calls = []
    search = exact.exact_search
    monkeypatch.setattr(exact, "exact_search", lambda lifted: calls.append(lifted.dtype) or search(lifted))
    x = 0.5 + 1e-7 * ball(0, 400)
    tree = tree_of(x, "exact", "poincare")
    assert torch.float64 in calls
    assert_valid(tree, 400)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("geometry", GEOMETRIES)
def test_the_same_tree_on_a_gpu(mode, geometry):
    x = mixture(8, 5000, classes=50)[0]
    cpu, gpu = (tree_of(x, mode, geometry, device=device) for device in ("cpu", "cuda"))
    np.testing.assert_allclose(cpu.to_scipy()[:, 2], gpu.to_scipy()[:, 2], rtol=1e-9, atol=1e-12)
    assert torch.equal(cpu.cut(counts=[500, 50, 5]), gpu.cut(counts=[500, 50, 5]))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_approximate_search_on_a_gpu():
    x = mixture(9, 20_000, classes=50)[0]
    tree = average_linkage(x, device="cuda", exact_search_up_to=1000, num_neighbors=10)
    assert_valid(tree, 20_000)
