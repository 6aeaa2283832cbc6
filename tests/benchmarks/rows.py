"""Runs beside ours on the scoreboard: other levels, another loss, another method; same backbone, pictures and steps.

    python tests/benchmarks/rows.py labels configs/cars196.yaml data.root=... --run-dir results/labels

"labels" and "contrastive" are ``uhml train`` with one part replaced. "simclr" is lightly's head and loss
(``pip install lightly``) on our batches' two views, its network deployed like ours, behind a head fitted at the end.
"""

import argparse
import json
import time
from dataclasses import asdict
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

import uhml.train
from uhml import cli
from uhml.config import load_config
from uhml.data.loading import training_batches
from uhml.data.transforms import training_transform
from uhml.data.verify import list_pictures, readable_pictures
from uhml.evaluate import score_unseen
from uhml.hierarchy import average_linkage
from uhml.model import build_embedder
from uhml.optim import build_optimizer, build_schedule
from uhml.progress import progress


class Contrastive(nn.Module):
    """Hadsell et al. (CVPR 2006): pairs of one cluster, or of one picture, attract; others repel up to a margin.

    The margin is twice the mean distance within the batch of the first step.
    """

    def __init__(self, omega, num_levels):
        super().__init__()
        self.margin = None

    def forward(self, distances, similarity, is_self):
        if self.margin is None:
            self.margin = 2 * float(distances.detach()[~is_self].mean())
        positive, negative = (similarity > 0) & ~is_self, similarity == 0
        attract = (distances.square() * positive).sum(1) / positive.sum(1).clamp_min(1)
        repel = ((self.margin - distances).clamp_min(0).square() * negative).sum(1) / negative.sum(1).clamp_min(1)
        return (attract + repel).sum(), torch.tensor(len(distances))


def with_labels(args):
    """The trainer with the true classes as its one level, by way of a tree of their one-hot vectors: the ceiling."""
    original = uhml.train.discover_hierarchy

    def discover(state, pictures, config, run, report):
        def tree_of_labels(*_, **__):
            return average_linkage(
                F.one_hot(torch.from_numpy(pictures.labels).long()).float(), geometry="euclidean", mode="exact"
            )

        uhml.train.average_linkage_over_ranks = tree_of_labels
        original(state, pictures, config, run, report)

    uhml.train.discover_hierarchy = discover
    # All classes lie equally far apart, above the pictures of one class, which lie nowhere apart.
    return cli.main(["train", *args, "hierarchy.cut_by=heights", "hierarchy.cuts=[0.5]"])


def with_contrastive(args):
    """The trainer with the single-level contrastive loss on the pseudo-labels of one cut."""
    uhml.train.HierarchicalLogRatioLoss = Contrastive
    return cli.main(["train", *args, "hierarchy.cuts=[0.85]"])


def simclr(config, run_dir):
    """SimCLR (Chen et al., ICML 2020) on random batches, with optimizer, schedule and pictures of ``config``."""
    from lightly.loss import NTXentLoss
    from lightly.models.modules import SimCLRProjectionHead

    started, seed = time.monotonic(), config.train.seed
    splits = readable_pictures(list_pictures(config.data), config.data)
    torch.manual_seed(seed)
    model = build_embedder(config.model, config.data.image_size).eval()
    uhml.train.start_head(model, splits.train, config)
    before = score_unseen(model, splits, config)
    num_features = model.head.linear.in_features
    model.projector = SimCLRProjectionHead(num_features, num_features, 128)
    optimizer = build_optimizer(model, config.optim)
    schedule = build_schedule(optimizer, config.optim, config.train.num_steps)
    loss_function = NTXentLoss(temperature=0.1)

    def batch_of_step(step):
        generator = torch.Generator().manual_seed(seed * 1_000_003 + step)
        return torch.randperm(len(splits.train), generator=generator)[: config.train.global_batch_size // 2].numpy()

    batches = training_batches(
        splits.train,
        training_transform(config.data, model.backbone.mean, model.backbone.std),
        batch_of_step,
        range(config.train.num_steps),
        num_views=2,
        seed=seed,
        num_workers=config.data.num_workers,
    )
    model.train()
    figures = {}
    for images, _ in progress(batches, "simclr", unit="step", note=lambda: str(figures)):
        projected = model.projector(model.features(images))
        loss = loss_function(projected[::2], projected[1::2])  # the two views of a picture are neighbours
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), config.optim.gradient_clip)
        optimizer.step()
        schedule.step()
        figures["loss"] = round(loss.item(), 4)
    model.projector = None
    model.eval()
    uhml.train.start_head(model, splits.train, config)
    after = score_unseen(model, splits, config)
    result = {"frozen": asdict(before["backbone"]), "steps": config.train.num_steps}
    for when, scores in (("start", before), ("trained", after)):
        result[when] = asdict(scores["ball"]) | {name: asdict(scores[name]) for name in ("cosine", "backbone")}
    run_dir.mkdir(parents=True, exist_ok=True)
    result["seconds"] = round(time.monotonic() - started, 1)
    (run_dir / "result.json").write_text(json.dumps(result, indent=2) + "\n")


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("row", choices=["labels", "contrastive", "simclr"])
    parser.add_argument("config")
    parser.add_argument("overrides", nargs="*")
    parser.add_argument("--run-dir", type=Path, required=True)
    args = parser.parse_intermixed_args()
    if args.row == "simclr":
        return simclr(load_config(args.config, args.overrides), args.run_dir)
    run = {"labels": with_labels, "contrastive": with_contrastive}[args.row]
    return run([args.config, *args.overrides, "--run-dir", str(args.run_dir)])


if __name__ == "__main__":
    raise SystemExit(main())
