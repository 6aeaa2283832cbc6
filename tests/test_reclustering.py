"""Re-clustering that does not stop the steps: when levels change, the bank of features, and whole runs by hand."""

import dataclasses
import json

import numpy as np
import pytest
import torch
from in_place import InPlace
from PIL import Image
from ranks import run_ranks
from timm.models import is_model, register_model
from torch import nn

import uhml.train
from uhml import distributed
from uhml.config import Config, HierarchyConfig, TrainConfig, load_config, parse_config
from uhml.data.pictures import Pictures, Splits
from uhml.data.verify import list_pictures
from uhml.errors import UserError
from uhml.hierarchy import average_linkage
from uhml.loss import HierarchicalLoss
from uhml.model import Embedder, HyperbolicHead
from uhml.run import training_state
from uhml.run.bank import FeatureBank, features_seen
from uhml.run.checkpoint import read_file
from uhml.run.reclustering import linkage_options, next_levels_at, reclusters_at
from uhml.run.training_state import TrainingState, read_state
from uhml.train import batches_left, build_model, fit_head, start_head, train, train_step

NUM_STEPS, EVERY, OVERLAP = 9, 3, 2


@pytest.mark.parametrize(("every", "overlap"), [(1, 0), (3, 0), (3, 1), (5, 4)])
@pytest.mark.parametrize("num_steps", [1, 4, 11])
def test_levels_change_a_fixed_number_of_steps_after_a_reclustering(every, overlap, num_steps):
    config = Config(
        hierarchy=HierarchyConfig(recluster_every=every, overlap_steps=overlap), train=TrainConfig(num_steps=num_steps)
    )
    changes = []
    for step in range(num_steps):
        if step % every == 0 and step + overlap < num_steps:
            assert reclusters_at(step, config)
            changes.append(step + overlap if step else 0)
        else:
            assert not reclusters_at(step, config)
    for step in range(num_steps):
        assert next_levels_at(step, config) == min([change for change in changes if change > step] or [num_steps])


def test_a_clustering_must_end_before_the_next_begins(tmp_path):
    path = tmp_path / "config.yaml"
    path.write_text("hierarchy: {recluster_every: 5, overlap_steps: 4}\n")
    assert load_config(path).hierarchy.overlap_steps == 4
    with pytest.raises(UserError, match=r"overlap_steps=5 must be less than hierarchy\.recluster_every=5"):
        load_config(path, ["hierarchy.overlap_steps=5"])


def filled_bank(num_pictures, num_views, steps):
    """This rank's rows of a bank that has seen some batches, with all of the bank put together."""
    rank, world = distributed.rank(), distributed.world_size()
    start = torch.randn(num_pictures, 5, generator=torch.Generator().manual_seed(0))
    bank = FeatureBank(start[rank::world])
    for features, pictures in steps:
        own = len(features) // world
        bank.update(features[rank * own :][:own], pictures, num_views)
    gathered = distributed.gather_shares_on_main(bank.own, num_pictures)
    assert (gathered is None) == (rank > 0)
    return bank.own, gathered


@pytest.mark.ddp
@pytest.mark.parametrize("num_views", [1, 2])
def test_the_bank_is_a_dictionary_of_what_each_picture_was_last(num_views):
    random = torch.Generator().manual_seed(1)
    num_pictures = 23
    steps = []
    for _ in range(3):
        pictures = torch.randperm(num_pictures, generator=random)[:4].repeat_interleave(num_views)
        steps.append((100 * torch.randn(len(pictures), 5, generator=random), pictures))
    steps[-1][0][0] = 1e6  # more than half precision holds
    start = torch.randn(num_pictures, 5, generator=torch.Generator().manual_seed(0)).half()
    by_hand = dict(enumerate(start))
    for features, pictures in steps:
        for picture in set(pictures.tolist()):
            views = [row.clamp(-65504, 65504).half().float() for row in features[pictures == picture]]
            by_hand[picture] = (sum(views) / len(views)).half()
    expected = torch.stack([by_hand[picture] for picture in range(num_pictures)])
    assert not torch.equal(expected, start)
    results = {1: [filled_bank(num_pictures, num_views, steps)]}
    if num_views == 2:
        results |= {world: run_ranks(filled_bank, world, num_pictures, num_views, steps) for world in (2, 4)}
    for world_size, of_ranks in results.items():
        assert torch.equal(of_ranks[0][1], expected)
        for rank, (own, _) in enumerate(of_ranks):
            assert torch.equal(own, expected[rank::world_size])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_is_too_large_for_the_bank_stays_finite(dtype):
    bank = FeatureBank(torch.zeros(2, 3))
    bank.update(torch.tensor([[1e6, -1e6, 1.0], [7e4, 0.0, torch.nan]], dtype=dtype), torch.arange(2), 1)
    expected = torch.tensor([[65504.0, -65504.0, 1.0], [65504.0, 0.0, torch.nan]]).half()
    torch.testing.assert_close(bank.own, expected, equal_nan=True, rtol=0, atol=0)


