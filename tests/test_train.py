"""Whole runs, started as their users start them."""

import dataclasses
import json
import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw

import uhml.train
from uhml import cli, poincare
from uhml.config import Config, DataConfig, ModelConfig, TrainConfig, load_config, parse_dump
from uhml.data.loading import TrainingBatches
from uhml.data.transforms import training_transform
from uhml.data.verify import list_pictures
from uhml.errors import UserError
from uhml.hierarchy import Dendrogram, linkage
from uhml.hierarchy.knn import nearest_neighbors
from uhml.loss import HierarchicalLogRatioLoss, similarity_levels
from uhml.model import build_embedder
from uhml.model.head import HyperbolicHead
from uhml.model.projector import Projector
from uhml.run.checkpoint import read_file, write_file
from uhml.run.random_state import restore_random_state
from uhml.run.reclustering import clusters_to_learn
from uhml.run.status import read_status
from uhml.run.training_state import CONTENTS, read_state
from uhml.train import build_model
from uhml.trained import load_trained

CONFIGS = Path(__file__).parent.parent / "configs"
NUM_CLASSES, PER_CLASS = 8, 9
LAST_TREE = "hierarchies/step-00000004.npz"


@pytest.fixture(scope="module")
def shapes(tmp_path_factory):
    """Eight classes of nine pictures: a polygon of 3 to 10 corners, at another place, size and colour each time."""
    root = tmp_path_factory.mktemp("shapes")
    random = np.random.default_rng(0)
    for corners in range(3, 3 + NUM_CLASSES):
        folder = root / f"corners{corners:02d}"
        folder.mkdir()
        for i in range(PER_CLASS):
            image = Image.new("RGB", (48, 40), tuple(random.integers(150, 255, 3).tolist()))
            circle = (*random.uniform(18, 30, 2).tolist(), random.uniform(8, 16))
            fill = tuple(random.integers(0, 120, 3).tolist())
            ImageDraw.Draw(image).regular_polygon(circle, corners, random.uniform(0, 360), fill)
            image.save(folder / f"{i}.png")
    return root


@pytest.fixture
def config(tmp_path):
    """A config file of a run of seconds."""
    path = tmp_path / "tiny.yaml"
    path.write_text(
        "data: {dataset: folder, image_size: 32, fit: squash, num_workers: 1}\n"
        "model: {embedding_dim: 16}\n"
        "hierarchy: {recluster_every: 2, num_neighbors: 5, cut_by: counts, cuts: [12, 6, 3]}\n"
        "mining: {pictures_per_cluster: 2}\n"
        "train: {num_steps: 4, global_batch_size: 16, log_every: 1, device: cpu}\n"
        "eval: {recall_at: [1, 4], batch_size: 8}\n"
    )
    return path


def run(config, root, run_dir, *overrides):
    """Run in this process."""
    return cli.main(["train", str(config), f"data.root={root}", "--run-dir", str(run_dir), *overrides])


@pytest.mark.slow
@pytest.mark.ddp
def test_ranks_that_name_the_run_differently_make_one(config, shapes, tmp_path):
    """As they do by their clocks, when none is named."""
    words = ["train", str(config), f"data.root={shapes}", "train.num_steps=1", "--run-dir"]
    program = tmp_path / "named.py"
    program.write_text(
        "import os, sys\n"
        "from uhml import cli\n"
        f"sys.exit(cli.main({words!r} + [{str(tmp_path / 'run')!r} + os.environ['RANK']]))\n"
    )
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(program)]
    ended = subprocess.run(launcher, capture_output=True, text=True, timeout=280, check=False)
    assert ended.returncode == 0, ended.stderr
    assert sorted(path.name for path in (tmp_path / "run0" / "logs").iterdir()) == ["rank0.log", "rank1.log"]
    assert not (tmp_path / "run1").exists()


@pytest.mark.parametrize("overlap", [0, 1])
def test_training_workers_are_gone_when_pictures_are_embedded(config, shapes, tmp_path, monkeypatch, overlap):
    """A node need not hold both."""
    alive = []
    embed = uhml.train.embed_to_cluster

    def seen(*arguments):
        alive.append(len(multiprocessing.active_children()))
        return embed(*arguments)

    monkeypatch.setattr(uhml.train, "embed_to_cluster", seen)
    assert run(config, shapes, tmp_path / "run", f"hierarchy.overlap_steps={overlap}", "data.num_workers=1") == 0
    assert alive == [0, 0, 0]


