"""What a training step costs beyond its backbone, and what the loss takes as the batch grows.

    python tests/benchmarks/step.py --out results/step configs/cars196-small.yaml data.root=cars196

Writes ``step.json`` and ``loss.png``, and prints both tables. All times are medians, of processor time of one thread.

* A step: the trainer's own, with all but the reading of pictures, against forward, backward and AdamW of the same
  backbone on the same pictures, step by step in turn.
* The loss and its gradient, 128 dimensions: ours; a tensor of all triplets, for the same value; and triplet margin loss
  over all triplets of pytorch-metric-learning, which needs one level and gets clusters of 8. Each is a process of its
  own, for its peak of memory; one that takes over 16 GiB or 5 minutes is left out.
"""

import argparse
import json
import resource
import statistics
import subprocess
import sys
import time
from pathlib import Path

import matplotlib
import torch

matplotlib.use("Agg")
import matplotlib.pyplot as plt

from uhml import poincare, train
from uhml.config import load_config
from uhml.data.loading import TrainingBatches
from uhml.data.transforms import training_transform
from uhml.data.verify import list_pictures
from uhml.environment import keep_freed_memory
from uhml.loss import Batch, HierarchicalLogRatioLoss, HierarchicalLoss, global_loss
from uhml.mining import ClusterBatches
from uhml.run.training_state import TrainingState

DIMENSIONS, CLUSTER, CURVATURE, OMEGA = 128, 8, 0.1, 0.8
KINDS = ("ours", "all triplets", "pytorch-metric-learning")
MOST_BYTES, MOST_SECONDS = 16 * 2**30, 300


