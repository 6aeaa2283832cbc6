"""A training step: micro-batches, and that none is taken whose loss or gradient is not finite."""

import copy
import itertools
import json
import random

import numpy as np
import pytest
import torch
from ranks import run_ranks
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from uhml import distributed, poincare
from uhml.config import parse_config
from uhml.data.pictures import Pictures, Splits
from uhml.errors import UserError
from uhml.loss import Batch, HierarchicalLogRatioLoss, HierarchicalLoss, global_loss
from uhml.model import build_embedder
from uhml.reporting.profile import STEPS_BEFORE, profiled
from uhml.run.bank import FeatureBank
from uhml.run.random_state import random_state, restore_random_state, seed_generators
from uhml.run.stepper import Stepper
from uhml.run.training_state import TrainingState
from uhml.train import backward, embed_batch, train_step

B, CURVATURE = 12, 0.5


class Net(nn.Module):
    def __init__(self, dropout):
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Dropout(dropout), nn.Linear(8, 3))

    def forward(self, x):
        return poincare.exponential_map(self.layers(x).tanh(), CURVATURE)


def gradients(dropout, micro_batch_size, graphs_kept=False):
    """Of one step on this rank's part of the batch; at once from all micro-batches' graphs, or as the trainer does."""
    torch.manual_seed(0)
    model, images, pictures = Net(dropout).double(), torch.randn(B, 6).double(), torch.arange(B) // 2
    levels = torch.stack([torch.arange(B) // 2, torch.arange(B) // 4])
    own = slice(distributed.rank() * B // distributed.world_size(), None)
    own = slice(own.start, own.start + B // distributed.world_size())
    parallel = distributed.data_parallel(model)
    torch.manual_seed(distributed.rank())
    before, micro_batches = random_state(), images[own].split(micro_batch_size)
    points = (
        torch.cat([parallel(part) for part in micro_batches]) if graphs_kept else embed_batch(parallel, micro_batches)
    )
    assert points.requires_grad == (graphs_kept or len(micro_batches) == 1)
    found = global_loss(HierarchicalLogRatioLoss(0.8, 3), Batch.over_ranks(points, pictures[own]), levels, CURVATURE)
    gradient = distributed.world_size() * found.gradient
    if graphs_kept:
        points.backward(gradient)
    else:
        backward(parallel, micro_batches, points, gradient, before)
    return [p.grad for p in model.parameters()], torch.rand(1)


@pytest.mark.ddp
@pytest.mark.parametrize("world_size", [1, 2])
def test_micro_batches_have_the_whole_batchs_gradient(world_size):
    expected, _ = gradients(0.0, B)
    assert all(gradient.abs().max() > 1e-3 for gradient in expected)
    for found, _ in run_ranks(gradients, world_size, 0.0, 4):
        for a, b in zip(found, expected, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("micro_batch_size", [5, 12])
def test_both_passes_of_a_micro_batch_draw_the_same_random_numbers(micro_batch_size):
    expected, expected_next = gradients(0.5, micro_batch_size, graphs_kept=True)
    found, following = gradients(0.5, micro_batch_size)
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)
    assert torch.equal(following, expected_next)
    assert not torch.equal(gradients(0.0, micro_batch_size)[0][0], found[0])


def _first_step():
    torch.manual_seed(0)
    options = {"backbone": "test_efficientnet.r160_in1k", "weights": "random", "precision": "float32"}
    config = parse_config({"model": options}, "a test")
    state = TrainingState(build_embedder(config.model, 32), Splits(train=Pictures(paths=("a", "b"))), config)
    state.levels = torch.stack([torch.arange(8) // 2, torch.arange(8) // 4]).int()
    loss = HierarchicalLoss(config.loss, 2, config.mining.num_views)
    images, pictures = torch.randn(16, 3, 32, 32), torch.arange(16) // 2
    b = 16 // distributed.world_size()
    own = slice(distributed.rank() * b, (distributed.rank() + 1) * b)
    figures, _ = train_step(distributed.data_parallel(state.model), images[own], pictures[own], state, loss, None)
    return {name: float(figures[name]) for name in ("loss", "gradient_norm", "mean_norm")}


@pytest.mark.ddp
def test_a_step_of_two_ranks_has_the_loss_and_gradient_of_one():
    # The optimizer would hide a gradient that is some times too large, but the clip of its norm would not.
    (alone,) = run_ranks(_first_step, 1)
    assert alone["gradient_norm"] > 1e-3
    for figures in run_ranks(_first_step, 2):
        assert figures == pytest.approx(alone, rel=1e-3)


@pytest.fixture
def own_numbers():
    """What a test does to the generators of random numbers is undone."""
    before = random_state()
    yield
    restore_random_state(before)


def drawn():
    return torch.rand(1).item(), np.random.rand(), random.random()


@pytest.mark.usefixtures("own_numbers")
def test_each_rank_draws_numbers_of_its_own_the_same_in_every_run_of_a_seed():
    def seeded(seed, rank):
        seed_generators(seed, rank)
        return drawn()

    assert seeded(0, 1) == seeded(0, 1)
    for a, b in itertools.combinations([(0, 0), (0, 1), (1, 0), (1, 1)], 2):
        assert all(x != y for x, y in zip(seeded(*a), seeded(*b), strict=True))


@pytest.mark.usefixtures("own_numbers")
def test_every_generator_goes_back():
    before = random_state()
    first = drawn()
    assert first != drawn()
    restore_random_state(before)
    assert drawn() == first


@pytest.mark.parametrize("wrong", [(float("nan"), 1.0), (1.0, float("inf"))])
def test_from_a_step_that_is_not_finite_on_none_is_taken(wrong):
    model = nn.Linear(3, 2)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, fused=True)
    stepper = Stepper(optimizer, torch.device("cpu"))
    reference = copy.deepcopy(model)
    plain = torch.optim.AdamW(reference.parameters(), lr=0.1)

    def take(numbers, scale):
        for p in (*model.parameters(), *reference.parameters()):
            p.grad = torch.full_like(p, scale)
        stepper.step(*map(torch.tensor, numbers), lambda *said: UserError(f"refused {said}"))

    def state():
        return copy.deepcopy([*model.state_dict().values(), *map(list, map(dict.values, optimizer.state.values()))])

    assert stepper.note() == ""
    for scale in (1.0, -3.0):
        take((0.5, 2.0), scale)
        plain.step()
    stepper.settle()
    assert stepper.note() == "loss 0.5000"
    for a, b in zip(model.parameters(), reference.parameters(), strict=True):
        torch.testing.assert_close(a, b)
    before = state()
    take(wrong, float("nan"))
    # Nobody has asked yet, and this one would do.
    with pytest.raises(UserError, match=r"refused \((nan, 1\.0|1\.0, inf)\)"):
        take((0.5, 2.0), 1.0)
    assert repr(state()) == repr(before)
    stepper.settle()  # told once


def test_a_profile_holds_the_steps_asked_for(tmp_path):
    with profiled(tmp_path, 0) as step_ends:
        step_ends()
    assert not list(tmp_path.iterdir())
    with profiled(tmp_path, 3) as step_ends:
        for _ in range(STEPS_BEFORE + 5):
            torch.ones(4).cosh()
            step_ends()
        (trace,) = (tmp_path / "tensorboard").glob("*.pt.trace.json")
    events = json.loads(trace.read_text())["traceEvents"]
    assert sum(event["name"] == "aten::cosh" for event in events) == 3


WAYS = {
    "default": {},
    "bank": {"hierarchy": {"features": "bank"}},
    "micro-batches": {"train": {"micro_batch_size": 8}},
    "bfloat16": {"model": {"precision": "bfloat16"}},
    "flat, without projector": {"model": {"curvature": 0.0, "projector": False}},
    "contrast of views": {"loss": {"view_weight": 0.5}},
}


def taken_steps(way, device):
    """Yield what takes one step after another, of a network with random weights on pictures of noise."""
    options = {"model": {}, **WAYS[way]}
    options["model"] = {"weights": "random", **options["model"]}
    config = parse_config(options, "a test")
    state = TrainingState(build_embedder(config.model, 64).to(device), Splits(train=Pictures(paths=("a", "b"))), config)
    state.levels = torch.stack([torch.arange(64) // 8, torch.arange(64) // 16]).int().to(device)
    if config.hierarchy.features == "bank":
        state.bank = FeatureBank(torch.zeros(64, state.model.backbone.num_features, device=device))
    images, indices = torch.randn(32, 3, 64, 64), torch.arange(32)
    if device == "cuda":
        images, indices = images.pin_memory(), indices.pin_memory()
    loss = HierarchicalLoss(config.loss, 2, config.mining.num_views)
    while True:
        yield lambda: train_step(state.model, images, indices, state, loss, None)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("way", WAYS)
def test_a_step_waits_for_no_gpu(way):
    try:
        for step, take in enumerate(itertools.islice(taken_steps(way, "cuda"), 4)):
            if step == 2:  # what is made on first use may wait
                torch.cuda.set_sync_debug_mode("error")
            take()
    finally:
        torch.cuda.set_sync_debug_mode("default")


class Asked(TorchDispatchMode):
    """Notes the operations whose result the host must have before it can go on, whatever device they run on."""

    WAITING = ("_local_scalar_dense", "nonzero", "masked_select", "equal", "_unique", "unique", "bincount")

    def __init__(self):
        super().__init__()
        self.found = []

    def __torch_dispatch__(self, function, types, arguments=(), options=None):
        name = function.name().removeprefix("aten::").split(".")[0]
        if name.startswith(self.WAITING):
            self.found.append(name)
        return function(*arguments, **(options or {}))


@pytest.mark.parametrize("way", WAYS)
def test_a_step_asks_for_no_number_that_a_gpu_would_have_to_be_waited_for(way, monkeypatch):
    """As far as it shows without one."""
    settle, asked, settled = Stepper.settle, Asked(), []

    def look_at_the_step_before(stepper):
        before = len(asked.found)
        settle(stepper)
        settled.append(asked.found[before:])
        del asked.found[before:]

    monkeypatch.setattr(Stepper, "settle", look_at_the_step_before)
    for take in itertools.islice(taken_steps(way, "cpu"), 2):
        with asked:
            take()
    assert asked.found == []
    # And what is looked for can be seen.
    assert "_local_scalar_dense" in settled[1]