def torchrun(num_ranks, config, root, run_dir, *overrides):
    """Run in processes of their own, as a user would."""
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(num_ranks)]
    command = [*launcher, "-m", "uhml", "train", str(config), f"data.root={root}", "--run-dir", str(run_dir)]
    return subprocess.run([*command, *overrides], capture_output=True, text=True, timeout=280, check=False)


def figures(run_dir, kind):
    lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    return [line for line in lines if line["kind"] == kind]


def test_every_key_reaches_what_it_is_for(shapes, config, tmp_path, monkeypatch):
    """Each with a value that is not its default, and looked at where it takes effect."""
    seen = {}

    def spied(owner, name, key):
        original = getattr(owner, name)

        def call(*arguments, **options):
            seen.setdefault(key, (arguments, options))
            return original(*arguments, **options)

        monkeypatch.setattr(owner, name, call)

    spied(uhml.train, "average_linkage_over_ranks", "linkage")
    spied(uhml.train, "HierarchicalLoss", "loss")
    spied(uhml.train.nn.utils, "clip_grad_norm_", "clip")
    spied(uhml.run.reclustering, "ClusterBatches", "batches")
    spied(HyperbolicHead, "fit", "head")
    spied(Projector, "fit", "projector")
    linkage_keys = {
        "mode": "exact",
        "geometry": "cosine",
        "num_neighbors": 7,
        "exact_search_up_to": 33,
        "min_recall": 0.7,
    }
    changed = {f"hierarchy.{key}": value for key, value in linkage_keys.items()} | {
        "model.curvature": 0.2,
        "model.start_norm": 1.5,
        "model.whitening": 0.25,
        "mining.clusters_together": 2,
        "loss.omega": 0.7,
        "loss.view_weight": 0.4,
        "loss.view_sharpness": 7.0,
        "optim.gradient_clip": 0.5,
        "train.seed": 5,
        "train.num_steps": 1,
    }
    for key, value in changed.items():
        section, name = key.split(".")
        assert getattr(getattr(Config(), section), name) != value, f"{key}={value} is the default"
    assert run(config, shapes, tmp_path / "run", *(f"{key}={value}" for key, value in changed.items())) == 0
    assert seen["linkage"][1] == {**linkage_keys, "curvature": 0.2}
    options, num_cuts, num_views = seen["loss"][0]
    assert (options.omega, options.view_weight, options.view_sharpness, num_cuts, num_views) == (0.7, 0.4, 7.0, 3, 2)
    assert seen["clip"][0][1] == 0.5
    # Clusters, pictures of each, seed, and how many come together.
    assert seen["batches"][0][1:] == (4, 2, 5, 2)
    _, init, _, start_norm, whitening = seen["head"][0]
    assert (init, start_norm, whitening) == ("whitened_pca", 1.5, 0.25)
    assert seen["projector"][0][3] == 1.5


def test_seeds_begin_with_other_weights_and_other_batches():
    def weights(seed):
        model = ModelConfig(backbone="test_efficientnet.r160_in1k", weights="random")
        built = build_model(Config(model=model, data=DataConfig(image_size=32), train=TrainConfig(seed=seed)), True)
        return torch.cat([weight.flatten() for weight in built.state_dict().values()])

    assert torch.equal(weights(0), weights(0))
    assert not torch.equal(weights(0), weights(1))
    levels = torch.arange(400)[None].int() // 4
    first, again, other = (
        clusters_to_learn(levels, Config(train=TrainConfig(seed=seed)))(0).tolist() for seed in (0, 0, 1)
    )
    assert first == again != other


def stop_after(step, monkeypatch):
    """Send this process SIGTERM within a step, as a cluster would."""
    true_step = uhml.train.train_step

    def signalled(model, images, pictures, state, *rest):
        if state.step + 1 == step:
            os.kill(os.getpid(), signal.SIGTERM)
        return true_step(model, images, pictures, state, *rest)

    monkeypatch.setattr(uhml.train, "train_step", signalled)


def result(run_dir):
    return json.loads((run_dir / "result.json").read_text())


@pytest.fixture
def finished(shapes, config, tmp_path):
    """A finished run."""
    run_dir = tmp_path / "run"
    assert run(config, shapes, run_dir) == 0
    return run_dir