def test_the_bank_outlives_a_launch_that_ends_before_its_first_levels(tmp_path):
    """As one does whose hierarchy was changed: it clusters the bank anew, after a checkpoint without levels."""
    splits = Splits(train=Pictures(paths=tuple(f"/x/{i}.jpg" for i in range(8))))

    def new_state(cuts):
        options = {"hierarchy": {"features": "bank", "cuts": cuts}, "model": {"embedding_dim": 4}}
        model = Embedder(nn.Flatten(), HyperbolicHead(4, 4, 0.1, 2.3), None, "float32", "float32")
        return TrainingState(model, splits, parse_config(options, "a test"))

    def saved():
        return read_state(max((tmp_path / "checkpoints").iterdir()))

    (tmp_path / "checkpoints").mkdir()
    first, changed, again, begun = (new_state(cuts) for cuts in ([0.9], [0.5], [0.5], [0.9]))
    first.step, first.levels = 100, torch.zeros(1, 8, dtype=torch.int32)
    first.bank = FeatureBank(torch.full((8, 4), 7.0))
    first.save(tmp_path, dict)
    changed.load(saved())
    assert changed.levels is None
    changed.save(tmp_path, dict)
    again.load(saved())
    assert torch.equal(again.bank.own, first.bank.own)
    # Of step 0 it is made again.
    again.step = 0
    again.save(tmp_path, dict)
    begun.load(read_state(tmp_path / "checkpoints" / "step-00000000.pt"))
    assert begun.bank is None


def test_features_are_seen_without_gradient_and_only_within():
    layer = torch.nn.Linear(3, 2)
    with features_seen(layer) as seen:
        first, second = layer(torch.ones(1, 3)), layer(torch.zeros(1, 3))
    layer(torch.ones(1, 3))
    assert torch.equal(torch.cat(seen), torch.cat([first, second]))
    assert not torch.cat(seen).requires_grad


if not is_model("reclustering_net"):

    @register_model
    def reclustering_net(pretrained=False, **options):
        layers = [nn.Conv2d(3, 24, 5, stride=4), nn.GELU(), nn.AdaptiveAvgPool2d(1), nn.Flatten()]
        return nn.Sequential(*layers)


CONFIG = """\
data: {dataset: folder, image_size: 32, fit: squash, num_workers: 0}
model: {backbone: reclustering_net, weights: random, embedding_dim: 8}
hierarchy: {recluster_every: 3, num_neighbors: 5, cut_by: counts, cuts: [12, 6, 3]}
mining: {pictures_per_cluster: 2}
optim: {learning_rate: 0.01}
train: {num_steps: 9, global_batch_size: 16, log_every: 1, device: cpu}
"""


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """A run of seconds on 36 pictures of no known classes, on which nothing is scored."""
    root, random = tmp_path_factory.mktemp("reclustering"), np.random.default_rng(0)
    (root / "pictures").mkdir()
    for i in range(36):
        pixels = random.integers(0, 256, (3 + i % 4, 4, 3), dtype=np.uint8)
        Image.fromarray(pixels).resize((40, 40)).save(root / "pictures" / f"{i}.png")
    (root / "config.yaml").write_text(CONFIG)
    return load_config(root / "config.yaml", [f"data.root={root / 'pictures'}"])


