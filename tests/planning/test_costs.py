"""The formulas against bytes and events counted in real networks, optimizers and runs."""

import dataclasses
import json

import pytest
import torch
from ranks import run_ranks
from torch import nn

from uhml import distributed
from uhml.config import load_config
from uhml.data.pictures import Pictures, Splits
from uhml.hierarchy.graph import graph_memory
from uhml.hierarchy.knn import search_memory
from uhml.loss import HierarchicalLogRatioLoss
from uhml.model import Backbone, Embedder, HyperbolicHead, build_embedder, projected_dim
from uhml.planning import costs
from uhml.planning.calibration import measure_network, nested_levels
from uhml.planning.costs import Growth, Network, Ranks, Sizes, Speed
from uhml.run.bank import FeatureBank
from uhml.run.reclustering import reclusters_at
from uhml.run.training_state import TrainingState
from uhml.train import train, train_step

ONE = Ranks(nodes=1, per_node=1)
NETWORK = Network(weights=4_000, learned=3_000, num_features=64, flops=1e6, saved=10_000, widest=2_000)


def changed(config, section, **options):
    return dataclasses.replace(config, **{section: dataclasses.replace(getattr(config, section), **options)})


def test_bytes_of_network_gradients_and_optimizer_are_those_of_real_ones(words):
    config = changed(load_config(words[0]), "model", weights="random")
    model = build_embedder(config.model, config.data.image_size)
    network = measure_network(model, config)
    state = TrainingState(model, Splits(train=Pictures(paths=("a", "b"))), config)
    model.train()
    model(torch.randn(4, 3, 32, 32)).sum().backward()
    state.optimizer.step()
    gradients = [p.grad for p in model.parameters() if p.grad is not None]
    moments = [t for s in state.optimizer.state.values() for name, t in s.items() if name != "step"]
    assert network.learned == sum(g.nbytes for g in gradients)
    assert 2 * network.learned == sum(t.nbytes for t in moments)
    assert network.weights == sum(t.nbytes for t in model.state_dict().values())
    expected = network.weights + network.learned + sum(t.nbytes for t in moments) + 2 * 24 * 4
    assert costs.memory(config, Sizes(train=24), ONE, network, rank=0, on_gpu=True).network == expected


