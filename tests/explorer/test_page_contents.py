"""What a page holds, against independent ways to find it."""

import json
import math
import re
import shutil

import numpy as np
import pytest
import scipy.cluster.hierarchy
from pages import NASTY, explore, read_page
from PIL import Image, ImageOps
from sklearn.metrics import adjusted_rand_score

from uhml import cli
from uhml.data.verify import list_pictures
from uhml.embedding import embed_share
from uhml.hierarchy import Dendrogram
from uhml.trained import load_trained

CURVATURE = 0.1


@pytest.fixture(scope="module")
def page(labelled_page):
    return read_page(labelled_page)


@pytest.fixture(scope="module")
def pictures(labelled_run):
    return list_pictures(load_trained(str(labelled_run)).config.data).train


@pytest.fixture(scope="module")
def order(page, pictures):
    """Each shown picture's number among the run's."""
    number = {"/".join(path.split("/")[-2:]): i for i, path in enumerate(pictures.paths)}
    return np.array([number[name] for name in page.meta["names"]])


@pytest.fixture(scope="module")
def points(labelled_run, pictures, order):
    """``[n, d]`` float64, in the order of the page."""
    trained = load_trained(str(labelled_run))
    return embed_share(trained.model, pictures, trained.config, "embed").double().numpy()[order]


def ball_distances(x, y):
    """By the textbook's formula, which is not ours."""
    gap = np.square(x[:, None] - y[None]).sum(-1)
    shrink = (1 - CURVATURE * np.square(x).sum(-1))[:, None] * (1 - CURVATURE * np.square(y).sum(-1))[None]
    return np.arccosh(1 + 2 * CURVATURE * gap / shrink) / math.sqrt(CURVATURE)


def test_all_pictures_with_their_labels(page, pictures, order):
    assert sorted(order) == list(range(160))
    assert (page.meta["num_pictures"], page.meta["num_all"], page.meta["part"]) == (160, 160, "train")
    assert (page.meta["step"], page.meta["curvature"], page.meta["run"]) == (4, CURVATURE, "run")
    assert page.meta["super_labels"] is None
    assert "super_label" not in page.arrays
    assert [page.meta["labels"][label] for label in page.arrays["label"]] == [
        name.split("/")[0] for name in page.meta["names"]
    ]
    assert re.fullmatch(r"\d{4}-\d\d-\d\d", page.meta["created"])


def test_neighbors_and_radius(page, points):
    expected = ball_distances(points, points)
    np.fill_diagonal(expected, np.inf)
    neighbors, distances = page.arrays["neighbors"], page.arrays["distances"]
    assert neighbors.shape == distances.shape == (160, 12)
    assert all(len(set(row)) == 12 for row in neighbors)
    np.testing.assert_allclose(np.take_along_axis(expected, neighbors, 1), distances, rtol=1e-4)
    np.testing.assert_allclose(np.sort(expected, 1)[:, :12], distances, rtol=1e-4)
    np.testing.assert_allclose(page.arrays["radius"], ball_distances(points, np.zeros((1, 16)))[:, 0], rtol=1e-4)


def test_neighbors_are_those_of_uhml_search(page, pictures, order, labelled_run, tmp_path, capsys):
    run = shutil.copytree(labelled_run, tmp_path / "run")
    shown = [0, 70, 159]
    queries = [pictures.paths[order[picture]] for picture in shown]
    assert cli.main(["search", str(run), "--query", *queries, "--top", "12", "--json"]) == 0
    for picture, answer in zip(shown, json.loads(capsys.readouterr().out)["queries"], strict=True):
        found = answer["neighbors"]
        assert [item["path"] for item in found] == [
            pictures.paths[order[other]] for other in page.arrays["neighbors"][picture]
        ]
        np.testing.assert_allclose(
            [item["distance"] for item in found], page.arrays["distances"][picture], rtol=1e-4, atol=1e-4
        )


def test_levels_are_nested_cuts_of_the_saved_trees(page, labelled_run, order):
    assert [step["step"] for step in page.meta["steps"]] == [0, 2, 4]
    for i, step in enumerate(page.meta["steps"]):
        levels = page.arrays[f"levels-{i}"]
        tree = Dendrogram.load(labelled_run / "hierarchies" / f"step-0000000{step['step']}.npz").to_scipy()
        for level, said in zip(levels, step["levels"], strict=True):
            sizes = np.bincount(level)
            assert said["clusters"] == len(sizes) > 1
            assert (np.diff(sizes) <= 0).all()
            assert sizes.min() > 0
            cut = scipy.cluster.hierarchy.cut_tree(tree, len(sizes))[:, 0][order]
            assert adjusted_rand_score(cut, level) == 1
        assert len(levels) == 2
        assert all(len(set(levels[0][levels[1] == fine])) == 1 for fine in range(levels[1].max() + 1))


def test_heights_are_the_greatest_cophenetic_distances(page, labelled_run, order):
    tree = Dendrogram.load(labelled_run / "hierarchies" / "step-00000004.npz").to_scipy()
    together = scipy.spatial.distance.squareform(scipy.cluster.hierarchy.cophenet(tree))[np.ix_(order, order)]
    for i, level in enumerate(page.arrays["levels-2"]):
        heights = page.arrays[f"height-{i}"]
        for cluster in range(level.max() + 1):
            members = level == cluster
            assert heights[cluster] == pytest.approx(together[np.ix_(members, members)].max(), rel=1e-6)


