import json
import re
import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch
from launched import uhml
from PIL import Image
from sklearn.metrics import confusion_matrix

from uhml import cli
from uhml import evaluate as evaluation
from uhml.config import Config, EvalConfig, TrainConfig
from uhml.data.decode import load_rgb
from uhml.data.pictures import Splits
from uhml.data.transforms import plain_transform
from uhml.data.verify import list_pictures
from uhml.evaluate import by_class, confusions, find_neighbors, score_unseen
from uhml.hierarchy.geometry import Geometry
from uhml.metrics import Embedded
from uhml.poincare import distance_matrix
from uhml.reporting.confusion import MATRIX_UP_TO, matrix
from uhml.reporting.sheets import RIGHT, TILE, WRONG, Answer, Tile, draw_sheet
from uhml.trained import load_trained


def evaluate(*words):
    return cli.main(["evaluate", *map(str, words)])


def embedded_test_pictures(run):
    """The run's test pictures and their points, by the network alone."""
    trained = load_trained(str(run))
    pictures = list_pictures(trained.config.data).test
    backbone = trained.model.backbone
    transform = plain_transform(trained.config.data, backbone.mean, backbone.std)
    with torch.inference_mode():
        points = torch.cat([trained.model(transform(load_rgb(path))[None]) for path in pictures.paths])
    return pictures, points, trained.config.model.curvature


def test_scores_are_those_by_hand_and_of_the_run(run_copy, capsys):
    assert evaluate(run_copy) == 0
    assert "not those that the run knew" not in capsys.readouterr().err
    scores = json.loads((run_copy / "evaluation" / "scores.json").read_text())
    pictures, points, curvature = embedded_test_pictures(run_copy)
    assert scores["pictures"] == len(pictures) > 50

    far = distance_matrix(points, points, curvature).fill_diagonal_(torch.inf)
    order = far.argsort(1)[:, :-1].numpy()
    right = pictures.labels[order[:, 0]] == pictures.labels
    assert scores["ball"]["recall_at_k"]["1"] == pytest.approx(right.mean(), abs=1e-9)
    precisions = []
    for label, near in zip(pictures.labels, order, strict=True):
        same = pictures.labels[near][: (pictures.labels == label).sum() - 1] == label
        precisions.append(np.mean([same[: i + 1].mean() if hit else 0 for i, hit in enumerate(same)]))
    assert scores["ball"]["map_at_r"] == pytest.approx(np.mean(precisions), abs=1e-6)
    result = json.loads((run_copy / "result.json").read_text())["trained"]
    assert scores["ball"]["map_at_r"] == pytest.approx(result["map_at_r"], abs=1e-6)
    assert scores["backbone"]["recall_at_k"]["4"] == pytest.approx(result["backbone"]["recall_at_k"]["4"], abs=1e-6)
    assert scores["ball"]["nmi"] == pytest.approx(result["nmi"], abs=1e-6)
    assert scores["ball"]["ami"] < scores["ball"]["nmi"]

    assert len(scores["classes"]) == 12
    assert sum(score["pictures"] for score in scores["classes"]) == len(pictures)
    for score in scores["classes"]:
        own = pictures.labels == pictures.class_names.index(score["name"])
        assert score["recall_at_1"] == pytest.approx(right[own].mean())
    worst = [score["recall_at_1"] for score in scores["classes"]]
    assert worst == sorted(worst)
    for score in scores["super_classes"]:
        own = pictures.super_labels == pictures.super_class_names.index(score["name"])
        assert (score["pictures"], score["recall_at_1"]) == (own.sum(), pytest.approx(right[own].mean()))
    counts = confusion_matrix(pictures.labels, pictures.labels[order[:, 0]])
    for pair in scores["confused"]:
        a, b = (pictures.class_names.index(pair[key]) for key in ("class", "taken_for"))
        assert (pair["pictures"], pair["share"]) == (counts[a, b], pytest.approx(counts[a, b] / counts[a].sum()))
    np.fill_diagonal(counts, 0)
    assert len(scores["confused"]) == (counts > 1).sum() > 0


def test_pictures_are_drawn_and_the_run_still_goes_on(run_copy, capsys):
    assert evaluate(run_copy, "--json") == 0
    printed = capsys.readouterr().out
    folder = run_copy / "evaluation"
    assert printed == (folder / "scores.json").read_text()
    for name in ("confusion.png", "neighbors.png"):
        with Image.open(folder / name) as image:
            assert min(image.size) > 400
            assert len(image.convert("RGB").getcolors(1 << 24)) > 100
    # Its folder holds nothing that the run would refuse.
    before = (run_copy / "result.json").read_bytes()
    ended = cli.main(["train", str(run_copy / "config.yaml"), "--run-dir", str(run_copy)])
    assert ended == 2
    assert "holds a finished run" in capsys.readouterr().err
    assert (run_copy / "result.json").read_bytes() == before


