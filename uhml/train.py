"""The training loop, as the article tells it: embed, cluster, cut into levels, learn from the levels, and again."""

import dataclasses
import logging
import math
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from uhml import distributed, poincare
from uhml.checkpoint import load_weights, save_checkpoint
from uhml.config import Config, dump_config
from uhml.data.loading import training_batches
from uhml.data.pictures import Pictures, Splits
from uhml.data.transforms import plain_transform, training_transform
from uhml.data.verify import load_pictures
from uhml.embedding import embed_share
from uhml.evaluate import Scores, score
from uhml.hierarchy import average_linkage_over_ranks
from uhml.hierarchy.geometry import Geometry
from uhml.loss import HierarchicalLogRatioLoss, similarity_levels
from uhml.mining import ClusterBatches
from uhml.model import Embedder, FeatureMoments, build_embedder
from uhml.optim import build_optimizer, build_schedule
from uhml.progress import progress
from uhml.report import Reporter, print_table, result_table, write_json
from uhml.run_dir import prepare_run_dir

logger = logging.getLogger(__name__)


def train(config: Config, run_dir: Path, overwrite: bool = False) -> dict[str, Any]:
    """Train an embedding and score it on classes it never saw.

    Args:
        config: the whole run.
        run_dir: the folder the run leaves its files in.
        overwrite: replace an earlier run there.

    Returns:
        What ``result.json`` holds.

    Raises:
        UserError: whatever the user can put right.
    """
    started = time.monotonic()
    with distributed.process_group(config.train.device) as device:
        prepare_run_dir(run_dir, config, overwrite)
        torch.manual_seed(config.train.seed)
        splits = load_pictures(config.data)
        model = build_embedder(config.model, config.data.image_size).to(device).eval()
        report = Reporter(run_dir)

        start_head(model, splits.train, config, device)
        before = score_unseen(model, splits, config, device)
        for name, scores in (("frozen", before["backbone"]), ("start", before["ball"])) if before else ():
            report.scores(name, 0, scores)

        parallel = distributed.data_parallel(model)
        optimizer = build_optimizer(model, config.optim)
        schedule = build_schedule(optimizer, config.optim, config.train.num_steps)
        # Two views of one picture are one level above the finest cluster.
        num_levels = len(config.hierarchy.cuts) + (config.mining.num_views > 1)
        loss_function = HierarchicalLogRatioLoss(config.loss.omega, num_levels)

        for step in progress(range(config.train.num_steps), "train", unit="step"):
            if step % config.hierarchy.recluster_every == 0:
                levels = discover_hierarchy(model, splits.train, config, device, run_dir, report, step)
                batches = iter(cluster_batches(model, splits.train, levels, config, step))
            images, pictures = next(batches)
            figures = train_step(
                parallel, images.to(device), pictures.to(device), levels, loss_function, optimizer, config, step
            )
            schedule.step()
            if (step + 1) % config.train.log_every == 0:
                report.scalars("train", step + 1, {key: float(value) for key, value in figures.items()})
            if (step + 1) % config.train.checkpoint_every == 0 or step + 1 == config.train.num_steps:
                save(run_dir, step + 1, model, optimizer, schedule, levels, config)

        discover_hierarchy(model, splits.train, config, device, run_dir, report, config.train.num_steps)
        after = score_unseen(model, splits, config, device)
        if after:
            report.scores("trained", config.train.num_steps, after["ball"])
        report.close()
        return finish(run_dir, before, after, config, time.monotonic() - started)


def start_head(model: Embedder, pictures: Pictures, config: Config, device: torch.device) -> None:
    """Fit the head to the frozen features of the training pictures, or take a trained network's weights."""
    if config.model.init_from is not None:
        load_weights(model, config.model.init_from)
        return
    transform = plain_transform(config.data, model.backbone.mean, model.backbone.std)
    own = embed_share(model.features, pictures, transform, config, device, "frozen features, train")
    model.head.start(config.model.head_init, FeatureMoments.over_ranks(own), config.model.start_norm)