def test_a_cache_changes_nothing(shapes, config, tmp_path):
    small = ("model.backbone=test_efficientnet.r160_in1k", "model.weights=random", "train.num_steps=3")
    options = {"files": (), "cache": (f"data.cache={tmp_path / 'kept'}", "data.reduce_to=40", "data.num_workers=0")}
    for name, more in options.items():
        assert run(config, shapes, tmp_path / name, *small, *more) == 0
    assert len(list((tmp_path / "kept").iterdir())) == 2
    for kind in ("train", "hierarchy", "unseen_ball", "unseen_backbone"):
        theirs, ours = (figures(tmp_path / name, kind) for name in options)
        assert ours
        assert ours == theirs
    theirs, ours = (read_file(tmp_path / name / "checkpoints" / "step-00000003.pt")["model"] for name in options)
    torch.testing.assert_close(ours, theirs, rtol=0, atol=0)


def test_run_leaves_exactly_these_files(finished, shapes, config):
    found = {str(p.relative_to(finished)) for p in finished.rglob("*") if p.is_file()}
    events = {name for name in found if name.startswith("tensorboard/events.out.tfevents.")}
    assert len(events) == 1
    assert found - events == {
        "config.yaml",
        "metrics.jsonl",
        "result.json",
        "status.json",
        "lock",
        "checkpoints/step-00000000.pt",
        "checkpoints/step-00000002.pt",
        "checkpoints/step-00000004.pt",
        "hierarchies/step-00000000.npz",
        "hierarchies/step-00000002.npz",
        "hierarchies/step-00000004.npz",
        "logs/rank0.log",
        "tensorboard/projector_config.pbtxt",
        "tensorboard/00004/embedding/metadata.tsv",
        "tensorboard/00004/embedding/sprite.png",
        "tensorboard/00004/embedding/tensors.tsv",
    }
    saved = result(finished)
    assert (saved["steps"], saved["world_size"]) == (4, 1)
    assert saved["seconds"] > 0
    for row in (saved["frozen"], saved["trained"], saved["trained"]["cosine"], saved["start"]):
        assert set(row["recall_at_k"]) == {"1", "4"}
        assert all(0 <= score <= 1 for score in (*row["recall_at_k"].values(), row["map_at_r"], row["nmi"]))
    # The resolved config runs the same run again.
    assert load_config(finished / "config.yaml") == load_config(config, [f"data.root={shapes}"])
    assert Dendrogram.load(finished / LAST_TREE).num_points == NUM_CLASSES // 2 * PER_CLASS
    assert [line["step"] for line in figures(finished, "train")] == [1, 2, 3, 4]
    assert [line["step"] for line in figures(finished, "hierarchy")] == [0, 2, 4]


def test_same_seed_same_run(finished, shapes, config, tmp_path):
    again = tmp_path / "again"
    assert run(config, shapes, again, "data.num_workers=0") == 0
    assert (again / "metrics.jsonl").read_text() == (finished / "metrics.jsonl").read_text()
    first, second = (
        torch.load(path / "checkpoints/step-00000004.pt", weights_only=True)["model"] for path in (finished, again)
    )
    assert all(torch.equal(first[name], second[name]) for name in first)
    other = tmp_path / "other"
    assert run(config, shapes, other, "train.seed=1") == 0
    assert figures(other, "train")[0]["loss"] != figures(finished, "train")[0]["loss"]


