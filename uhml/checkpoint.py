"""Checkpoints: one file of tensors and plain values, never half written, never unpickled beyond those."""

import os
from pathlib import Path
from typing import Any

import torch
from torch import nn

from uhml.errors import UserError


def save_checkpoint(folder: Path, step: int, state: dict[str, Any]) -> Path:
    """Write ``state`` as the checkpoint of ``step``: aside first, forced to the disk, then renamed.

    Raises:
        UserError: the file cannot be written; what was there before is untouched.
    """
    path = folder / f"step-{step:08d}.pt"
    aside = path.with_suffix(".partial")
    try:
        with aside.open("wb") as file:
            torch.save(state, file)
            file.flush()
            os.fsync(file.fileno())
        aside.replace(path)
    except (OSError, RuntimeError) as e:
        raise UserError(f"The checkpoint {path} cannot be written: {e}") from e
    finally:
        aside.unlink(missing_ok=True)
    return path


def load_weights(model: nn.Module, source: str) -> None:
    """Take the weights of another run's network, and nothing else, for ``model.init_from``.

    Args:
        model: gets the weights; every tensor must be there and fit.
        source: a checkpoint file, or a run's folder, whose newest checkpoint is meant.

    Raises:
        UserError: no checkpoint there, or not of this network.
    """
    path = Path(source).expanduser()
    if path.is_dir():
        found = sorted((path / "checkpoints").glob("step-*.pt"))
        if not found:
            raise UserError(f"model.init_from={source}: the folder holds no checkpoints/step-*.pt.")
        path = found[-1]
    if not path.is_file():
        raise UserError(f"model.init_from={source}: no such checkpoint.")
    try:
        weights = torch.load(path, map_location="cpu", weights_only=True)["model"]
    except Exception as e:  # what a damaged file raises depends on where it is damaged
        raise UserError(f"model.init_from={path} is damaged or no checkpoint of uhml.") from e
    try:
        model.load_state_dict(weights)
    except (RuntimeError, TypeError) as e:
        reason = " ".join(str(e).split())[:300]
        raise UserError(
            f"model.init_from={path} is of another network than model.backbone and model.embedding_dim: {reason}"
        ) from e