def discover_hierarchy(
    model: Embedder,
    pictures: Pictures,
    config: Config,
    device: torch.device,
    run_dir: Path,
    report: Reporter,
    step: int,
) -> Tensor:
    """Embed all training pictures, cluster them by average linkage, cut the tree into levels.

    Returns:
        ``[K, n]`` int32, the cluster of each picture on each cut, finest first, the same on every rank.
    """
    options = config.hierarchy
    transform = plain_transform(config.data, model.backbone.mean, model.backbone.std)
    own = embed_share(model.eval(), pictures, transform, config, device, "embed train pictures")
    tree = average_linkage_over_ranks(
        own,
        len(pictures),
        mode=options.mode,
        geometry=options.geometry,
        curvature=config.model.curvature,
        num_neighbors=options.num_neighbors,
    )
    cut = None
    if tree is not None:  # on rank 0, which merged
        tree.save(run_dir / "hierarchy.npz")
        cut = tree.cut(**{options.cut_by: list(options.cuts)})
        report.hierarchy(step, cut.numpy(), pictures)
    return distributed.broadcast_from_main(cut, device)


def cluster_batches(model: Embedder, pictures: Pictures, levels: Tensor, config: Config, step: int) -> Any:
    """Return the loader of this rank's part of the batches from ``step`` to the next re-clustering."""
    mining, options = config.mining, config.train
    batch_of_step = ClusterBatches(
        levels.cpu().numpy(), config.clusters_per_batch, mining.pictures_per_cluster, options.seed
    )
    return training_batches(
        pictures,
        training_transform(config.data, model.backbone.mean, model.backbone.std),
        batch_of_step,
        range(step, min(step + config.hierarchy.recluster_every, options.num_steps)),
        num_views=mining.num_views,
        seed=options.seed,
        num_workers=config.data.num_workers,
    )


def train_step(
    model: nn.Module,
    images: Tensor,
    pictures: Tensor,
    levels: Tensor,
    loss_function: HierarchicalLogRatioLoss,
    optimizer: torch.optim.Optimizer,
    config: Config,
    step: int,
) -> dict[str, Tensor | float]:
    """Take one optimizer step on the global batch, of which this rank brings ``b`` of ``B`` rows.

    Args:
        model: pictures to points of the ball, wrapped for data parallelism.
        images: ``[b, 3, h, w]``.
        pictures: ``[b]``, indices of the images' pictures.
        levels: ``[K, n]``.
        loss_function: of distances and similarity levels.
        optimizer: of the model's parameters.
        config: for the curvature and the gradient clip.
        step: for messages.

    Returns:
        Figures to log, of the global batch.

    Raises:
        FloatingPointError: loss or gradient is not finite; the parameters are as they were.
    """
    model.train()
    points = model(images)
    # This rank's rows are the anchors; each is compared with the whole batch, wherever it was embedded.
    all_points = distributed.all_gather_with_gradient(points)
    all_pictures = distributed.all_gather_with_gradient(pictures)
    rows = torch.arange(len(points), device=points.device) + distributed.rank() * len(points)
    distances = poincare.distance_matrix(points, all_points, config.model.curvature)
    similarity = similarity_levels(levels, pictures, all_pictures)
    is_self = rows[:, None] == torch.arange(len(all_points), device=points.device)
    total, num_anchors = loss_function(distances, similarity, is_self)

    # Data parallelism averages gradients over ranks, and the loss is a sum over them: hence the world size.
    num_anchors = distributed.all_reduce_sum(num_anchors).clamp_min(1)
    optimizer.zero_grad()
    (distributed.world_size() * total / num_anchors).backward()
    loss = distributed.all_reduce_sum(total) / num_anchors
    gradient_norm = nn.utils.clip_grad_norm_(model.parameters(), config.optim.gradient_clip)
    if not (math.isfinite(loss) and math.isfinite(gradient_norm)):
        raise FloatingPointError(
            f"step {step}: the loss is {float(loss)}, the gradient's norm {float(gradient_norm)}; stopped before the step. "
            "A lower optim.learning_rate or model.precision=float32 is the usual cure."
        )
    optimizer.step()

    radius = poincare.tangent_norm(all_points.detach(), config.model.curvature)
    return {
        "loss": loss,
        "learning_rate": optimizer.param_groups[0]["lr"],
        "gradient_norm": gradient_norm,
        "mean_norm": radius.mean(),
        "share_at_clip": (radius > 0.999 * config.model.clip_radius).float().mean(),
    }


