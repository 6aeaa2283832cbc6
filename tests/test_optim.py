import math

import pytest
import torch
from torch import nn

from uhml.config import OptimConfig
from uhml.model import Embedder, HyperbolicHead
from uhml.model.projector import Projector
from uhml.optim import build_optimizer, build_schedule


def model():
    backbone = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.Flatten())
    return Embedder(backbone, HyperbolicHead(4, 2, 0.1, 2.3), None, "float32", "float32")


def settings(optimizer, network):
    """For each parameter by name: its learning rate and weight decay."""
    names = {id(p): name for name, p in network.named_parameters()}
    return {names[id(p)]: (g["lr"], g["weight_decay"]) for g in optimizer.param_groups for p in g["params"]}


def test_matrices_decay_biases_and_norms_do_not_and_the_head_has_its_own_rate():
    network = model()
    optimizer = build_optimizer(network, OptimConfig(learning_rate=0.01, head_lr_factor=3, weight_decay=0.2))
    assert settings(optimizer, network) == {
        "backbone.0.weight": (0.01, 0.2),
        "backbone.0.bias": (0.01, 0.0),
        "backbone.1.weight": (0.01, 0.0),
        "backbone.1.bias": (0.01, 0.0),
        "head.linear.weight": (pytest.approx(0.03), 0.2),
        "head.linear.bias": (pytest.approx(0.03), 0.0),
    }


def test_a_head_with_factor_0_stays_as_it_starts():
    network = model()
    before = [p.detach().clone() for p in network.head.parameters()]
    optimizer = build_optimizer(network, OptimConfig(learning_rate=0.1, head_lr_factor=0.0))
    network(torch.randn(5, 3, 1, 1)).square().sum().backward()
    changed = network.backbone[0].weight.detach().clone()
    optimizer.step()
    assert all(torch.equal(a, b) for a, b in zip(network.head.parameters(), before, strict=True))
    assert not torch.equal(network.backbone[0].weight, changed)


def test_where_there_is_a_projector_it_is_what_learns_and_the_head_stays():
    backbone, head, projector = nn.Flatten(), HyperbolicHead(4, 2, 0.1, 2.3), Projector(4, 0.1, 2.3)
    network = Embedder(backbone, head, projector, "float32", "float32")
    optimizer = build_optimizer(network, OptimConfig(learning_rate=0.01, head_lr_factor=3))
    assert set(settings(optimizer, network)) == {f"projector.{name}" for name, _ in projector.named_parameters()}
    images = torch.randn(5, 4)
    assert torch.equal(network.train()(images), projector(images))
    assert torch.equal(network.eval()(images), head(images))
    network.train()(images).square().sum().backward()
    assert all(p.grad is None for p in head.parameters())
    assert all(p.grad is not None for p in projector.parameters())


@pytest.mark.parametrize(("schedule", "warmup"), [("cosine", 0), ("cosine", 4), ("constant", 4), ("constant", 0)])
def test_learning_rate_over_time(schedule, warmup):
    config, steps = OptimConfig(learning_rate=0.5, warmup_steps=warmup, schedule=schedule), 10
    optimizer = build_optimizer(model(), config)
    scheduler = build_schedule(optimizer, config, steps)
    rates = []
    for _ in range(steps):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    for step, rate in enumerate(rates):
        if step < warmup:
            expected = (step + 1) / warmup
        elif schedule == "constant":
            expected = 1
        else:
            expected = (1 + math.cos(math.pi * (step - warmup) / (steps - warmup))) / 2
        assert rate == pytest.approx(0.5 * expected)
    if schedule == "cosine":
        assert optimizer.param_groups[0]["lr"] == pytest.approx(0, abs=1e-12)