@pytest.mark.parametrize(
    ("mode", "geometry", "cut_by", "cuts"),
    [
        ("exact", "poincare", "heights", "[1.02,1.05]"),
        ("exact", "cosine", "quantiles", "[0.5,0.9]"),
        ("dense", "poincare", "heights", "[0.5,1.5,2.5]"),
        ("graph", "cosine", "counts", "[9]"),
    ],
)
def test_every_way_to_a_hierarchy(shapes, config, tmp_path, mode, geometry, cut_by, cuts):
    hierarchy = {"mode": mode, "geometry": geometry, "cut_by": cut_by, "cuts": cuts}
    overrides = [f"hierarchy.{key}={value}" for key, value in hierarchy.items()]
    assert run(config, shapes, tmp_path / "run", "train.num_steps=2", *overrides) == 0
    levels = figures(tmp_path / "run", "hierarchy")[0]
    sizes = [value for name, value in levels.items() if name.endswith("_clusters")]
    assert len(sizes) == len(cuts.split(","))
    assert sizes == sorted(sizes, reverse=True)
    assert all(1 <= size <= NUM_CLASSES // 2 * PER_CLASS for size in sizes)


def test_the_search_for_neighbours_is_as_exact_as_asked(shapes, config, tmp_path, monkeypatch):
    searches = []

    def spied(*arguments, min_recall, **options):
        searches.append(min_recall)
        return nearest_neighbors(*arguments, min_recall=min_recall, **options)

    monkeypatch.setattr(linkage, "nearest_neighbors", spied)
    overrides = ["train.num_steps=0", "hierarchy.min_recall=0.7"]
    assert run(config, shapes, tmp_path / "exact", *overrides) == 0
    assert run(config, shapes, tmp_path / "fast", *overrides, "hierarchy.exact_search_up_to=35") == 0
    # There are 36 pictures.
    assert searches == [1.0, 0.7]
    default = Config().hierarchy
    assert (default.exact_search_up_to, default.min_recall) == (linkage.EXACT_SEARCH_UP_TO, linkage.MIN_RECALL)


@pytest.mark.ddp
@pytest.mark.slow
@pytest.mark.parametrize("num_ranks", [2, 4])
def test_ranks_do_not_change_the_run(finished, shapes, config, tmp_path, num_ranks):
    run_dir = tmp_path / "ranks"
    ended = torchrun(num_ranks, config, shapes, run_dir)
    assert ended.returncode == 0, ended.stderr
    assert result(run_dir)["world_size"] == num_ranks
    assert len(list((run_dir / "logs").iterdir())) == num_ranks
    for mine, theirs in zip(figures(finished, "train"), figures(run_dir, "train"), strict=True):
        assert theirs["loss"] == pytest.approx(mine["loss"], rel=1e-3)
    # Before the first step nothing but float32 rounding of the embeddings can differ.
    assert figures(run_dir, "train")[0]["loss"] == pytest.approx(figures(finished, "train")[0]["loss"], rel=1e-5)
    assert figures(run_dir, "hierarchy") == figures(finished, "hierarchy")
    mine, theirs = (Dendrogram.load(path / LAST_TREE).cut(counts=[12, 6, 3]) for path in (finished, run_dir))
    assert torch.equal(mine, theirs)
    assert result(run_dir)["trained"]["recall_at_k"] == result(finished)["trained"]["recall_at_k"]


def test_unlabelled_folder_is_trained_and_not_scored(shapes, config, tmp_path, caplog):
    flat = tmp_path / "flat"
    flat.mkdir()
    for i, path in enumerate(sorted(shapes.rglob("*.png"))):
        # On the disk a name is any bytes, not only letters of UTF-8.
        (flat / (f"{i}\udcff\n<b>.png" if i % 9 == 0 else f"{i}.png")).write_bytes(path.read_bytes())
    assert run(config, flat, tmp_path / "run") == 0
    assert result(tmp_path / "run")["trained"] is None
    assert "nothing to score" in caplog.text
    assert Dendrogram.load(tmp_path / "run" / LAST_TREE).num_points == NUM_CLASSES * PER_CLASS


def test_queries_search_their_gallery(shapes, config, tmp_path):
    lines = []
    for number, folder in enumerate(sorted(shapes.iterdir())):
        for i, path in enumerate(sorted(folder.iterdir())):
            status = "train" if number < NUM_CLASSES // 2 else "query" if i < 3 else "gallery"
            name = f"img/{folder.name}/{path.name}"
            (tmp_path / "Img" / name).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / "Img" / name).write_bytes(path.read_bytes())
            lines.append(f"{name} id_{number:08d} {status}")
    (tmp_path / "Eval").mkdir()
    header = f"{len(lines)}\nimage_name item_id evaluation_status\n"
    (tmp_path / "Eval" / "list_eval_partition.txt").write_text(header + "\n".join(lines) + "\n")
    assert run(config, tmp_path, tmp_path / "run", "data.dataset=inshop", "train.num_steps=2") == 0
    # Three queries of each of four items, so that recall comes in twelfths; six pictures of each in the gallery.
    recall = result(tmp_path / "run")["trained"]["recall_at_k"]["1"]
    assert recall * 12 == pytest.approx(round(recall * 12))
    assert recall > 0


def all_to_train(shapes, folder, *more):
    """List all eight classes as such to train on, enough of them to hold some out."""
    rows = [f"{path},{path.parent.name},train" for path in sorted(shapes.glob("*/*.png"))]
    (folder / "list.csv").write_text("\n".join(["path,label,split", *rows, *more]))
    return folder / "list.csv"


