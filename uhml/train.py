"""The training loop, as the article tells it: embed, cluster, cut into levels, learn from the levels, and again."""

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
from uhml.data.pictures import Pictures
from uhml.data.transforms import training_transform
from uhml.data.verify import load_pictures
from uhml.embedding import embed_share
from uhml.errors import UserError
from uhml.evaluate import score_unseen
from uhml.hierarchy import average_linkage_over_ranks
from uhml.loss import HierarchicalLogRatioLoss, similarity_levels
from uhml.mining import ClusterBatches
from uhml.model import Embedder, FeatureMoments, build_embedder
from uhml.optim import build_optimizer, build_schedule
from uhml.progress import progress
from uhml.report import Reporter
from uhml.run_dir import open_run_dir

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
    with distributed.process_group(config.train.device) as device, open_run_dir(run_dir, config, overwrite):
        torch.manual_seed(config.train.seed)
        splits = load_pictures(config.data)
        model = build_embedder(config.model, config.data.image_size).to(device).eval()
        report = Reporter(run_dir)

        start_head(model, splits.train, config)
        before = score_unseen(model, splits, config)
        report.scores(0, before)

        parallel = distributed.data_parallel(model)
        optimizer = build_optimizer(model, config.optim)
        schedule = build_schedule(optimizer, config.optim, config.train.num_steps)
        # Two views of one picture are one level above the finest cluster.
        num_levels = len(config.hierarchy.cuts) + (config.mining.num_views > 1)
        loss_function = HierarchicalLogRatioLoss(config.loss.omega, num_levels)

        figures: dict[str, Tensor | float] = {}
        steps = progress(
            range(config.train.num_steps),
            "train",
            unit="step",
            note=lambda: f"loss {float(figures['loss']):.4f}" if figures else "",
        )
        for step in steps:
            if step % config.hierarchy.recluster_every == 0:
                levels = discover_hierarchy(model, splits.train, config, run_dir, report, step)
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

        discover_hierarchy(model, splits.train, config, run_dir, report, config.train.num_steps)
        after = score_unseen(model, splits, config)
        report.scores(config.train.num_steps, after)
        return report.finish(before, after, config.train.num_steps, time.monotonic() - started)


def start_head(model: Embedder, pictures: Pictures, config: Config) -> None:
    """Fit the head to the frozen features of the training pictures, or take a trained network's weights."""
    if config.model.init_from is not None:
        load_weights(model, config.model.init_from)
        return
    own = embed_share(model, pictures, config, "frozen features of train pictures", features=True)
    model.head.start(config.model.head_init, FeatureMoments.over_ranks(own), config.model.start_norm)


def discover_hierarchy(
    model: Embedder,
    pictures: Pictures,
    config: Config,
    run_dir: Path,
    report: Reporter,
    step: int,
) -> Tensor:
    """Embed all training pictures, cluster them by average linkage, cut the tree into levels.

    Returns:
        ``[K, n]`` int32, the cluster of each picture on each cut, finest first, the same on every rank.
    """
    options = config.hierarchy
    own = embed_share(model, pictures, config, "embed train pictures")
    tree = average_linkage_over_ranks(
        own,
        len(pictures),
        mode=options.mode,
        geometry=options.geometry,
        curvature=config.model.curvature,
        num_neighbors=options.num_neighbors,
    )

    def cut() -> Tensor:
        assert tree is not None, "rank 0 has the tree"
        tree.save(run_dir / "hierarchy.npz")
        levels = tree.cut(**{options.cut_by: options.cuts})  # type: ignore[arg-type]
        report.hierarchy(step, levels.numpy(), pictures)
        return levels

    return distributed.broadcast_from_main(distributed.on_main(cut), model.device)


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
        UserError: loss or gradient is not finite; the parameters are as they were.
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
        raise UserError(
            f"Step {step}: the loss is {float(loss)} and the gradient's norm {float(gradient_norm)}, so the run "
            "stopped before the step. A lower optim.learning_rate or model.precision=float32 is the usual cure."
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