def test_a_second_time_only_when_asked_to(run_copy, capsys):
    assert evaluate(run_copy) == 0
    said = capsys.readouterr().out
    assert "R@1" in said
    assert "AMI" in said
    assert evaluate(run_copy) == 2
    assert "holds an evaluation already" in capsys.readouterr().err
    assert evaluate(run_copy, "--overwrite") == 0


def test_other_pictures_with_names_that_need_care(run_copy, shapes, tmp_path, capsys):
    words = ("data.dataset=folder", f"data.root={shapes}", "--out", tmp_path / "out")
    assert evaluate(run_copy, *words) == 0
    scores = json.loads((tmp_path / "out" / "scores.json").read_text())
    assert {score["name"] for score in scores["classes"]} == {"plain", "with, comma"}
    assert not (run_copy / "evaluation").exists()
    said = capsys.readouterr()
    assert "plain" in said.out
    assert "The pictures are not those that the run knew" in said.err
    # The classes that are scored are the last by name.
    every = [f"data.root={tmp_path / 'turned'}", "data.dataset=folder"]
    for name in ("[red]ünï $x_{", "<img src=x onerror=alert(1)>"):
        shutil.copytree(shapes / name, tmp_path / "turned" / f"z{name}")
    shutil.copytree(shapes / "plain", tmp_path / "turned" / "zz\x1b[31mcaf\udce9")
    for name in ("a", "b", "c"):
        shutil.copytree(shapes / "plain", tmp_path / "turned" / name)
    assert evaluate(run_copy, *every, "--out", tmp_path / "turned-out") == 0
    said = capsys.readouterr().out
    assert "z[red]ünï $x_{" in said
    assert "\x1b[31m" not in said
    assert (tmp_path / "turned-out" / "confusion.png").exists()


def test_without_labels_the_neighbours_are_shown_and_nothing_scored(run_copy, shapes, tmp_path, capsys):
    (tmp_path / "list.txt").write_text("".join(f"{path}\n" for path in shapes.rglob("*.png")))
    words = ("data.dataset=list", f"data.root={tmp_path / 'list.txt'}", "--out", tmp_path / "out")
    assert evaluate(run_copy, *words) == 0
    assert "No classes are known for these pictures, so there is nothing to score" in capsys.readouterr().err
    assert json.loads((tmp_path / "out" / "scores.json").read_text())["ball"] is None
    assert not (tmp_path / "out" / "confusion.png").exists()
    with Image.open(tmp_path / "out" / "neighbors.png") as image:
        found = {colour for _, colour in image.convert("RGB").getcolors(1 << 24)}
    assert not found & {rgb(RIGHT), rgb(WRONG)}