def test_validation_holds_out_training_classes_and_keeps_the_best(shapes, config, tmp_path, caplog):
    (tmp_path / "never-opened.png").write_text("no picture")
    listed = all_to_train(shapes, tmp_path, f"{tmp_path / 'never-opened.png'},other,test")
    options = ("data.dataset=list", "data.score_on=validation", "eval.at_reclustering=true", "train.num_steps=6")
    assert run(config, listed, tmp_path / "run", *options) == 0
    assert f"train: {6 * PER_CLASS} pictures of 6 classes" in caplog.text
    assert f"validation: {2 * PER_CLASS} pictures of 2 classes" in caplog.text
    curve = {line["step"]: line["recall_at_1"] for line in figures(tmp_path / "run", "unseen_ball")}
    assert list(curve) == [0, 2, 4, 6]
    best = torch.load(tmp_path / "run" / "checkpoints" / "best.pt", weights_only=True)
    assert best["step"] == max(curve, key=curve.get)
    assert read_state(tmp_path / "run" / "checkpoints" / "step-00000006.pt")["step"] == 6
    # On test classes no checkpoint is the best.
    assert run(config, shapes, tmp_path / "tested", "eval.at_reclustering=true") == 0
    assert not (tmp_path / "tested" / "checkpoints" / "best.pt").exists()


def test_validation_needs_classes(shapes, config, tmp_path, caplog):
    assert run(config, shapes, tmp_path / "run", "data.score_on=validation") == 2
    assert "data.score_on=validation holds out a quarter of the training classes, and 4 are known" in caplog.text


def test_corrupt_picture_is_refused_by_name_or_skipped_on_demand(shapes, config, tmp_path, caplog):
    root = tmp_path / "pictures"
    for path in shapes.rglob("*.png"):
        (root / path.parent.name).mkdir(parents=True, exist_ok=True)
        (root / path.parent.name / path.name).write_bytes(path.read_bytes())
    broken = root / "corners03" / "0.png"
    broken.write_bytes(broken.read_bytes()[:100])
    assert run(config, root, tmp_path / "run") == 2
    assert str(broken) in caplog.text
    assert "data.skip_corrupt=true" in caplog.text
    assert run(config, root, tmp_path / "skipping", "data.skip_corrupt=true") == 0
    assert "without 1 unreadable" in caplog.text
    assert Dendrogram.load(tmp_path / "skipping" / LAST_TREE).num_points == NUM_CLASSES // 2 * PER_CLASS - 1
    # With the broken one there would be just enough for a batch.
    whole = ("data.skip_corrupt=true", f"train.global_batch_size={2 * NUM_CLASSES // 2 * PER_CLASS}")
    assert run(config, root, tmp_path / "short", *whole) == 2
    assert "of 35 training pictures train.global_batch_size=68 is the largest that fits" in caplog.text


def test_init_from_takes_the_weights_and_nothing_else(finished, shapes, config, tmp_path):
    run_dir = tmp_path / "next"
    # Nor are other weights fetched, from wherever the config would have them.
    nowhere = f"model.weights={tmp_path / 'nowhere.pth'}"
    assert run(config, shapes, run_dir, f"model.init_from={finished}", nowhere, "train.num_steps=0") == 0
    assert result(run_dir)["start"] == result(finished)["trained"]
    assert result(run_dir)["trained"] == result(finished)["trained"]
    assert result(run_dir)["steps"] == 0


def test_a_finished_run_is_loaded_to_be_used(finished, shapes, tmp_path):
    trained = load_trained(str(finished))
    assert trained.step == 4
    assert trained.config.model.embedding_dim == 16
    assert not trained.model.training
    saved = read_file(trained.checkpoint)["model"]
    assert trained.model.state_dict().keys() == saved.keys()
    assert all(torch.equal(value, saved[name]) for name, value in trained.model.state_dict().items())
    with pytest.raises(UserError, match="no such checkpoint"):
        load_trained(str(tmp_path / "elsewhere"))
    write_file(tmp_path / "weights.pt", {"model": saved})
    with pytest.raises(UserError, match="weights alone"):
        load_trained(str(tmp_path / "weights.pt"))
    spoilt = read_file(trained.checkpoint)
    next(iter(spoilt["model"].values())).fill_(torch.nan)
    write_file(tmp_path / "nan.pt", spoilt)
    with pytest.raises(UserError, match=r"nan\.pt: .* holds NaN or infinite values"):
        load_trained(str(tmp_path / "nan.pt"))


