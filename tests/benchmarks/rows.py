"""Runs beside ours on the scoreboard: other levels, another loss, other methods; same backbone, pictures and steps.

    python tests/benchmarks/rows.py labels configs/cars196-small.yaml data.root=... --run-dir results/labels

"labels" and "contrastive" are ``uhml train`` with one part replaced. "simclr" is lightly's head and loss
(``pip install lightly``); "stml" is the loss and the teacher of STML's official code, from a clone of
https://github.com/tjddus9597/STML-CVPR22 that the environment variable STML names. These two
are deployed like ours, behind a head fitted at the end; STML's own embedding is scored beside it.
"""

import uhml  # before torch, which reads then how its threads are to wait

# isort: split
import argparse
import copy
import importlib.util
import json
import math
import os
import time
from dataclasses import asdict
from pathlib import Path
from unittest import mock

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

import uhml.train
from uhml import cli
from uhml.config import load_config
from uhml.data.loading import TrainingBatches
from uhml.data.transforms import training_transform
from uhml.data.verify import list_pictures, readable_pictures
from uhml.embedding import embed_share
from uhml.errors import UserError
from uhml.evaluate import score_unseen
from uhml.hierarchy import average_linkage
from uhml.hierarchy.geometry import Geometry
from uhml.logs import to_terminal
from uhml.metrics import Embedded, score
from uhml.model import build_embedder
from uhml.optim import build_optimizer, build_schedule
from uhml.progress import progress
from uhml.reporting.hierarchy import purities
from uhml.run.reclustering import linkage_options


class Contrastive(nn.Module):
    """Hadsell et al. (CVPR 2006): pairs of one cluster, or of one picture, attract; others repel up to a margin.

    The margin is twice the mean distance within the batch of the first step.
    """

    def __init__(self, options, num_cuts, num_views):
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

    def discover(state, pictures, run, report):
        def tree_of_labels(*_, **__):
            return average_linkage(
                F.one_hot(torch.from_numpy(pictures.labels).long()).float(), geometry="euclidean", mode="exact"
            )

        uhml.train.average_linkage_over_ranks = tree_of_labels
        original(state, pictures, run, report)

    uhml.train.discover_hierarchy = discover
    # All classes lie equally far apart, above the pictures of one class, which lie nowhere apart.
    return cli.main(["train", *args, "hierarchy.cut_by=heights", "hierarchy.cuts=[0.5]"])


def with_contrastive(args):
    """The trainer with the single-level contrastive loss on the pseudo-labels of one cut."""
    # Fails where the trainer has no such name, instead of training by its own loss.
    with mock.patch.object(uhml.train, "HierarchicalLoss", Contrastive):
        return cli.main(["train", *args, "hierarchy.cuts=[0.85]"])


class SimCLR:
    """Chen et al., ICML 2020, on random batches."""

    def __init__(self, model, config):
        from lightly.loss import NTXentLoss
        from lightly.models.modules import SimCLRProjectionHead

        self.config, num_features = config, model.backbone.num_features
        self.head = SimCLRProjectionHead(num_features, num_features, 128)
        self.criterion = NTXentLoss(temperature=0.1)

    def sampler(self, model, pictures, step):
        def batch_of_step(step):
            generator = torch.Generator().manual_seed(self.config.train.seed * 1_000_003 + step)
            return torch.randperm(len(pictures), generator=generator)[
                : self.config.train.global_batch_size // 2
            ].numpy()

        return batch_of_step, self.config.train.num_steps

    def loss(self, model, images, pictures):
        projected = self.head(model.features(images))
        return self.criterion(projected[::2], projected[1::2])  # the two views of a picture are neighbours

    def after_step(self, model):
        pass

    embed = None