def with_hierarchy(config, **options):
    return dataclasses.replace(config, hierarchy=dataclasses.replace(config.hierarchy, **options))


def losses(run_dir):
    lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    return [line["loss"] for line in lines if line["kind"] == "train"]


def run_by_hand(config, overlap, use_bank):
    """The losses and weights of a run of one process: levels of step t are learnt from at t + overlap."""
    splits = list_pictures(config.data)
    torch.manual_seed(config.train.seed)
    state = TrainingState(build_model(config, True).eval(), splits, config)
    model, num_pictures = state.model, len(splits.train)
    start_head(model, splits.train, config)
    loss_function = HierarchicalLoss(config.loss, len(config.hierarchy.cuts), config.mining.num_views)
    bank, coming, found = {}, {}, []
    for step in range(NUM_STEPS):
        if step % EVERY == 0:
            if use_bank and step > 0:
                features = torch.stack([bank[picture] for picture in range(num_pictures)])
            else:
                features = uhml.train.embed_share(model, splits.train, config, "", features=True)
                bank = dict(enumerate(features.half().float()))
            fit_head(model, features, config)
            with torch.no_grad():
                tree = average_linkage(model.head(features), **linkage_options(config))
            coming[step + overlap if step else 0] = tree.cut(counts=config.hierarchy.cuts)
        state.levels = coming.get(step, state.levels)
        images, pictures = next(batches_left(state, splits.train))
        with torch.no_grad():
            seen = model.train().features(images).half().float()
        bank |= {int(p): seen[pictures == p].mean(0).half().float() for p in pictures}
        figures, _ = train_step(model, images, pictures, state, loss_function, None)
        found.append(float(figures["loss"]))
    return found, model.state_dict()


# One of them with a real process, which takes seconds to start.
@pytest.mark.parametrize(
    ("features", "overlap", "background"),
    [("fresh", OVERLAP, None), ("bank", 0, InPlace), ("bank", OVERLAP, InPlace)],
)
def test_a_run_is_the_one_made_by_hand(small, tmp_path, monkeypatch, one_thread, features, overlap, background):
    if background is not None:
        monkeypatch.setattr(uhml.train, "Background", background)
    config = with_hierarchy(small, features=features, overlap_steps=overlap)
    monkeypatch.setattr(uhml.train, "project", lambda *_: None)
    passes, saved_at = [], []

    def save_checkpoint(folder, step, *rest):
        saved_at.append(step)
        return true_save(folder, step, *rest)

    true_save = training_state.save_checkpoint
    monkeypatch.setattr(training_state, "save_checkpoint", save_checkpoint)

    def embed_share(*arguments, **options):
        passes.append(arguments)
        return true_embed_share(*arguments, **options)

    true_embed_share = uhml.train.embed_share
    monkeypatch.setattr(uhml.train, "embed_share", embed_share)
    train(config, tmp_path / "run")
    # At steps 0, 3, 6 and 9; the head is fitted to those of the first.
    assert len(passes) == (2 if features == "bank" else 4)
    # Before the pass, if there is one, and with the head that is fitted anew.
    assert [saved_at.count(step) for step in (EVERY, 2 * EVERY)] == ([1, 1] if features == "bank" else [2, 2])
    with torch.jit.optimized_execution(False):
        expected, weights = run_by_hand(small, overlap, features == "bank")
    assert losses(tmp_path / "run") == pytest.approx(expected, rel=1e-6)
    saved = read_file(tmp_path / "run" / "checkpoints" / f"step-{NUM_STEPS:08d}.pt")["model"]
    for name, value in weights.items():
        if not name.startswith("head."):  # which is fitted once more at the end
            torch.testing.assert_close(saved[name], value, rtol=1e-5, atol=1e-7)
    # The levels matter, or all of this says nothing.
    if overlap:
        other = run_by_hand(small, 0, features == "bank")[0]
        assert expected[: EVERY + 1] != pytest.approx(other[: EVERY + 1], rel=1e-6)
    steps = sorted(int(path.stem[5:]) for path in (tmp_path / "run" / "hierarchies").iterdir())
    assert steps == [0, 3, 6, 9]