def test_a_checkpoint_of_other_contents_is_told(finished, shapes, config, caplog):
    newest = max((finished / "checkpoints").glob("step-*.pt"))
    state = read_state(newest)
    for name in CONTENTS:
        others = {key: value for key, value in state.items() if key != name}
        for harmed in (others, {**others, name: b"strange"}):
            write_file(newest, harmed)
            with pytest.raises(UserError, match=f"its {name} is not what this version of uhml leaves there"):
                read_state(newest)
    (finished / "result.json").unlink()
    assert run(config, shapes, finished) == 2
    assert f"{newest}: its {name} is not what" in caplog.text


def test_a_run_is_never_overwritten_unasked(finished, shapes, config, caplog):
    before = (finished / "result.json").read_text()
    assert run(config, shapes, finished) == 2
    assert "--overwrite" in caplog.text
    assert (finished / "result.json").read_text() == before
    (finished / "mine.txt").write_text("not of the run")
    assert run(config, shapes, finished, "--overwrite") == 2
    assert "mine.txt" in caplog.text
    (finished / "mine.txt").unlink()
    assert run(config, shapes, finished, "--overwrite", "train.num_steps=2") == 0
    assert result(finished)["steps"] == 2


def test_a_mistake_leaves_no_folder(shapes, config, tmp_path, caplog):
    run_dir = tmp_path / "run"
    for mistake, words in (
        (f"data.root={tmp_path}/mistyped", "mistyped is no folder"),
        ("model.backbone=resnet9000", "timm has no such model"),
        ("train.global_batch_size=160", "global_batch_size=72 is the largest that fits"),
    ):
        assert run(config, shapes, run_dir, mistake, "model.weights=random") == 2
        assert words in caplog.text
        assert not run_dir.exists()


def test_the_first_and_the_last_step_are_always_logged(shapes, config, tmp_path):
    assert run(config, shapes, tmp_path / "run", "train.log_every=1000") == 0
    assert [line["step"] for line in figures(tmp_path / "run", "train")] == [1, 4]
    assert all(np.isfinite(line["loss"]) for line in figures(tmp_path / "run", "train"))


def test_the_last_step_before_other_levels_is_reproduced_by_its_own(shapes, config, tmp_path, monkeypatch):
    true_loss, calls = uhml.train.global_loss, []

    def broken(*arguments):
        calls.append(1)
        found = true_loss(*arguments)
        return found._replace(loss=found.loss * torch.nan) if len(calls) == 3 else found

    monkeypatch.setattr(uhml.train, "global_loss", broken)
    run_dir = tmp_path / "run"
    assert run(config, shapes, run_dir, "hierarchy.overlap_steps=1") == 2  # other levels from step 3 on
    left = torch.load(run_dir / "nan-step-00000002.pt", weights_only=True)["levels"]
    assert torch.equal(left, Dendrogram.load(run_dir / "hierarchies/step-00000000.npz").cut(counts=[12, 6, 3]))
    assert not (run_dir / "hierarchies/step-00000002.npz").exists()


def test_nan_stops_before_the_step_and_leaves_what_reproduces_it(shapes, config, tmp_path, caplog):
    run_dir = tmp_path / "run"
    # One step of this length throws the weights so far that the next one's loss overflows.
    assert run(config, shapes, run_dir, "optim.learning_rate=1e30", "train.checkpoint_every=1") == 2
    assert "Step 1: the loss is nan (from rank 0 of 1)" in caplog.text
    path = run_dir / "nan-step-00000001.pt"
    assert str(path) in caplog.text
    assert read_status(run_dir).state == "failed"
    left = torch.load(path, weights_only=True)
    # The weights of the last good step, and from them and the rest the loss again.
    saved = torch.load(run_dir / "checkpoints" / "step-00000001.pt", weights_only=True)
    assert all(torch.equal(value, saved["model"][name]) for name, value in left["model"].items())
    options = parse_dump(left["config"])
    model = build_embedder(options.model, options.data.image_size)
    model.load_state_dict(left["model"])
    restore_random_state(left["random_states"][0])
    transform = training_transform(options.data, model.backbone.mean, model.backbone.std)
    batch = left["pictures"].numpy()[:: options.mining.num_views]
    batches = TrainingBatches(list_pictures(options.data).train, transform, num_views=2, seed=0, num_workers=0)
    images, pictures = next(batches.of_steps(range(1, 2), lambda _: batch))
    assert torch.equal(pictures, left["pictures"])
    points = model.train()(images)
    distances = poincare.distance_matrix(points, points, options.model.curvature)
    similarity = similarity_levels(left["levels"], pictures, pictures)
    loss, _ = HierarchicalLogRatioLoss(options.loss.omega, 4)(distances, similarity, torch.eye(16, dtype=torch.bool))
    assert not torch.isfinite(loss)
    # Nothing is lost: with another learning rate it goes on.
    cure = ["optim.learning_rate=1e-5", "train.num_steps=1"]
    assert run(config, shapes, run_dir, *cure) == 2
    assert "optim.learning_rate: 1e+30 -> 1e-05" in caplog.text