def test_what_a_forward_pass_keeps_and_computes_is_counted_by_hand(words):
    config = changed(load_config(words[0]), "model", projector=False)
    convolution = nn.Conv2d(3, 8, 3, padding=1, bias=False)
    layers = nn.Sequential(convolution, nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    backbone = Backbone(layers, (0.5,) * 3, (0.5,) * 3, 32)
    model = Embedder(backbone, HyperbolicHead(8, 16, 0.1, 2.3), None, "float32", "float32")
    network = measure_network(model, config)
    # The picture with its channels last, the rectified maps once for both layers that want them, and the head's rows.
    assert 0 <= network.saved - (3 + 8) * 32 * 32 * 4 < 1500
    assert network.widest == 2 * 8 * 32 * 32 * 4
    assert network.flops == 2 * 27 * 8 * 32 * 32 + 2 * 8 * 16


def test_a_real_run_has_as_many_hierarchies_scores_and_bytes_as_planned(words, tmp_path):
    config = load_config(words[0])
    train(config, tmp_path / "run")
    network = measure_network(build_embedder(config.model, config.data.image_size), config)
    checkpoint, hierarchy = costs.disk(config, Sizes(train=24, test=24), network)
    trees = list((tmp_path / "run" / "hierarchies").iterdir())
    # After 0, 2, 4 and the last of 5 steps.
    assert len(trees) == costs.num_hierarchies(config) == 4
    assert all(abs(tree.stat().st_size - hierarchy) < 1000 for tree in trees)
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert sum(line["kind"] == "unseen_ball" for line in lines) == costs.num_evaluations(config) == 4
    checkpoints = list((tmp_path / "run" / "checkpoints").glob("step-*.pt"))
    assert len(checkpoints) + 1 == costs.num_kept(config)
    # Names, random states and the archive's padding are some 250 kB, whatever the network.
    assert 0 < max(path.stat().st_size for path in checkpoints) - checkpoint < 300_000


@pytest.mark.parametrize(("num_steps", "overlap", "expected"), [(0, 1, 1), (1, 1, 2), (4, 1, 3), (5, 1, 3), (6, 1, 4)])
def test_hierarchies_that_no_step_would_learn_from_are_left_out(words, num_steps, overlap, expected):
    config = load_config(words[0], [f"train.num_steps={num_steps}", f"hierarchy.overlap_steps={overlap}"])
    assert costs.num_hierarchies(config) == expected
    steps = [step for step in range(0, num_steps, 2) if step == 0 or reclusters_at(step, config)]
    assert len(steps) + 1 == expected


def test_bank_and_pending_clustering_are_counted_in_checkpoint_and_memory_and_save_time(words):
    config = load_config(words[0], ["train.num_steps=20"])
    both = changed(config, "hierarchy", overlap_steps=1, features="bank")
    sizes = Sizes(train=24, test=24)
    state = TrainingState(
        build_embedder(changed(config, "model", weights="random").model, 32),
        Splits(train=Pictures(paths=("a", "b"))),
        config,
    )
    width = state.model.backbone.num_features
    network = dataclasses.replace(NETWORK, num_features=width)
    bank, points = FeatureBank(torch.randn(24, width)), torch.randn(24, 16)
    kept = bank.own.nbytes + points.nbytes
    assert costs.disk(both, sizes, network)[0] - costs.disk(config, sizes, network)[0] == kept
    memory = [costs.memory(c, sizes, ONE, network, rank=0, on_gpu=True).network for c in (config, both)]
    assert memory[1] - memory[0] == kept + 2 * width
    merged = points.nbytes + graph_memory(24, 5)
    assert costs.background(config, 24, ONE, on_gpu=True) == 0
    assert costs.background(both, 24, ONE, on_gpu=True) == merged
    assert costs.background(both, 24, Ranks(nodes=1, per_node=2), on_gpu=False) == merged
    # It searches, too, where one rank has no GPU.
    assert costs.background(both, 24, ONE, on_gpu=False) == merged + search_memory(24, 24, 16, 5, 4)
    none, some = Growth(0.0, 0.0), Growth(0.01, 0.0)
    speed = Speed(
        view=0.01, picture=0.1, checked=0, start=0, exchange=0, search=none, linkage=some, retrieval=none, kmeans=none,
        disk=1e12, record=1, shown=0,
    )  # fmt: skip
    waiting, overlapped = (costs.seconds(c, sizes, ONE, network, speed) for c in (config, both))
    # Ten clusterings and one more.
    assert waiting.embedding == pytest.approx(11 * 2.4)
    assert overlapped.embedding == pytest.approx(2 * 2.4)
    linked = 0.01 * round((24 * 5) ** costs.LINKAGE_GROWTH)
    assert waiting.linkage == pytest.approx(11 * linked)
    # A step takes 0.16 s.
    assert overlapped.linkage == pytest.approx(2 * linked + 9 * (linked - 0.16))
    assert waiting.recording - overlapped.recording == pytest.approx(9, rel=1e-6)


def exchanged(config_path, features):
    """Bytes that one step of this rank adds up and gathers over ranks, data parallelism's apart."""
    config = changed(load_config(config_path), "model", weights="random")
    model = build_embedder(config.model, config.data.image_size)
    state = TrainingState(model, Splits(train=Pictures(paths=("a", "b"))), config)
    state.levels = nested_levels(64, 2)
    if features == "bank":
        state.bank = FeatureBank(torch.randn(32, model.backbone.num_features))
    counted = {"all_gather": 0, "all_reduce": 0}

    def counting(name, function, bytes_of):
        def call(*args, **options):
            counted[name] += bytes_of(*args)
            return function(*args, **options)

        setattr(distributed.dist, name, call)

    counting("all_gather", distributed.dist.all_gather, lambda parts, own: sum(part.nbytes for part in parts))
    counting("all_reduce", distributed.dist.all_reduce, lambda tensor, *_: tensor.nbytes)
    loss = HierarchicalLogRatioLoss(0.8, 3)
    rows = torch.arange(8) + 8 * distributed.rank()
    train_step(model, torch.randn(8, 3, 32, 32), rows, state, loss, None)
    distributed.all_reduce_max(0)  # as before each step, whether all are well
    return counted, measure_network(model, config)


@pytest.mark.ddp
@pytest.mark.parametrize("features", ["fresh", "bank"])
def test_wire_is_what_a_step_exchanges_and_near_the_least(words, features):
    config, ranks = load_config(words[0], [f"hierarchy.features={features}"]), Ranks(nodes=1, per_node=2)
    for counted, network in run_ranks(exchanged, 2, words[0], features):
        wire, least = costs.wire_per_step(config, ranks, network)
        points = 16 * (projected_dim(network.num_features) + 1) * 4
        assert counted["all_gather"] == points + (features == "bank") * 16 * network.num_features * 2
        # In a ring of two, half of what is gathered is a rank's own, and of what is added up each half travels twice.
        assert wire == network.learned + counted["all_reduce"] + counted["all_gather"] / 2
        assert least == network.learned + points / 2
        assert wire < (1.001 if features == "fresh" else 1.01) * least


def test_growth_goes_through_its_measurements():
    growth = Growth.through((100, 0.3), (400, 3.6))
    assert growth(100) == pytest.approx(0.3)
    assert growth(400) == pytest.approx(3.6)
    # Less than linear growth is taken for linear.
    assert Growth.through((100, 1.0), (400, 2.0)) == Growth(0.005, 0.0)
    assert Growth.through((100, 0.1), (400, 6.4)).linear == 0


def test_nothing_but_rank_0_and_its_graph_limits_100_million_pictures_on_64_ranks(words):
    config, sizes, ranks = load_config(words[0]), Sizes(train=10**8), Ranks(nodes=8, per_node=8)
    main, other = (costs.memory(config, sizes, ranks, NETWORK, rank=rank, on_gpu=True) for rank in (0, 1))
    assert main.clustering - other.clustering == graph_memory(10**8, 5) - 12 * 10**8 * 5
    doubled = costs.memory(config, sizes, Ranks(nodes=16, per_node=8), NETWORK, rank=0, on_gpu=True)
    # The share of a rank halves, the graph does not.
    assert doubled.embedding < 0.6 * main.embedding
    assert doubled.clustering > graph_memory(10**8, 5)


@pytest.mark.parametrize("dim", [16, 2048])
def test_search_in_cells_grows_by_less_than_the_square_and_falls_with_the_ranks(words, dim):
    config, exact = changed(load_config(words[0]), "model", embedding_dim=dim), Growth(0.0, 1e-9)
    seconds = {
        (n, world): costs.seconds_of_search(config, n, Ranks(nodes=world, per_node=1), exact)
        for n in (10**5, 10**6, 10**7)
        for world in (1, 8)
    }
    assert seconds[10**5, 1] == pytest.approx(10)
    assert seconds[10**6, 1] == pytest.approx(1000 / 37)
    assert seconds[10**7, 1] == pytest.approx(1000 / 37 * 10**1.5)
    assert all(seconds[n, 8] < seconds[n, 1] / 2 for n in (10**5, 10**6, 10**7))


@pytest.mark.parametrize("world", [1, 4])
def test_memory_is_counted_by_hand(words, world):
    config = changed(load_config(words[0]), "model", embedding_dim=16)
    config = changed(config, "train", global_batch_size=16)
    ranks, sizes = Ranks(nodes=1, per_node=world), Sizes(train=4000, test=400)
    found = costs.memory(config, sizes, ranks, NETWORK, rank=1, on_gpu=True)
    batch, own, num_cuts = 16 // world, 4000 // world, len(config.hierarchy.cuts)
    picture = 3 * config.data.image_size**2 * 4
    # Weights, gradients and two moments, over ranks the buckets' copy of the gradients, and the levels.
    assert found.network == 4_000 + 3 * 3_000 + (3_000 if world > 1 else 0) + num_cuts * 4000 * 4
    loss = (4 * (num_cuts + 1) + 20) * batch * 16 * 4
    assert found.step == batch * (picture + 10_000 + 2_000) + loss
    forward = config.eval.batch_size * (picture + 2_000)
    assert found.embedding == own * 64 * 4 + forward
    # The training pictures' features wait for the first clustering; rows, points and lift of those that are scored.
    block = 400 * 400 * 8
    scored = 400 * 64 * (4 + 3 * 8) + 6 * block
    assert found.evaluation == own * 64 * 4 + max(400 * 64 * 4 + forward, scored)
    taken = changed(config, "model", init_from="elsewhere")
    assert costs.memory(taken, sizes, ranks, NETWORK, rank=1, on_gpu=True).evaluation == found.evaluation - own * 64 * 4
    largest = max(found.embedding, found.clustering, found.evaluation)
    assert found.peak == found.network + max(found.step, largest)
    on_cpu = costs.memory(config, sizes, ranks, NETWORK, rank=1, on_gpu=False)
    assert on_cpu.peak == on_cpu.network + on_cpu.step + largest


def test_gradients_go_at_the_pace_of_the_slowest_link():
    assert costs.seconds_of_exchange(1000, Ranks(nodes=1, per_node=1), 10, 1) == 0
    assert costs.seconds_of_exchange(1000, Ranks(nodes=1, per_node=4), 10, 1) == pytest.approx(2 * 3 / 4 * 1000 / 10)
    assert costs.seconds_of_exchange(1000, Ranks(nodes=2, per_node=2), 10, 1) == pytest.approx(2 * 3 / 4 * 1000 / 1)


def test_the_best_checkpoint_is_kept_besides_the_last_ones(words):
    config = load_config(words[0])
    kept = costs.num_kept(changed(config, "data", score_on="test"))
    assert costs.num_kept(changed(config, "data", score_on="validation")) == kept + 1
