"""What TensorBoard is told."""

import csv
import itertools
import math
import types

import numpy as np
import pytest
import torch
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData
from tensorboard.summary.writer import event_file_writer

from uhml.config import Config, DataConfig, TrainConfig
from uhml.data.pictures import Pictures, Splits
from uhml.data.sampling import evenly
from uhml.hierarchy import average_linkage
from uhml.hierarchy.plot import SHOWN_CLUSTERS, draw_top
from uhml.loss import Pairs
from uhml.reporting import figures, projector
from uhml.reporting.figures import draw_batch, draw_clusters
from uhml.reporting.hierarchy import show_hierarchy
from uhml.reporting.report import Reporter

LEVELS = np.array([[0, 0, 1, 1, 2, 2, 3, 3, 4], [0, 0, 0, 0, 1, 1, 1, 1, 2]], np.int32)


@pytest.fixture
def make_pictures(tmp_path):
    """Write small pictures under given names, each of one grey that is its number."""

    def _make_pictures(names, **options):
        paths = []
        for i, name in enumerate(names):
            paths.append(str(tmp_path / "pictures" / name))
            (tmp_path / "pictures").mkdir(exist_ok=True)
            Image.new("RGB", (6, 4), (i, i, i)).save(paths[-1], format="PNG")
        return Pictures(paths=tuple(paths), **options)

    return _make_pictures


def told(run_dir):
    """All that is told, none left out."""
    events = EventAccumulator(
        str(run_dir / "tensorboard"), size_guidance={"scalars": 0, "images": 0, "histograms": 0, "tensors": 0}
    )
    return events.Reload()


# Going on


def test_what_was_told_after_the_checkpoint_is_told_once(tmp_path, monkeypatch):
    # Launches begin in seconds of their own, by which TensorBoard orders files; within one, number 10 comes before 9.
    seconds = itertools.count(10**9)
    monkeypatch.setattr(event_file_writer, "time", types.SimpleNamespace(time=lambda: next(seconds)))

    def tell(report, steps):
        for step in steps:
            report.scalars("train", step, {"loss": float(step)})

    with Reporter(tmp_path, Config()) as report:
        tell(report, (1, 2))
        saved = {"step": 2, "recorded": report.settle()}
        tell(report, (2, 3))
    with Reporter(tmp_path, Config(), saved) as report:
        tell(report, (3,))
        again = {"step": 3, "recorded": report.settle()}
        assert len(again["recorded"]) == 3
        tell(report, (4, 5))
    # A second time, from the same: what the first launch after it has told is forgotten, files and all.
    with Reporter(tmp_path, Config(), saved) as report:
        tell(report, (3, 4))
    assert len(list((tmp_path / "tensorboard").glob("events.*"))) == 2
    assert [event.step for event in told(tmp_path).Scalars("train/loss")] == [1, 2, 3, 4]
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
    assert [line.split('"step": ')[1][0] for line in lines] == ["1", "2", "3", "4"]


def test_lost_records_are_told_and_do_not_stop_a_run(tmp_path, caplog):
    with Reporter(tmp_path, Config()) as report:
        report.scalars("train", 1, {"loss": 1.0})
        saved = {"step": 1, "recorded": report.settle()}
    (tmp_path / "metrics.jsonl").write_text("")
    with Reporter(tmp_path, Config(), saved):
        pass
    assert f"{tmp_path / 'metrics.jsonl'} is shorter than it was" in caplog.text
    assert (tmp_path / "metrics.jsonl").stat().st_size == 0


def test_the_config_is_in_the_table_of_hyper_parameters_of_the_run_itself(tmp_path):
    config = Config(train=TrainConfig(seed=7), data=DataConfig(root="caf\udce9"))
    with Reporter(tmp_path, config) as report:
        saved = {"step": 0, "recorded": report.settle()}
    with Reporter(tmp_path, config, saved):
        pass
    assert not [path for path in (tmp_path / "tensorboard").iterdir() if path.is_dir()]
    metadata = told(tmp_path).summary_metadata
    content = {tag: HParamsPluginData.FromString(metadata[tag].plugin_data.content) for tag in metadata}
    values = content["_hparams_/session_start_info"].session_start_info.hparams
    assert values["train.seed"].number_value == 7
    assert values["data.augment_flip"].string_value == "True"
    assert values["data.root"].string_value == r"caf\udce9"
    scores = [info.name.tag for info in content["_hparams_/experiment"].experiment.metric_infos]
    assert scores[0] == "unseen_ball/recall_at_1"


# Distances


