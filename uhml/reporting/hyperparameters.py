"""TensorBoard's table of runs: their configs beside their scores."""

import dataclasses
from typing import Any

from torch.utils.tensorboard.summary import hparams

from uhml import logs
from uhml.config import Config


def summaries(config: Config) -> tuple[Any, Any]:
    """Return what makes a run a row of the table, in its own event file: the columns, and the values of the keys.

    The scores are those that the run records in any case.
    """
    values = {
        f"{section}.{key}": value if type(value) in (int, float) else logs.shown(str(value))
        for section, keys in dataclasses.asdict(config).items()  # type: ignore[call-overload]
        for key, value in keys.items()
    }
    names = (f"recall_at_{config.eval.recall_at[0]}", "map_at_r", "nmi")
    scores = [f"unseen_{way}/{name}" for way in ("ball", "backbone") for name in names]
    columns, start, _ = hparams(values, dict.fromkeys([*scores, "train/loss"]))
    return columns, start