def test_central_and_unusual_pictures_by_the_hyperboloids_centroid(page, points):
    root = math.sqrt(CURVATURE)
    norm = CURVATURE * np.square(points).sum(1, keepdims=True)
    lifted = np.concatenate([(1 + norm), 2 * root * points], 1) / (1 - norm)
    minkowski = np.array([-1] + [1] * 16)
    for i, level in enumerate(page.arrays["levels-2"]):
        for cluster in range(level.max() + 1):
            members = np.flatnonzero(level == cluster)
            mean = lifted[members].mean(0)
            centroid = mean / math.sqrt(-(mean * minkowski) @ mean)
            distances = np.arccosh(np.maximum(1, -(lifted[members] * minkowski) @ centroid))
            by_distance = np.sort(distances)
            far = dict(zip(members, distances, strict=True))
            central = [p for p in page.arrays[f"central-{i}"][cluster] if p >= 0]
            unusual = [p for p in page.arrays[f"unusual-{i}"][cluster] if p >= 0]
            assert len(central) == min(6, len(members))
            assert len(unusual) == min(3, max(0, len(members) - 6))
            assert not set(central) & set(unusual)
            np.testing.assert_allclose([far[p] for p in central], by_distance[: len(central)], atol=1e-6)
            np.testing.assert_allclose([far[p] for p in unusual], by_distance[::-1][: len(unusual)], atol=1e-6)


def test_clusters_lie_together_in_the_sheets(page):
    for levels in page.arrays["levels-2"]:
        assert (np.diff(levels) != 0).sum() == levels.max()


def test_every_tile_is_its_picture(page, pictures, order):
    side = page.meta["sheets"]["tile"]
    assert page.meta["sheets"]["count"] == len(page.sheets)
    own = np.stack([np.asarray(page.tile(p), float) for p in range(160)])
    true = np.stack(
        [np.asarray(ImageOps.fit(Image.open(pictures.paths[i]), (side, side), Image.Resampling.BICUBIC)) for i in order]
    )
    apart = np.stack([np.abs(own - picture).mean((1, 2, 3)) for picture in true])
    assert (apart.argmin(1) == np.arange(160)).all()
    assert apart.diagonal().max() < 6


def test_the_same_run_gives_the_same_page(labelled_run, labelled_page, tmp_path):
    assert explore(labelled_run, tmp_path / "again.html").read_bytes() == labelled_page.read_bytes()


def test_a_sample_comes_evenly_from_the_clusters(labelled_run, page, points, tmp_path, caplog):
    small = read_page(explore(labelled_run, tmp_path / "small.html", "--max-pictures", "80"))
    assert "showing 80 of 160 pictures" in caplog.text
    assert (small.meta["num_pictures"], small.meta["num_all"]) == (80, 160)
    names = page.meta["names"]
    shown = np.array([names.index(name) for name in small.meta["names"]])
    assert len(set(shown)) == 80
    sizes = np.bincount(page.arrays["levels-2"][0])
    taken = np.bincount(page.arrays["levels-2"][0][shown])
    assert np.abs(taken - sizes / 2).max() <= 1
    expected = ball_distances(points[shown], points[shown])
    np.fill_diagonal(expected, np.inf)
    np.testing.assert_allclose(np.sort(expected, 1)[:, :12], small.arrays["distances"], rtol=1e-4)


def test_other_pictures_get_a_tree_of_their_own(labelled_run, tmp_path, caplog):
    test = read_page(explore(labelled_run, tmp_path / "test.html", "--part", "test"))
    assert {name.split("/")[0] for name in test.meta["names"]} == {f"corners{corners}" for corners in range(11, 19)}
    assert [step["step"] for step in test.meta["steps"]] == [4]
    shapes = labelled_run.parent / "shapes"
    all_of_them = read_page(explore(labelled_run, tmp_path / "all.html", "--images", str(shapes)))
    assert (all_of_them.meta["num_pictures"], all_of_them.meta["labels"]) == (320, None)
    # Half of the classes gone: no longer the pictures of the saved trees.
    assert "made anew" not in caplog.text
    fewer = read_page(explore(labelled_run, tmp_path / "fewer.html", "data.num_classes=4"))
    assert "made anew" in caplog.text
    assert [step["step"] for step in fewer.meta["steps"]] == [4]
    assert fewer.meta["num_pictures"] == 80


def test_an_earlier_checkpoint_shows_no_later_tree(labelled_run, tmp_path):
    early = explore(labelled_run / "checkpoints" / "step-00000002.pt", tmp_path / "early.html")
    assert [step["step"] for step in read_page(early).meta["steps"]] == [0, 2]
    assert read_page(early).meta["run"] == "run"


def test_names_end_no_element(plain_page):
    page = read_page(plain_page)
    assert set(NASTY) <= set(page.meta["names"])
    assert page.meta["labels"] is None
    scripts = [attributes for tag, attributes in page.elements if tag == "script"]
    expected = len(page.arrays) + len(page.sheets)
    assert len(scripts) == expected + 2  # meta, and the program
    assert not any(name.startswith("on") for _, attributes in page.elements for name in attributes)
    assert "49" not in page.meta["title"]