def test_distances_are_counted_by_the_finest_level_that_pairs_share(tmp_path):
    random = np.random.default_rng(0)
    distances, similarity = random.random((20, 30)) * 5, random.integers(0, 4, (20, 30))
    similarity[similarity == 1] = 2
    is_self = np.eye(20, 30, dtype=bool)
    with Reporter(tmp_path, Config()) as report:
        report.distances(4, Pairs(*map(torch.from_numpy, (distances, similarity, is_self))), num_levels=2)
    events = told(tmp_path)
    # Two levels and two views: similarity 2 is level 1, the finest. No pair is on level 2.
    tags = {"distances/apart": 0, "distances/level1": 2, "distances/views_of_one_picture": 3}
    assert set(events.Tags()["histograms"]) == set(tags)
    for tag, s in tags.items():
        (event,) = events.Histograms(tag)
        chosen, found = distances[(similarity == s) & ~is_self], event.histogram_value
        assert event.step == 4
        assert found.num == len(chosen)
        assert (found.min, found.max) == pytest.approx((chosen.min(), chosen.max()))
        assert found.sum == pytest.approx(chosen.sum())


# Pictures


@pytest.mark.parametrize("num_items", [1, 2, 49, 50, 51, 5000])
def test_evenly_chosen_from_the_first_to_the_last(num_items):
    chosen = evenly(num_items, 50)
    assert len(chosen) == min(num_items, 50)
    assert (chosen[0], chosen[-1]) == (0, num_items - 1)
    assert (np.diff(chosen) >= 1).all()
    assert len(chosen) < 3 or np.ptp(np.diff(chosen)) <= 1


def test_a_hierarchy_is_shown_by_its_tree_its_clusters_and_a_batch(make_pictures, tmp_path):
    pictures = make_pictures([f"{i}.png" for i in range(9)])
    tree = average_linkage(torch.rand(9, 2), geometry="euclidean", mode="exact")
    with Reporter(tmp_path, Config()) as report:
        report.hierarchy(6, show_hierarchy(6, tree, LEVELS, pictures, np.array([[0, 1], [4, 5]])))
    events = told(tmp_path)
    assert set(events.Tags()["images"]) == {"clusters/level1", "clusters/level2", "hierarchy/tree", "hierarchy/batch"}
    for tag in events.Tags()["images"]:
        assert [event.step for event in events.Images(tag)] == [6]
    assert events.Scalars("hierarchy/level2_clusters")[0].value == 3
    assert events.Scalars("hierarchy/level1_singletons")[0].value == 1


