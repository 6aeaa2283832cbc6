"""The training loop, as the article tells it: embed, cluster, cut into levels, learn from the levels, and again."""

import contextlib
import dataclasses
import functools
import logging
from collections.abc import Generator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from uhml import distributed, interruption, poincare
from uhml.config import Config, check_batch_fits
from uhml.data.loading import TrainingBatches
from uhml.data.pictures import Pictures, Splits
from uhml.data.transforms import training_transform
from uhml.data.verify import list_pictures, readable_pictures
from uhml.data.workers import next_together
from uhml.embedding import embed_share
from uhml.evaluate import score_unseen
from uhml.hierarchy import average_linkage_over_ranks, merging_over_ranks
from uhml.interruption import Preempted
from uhml.loss import Batch, HierarchicalLoss, global_loss
from uhml.metrics import Scores
from uhml.model import Embedder, FeatureMoments, build_embedder
from uhml.progress import progress
from uhml.reporting.guards import watch
from uhml.reporting.profile import profiled
from uhml.reporting.projector import project
from uhml.reporting.report import Reporter
from uhml.run.background import Background
from uhml.run.bank import FeatureBank, features_seen
from uhml.run.checkpoint import keep_best, load_weights
from uhml.run.not_finite import refuse_step
from uhml.run.random_state import random_state, restore_random_state, seed_generators
from uhml.run.reclustering import (
    Hierarchy,
    clusters_to_learn,
    embeds_at,
    grow_hierarchy,
    is_first_of_levels,
    linkage_options,
    next_levels_at,
    reclusters_at,
)
from uhml.run.run_dir import HIERARCHIES, OpenRun, open_run_dir, record_config
from uhml.run.training_state import Pending, TrainingState, read_state

logger = logging.getLogger(__name__)


def train(config: Config, run_dir: Path, overwrite: bool = False, allow_change: Sequence[str] = ()) -> dict[str, Any]:
    """Train an embedding and score it on classes it never saw; or go on with such a run where it stopped.

    Args:
        config: the whole run.
        run_dir: the folder the run leaves its files in. If it holds an unfinished run, this one goes on with it.
        overwrite: begin anew, in the place of an earlier run there.
        allow_change: keys of the config that may differ from the unfinished run's.

    Returns:
        What ``result.json`` holds.

    Raises:
        UserError: whatever the user can put right.
        Preempted: on every rank, when a signal asked the run to end and its state is saved.
    """
    with (
        interruption.handled(),
        distributed.process_group(config.train.device) as device,
        # geoopt's functions are scripts, which torch rewrites once they have run a few times: to other last digits, so
        # that a process which has just gone on with a run would differ from one that never stopped.
        torch.jit.optimized_execution(False),
    ):
        # A run without a name is named by the time, of which each process has its own.
        run_dir = distributed.from_main(lambda: run_dir)
        # Before there is a folder: what is mistyped shall leave none.
        listed = list_pictures(config.data)
        check_batch_fits(len(listed.train), config, distributed.world_size())
        with open_run_dir(run_dir, config, overwrite, allow_change) as run:
            if device.type == "cuda":
                logger.info("Training on %s, %s.", device, torch.cuda.get_device_name(device))
            splits = readable_pictures(listed, config.data)
            check_batch_fits(len(splits.train), config, distributed.world_size())
            saved = None if run.checkpoint is None else read_state(run.checkpoint)
            model = build_model(config, saved is None).to(device).eval()
            if config.train.compile:
                compile_backbone(model, config)
            state = TrainingState(model, splits, config)
            with Reporter(run_dir, config, saved) as report:
                try:
                    if saved is None:
                        run.status.phase("embed")
                        state.features = start_head(state.model, splits.train, config)
                    else:
                        state.load(saved)
                        distributed.on_main(lambda: record_config(run_dir, config))
                        logger.info("Going on after step %d of %d.", state.step, config.train.num_steps)
                    return learn(state, splits, run, report)
                except Preempted as e:
                    if state.saved is None:
                        raise Preempted(e.signal, "before the first step") from e
                    save(state, run, report)
                    raise Preempted(
                        e.signal, f"after step {state.step} of {config.train.num_steps}, which is saved"
                    ) from e