@pytest.mark.ddp
def test_two_ranks_score_as_one(run_copy, tmp_path):
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "uhml"]
    command = [*torchrun, "evaluate", str(run_copy), "--json", "--out", str(tmp_path / "two")]
    ended = subprocess.run(command, capture_output=True, text=True, check=False, timeout=200)
    assert ended.returncode == 0, ended.stderr
    uhml("evaluate", run_copy, "--out", tmp_path / "one")
    one, two = (json.loads((tmp_path / name / "scores.json").read_text()) for name in ("one", "two"))
    assert json.loads(ended.stdout) == two
    assert one == two


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["absent"], "absent: no such checkpoint"),
        (["RUN", "--out", "absent/out"], "there is no folder"),
        (["RUN", "--out", "file"], "file is a file: name a folder"),
        (["RUN", "data.root"], "'data.root' is no override"),
        (["RUN", "data.dataset=folder"], "data.root is missing"),
        (["RUN", "data.dataset=fold", "data.root=file"], "Did you mean 'folder'"),
        (["RUN", "model.curvature=1"], "the network is trained"),
    ],
)
def test_what_is_refused(finished_run, tmp_path, monkeypatch, capsys, words, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").touch()
    assert evaluate(*[finished_run if word == "RUN" else word for word in words]) == 2
    assert re.search(message, capsys.readouterr().err)
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_scores_of_classes_by_hand():
    labels, right = np.array([0, 0, 0, 2, 2, 3]), np.array([True, False, True, False, False, False])
    precision = np.array([1, 0.5, 0, 0.25, 0.75, np.nan])
    found = by_class(labels, ("a", "none", "c", "alone"), right, precision)
    assert [(s.name, s.pictures, s.recall_at_1, s.map_at_r) for s in found] == [
        ("alone", 1, 0, None),
        ("c", 2, 0, 0.5),
        ("a", 3, pytest.approx(2 / 3), 0.5),
    ]


def test_a_picture_that_has_no_second_of_its_class_is_no_query_of_its_super_class():
    (found,) = by_class(np.array([0, 0]), ("both",), np.array([True, False]), np.array([0.5, np.nan]))
    assert (found.pictures, found.recall_at_1, found.map_at_r) == (2, 0.5, 0.5)


def test_confusions_by_hand():
    labels, nearest = np.array([0, 0, 0, 0, 1, 1, 2]), np.array([1, 0, 1, 2, 1, 0, 2])
    found = [(p.label, p.taken_for, p.pictures, p.share, p.example) for p in confusions(labels, nearest)]
    assert found == [(0, 1, 2, 0.5, 0), (1, 0, 1, 0.5, 5), (0, 2, 1, 0.25, 3)]


def test_of_confusions_the_greatest_share_comes_first_and_not_the_most_pictures():
    labels, nearest = np.array([0, 0, 0, 0, 1]), np.array([1, 1, 0, 0, 0])
    assert [(p.label, p.pictures, p.share) for p in confusions(labels, nearest)] == [(1, 1, 1.0), (0, 2, 0.5)]


def test_a_query_may_be_found_in_a_gallery_at_its_own_row():
    points = torch.tensor([[0.0, 0.1], [0.2, 0.0], [0.0, 0.3]])
    found = find_neighbors(points, points, Geometry("poincare"), 1)
    assert found.rows[:, 0].tolist() == [0, 1, 2]
    among_themselves = find_neighbors(points, None, Geometry("poincare"), 1)
    assert among_themselves.rows[:, 0].tolist() == [2, 0, 0]


@pytest.fixture
def embedded(monkeypatch):
    """What there is to score, without a network: forty pictures of four classes, the same for "backbone" and "ball"."""
    random = np.random.default_rng(0)
    rows = Embedded(torch.from_numpy(random.uniform(-1, 1, (40, 3))), random.integers(0, 4, 40))
    kinds = (("backbone", Geometry("cosine")), ("ball", Geometry("poincare", 0.1)))
    monkeypatch.setattr(evaluation, "_embedded", lambda *_: ((name, space, rows, None) for name, space in kinds))
    return rows


def test_whether_the_nearest_is_right_is_known_whatever_recall_is_asked_for(embedded):
    found = evaluation.evaluate(None, None, Config(eval=EvalConfig(recall_at=(4, 2))), 1)
    right = embedded.labels[found.neighbors.rows[:, 0]] == embedded.labels
    assert np.array_equal(found.is_right, right)
    assert found.scores["ball"].recall_at_k["1"] == pytest.approx(right.mean())
    assert set(found.scores["ball"].recall_at_k) == {"1", "2", "4"}


def test_the_runs_seed_decides_the_clusters_that_are_scored(embedded):
    def nmi(seed):
        config, splits = Config(train=TrainConfig(seed=seed)), Splits(train=None, test=())
        while_training, after = score_unseen(None, splits, config), evaluation.evaluate(None, splits, config, 1).scores
        assert while_training["ball"].nmi == after["ball"].nmi
        return while_training["ball"].nmi

    assert nmi(0) != nmi(1)


def test_a_matrix_is_drawn_where_it_can_be_read():
    names = tuple(f"class {i}" for i in range(100))
    labels, nearest = np.array([3, 3, 3, 7]), np.array([3, 3, 7, 7])
    found = matrix("class", names, labels, nearest)
    assert found.names == ["class 3", "class 7"]
    np.testing.assert_allclose(found.shares, [[2 / 3, 1 / 3], [0, 1]])
    many = np.arange(MATRIX_UP_TO + 1)
    assert matrix("class", names, many, many) is None
    assert matrix("class", names, many[1:], many[1:]) is not None


def test_frames_tell_right_from_wrong_by_colour_and_by_mark(tmp_path):
    Image.new("RGB", (40, 20), "#336699").save(tmp_path / "a.png")
    sheets = {}
    for is_right in (True, False, None):
        tile = Tile(str(tmp_path / "a.png"), ("0.1", "a very long name of a class " * 9), is_right)
        sheets[is_right] = np.asarray(draw_sheet([Answer(tile, [tile] * 13)], "title " * 99, "")).astype(int)
    assert sheets[True].shape == sheets[False].shape
    for is_right, colour in ((True, RIGHT), (False, WRONG)):
        count = (sheets[is_right] == rgb(colour)).all(2).sum()
        assert count > 13 * 4 * TILE
        assert not any((sheets[other] == rgb(colour)).all(2).any() for other in sheets if other is not is_right)
    # Without any colour, the marks are still two.
    grey = {is_right: (sheets[is_right] == 255).all(2) for is_right in (True, False)}
    assert (grey[True] != grey[False]).sum() > 13 * 20


def rgb(colour):
    return tuple(int(colour[i : i + 2], 16) for i in (1, 3, 5))