def test_going_on_needs_no_permission_for_what_changes_nothing(shapes, config, tmp_path, caplog, monkeypatch):
    whole, cut, elsewhere = tmp_path / "whole", tmp_path / "cut", tmp_path / "elsewhere"
    assert run(config, shapes, whole) == 0
    stop_after(3, monkeypatch)
    assert run(config, shapes, cut) == 75
    assert "Stopped by SIGTERM after step 3 of 4, which is saved" in caplog.text
    assert read_status(cut).state == "preempted"
    monkeypatch.undo()
    assert run(config, shapes, cut, "optim.weight_decay=0.5") == 2
    assert "optim.weight_decay: 0.01 -> 0.5" in caplog.text
    shutil.copytree(shapes, elsewhere)
    (elsewhere / "corners03" / "new.png").write_bytes((elsewhere / "corners03" / "0.png").read_bytes())
    assert run(config, elsewhere, cut) == 2
    assert "The run began with 36 + 36 pictures, and there are 37 + 36 now" in caplog.text
    (elsewhere / "corners03" / "new.png").unlink()
    assert run(config, elsewhere, cut, "data.num_workers=0", "train.checkpoint_every=1") == 0
    assert (cut / "metrics.jsonl").read_text() == (whole / "metrics.jsonl").read_text()
    assert {**result(cut), "seconds": 0} == {**result(whole), "seconds": 0}
    mine, theirs = (sorted((path / "hierarchies").iterdir()) for path in (cut, whole))
    assert [path.name for path in mine] == [path.name for path in theirs]
    assert all(a.read_bytes() == b.read_bytes() for a, b in zip(mine, theirs, strict=True))
    assert read_status(cut).restarts == 2


def test_going_on_forgets_neither_the_best_network_nor_the_time(shapes, config, tmp_path, monkeypatch):
    run_dir, listed = tmp_path / "run", all_to_train(shapes, tmp_path)
    options = ("data.dataset=list", "data.score_on=validation", "eval.at_reclustering=true")
    better = iter((0.5, 0.9, 0.6, 0.7))  # before the first step, at 2, and after each launch's end
    score = uhml.train.score_unseen

    def as_good_as_told(*arguments):
        scores = score(*arguments)
        recall = next(better)
        return scores | {"ball": dataclasses.replace(scores["ball"], recall_at_k={"1": recall, "4": 1.0})}

    monkeypatch.setattr(uhml.train, "score_unseen", as_good_as_told)
    with monkeypatch.context() as stopped:
        stop_after(3, stopped)
        assert run(config, listed, run_dir, *options) == 75
    assert torch.load(run_dir / "checkpoints" / "best.pt", weights_only=True)["step"] == 2
    saved = read_state(max((run_dir / "checkpoints").glob("step-*.pt")))
    assert saved["seconds"] > 0
    assert run(config, listed, run_dir, *options) == 0
    assert torch.load(run_dir / "checkpoints" / "best.pt", weights_only=True)["step"] == 2
    assert result(run_dir)["seconds"] > saved["seconds"]