def learn(state: TrainingState, splits: Splits, run: OpenRun, report: Reporter) -> dict[str, Any]:
    """Take the steps that are left, and score before the first and after the last. Returns what ``result.json`` holds.

    All that takes long comes after a checkpoint of its step, so that an interruption there costs no step; a head fitted
    to the bank's features comes before, and into it.
    """
    config, num_steps = state.config, state.config.train.num_steps
    save(state, run, report)
    if state.before is None and splits.test is not None:
        state.before = score_now(state, splits, run, report)
        state.save(run.folder, report.settle)

    parallel = distributed.data_parallel(state.model)
    loss_function = HierarchicalLoss(config.loss, len(config.hierarchy.cuts), config.mining.num_views)
    remaining = range(state.step, num_steps)
    steps = progress(remaining, "train", done=state.step, unit="step", note=state.stepper.note)
    with (
        profiled(run.folder, config.train.profile_steps) as step_ends,
        Background() as background,
        contextlib.closing(batches_left(state, splits.train)) as batches,
    ):
        if state.pending is not None:
            cluster_in_background(state, splits.train, background)
        for _ in steps:
            if state.pending is not None and state.step == state.pending.step + config.hierarchy.overlap_steps:
                swap_hierarchy(state, run, report, background)
            if state.levels is None or reclusters_at(state.step, config):
                if state.levels is None or config.hierarchy.overlap_steps == 0:
                    discover_hierarchy(state, splits.train, run, report)
                else:
                    embed_to_cluster(state, splits.train, run, report)
                    cluster_in_background(state, splits.train, background)
                if config.eval.at_reclustering and state.step > 0:
                    score_now(state, splits, run, report)
            run.status.phase("train")
            # Here all ranks agree to go on; an error or a signal on any of them ends all.
            images, indices = next(batches)
            figures, batch = train_step(parallel, images, indices, state, loss_function, run.folder)
            if state.step in (1, num_steps) or state.step % config.train.log_every == 0:
                # Here alone, and where a hierarchy or a checkpoint is made, a step waits for the GPU.
                state.stepper.settle()
                report.scalars("train", state.step, figures)
            if is_first_of_levels(state.step - 1, config):
                assert state.levels is not None
                pairs = batch.pairs(next(batch.blocks()), state.levels, config.model.curvature)
                report.distances(state.step, pairs, len(config.hierarchy.cuts))
            if state.step % config.train.checkpoint_every == 0:
                save(state, run, report)
            run.status.step(state.step)
            step_ends()

    save(state, run, report)
    state.bank = state.pending = None
    discover_hierarchy(state, splits.train, run, report)
    after = score_now(state, splits, run, report)
    project(state.model, splits, state.step, config, report)
    return report.finish(state.before, after, num_steps, state.seconds)


def save(state: TrainingState, run: OpenRun, report: Reporter) -> None:
    """Write a checkpoint of this step, unless there is one. A collective.

    Raises:
        UserError: the step was not taken, as its loss or gradient is not finite.
    """
    state.stepper.settle()
    if state.saved != state.step:
        state.save(run.folder, report.settle)


def score_now(state: TrainingState, splits: Splits, run: OpenRun, report: Reporter) -> dict[str, Scores] | None:
    """Score the network as it is; on validation classes, keep its checkpoint if the first of its Recall@K is best.

    On test classes there is no best one: choosing by them would make their score worthless.
    """
    run.status.phase("evaluate")
    scores = score_unseen(state.model, splits, state.config)
    report.scores(state.step, scores)
    if scores is not None and state.config.data.score_on == "validation":
        recall = next(iter(scores["ball"].recall_at_k.values()))
        if recall > state.best:
            state.best = recall
            distributed.on_main(lambda: keep_best(run.folder / "checkpoints", state.step))
    return scores


def build_model(config: Config, is_new: bool) -> Embedder:
    """Make the network. One that gets the weights of a checkpoint, or of another run, needs none before."""
    options = config.model
    if not is_new or options.init_from is not None:
        options = dataclasses.replace(options, weights="random")  # type: ignore[type-var]
    torch.manual_seed(config.train.seed)
    model = distributed.on_every_rank(lambda: build_embedder(options, config.data.image_size))
    seed_generators(config.train.seed, distributed.rank())
    return model


def compile_backbone(model: Embedder, config: Config) -> None:
    """Have torch compile the backbone, on every rank."""
    logger.info("Compiling the backbone, and once more in the first step: it may take minutes.")
    side = config.data.image_size
    images = torch.zeros(config.eval.batch_size, 3, side, side, device=model.device)
    distributed.on_every_rank(lambda: model.compile_backbone(images))


def start_head(model: Embedder, pictures: Pictures, config: Config) -> Tensor | None:
    """Fit the head to the frozen features of the training pictures, or take a trained network's weights.

    Returns:
        ``[n, num_features]``, the features of this rank's share, if they were needed.
    """
    if config.model.init_from is not None:
        source = config.model.init_from
        distributed.on_every_rank(lambda: load_weights(model, source))
        return None
    features = embed_share(model, pictures, config, "frozen features of train pictures", features=True)
    fit_head(model, features, config)
    if model.projector is not None:
        model.projector.fit(features, model.head.mean, config.model.start_norm)
    return features


