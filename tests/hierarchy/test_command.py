import argparse
import csv
import itertools
import os

import numpy as np
import pytest
import scipy.cluster.hierarchy
import torch
from reference import mixture
from sklearn.metrics import silhouette_score

from uhml import cli
from uhml.errors import UserError
from uhml.hierarchy import Dendrogram, average_linkage, command, quality
from uhml.hierarchy.geometry import Geometry
from uhml.hierarchy.plot import _colors


def cluster(*words):
    parser = argparse.ArgumentParser()
    command.add_arguments(parser)
    command.run(parser.parse_args([str(word) for word in words]))


@pytest.fixture
def files(tmp_path):
    x, labels = mixture(0, 600, classes=8)
    np.save(tmp_path / "x.npy", x.numpy())
    np.save(tmp_path / "labels.npy", np.array([f"class {label}" for label in labels.tolist()]))
    return tmp_path


def test_everything_that_is_asked_for_is_written(files, capsys):
    cluster(
        *(files / "x.npy", "--out", files / "tree.npz", "--counts", "40,8", "--labels", files / "labels.npy"),
        *("--plot", files / "tree.png", "--levels", files / "levels.npy", "--geometry", "euclidean"),
    )
    tree = Dendrogram.load(files / "tree.npz")
    expected = average_linkage(np.load(files / "x.npy"), geometry="euclidean")
    assert np.array_equal(tree.to_scipy(), expected.to_scipy())
    assert np.array_equal(np.load(files / "levels.npy"), tree.cut(counts=[40, 8]).numpy())
    assert (files / "tree.png").read_bytes().startswith(b"\x89PNG")
    said = capsys.readouterr().out
    assert "600 points" in said
    assert "silhouette: of d²" in said
    assert "purity" in said
    assert len([line for line in said.splitlines() if line.startswith("│")]) == 2


@pytest.mark.parametrize("names", ["none", "beside", "within"])
def test_levels_as_a_table_of_pictures(files, names):
    rows, paths = np.load(files / "x.npy"), [f"a b/{i},é.jpg" for i in range(600)]
    source = files / "x.npy"
    if names == "beside":
        with (files / "x.csv").open("w", newline="") as file:
            csv.writer(file).writerows([["path"], *([path] for path in paths)])
    elif names == "within":
        pa, pq = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
        source = files / "x.parquet"
        vectors = pa.array(rows.astype(np.float32).tolist(), pa.list_(pa.float32(), rows.shape[1]))
        pq.write_table(pa.table({"path": paths, "vector": vectors}), source)
    words = ("--geometry", "euclidean", "--counts", "8,40")
    # Beside a Parquet file the table may have its name.
    out = files / ("x.csv" if names == "within" else "levels.csv")
    cluster(source, "--out", files / "tree.npz", *words, "--levels", out)
    with out.open(newline="", encoding="utf-8") as file:
        heading, *found = csv.reader(file)
    assert heading == ["row" if names == "none" else "path", "clusters_40", "clusters_8"]
    assert [row[0] for row in found] == ([str(i) for i in range(600)] if names == "none" else paths)
    expected = average_linkage(rows, geometry="euclidean").cut(counts=[40, 8])
    assert np.array_equal(np.array([row[1:] for row in found], int).T, expected.numpy())


def test_names_of_pictures_are_not_written_over(files):
    (files / "x.csv").write_text("path\n" + "a\n" * 600)
    with pytest.raises(UserError, match="are one file"):
        cluster(files / "x.npy", "--out", files / "tree.npz", "--levels", files / "x.csv", "--overwrite")
    (files / "x.csv").write_text("path\n" + "a\n" * 599)
    with pytest.raises(UserError, match="600 vectors, and 599 pictures"):
        cluster(files / "x.npy", "--out", files / "tree.npz", "--levels", files / "levels.csv")
    # What is beside concerns only who asks for pictures.
    cluster(files / "x.npy", "--out", files / "tree.npz", "--levels", files / "levels.npy")


