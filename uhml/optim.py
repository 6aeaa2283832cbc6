"""AdamW for backbone and projector, and the learning rate over time."""

import math

import torch
from torch.optim.lr_scheduler import LambdaLR

from uhml.config import OptimConfig
from uhml.model import Embedder


def build_optimizer(model: Embedder, config: OptimConfig) -> torch.optim.AdamW:
    """Return AdamW over all parameters: matrices with weight decay, biases and norms without.

    All parameters are Euclidean: the points of the ball are the network's output, not its parameters, so Riemannian
    steps have nothing to act on.
    """
    groups = []
    for module, factor in ((model.backbone, 1.0), (model.learned_head, config.head_lr_factor)):
        parameters = [p for p in module.parameters() if p.requires_grad]
        for decay, chosen in (
            (config.weight_decay, [p for p in parameters if p.ndim > 1]),
            (0.0, [p for p in parameters if p.ndim <= 1]),
        ):
            groups.append({"params": chosen, "lr": config.learning_rate * factor, "weight_decay": decay})
    # Fused: the fastest on GPUs and on CPUs, and the one that can be told on the device not to step.
    return torch.optim.AdamW(groups, fused=True)


def build_schedule(optimizer: torch.optim.Optimizer, config: OptimConfig, num_steps: int) -> LambdaLR:
    """Return the learning rate over ``num_steps`` steps: linear warm-up, then half a cosine or constant."""

    def factor(step: int) -> float:
        if step < config.warmup_steps:
            return (step + 1) / config.warmup_steps
        if config.schedule == "constant":
            return 1.0
        after = (step - config.warmup_steps) / max(1, num_steps - config.warmup_steps)
        return 0.5 * (1 + math.cos(math.pi * min(1.0, after)))

    return LambdaLR(optimizer, factor)
