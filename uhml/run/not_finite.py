"""The end of a run whose loss is no number any more, and what is needed to look into it."""

import math
from pathlib import Path
from typing import Any

from torch import Tensor

from uhml import distributed
from uhml.config import dump_config
from uhml.errors import UserError, known_everywhere
from uhml.run.checkpoint import write_file
from uhml.run.training_state import TrainingState


def refuse_step(
    run_dir: Path,
    state: TrainingState,
    step: int,
    indices: Tensor,
    random_before: dict[str, Any],
    own_loss: Tensor,
    loss: float,
    gradient_norm: float,
) -> UserError:
    """Leave a reproducer of the step and return the error to raise in its place. A collective.

    ``nan-step-<step>.pt`` holds, for ``torch.load(..., weights_only=True)``: ``step``; ``pictures`` ``[B]``, the rows
    of the global batch, each an index into the training pictures; ``levels`` ``[K, n]``; ``model``, the weights before
    the step; ``random_states``, of every rank before the step; ``losses``, every rank's part of the loss; ``config``.
    The images follow from these: :class:`uhml.data.loading.TrainingBatches` of that step.

    Args:
        run_dir: gets the file.
        state: with the weights of before the step, which it may count as taken.
        step: steps taken before.
        indices: ``[B]``, of the pictures of the global batch.
        random_before: this rank's :func:`uhml.run.random_state.random_state` before the step.
        own_loss: this rank's part of the loss.
        loss: of the global batch.
        gradient_norm: of the gradient of the loss.
    """
    assert state.levels is not None
    own_losses = distributed.gather_objects(float(own_loss))
    path = run_dir / f"nan-step-{step:08d}.pt"
    reproducer = {
        "step": step,
        "pictures": indices.cpu(),
        "levels": state.levels.cpu(),
        "model": state.model.state_dict(),
        "random_states": distributed.gather_objects(random_before),
        "losses": own_losses,
        "config": dump_config(state.config),
    }
    distributed.on_main(lambda: write_file(path, reproducer), interruptible=False)
    ranks = [str(rank) for rank, own in enumerate(own_losses) if not math.isfinite(own)]
    where = f" (from rank {', '.join(ranks)} of {len(own_losses)})" if ranks else ""
    return known_everywhere(
        UserError(
            f"Step {step}: the loss is {loss}{where} and the gradient's norm {gradient_norm}, "
            f"so the run stopped before the step; {path} holds all that reproduces it. A lower optim.learning_rate or "
            "model.precision=float32 is the usual cure, and --allow-change goes on with it from the last checkpoint."
        )
    )
