import numpy as np
import pytest
import scipy.cluster.hierarchy
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from reference import assert_valid, partition

from uhml.errors import UserError
from uhml.hierarchy import Dendrogram, average_linkage
from uhml.hierarchy.dendrogram import Merges
from uhml.hierarchy.quality import dendrogram_purity


def random_tree(seed, n):
    return Dendrogram(scipy.cluster.hierarchy.linkage(np.random.default_rng(seed).normal(size=(n, 3)), "average"))


@settings(max_examples=50, deadline=None)
@given(st.integers(0, 10**6), st.integers(2, 40))
def test_cuts_by_counts_are_those_of_the_linkage(seed, n):
    tree = random_tree(seed, n)
    assert_valid(tree, n)
    counts = list(range(n, 0, -1))
    levels = tree.cut(counts=counts)
    for count, level in zip(counts, levels, strict=True):
        names = partition(tree.to_scipy(), n - count)
        _, first, inverse = np.unique(names, return_index=True, return_inverse=True)
        assert np.array_equal(level.numpy(), inverse)  # names are first points, so they number in that order
        assert len(first) == count


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 10**6), st.integers(2, 40), st.floats(0, 6))
def test_cuts_by_heights_are_scipys(seed, n, height):
    tree = random_tree(seed, n)
    theirs = scipy.cluster.hierarchy.fcluster(tree.to_scipy(), height, "distance")
    ours = tree.cut(heights=[height])[0].numpy()
    assert np.array_equal(ours[:, None] == ours, theirs[:, None] == theirs)


def test_finest_first_whatever_the_order():
    tree = random_tree(0, 30)
    assert torch.equal(tree.cut(counts=[3, 20, 7]), tree.cut(counts=[20, 7, 3]))
    assert torch.equal(tree.cut(heights=[3, 1]), tree.cut(heights=[1, 3]))
    sizes = [len(level.unique()) for level in tree.cut(quantiles=[0.9, 0.0, 0.5, 1.0])]
    assert sizes == sorted(sizes, reverse=True)
    assert sizes[-1] == 1


def test_more_clusters_than_points_are_as_many_as_points():
    assert random_tree(0, 5).cut(counts=[99]).tolist() == [[0, 1, 2, 3, 4]]


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 10**6), st.integers(2, 40), st.floats(0, 1))
def test_cuts_by_quantiles_are_numpys_where_heights_differ(seed, n, quantile):
    tree = random_tree(seed, n)
    assert len(np.unique(tree.heights)) == n - 1
    by_height = tree.cut(heights=[float(np.quantile(tree.heights, quantile, method="lower"))])
    assert torch.equal(tree.cut(quantiles=[quantile]), by_height)


def test_quantiles_tell_apart_the_merges_of_a_graphs_parts():
    """Fifty groups that nothing links: joined at one height, and still a tenth as many clusters at the quantile 0.9."""
    middle = 100 * torch.randn(50, 3, generator=torch.Generator().manual_seed(0))
    points = middle.repeat_interleave(6, 0) + torch.randn(300, 3, generator=torch.Generator().manual_seed(1))
    tree = average_linkage(points, geometry="euclidean", num_neighbors=5)
    assert (tree.heights == tree.heights[-1]).sum() == 49
    cuts = tree.cut(quantiles=[0.5, 0.9, 0.95, 1])
    assert [int(level.max()) + 1 for level in cuts] == [150, 31, 16, 1]
    # Below the top, equal heights go together: copies of a picture are one cluster.
    copies = average_linkage(torch.arange(20.0).repeat_interleave(3)[:, None] ** 2, geometry="euclidean")
    assert int(copies.cut(quantiles=[0.1])[0].max()) + 1 == 20
    assert not average_linkage(torch.ones(10, 2), geometry="euclidean").cut(quantiles=[0.5]).any()


@pytest.mark.parametrize(
    "cut",
    [
        {},
        {"counts": [3], "heights": [1.0]},
        {"counts": [0]},
        {"counts": [2.5]},
        {"counts": [float("nan")]},
        {"counts": [float("inf")]},
        {"counts": []},
        {"quantiles": [1.5]},
        {"quantiles": [float("nan")]},
        {"heights": [float("nan")]},
    ],
)
def test_cuts_refused(cut):
    with pytest.raises(UserError):
        random_tree(0, 5).cut(**cut)


def test_parents_below_their_children_are_raised():
    def column(values, dtype=torch.long):
        return torch.tensor(values, dtype=dtype)

    merges = [
        Merges(column([0, 2]), column([1, 3]), column([1.0, 5.0], torch.float64), column([2, 2])),
        Merges(column([0]), column([2]), column([4.0], torch.float64), column([4])),
        Merges(column([0]), column([4]), column([4.5], torch.float64), column([5])),
    ]
    tree = Dendrogram.from_merges(merges)
    assert_valid(tree, 5)
    assert tree.heights.tolist() == [1, 5, 5, 5]