@pytest.mark.parametrize("num_clusters", [1, 2, 7, 15, 30])
def test_each_cluster_of_the_coarsest_cut_is_drawn_in_one_colour_and_its_neighbours_in_others(num_clusters):
    # Parts that no neighbour joins: all are merged at one height, at which no height could tell clusters apart.
    tree = average_linkage(
        torch.cat([torch.randn(9, 3) / 99 + 5 * i for i in range(20)]), geometry="euclidean", num_neighbors=4
    )
    top, _ = tree.top(60)
    color_of = _colors(top, num_clusters)
    drawn = scipy.cluster.hierarchy.dendrogram(top, no_plot=True, link_color_func=color_of)
    clusters = Dendrogram(top).cut(counts=[num_clusters])[0].tolist()
    below = [{leaf} for leaf in range(60)]
    of_cluster = {}
    for t, (left, right) in enumerate(top[:, :2].astype(int)):
        below.append(below[left] | below[right])
        within = {clusters[leaf] for leaf in below[-1]}
        if len(within) > 1:
            assert color_of(60 + t) == "#888888"
        else:
            of_cluster.setdefault(*within, set()).add(color_of(60 + t))
    assert all(len(colors) == 1 for colors in of_cluster.values())
    in_order = [
        next(iter(of_cluster[c])) for c in dict.fromkeys(clusters[i] for i in drawn["leaves"]) if c in of_cluster
    ]
    assert len(set(in_order)) == min(len(in_order), 10 if num_clusters <= 10 else 20)
    assert all(a != b for a, b in itertools.pairwise(in_order))


def test_one_point(tmp_path):
    np.save(tmp_path / "x.npy", np.zeros((1, 2), np.float16))
    cluster(tmp_path / "x.npy", "--out", tmp_path / "tree.npz", "--plot", tmp_path / "tree.png")
    assert Dendrogram.load(tmp_path / "tree.npz").num_points == 1


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["absent.npy", "--out", "tree.npz"], "no file"),
        (["words.npy", "--out", "tree.npz"], "not a .npy file"),
        (["zip.npy", "--out", "tree.npz"], "not a .npy file"),
        (["labels.npy", "--out", "tree.npz"], "embeddings are floats"),
        (["x.npy", "--out", "tree.npz", "--labels", "x.npy"], "one label for each row"),
        (["x.npy", "--out", "absent/tree.npz"], "no folder"),
        (["x.npy", "--out", "tree.npz", "--device", "tpu9"], "say cpu or cuda"),
        (["x.npy", "--out", "tree.npz", "--num-neighbors", "0"], "num_neighbors=0"),
        (["x.npy", "--out", "tree.txt"], "must end in .npz"),
        (["x.npy", "--out", "tree.npz", "--levels", "old.npy"], "old.npy is there already.*--overwrite"),
        (["x.npy", "--out", "tree.npz", "--levels", "f.npy"], "--levels f.npy is a folder"),
        (["x.npy", "--out", "tree.npz", "--levels", "levels.txt"], "must end in .npy or .csv"),
        (["x.parquet", "--out", "tree.npz"], "no file"),
        (["x.npy", "--out", "tree.npz", "--plot", "tree.txt"], "--plot tree.txt must end in"),
    ],
)
def test_what_is_refused(files, words, message, monkeypatch):
    monkeypatch.chdir(files)
    (files / "words.npy").write_text("words")
    (files / "zip.npy").write_bytes(b"PK\x03\x04 no zip")
    (files / "old.npy").touch()
    (files / "f.npy").mkdir()
    with pytest.raises(UserError, match=message):
        cluster(*words)
    assert not (files / "tree.npz").exists()


@pytest.mark.parametrize("counts", ["many", "10,0", ""])
def test_counts_refused(files, counts, capsys):
    with pytest.raises(SystemExit):
        cluster(files / "x.npy", "--out", files / "tree.npz", "--counts", counts)
    assert f"{counts!r} is no list of numbers of clusters, such as 1000,100,10" in capsys.readouterr().err