def test_an_allowed_change_holds_from_there_on(shapes, config, tmp_path, monkeypatch):
    run_dir = tmp_path / "run"
    stop_after(3, monkeypatch)
    assert run(config, shapes, run_dir) == 75
    monkeypatch.undo()
    changes = ["optim.learning_rate=1e-5", "optim.weight_decay=0.5", "hierarchy.cuts=[9,2]", "train.num_steps=6"]
    keys = ",".join(change.split("=")[0] for change in changes)
    assert run(config, shapes, run_dir, *changes, "--allow-change", keys) == 0
    steps = figures(run_dir, "train")
    assert [line["step"] for line in steps] == [1, 2, 3, 4, 5, 6]
    assert steps[2]["learning_rate"] == pytest.approx(1e-4 * 0.5 * (1 + np.cos(np.pi * 2 / 4)))
    for taken in (3, 4, 5):
        expected = 1e-5 * 0.5 * (1 + np.cos(np.pi * taken / 6))
        assert steps[taken]["learning_rate"] == pytest.approx(expected)
    # New cuts are made at once.
    assert [line["step"] for line in figures(run_dir, "hierarchy")] == [0, 2, 3, 4, 6]
    assert figures(run_dir, "hierarchy")[-1]["level2_clusters"] == 2
    saved = torch.load(run_dir / "checkpoints" / "step-00000006.pt", weights_only=True)
    assert {group["weight_decay"] for group in saved["optimizer"]["param_groups"]} == {0.5, 0.0}
    assert load_config(run_dir / "config.yaml").optim.weight_decay == 0.5


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ("model.embedding_dim=8", "does not fit the model section"),
        ("eval.recall_at=[1,2]", "eval.recall_at=[1, 2]: the run was scored at [1, 4] before its first step"),
    ],
)
def test_an_allowed_change_that_the_checkpoint_refuses_is_forgotten(
    shapes, config, tmp_path, monkeypatch, caplog, change, said
):
    run_dir = tmp_path / "run"
    with monkeypatch.context() as stopped:
        stop_after(3, stopped)
        assert run(config, shapes, run_dir) == 75
    assert run(config, shapes, run_dir, change, "--allow-change", change.partition("=")[0]) == 2
    assert said in caplog.text
    assert run(config, shapes, run_dir) == 0


def test_pictures_that_the_cache_holds_are_not_looked_at_again(shapes, config, tmp_path, monkeypatch):
    """Not even to draw them: they may lie on a slow disk, or be gone by now."""
    cached = ("data.num_workers=0", f"data.cache={tmp_path / 'cache'}")
    assert run(config, shapes, tmp_path / "first", *cached) == 0

    def refuse(path):
        raise AssertionError(f"{path} is decoded")

    monkeypatch.setattr("uhml.data.pictures.load_rgb", refuse)
    monkeypatch.setattr("uhml.reporting.sheets.load_rgb", refuse)
    assert run(config, shapes, tmp_path / "second", *cached) == 0


@pytest.mark.ddp
def test_one_ranks_error_ends_all_ranks_with_its_message(shapes, config, tmp_path):
    ended = torchrun(2, config, shapes, tmp_path / "run", "train.global_batch_size=400")
    assert ended.returncode != 0
    assert ended.stderr.count("train.global_batch_size=72 is the largest that fits") == 1


@pytest.mark.slow
def test_quickstart_learns(tmp_path):
    """A quarter of the quickstart is enough to see that unseen characters are told apart better."""
    overrides = ["data.num_classes=50", "train.num_steps=40", "train.log_every=1"]
    command = ["train", str(CONFIGS / "quickstart.yaml"), "--run-dir", str(tmp_path / "run"), *overrides]
    assert cli.main(command) == 0
    saved = result(tmp_path / "run")
    assert saved["trained"]["recall_at_k"]["1"] > saved["frozen"]["recall_at_k"]["1"]
    losses = [line["loss"] for line in figures(tmp_path / "run", "train")]
    assert np.mean(losses[-10:]) < np.mean(losses[:10])


@pytest.mark.ddp
@pytest.mark.slow
@pytest.mark.real_data
@pytest.mark.parametrize("name", ["sop", "cars196"])
def test_real_pictures(name, tmp_path, request):
    root = request.getfixturevalue({"sop": "omniglot_root", "cars196": "cars196_root"}[name])
    small = ["train.num_steps=3", "data.image_size=48", "data.num_classes=40", "train.log_every=1"]
    ended = torchrun(2, CONFIGS / f"{name}.yaml", root, tmp_path / "run", *small)
    assert ended.returncode == 0, ended.stderr
    assert 0.1 < result(tmp_path / "run")["trained"]["recall_at_k"]["1"] < 1
    assert "trained embedding, ball" in ended.stdout