def nested_levels(num_pictures):
    """Return three levels of clusters of 8, 64 and 512 pictures, ``[3, n]``."""
    rows = torch.arange(num_pictures)
    return torch.stack([rows // CLUSTER**k for k in (1, 2, 3)]).int()


def measure_step(config, repeats):
    """Return the seconds of our step and of the bare one, in turn."""
    splits = list_pictures(config.data)
    models = [train.build_model(config, True) for _ in range(2)]
    for model in models:
        features = torch.randn(2048, model.backbone.num_features, generator=torch.Generator().manual_seed(0))
        train.fit_head(model, features, config)
        model.projector.fit(features, model.head.mean, config.model.start_norm)
    state = TrainingState(models[0], splits, config)
    state.levels = nested_levels(len(splits.train))
    chosen = ClusterBatches(
        state.levels.numpy(), config.clusters_per_batch, config.mining.pictures_per_cluster, config.train.seed
    )
    transform = training_transform(config.data, models[0].backbone.mean, models[0].backbone.std)
    views = config.mining.num_views
    loader = TrainingBatches(splits.train, transform, num_views=views, seed=0, num_workers=0)
    batches = list(loader.of_steps(range(4), chosen))
    loss_function = HierarchicalLoss(config.loss, len(state.levels), views)
    backbone = models[1].backbone.train()
    optimizer = torch.optim.AdamW(backbone.parameters(), config.optim.learning_rate, fused=True)

    def ours(images, pictures):
        figures, _ = train.train_step(models[0], images, pictures, state, loss_function, Path("/nowhere"))
        if state.step % config.train.log_every == 0:
            state.stepper.settle()
            [float(figure) for figure in figures.values()]

    def bare(images, pictures):
        optimizer.zero_grad()
        backbone(images).square().mean().backward()
        optimizer.step()

    seconds = {"ours": [], "bare": []}
    for i in range(repeats + 3):
        images, pictures = batches[i % len(batches)]
        for name, step in (("ours", ours), ("bare", bare)) if i % 2 else (("bare", bare), ("ours", ours)):
            started = time.process_time()
            step(images, pictures)
            if i >= 3:
                seconds[name].append(time.process_time() - started)
    return seconds


def measure_loss(kind, size, repeats):
    """Return the median seconds of a loss and its gradient, and the peak of memory above what was there before."""
    torch.manual_seed(0)
    points = poincare.exponential_map(torch.randn(size, DIMENSIONS) / DIMENSIONS**0.5, CURVATURE)
    levels, pictures = nested_levels(size), torch.arange(size)
    loss_function = HierarchicalLogRatioLoss(OMEGA, len(levels))
    if kind == KINDS[2]:
        from pytorch_metric_learning.losses import TripletMarginLoss

        triplet_loss = TripletMarginLoss()

    def once():
        if kind == "ours":
            global_loss(loss_function, Batch.over_ranks(points, pictures), levels, CURVATURE)
            return
        x = points.clone().requires_grad_()
        if kind == "all triplets":
            batch = Batch(x, pictures, range(size))
            distances, similarity, is_self = batch.pairs(range(size), levels, CURVATURE)
            a = distances.clamp_min(1e-3).log() - similarity * loss_function.log_omega
            differ = (similarity[:, :, None] != similarity[:, None, :]) & ~is_self[:, :, None] & ~is_self[:, None, :]
            (((a[:, :, None] - a[:, None, :]).square() * differ).sum() / differ.sum()).backward()
        else:
            triplet_loss(x, levels[0]).backward()

    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    seconds = []
    for _ in range(repeats + 1):
        started = time.process_time()
        once()
        seconds.append(time.process_time() - started)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    return {"seconds": statistics.median(seconds[1:] or seconds), "bytes": peak * 1024}


def loss_in_child(kind, size):
    """Measure in a process of its own; None where it does not fit."""
    limit = ["prlimit", f"--as={MOST_BYTES}"]
    child = [sys.executable, __file__, "--child", kind, "--size", str(size), "--out", "unused", "unused"]
    try:
        done = subprocess.run([*limit, *child], capture_output=True, text=True, timeout=MOST_SECONDS)
    except subprocess.TimeoutExpired:
        return None
    return json.loads(done.stdout.splitlines()[-1]) if done.returncode == 0 else None


def draw(losses, path):
    figure, axes = plt.subplots(1, 2, figsize=(9, 3.6), layout="constrained")
    for axis, key, unit in ((axes[0], "seconds", "seconds"), (axes[1], "bytes", "GiB")):
        for kind in KINDS:
            found = [(row["size"], row[key]) for row in losses if row["kind"] == kind and row.get(key)]
            if found:
                sizes, values = zip(*found, strict=True)
                scale = 2**30 if key == "bytes" else 1
                axis.loglog(sizes, [value / scale for value in values], "o-", label=kind)
        sizes = sorted({row["size"] for row in losses})
        axis.set_xticks(sizes, [f"{size:,}" for size in sizes])
        axis.set_xticks([], minor=True)
        axis.set(xlabel="global batch", ylabel=unit)
        axis.grid(alpha=0.3)
    axes[0].legend()
    figure.savefig(path, dpi=120)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config")
    parser.add_argument("overrides", nargs="*")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--sizes", default="512,2048,8192")
    parser.add_argument("--child", choices=KINDS, help=argparse.SUPPRESS)
    parser.add_argument("--size", type=int, help=argparse.SUPPRESS)
    args = parser.parse_intermixed_args()
    torch.set_num_threads(1)
    if args.child:
        print(json.dumps(measure_loss(args.child, args.size, 5 if args.size <= 2048 else 1)))
        return
    keep_freed_memory()
    args.out.mkdir(parents=True, exist_ok=True)
    losses = [
        {"kind": kind, "size": size} | (loss_in_child(kind, size) or {})
        for size in map(int, args.sizes.split(","))
        for kind in KINDS
    ]
    print("| global batch | loss | seconds | GiB |\n|---|---|---|---|")
    for row in losses:
        figures = f"{row['seconds']:.3g} | {row['bytes'] / 2**30:.2f}" if "seconds" in row else "does not fit | "
        print(f"| {row['size']} | {row['kind']} | {figures} |", flush=True)
    draw(losses, args.out / "loss.png")
    config = load_config(args.config, args.overrides)
    steps = measure_step(config, args.repeats)
    ratio = statistics.median(a / b for a, b in zip(steps["ours"], steps["bare"], strict=True))
    bare = statistics.median(steps["bare"])
    print(
        f"\nA step is {ratio:.3f} of the bare one, {bare:.3f} s ({config.train.global_batch_size / bare:.0f} images/s)."
    )
    (args.out / "step.json").write_text(json.dumps({"losses": losses, "steps": steps, "ratio": ratio}, indent=2))


if __name__ == "__main__":
    main()