def test_files_are_replaced_when_asked_to(files):
    for counts in ("9", "5"):
        out = ("--out", files / "tree.npz", "--levels", files / "levels.npy", "--overwrite")
        cluster(files / "x.npy", *out, "--counts", counts)
    assert np.load(files / "levels.npy").max() == 4


def test_the_top_of_the_tree_is_a_tree():
    tree = average_linkage(mixture(1, 300)[0])
    top, sizes = tree.top(12)
    assert scipy.cluster.hierarchy.is_valid_linkage(top)
    assert sizes.sum() == 300
    assert sorted(sizes) == sorted(tree.cut(counts=[12])[0].bincount().tolist())
    assert np.array_equal(top[:, 2], tree.heights[-11:])
    whole, ones = tree.top(1000)
    assert np.array_equal(whole, tree.to_scipy())
    assert (ones == 1).all()


def test_quality():
    x, labels = mixture(2, 400, classes=5, dtype=torch.float64)
    clusters = average_linkage(x, geometry="euclidean").cut(counts=[5])[0]
    assert quality.agreement(clusters, labels.numpy()) == pytest.approx((1, 1, 1))
    assert quality.agreement(torch.zeros(400, dtype=torch.int32), labels.numpy()).purity < 0.5
    assert quality.sizes(torch.tensor([0, 1, 1, 2, 2, 2])) == (3, 1, 2, 3)
    assert quality.sizes(torch.tensor([0, 1, 1, 1])) == (2, 1, 2, 3)
    space = Geometry("euclidean")
    ours = quality.silhouette(x, clusters, space)
    # The mean squared distance to a cluster is what cluster means give, so that is scikit-learn's metric here.
    assert ours == pytest.approx(
        silhouette_score(torch.cdist(x, x).square().fill_diagonal_(0), clusters, metric="precomputed")
    )
    assert quality.silhouette(x, torch.zeros(400, dtype=torch.int32), space) == 0


def test_a_point_by_itself_counts_0_in_the_silhouette():
    x, labels = mixture(2, 40, classes=3, dtype=torch.float64)
    clusters = torch.cat([labels[:-2], torch.tensor([3, 4])])
    expected = silhouette_score(torch.cdist(x, x).square().fill_diagonal_(0), clusters, metric="precomputed")
    assert quality.silhouette(x, clusters, Geometry("euclidean")) == pytest.approx(expected)


def test_what_is_read_is_never_written_over(tmp_path):
    path = tmp_path / "e.npy"
    np.save(path, np.eye(4))
    before = path.read_bytes()
    (tmp_path / "link.npy").symlink_to(path)
    for out in (path, tmp_path / "link.npy"):
        assert cli.main(["cluster", str(path), "--out", str(out), "--geometry", "cosine"]) == 2
    np.savez(tmp_path / "e.npz", np.eye(4))
    assert cli.main(["cluster", str(tmp_path / "e.npz"), "--out", str(tmp_path / "t.npz")]) == 2
    plot = ["--out", str(tmp_path / "t.npz"), "--plot", str(tmp_path / "t.xyz")]
    assert cli.main(["cluster", str(path), "--geometry", "cosine", *plot]) == 2
    assert path.read_bytes() == before
    assert not (tmp_path / "t.npz").exists()


@pytest.mark.parametrize("what", ["points", "labels"])
def test_a_pipe_in_the_place_of_a_file_is_named_and_not_waited_for(tmp_path, caplog, what):
    np.save(tmp_path / "points.npy", np.eye(4))
    os.mkfifo(pipe := tmp_path / "pipe.npy")
    words = [pipe] if what == "points" else [tmp_path / "points.npy", "--labels", pipe]
    assert cli.main(["cluster", *map(str, words), "--out", str(tmp_path / "tree.npz")]) == 2
    assert f"There is no file {pipe}." in caplog.text