def fit_head(model: Embedder, own_features: Tensor, config: Config) -> None:
    """Fit the head to the backbone's features of all ranks' training pictures, ``[n, num_features]`` on this one."""
    options, moments = config.model, FeatureMoments.over_ranks(own_features)
    model.head.fit(options.head_init, moments, options.start_norm, options.whitening)


def discover_hierarchy(state: TrainingState, pictures: Pictures, run: OpenRun, report: Reporter) -> None:
    """Embed all training pictures, cluster them by average linkage, cut the tree into levels: those of ``state``."""
    embedded = embed_to_cluster(state, pictures, run, report)
    run.status.phase("cluster")
    tree = average_linkage_over_ranks(embedded.own, len(pictures), **linkage_options(state.config))

    def grow() -> Hierarchy:
        assert tree is not None, "rank 0 has the tree"
        return grow_hierarchy(lambda: tree, state.step, state.step, pictures, state.config)

    take_hierarchy(state, distributed.on_main(grow), run, report)


def embed_to_cluster(state: TrainingState, pictures: Pictures, run: OpenRun, report: Reporter) -> Pending:
    """Embed this rank's share of the training pictures for a clustering, which is pending from here on.

    A network that learns by way of a projector has its head fitted anew to the features of this step.
    """
    state.stepper.settle()
    run.status.phase("embed")
    if state.bank is None:
        # The pass takes long, and an interruption of it shall cost no step.
        save(state, run, report)
    features = features_to_cluster(state, pictures)
    if state.model.projector is not None:
        fit_head(state.model, features, state.config)
        # A checkpoint from before lacks the head that goes with its backbone.
        state.save(run.folder, report.settle)
    else:
        save(state, run, report)
    with torch.inference_mode():
        state.pending = Pending(state.step, state.model.head(features))
    return state.pending


def features_to_cluster(state: TrainingState, pictures: Pictures) -> Tensor:
    """Return the features ``[len(share(n)), num_features]`` of this rank's share of the training pictures.

    Of a pass through all of them now; or, from the bank, what their last batches made of them.
    """
    if state.bank is not None:
        return state.bank.own.float()
    features, state.features = state.features, None
    if features is None:
        features = embed_share(state.model, pictures, state.config, "embed train pictures", features=True)
    state.bank = FeatureBank(features) if state.config.hierarchy.features == "bank" else None
    return features


def cluster_in_background(state: TrainingState, pictures: Pictures, background: Background) -> None:
    """Find the neighbours of the pending pictures together, and leave the rest to a process beside rank 0.

    One rank without a GPU leaves it the neighbours, too.
    """
    assert state.pending is not None
    config, (step, own) = state.config, state.pending
    merging = merging_over_ranks(own, len(pictures), **linkage_options(config))

    def start() -> None:
        assert merging is not None
        first_step = step + config.hierarchy.overlap_steps
        background.start(functools.partial(grow_hierarchy, merging, step, first_step, pictures, config))

    distributed.on_main(start)


def swap_hierarchy(state: TrainingState, run: OpenRun, report: Reporter, background: Background) -> None:
    """Wait for the pending clustering, however far it is: other levels at another step would make another run."""
    state.stepper.settle()  # a step that must be refused is reproduced by the levels that it learned from
    run.status.phase("cluster")
    take_hierarchy(state, distributed.on_main(background.result), run, report)


def take_hierarchy(state: TrainingState, found: Hierarchy | None, run: OpenRun, report: Reporter) -> None:
    """Let the coming steps learn from what rank 0 found of the pending pictures, and record it as of their step."""
    assert state.pending is not None
    (step, own), state.pending = state.pending, None

    def record() -> None:
        assert found is not None
        found.tree.save(run.folder / HIERARCHIES / f"step-{step:08d}.npz")
        report.hierarchy(step, found.shown)

    # Not to be interrupted: what is recorded belongs to a state with these levels.
    distributed.on_main(record, interruptible=False)
    state.levels = distributed.broadcast_from_main(None if found is None else found.levels, state.model.device)
    report.guards(step, watch(own, state.levels, state.config.model))