class STML:
    """Kim et al., CVPR 2022: queries with their five nearest neighbours, a momentum teacher, contextual similarity."""

    def __init__(self, model, config):
        if not torch.cuda.is_available():
            torch.Tensor.cuda = lambda self, *args, **kwargs: self  # the authors' code asks for one
        spec = importlib.util.spec_from_file_location("stml_loss", Path(os.environ["STML"]) / "code" / "loss.py")
        official = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(official)
        self.config, num_features = config, model.backbone.num_features

        def layer(width):
            linear = nn.Linear(num_features, width)
            nn.init.orthogonal_(linear.weight)
            nn.init.zeros_(linear.bias)
            return linear

        # f is what is deployed, g what teaches it. The teacher's g starts on its own, as in the authors' code.
        self.head = nn.ModuleDict({"f": layer(512), "g": layer(1024)})
        self.student = nn.ModuleDict({"backbone": model.backbone, "g": self.head["g"]})
        self.teacher = nn.ModuleDict({"backbone": copy.deepcopy(model.backbone), "g": layer(1024)}).eval()
        self.criterion = official.STML_loss(sigma=3, delta=1, view=2, disable_mu=False, topk=10)
        # The criterion's "disable_mu" is their --student_norm: 0, distances relative to their mean.
        self.momentum = official.Momentum_Update(momentum=0.999)

    @torch.no_grad()
    def sampler(self, model, pictures, step):
        """Their NNBatchSampler, made anew once around the pictures."""
        features = embed_share(model, pictures, self.config, "STML: neighbours", features=True)
        points = F.normalize(self.head["g"](features))
        nearest = torch.cat([(rows @ points.T).topk(5, 1).indices for rows in points.split(1024)]).numpy()
        per_batch = self.config.train.global_batch_size // 2
        num_queries = math.ceil(per_batch / 5)

        def batch_of_step(step):
            random = np.random.default_rng((self.config.train.seed, step))
            return nearest[random.choice(len(nearest), num_queries, replace=False)].reshape(-1)

        return batch_of_step, step + max(1, len(pictures) // per_batch)

    def loss(self, model, images, pictures):
        features = model.features(images)
        with torch.no_grad():
            taught = self.teacher["g"](self.teacher["backbone"](images))
        return self.criterion(self.head["f"](features), self.head["g"](features), taught, pictures)["loss"]

    def after_step(self, model):
        self.momentum(self.student, self.teacher)

    def embed(self, features):
        return self.head["f"](features)


def train_other(method, config, run_dir):
    """Train by another method, with optimizer, schedule and pictures of ``config``."""
    started, seed = time.monotonic(), config.train.seed
    splits = readable_pictures(list_pictures(config.data), config.data)
    torch.manual_seed(seed)
    model = build_embedder(config.model, config.data.image_size).eval()
    uhml.train.start_head(model, splits.train, config)
    before = score_unseen(model, splits, config)
    method = method(model, config)
    model.projector = method.head
    optimizer = build_optimizer(model, config.optim)
    schedule = build_schedule(optimizer, config.optim, config.train.num_steps)
    transform = training_transform(config.data, model.backbone.mean, model.backbone.std)
    workers = config.data.num_workers
    batches = TrainingBatches(splits.train, transform, num_views=2, seed=seed, num_workers=workers)
    step, figures = 0, {}
    while step < config.train.num_steps:
        batch_of_step, until = method.sampler(model, splits.train, step)
        steps = range(step, min(until, config.train.num_steps))
        model.train()
        of_steps = batches.of_steps(steps, batch_of_step)
        for images, pictures in progress(of_steps, "train", total=len(steps), unit="step", note=lambda: str(figures)):
            loss = method.loss(model, images, pictures)
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), config.optim.gradient_clip)
            optimizer.step()
            method.after_step(model)
            schedule.step()
            figures["loss"] = round(loss.item(), 4)
        step = steps.stop
    batches.close()
    model.projector = None
    model.eval()
    features = uhml.train.start_head(model, splits.train, config)
    with torch.inference_mode():
        tree = average_linkage(model.head(features), **linkage_options(config))
    after = score_unseen(model, splits, config)
    result = {"frozen": asdict(before["backbone"]), "steps": config.train.num_steps}
    for when, scores in (("start", before), ("trained", after)):
        result[when] = asdict(scores["ball"]) | {name: asdict(scores[name]) for name in ("cosine", "backbone")}
    result["tree"] = purities(tree, splits.train)
    if method.embed is not None:
        result["own"] = asdict(score_own(method, model, splits.test, config))
    run_dir.mkdir(parents=True, exist_ok=True)
    result["seconds"] = round(time.monotonic() - started, 1)
    (run_dir / "result.json").write_text(json.dumps(result, indent=2) + "\n")


@torch.inference_mode()
def score_own(method, model, pictures, config):
    """Score the method's own embedding by the Euclidean distance, as its authors do."""
    features = embed_share(model, pictures, config, "embed test pictures", features=True)
    embedded = Embedded(method.embed(features), pictures.labels)
    return score(embedded, None, Geometry("euclidean"), config.eval.recall_at, config.train.seed)


METHODS = {"simclr": SimCLR, "stml": STML}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("row", choices=["labels", "contrastive", *METHODS])
    parser.add_argument("config")
    parser.add_argument("overrides", nargs="*")
    parser.add_argument("--run-dir", type=Path, required=True)
    args = parser.parse_intermixed_args()
    if args.row in METHODS:
        with to_terminal():
            try:
                return train_other(METHODS[args.row], load_config(args.config, args.overrides), args.run_dir)
            except UserError as e:
                parser.error(str(e))
    run = {"labels": with_labels, "contrastive": with_contrastive}[args.row]
    return run([args.config, *args.overrides, "--run-dir", str(args.run_dir)])


if __name__ == "__main__":
    raise SystemExit(main())