def score_unseen(model: Embedder, splits: Splits, config: Config, device: torch.device) -> dict[str, Scores]:
    """Score the network as it is on the test pictures; an empty dictionary where no classes are known.

    Returns:
        "backbone": its features, by cosine; "ball": the embedding as it is deployed, by the ball's distance; "cosine":
        the embedding by cosine.
    """
    if splits.test is None or splits.test.labels is None:
        return {}
    model.eval()
    transform = plain_transform(config.data, model.backbone.mean, model.backbone.std)

    def features_of(pictures: Pictures, name: str) -> Tensor:
        own = embed_share(model.features, pictures, transform, config, device, f"features, {name}")
        return distributed.all_gather_shares(own, len(pictures))

    features = {"queries": features_of(splits.test, "test")}
    labels = {"query_labels": splits.test.labels}
    if splits.gallery is not None and splits.gallery.labels is not None:
        features["gallery"] = features_of(splits.gallery, "gallery")
        labels["gallery_labels"] = splits.gallery.labels
    with torch.inference_mode():
        points = {part: model.head(rows) for part, rows in features.items()}
    cosine, ball = Geometry("cosine"), Geometry("poincare", config.model.curvature)
    return {
        name: score(**rows, **labels, geometry=geometry, recall_at=config.eval.recall_at, seed=config.train.seed)
        for name, rows, geometry in (
            ("backbone", features, cosine),
            ("ball", points, ball),
            ("cosine", points, cosine),
        )
    }


def save(
    run_dir: Path,
    step: int,
    model: Embedder,
    optimizer: torch.optim.Optimizer,
    schedule: torch.optim.lr_scheduler.LRScheduler,
    levels: Tensor,
    config: Config,
) -> None:
    """Write a checkpoint after ``step`` steps, from rank 0; batches and augmentations follow from seed and step."""
    state = {
        "step": step,
        "model": model.state_dict(),
        "optimizer": optimizer.state_dict(),
        "schedule": schedule.state_dict(),
        "levels": levels,
        "config": dump_config(config),
    }
    distributed.on_main(lambda: save_checkpoint(run_dir / "checkpoints", step, state))


def finish(
    run_dir: Path, before: dict[str, Scores], after: dict[str, Scores], config: Config, seconds: float
) -> dict[str, Any]:
    """Write ``result.json`` and show the final table."""
    world_size, steps = distributed.world_size(), config.train.num_steps

    def plain(scores: dict[str, Scores]) -> dict[str, Any]:
        ball, others = scores["ball"], {name: dataclasses.asdict(scores[name]) for name in ("cosine", "backbone")}
        return {**dataclasses.asdict(ball), **others}

    result: dict[str, Any] = {
        "frozen": dataclasses.asdict(before["backbone"]) if before else None,
        "start": plain(before) if before else None,
        "trained": plain(after) if after else None,
        "steps": steps,
        "world_size": world_size,
        "seconds": round(seconds, 1),
    }
    distributed.on_main(lambda: write_json(run_dir / "result.json", result))
    if after:
        rows = {
            "frozen backbone, cosine": before["backbone"],
            "untrained embedding, ball": before["ball"],
            "trained embedding, ball": after["ball"],
            "trained embedding, cosine": after["cosine"],
            "trained backbone, cosine": after["backbone"],
        }
        print_table(result_table(rows, steps, seconds, world_size))
    else:
        logger.info("No classes are known for these pictures, so there is nothing to score.")
    logger.info("The run is in %s; tensorboard --logdir %s shows it.", run_dir, run_dir)
    return result