def batches_left(state: TrainingState, pictures: Pictures) -> Generator[tuple[Tensor, Tensor], None, None]:
    """Yield this rank's part of the batch of each step that is left, of the levels that the state has by then.

    Yields:
        Images ``[b, 3, h, w]``, and the indices ``[b]`` of their pictures.
    """
    config, backbone = state.config, state.model.backbone
    batches = TrainingBatches(
        pictures,
        training_transform(config.data, backbone.mean, backbone.std),
        num_views=config.mining.num_views,
        seed=config.train.seed,
        num_workers=config.data.num_workers,
        pin_memory=state.model.device.type == "cuda",
    )
    with contextlib.closing(batches):
        while state.step < config.train.num_steps:
            assert state.levels is not None
            other_levels = next_levels_at(state.step, config)
            end = next((step for step in range(state.step + 1, other_levels) if embeds_at(step, config)), other_levels)
            of_levels = batches.of_steps(range(state.step, end), clusters_to_learn(state.levels, config))
            for step in range(state.step, end):
                batch = next_together(of_levels)
                if embeds_at(step + 1, config):
                    # Before the workers of an embedding start: a node need not hold both.
                    batches.close()
                yield batch


def train_step(
    model: nn.Module,
    images: Tensor,
    indices: Tensor,
    state: TrainingState,
    loss_function: nn.Module,
    run_dir: Path,
) -> tuple[dict[str, Tensor | float], Batch]:
    """Take one step on the global batch, of which this rank brings ``b`` of ``B`` rows. A collective.

    Nothing here waits for a GPU, but to see that the step before was taken.

    Args:
        model: the state's, pictures to points of the ball, wrapped for data parallelism.
        images: ``[b, 3, h, w]``.
        indices: ``[b]``, of the images' pictures.
        state: goes one step further.
        loss_function: of distances and similarity levels.
        run_dir: where to leave what reproduces a step that fails.

    Returns:
        Figures to log, and the points, of the global batch.

    Raises:
        UserError: loss or gradient of the step before was not finite; neither that step nor this one is taken.
    """
    assert state.levels is not None
    config, random_before, device = state.config, random_state(), state.levels.device
    images, indices = images.to(device, non_blocking=True), indices.to(device, non_blocking=True)
    if not state.model.training:  # to go through all modules takes time
        model.train()
    micro_batches = images.split(config.train.micro_batch_size or len(images))
    with features_seen(state.model.backbone) as features:
        points = embed_batch(model, micro_batches)
    batch = Batch.over_ranks(points, indices)
    if state.bank is not None:
        state.bank.update(torch.cat(features), batch.indices, config.mining.num_views)
    loss, own_loss, gradient = global_loss(loss_function, batch, state.levels, config.model.curvature)
    state.optimizer.zero_grad()
    # Data parallelism averages gradients over ranks, and the loss is a sum over them: hence the world size.
    backward(model, micro_batches, points, distributed.world_size() * gradient, random_before)
    gradient_norm = nn.utils.clip_grad_norm_(model.parameters(), config.optim.gradient_clip)
    learning_rate = state.optimizer.param_groups[0]["lr"]
    refuse = functools.partial(refuse_step, run_dir, state, state.step, batch.indices, random_before, own_loss)
    state.stepper.step(loss, gradient_norm, refuse)
    state.schedule.step()
    state.step += 1

    radius = poincare.tangent_norm(batch.points, config.model.curvature)
    figures = {
        "loss": loss,
        "learning_rate": learning_rate,
        "gradient_norm": gradient_norm,
        "mean_norm": radius.mean(),
        "share_at_clip": (radius > 0.999 * config.model.clip_radius).float().mean(),
    }
    return figures, batch


def embed_batch(model: nn.Module, micro_batches: Sequence[Tensor]) -> Tensor:
    """Map pictures to points ``[b, d]``; of more than one micro-batch without what a backward pass needs."""
    with torch.set_grad_enabled(len(micro_batches) == 1):
        return torch.cat([model(images) for images in micro_batches])


def backward(
    model: nn.Module, micro_batches: Sequence[Tensor], points: Tensor, gradient: Tensor, random_before: dict[str, Any]
) -> None:
    """Add to the weights' gradients what the points' gradient ``[b, d]`` makes of them. A collective.

    Micro-batches go through the network once more, each with its graph alone (Gao et al., GradCache, RepL4NLP 2021).
    The loss has seen all of them together, so that the gradients are those of the whole batch.

    Args:
        model: as for :func:`train_step`.
        micro_batches: of pictures, ``[<= micro_batch_size, 3, h, w]``.
        points: what :func:`embed_batch` made of them.
        gradient: of the loss, by the points.
        random_before: the random numbers to go through the network again with.
    """
    if len(micro_batches) == 1:
        points.backward(gradient)
        return
    restore_random_state(random_before)
    *first, last = zip(micro_batches, gradient.split(len(micro_batches[0])), strict=True)
    with distributed.unexchanged(model):
        for images, own in first:
            model(images).backward(own)
    images, own = last
    model(images).backward(own)