def test_long_chains_are_cut():
    n = 20_000
    heights = np.arange(n - 1.0)
    linkage = np.stack([np.arange(n - 1.0), n - 1 + np.arange(n - 1.0), heights, np.arange(2.0, n + 1)], 1)
    linkage[0, :2], linkage[1:, 0] = (0, 1), np.arange(2, n)
    assert Dendrogram(linkage).cut(counts=[2])[0].bincount().tolist() == [n - 1, 1]


def test_saved_and_loaded(tmp_path):
    tree = random_tree(1, 20)
    path = tmp_path / "tree.of.mine"
    tree.save(path)
    assert np.array_equal(Dendrogram.load(path).to_scipy(), tree.to_scipy())
    assert [p.name for p in tmp_path.iterdir()] == ["tree.of.mine"]


def test_a_failed_save_leaves_nothing(tmp_path, monkeypatch):
    random_tree(1, 20).save(tmp_path / "tree.npz")
    before = (tmp_path / "tree.npz").read_bytes()
    monkeypatch.setattr(np, "savez", lambda file, **_: file.write(b"half") and 1 / 0)
    with pytest.raises(ZeroDivisionError):
        random_tree(2, 20).save(tmp_path / "tree.npz")
    assert [p.name for p in tmp_path.iterdir()] == ["tree.npz"]
    assert (tmp_path / "tree.npz").read_bytes() == before


@pytest.mark.parametrize("content", [b"", b"nonsense", "other", "pickle", "npy"])
def test_what_is_no_tree_is_refused(tmp_path, content):
    path = tmp_path / "tree.npz"
    if content == "other":
        np.savez(path, x=np.zeros(3))
    elif content == "pickle":
        np.savez(path, linkage=np.array([{}], dtype=object))
    elif content == "npy":
        with open(path, "wb") as file:
            np.save(file, np.zeros((2, 4)))
    else:
        path.write_bytes(content)
    with pytest.raises(UserError, match="not a tree"):
        Dendrogram.load(path)
    with pytest.raises(UserError, match="no file"):
        Dendrogram.load(tmp_path / "absent")
    with pytest.raises(UserError, match="no file"):
        Dendrogram.load(tmp_path)


@pytest.mark.parametrize(
    "rows",
    [
        [[0, 1, 1, 2], [0, 3, 2, 3]],  # a point twice
        [[0, 4, 1, 2], [1, 3, 2, 3]],  # the second merge in the first
        [[0, 1, 1, 2], [2, 9, 2, 3]],
        [[0, 1, 1, 2], [-1, 3, 2, 3]],
        [[0, 0.5, 1, 2], [2, 3, 2, 3]],
        [[0, 1, np.nan, 2], [2, 3, 2, 3]],
        [[0, 1, 1, 2], [2, 3, np.inf, 3]],
        [[0, 1, 2, 2], [2, 3, 1, 3]],  # falls
    ],
)
def test_merges_that_make_no_tree_are_refused(tmp_path, rows):
    np.savez(tmp_path / "tree.npz", linkage=np.array(rows, float))
    with pytest.raises(UserError, match="not a tree"):
        Dendrogram.load(tmp_path / "tree.npz")
    np.savez(tmp_path / "tree.npz", linkage=np.array([[0, 1, 1, 2], [2, 3, 2, 3]], float))
    assert Dendrogram.load(tmp_path / "tree.npz").num_points == 3


def test_a_tree_says_what_it_is_and_has_a_leaf_at_least():
    tree = average_linkage(np.array([[0.0, 0.0], [0.1, 0.0], [0.5, 0.0]]), geometry="euclidean", mode="dense")
    assert repr(tree) == "<Dendrogram of 3 points, merged at heights 0.1 to 0.45>"
    assert repr(average_linkage(np.zeros((1, 2)))) == "<Dendrogram of 1 point>"
    with pytest.raises(UserError, match="num_leaves=0 must be at least 1"):
        tree.top(0)


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 10**6), st.integers(2, 25), st.integers(1, 6))
def test_dendrogram_purity_is_that_of_all_pairs_one_by_one(seed, n, num_classes):
    tree, labels = random_tree(seed, n), np.random.default_rng(seed).integers(num_classes, size=n)
    clusters = [node.pre_order() for node in scipy.cluster.hierarchy.to_tree(tree.to_scipy(), rd=True)[1]]
    shares = []
    for i, j in zip(*np.triu_indices(n, 1), strict=True):
        if labels[i] == labels[j]:
            smallest = min((cluster for cluster in clusters if {i, j} <= set(cluster)), key=len)
            shares.append(np.mean(labels[smallest] == labels[i]))
    assert dendrogram_purity(tree, labels) == pytest.approx(np.mean(shares) if shares else 1)


def test_dendrogram_purity_is_1_for_subtrees_and_the_share_of_a_class_that_is_scattered():
    tree = Dendrogram(scipy.cluster.hierarchy.linkage([[0.0], [1.0], [10.0], [11.1]]))
    assert dendrogram_purity(tree, np.array([5, 5, 7, 7])) == 1
    assert dendrogram_purity(tree, np.array([5, 7, 5, 7])) == 0.5