def test_a_row_of_the_sheet_is_a_cluster_and_the_largest_comes_first(make_pictures):
    pictures = make_pictures([f"{i}.png" for i in range(9)])
    sheet = draw_clusters(LEVELS[1], pictures)
    step = figures.THUMBNAIL + 2
    # In the middle of a tile is the grey of its picture.
    greys = sheet[0, step // 2 :: step, step // 2 :: step].numpy()
    assert greys[:2, :4].tolist() == [[0, 1, 2, 3], [4, 5, 6, 7]]
    assert (greys[:2, 4:] == 255).all()


def test_a_batch_is_framed_by_what_is_shared_and_its_rows_are_in_the_order_of_the_tree(make_pictures):
    pictures = make_pictures([f"{i}.png" for i in range(9)])
    # Out of order; the row of 3 is filled up from the same coarse cluster, and that of 8, which is alone, from others.
    batch = np.array([[8, 4, 5], [3, 2, 0], [6, 7, 5], [1, 0, 3]])
    axes = draw_batch(batch, LEVELS, pictures, "title").axes[0]
    order = [[1, 0, 3], [3, 2, 0], [6, 7, 5], [8, 4, 5]]
    shown = [image.get_array()[32, 32, 0] for image in axes.images]
    assert shown == [picture for row in order for picture in row]
    frames = [patch for patch in axes.patches if not patch.get_fill()]
    finest, coarse = (axes.patches[i].get_facecolor() for i in (0, 4))
    apart = frames[-1].get_edgecolor()
    assert len({finest, coarse, apart}) == 3
    for frame, first, picture in zip(frames, np.repeat(order, 3, 0)[:, 0], shown, strict=True):
        shared = [level for level in LEVELS if level[first] == level[picture]]
        assert frame.get_edgecolor() == {2: finest, 1: coarse, 0: apart}[len(shared)]
    # Bars: of the finest level one for each row, of the coarse one a bar over the first two rows.
    bars = [patch for patch in axes.patches if patch.get_fill()]
    assert [round(bar.get_height() + 0.12) for bar in bars] == [1, 1, 1, 1, 2, 1, 1]
    sizes = [text.get_text() for text in axes.texts if text.get_rotation() == 90]
    assert sizes == ["2", "2", "2", "1", "4", "4", "1"]


@pytest.mark.parametrize("num_levels", [1, 2, 5])
@pytest.mark.parametrize("shape", [(2, 2), (40, 30)])
def test_batches_of_any_size_are_drawn(make_pictures, num_levels, shape):
    pictures = make_pictures(["0.png"])
    levels = np.zeros((num_levels, 1), np.int32)
    figure = draw_batch(np.zeros(shape, np.int64), levels, pictures, "title")
    figure.canvas.draw()
    rows, columns = min(shape[0], figures.BATCH_CLUSTERS), min(shape[1], figures.BATCH_PICTURES)
    assert len(figure.axes[0].images) == rows * columns


@pytest.mark.parametrize("num_points", [1, 2, 30, 300])
def test_lines_in_the_tree_are_where_it_is_cut(num_points):
    tree = average_linkage(torch.rand(num_points, 3), geometry="euclidean", mode="exact")
    axes = draw_top(tree, "title", [200, 20, 5, 2, 1]).axes[0]
    shown = {count for count in (20, 5, 2) if count <= min(num_points, SHOWN_CLUSTERS)}
    lines = [text for text in axes.texts if text.get_text().endswith("clusters")]
    heights = {int(text.get_text().split()[0]): text.get_position()[1] for text in lines}
    assert set(heights) == shown
    assert len(lines) == len(axes.texts) - (num_points == 1)  # which says that there is nothing to draw
    for count, height in heights.items():
        # The tree of two points has its only merge at one height, and no other to cut between.
        assert num_points == 2 or int(tree.cut(heights=[height]).max()) + 1 == count
    if num_points > 1:
        sizes = [int(label.get_text()) for label in axes.get_xticklabels()]
        assert len(sizes) == min(num_points, SHOWN_CLUSTERS)
        assert sum(sizes) == num_points


def test_a_tree_of_equal_points_is_no_error(recwarn):
    draw_top(average_linkage(torch.zeros(9, 2)), "title", [3])
    assert not recwarn.list


# The projector


@pytest.fixture
def points_by_file(monkeypatch):
    """A network whose embedding of a picture is its grey, three times."""

    def embed_share(model, pictures, config, description):
        greys = [Image.open(path).convert("L").getpixel((0, 0)) for path in pictures.paths]
        return torch.tensor(greys, dtype=torch.float32)[:, None].expand(-1, 3)

    monkeypatch.setattr(projector, "embed_share", embed_share)


def shown_in_projector(run_dir):
    folder = run_dir / "tensorboard" / "00007" / "embedding"
    with (folder / "metadata.tsv").open(newline="", encoding="utf-8") as file:
        rows = list(csv.reader(file, delimiter="\t", quoting=csv.QUOTE_NONE))
    points = np.loadtxt(folder / "tensors.tsv", delimiter="\t", ndmin=2)
    return rows, points, Image.open(folder / "sprite.png")


def test_the_projector_shows_each_picture_beside_its_name_whatever_its_name(
    make_pictures, points_by_file, tmp_path, capsys
):
    names = [
        "a\tb.png",
        "a\nb.png",
        "a\r\nb",
        "\u2028.png",
        "<img src=x onerror=alert(1)>.png",
        '"q',
        "\udcff.png",
        "ü",
    ]
    labels = np.arange(8) % 2
    pictures = make_pictures(names, labels=labels, class_names=("one\ttwo", "<b>"))
    for _ in range(2):  # as after a launch that was killed at the end
        with Reporter(tmp_path, Config()) as report:
            projector.project(None, Splits(train=pictures, test=pictures), 7, Config(), report)
    assert capsys.readouterr().out == ""
    rows, points, sprite = shown_in_projector(tmp_path)
    assert rows[0] == ["picture", "class"]
    kept = ["a?b.png", "a?b.png", "a??b", "?.png", "<img src=x onerror=alert(1)>.png", '"q', "?.png", "ü"]
    assert rows[1:] == [[name, ("one?two", "<b>")[label]] for name, label in zip(kept, labels, strict=True)]
    assert points[:, 0].tolist() == list(range(8))
    side = sprite.size[0] // 3
    assert sprite.size == (3 * side, 3 * side)
    greys = [sprite.getpixel((i % 3 * side + side // 2, i // 3 * side + side // 2))[0] for i in range(8)]
    assert greys == pytest.approx(range(8), abs=1)


def test_without_test_pictures_or_classes_the_projector_shows_those_of_the_training(
    make_pictures, points_by_file, tmp_path
):
    with Reporter(tmp_path, Config()) as report:
        projector.project(None, Splits(train=make_pictures(["only.png"])), 7, Config(), report)
    rows, points, _ = shown_in_projector(tmp_path)
    assert rows == [["picture", "class"], ["only.png", "unknown"]]
    assert points.shape == (1, 3)


def test_of_very_many_pictures_some_are_shown_evenly_chosen(make_pictures, points_by_file, tmp_path):
    pictures = make_pictures([f"{i}.png" for i in range(100)])
    many = Pictures(paths=tuple(path for path in pictures.paths for _ in range(100)))
    with Reporter(tmp_path, Config()) as report:
        projector.project(None, Splits(train=many), 7, Config(), report)
    rows, points, sprite = shown_in_projector(tmp_path)
    assert len(rows) - 1 == len(points) == projector.MOST
    assert max(sprite.size) == figures.THUMBNAIL * math.isqrt(projector.MOST) <= 8192
    # Of each of the hundred files as many, or one more or less.
    assert np.ptp(np.bincount(points[:, 0].astype(int), minlength=100)) <= 1
