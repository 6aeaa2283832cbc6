"""A trained network, taken out of its run to be used."""

import dataclasses
import datetime
from pathlib import Path

import torch

from uhml.config import Config, parse_dump
from uhml.errors import UserError
from uhml.model import Embedder, build_embedder
from uhml.run.checkpoint import find_checkpoint


@dataclasses.dataclass(frozen=True)
class Trained:
    """A trained network.

    Attributes:
        model: in evaluation mode.
        config: of its run.
        step: how many steps it was trained for.
        checkpoint: the file it is from.
        pictures: what the pictures of its run are known by (:func:`uhml.data.fingerprint.fingerprint`); None where
            the file does not tell.
        saved_at: when the file was written.
    """

    model: Embedder
    config: Config
    step: int
    checkpoint: Path
    pictures: list[tuple[int, str]] | None
    saved_at: datetime.datetime

    @property
    def folder(self) -> Path:
        """The folder of the run; for a checkpoint that lies alone, the folder it lies in."""
        folder = self.checkpoint.parent
        return folder.parent if folder.name == "checkpoints" else folder


def load_trained(source: str, device: torch.device | str = "cpu") -> Trained:
    """Load the network of a run.

    Args:
        source: the run's folder, whose newest checkpoint is meant, or a checkpoint file, or what ``uhml export`` made
            of one as safetensors.
        device: where the network is to be.

    Raises:
        UserError: there is no checkpoint, or none that this version can read.
    """
    path, state = find_checkpoint(source, "")
    if not {"config", "step"} <= state.keys():
        raise UserError(f"{path} holds weights alone: name a run's folder, or a checkpoint that a run left.")
    try:
        saved_at = datetime.datetime.fromtimestamp(path.stat().st_mtime, datetime.UTC)
    except FileNotFoundError:
        # The run, which goes on, has removed it since it was opened, and has newer ones.
        return load_trained(source, device)
    config = parse_dump(state["config"])
    # Its weights come from the checkpoint: none are to be downloaded first.
    options = dataclasses.replace(config.model, weights="random")  # type: ignore[type-var]
    model = build_embedder(options, config.data.image_size)
    try:
        model.load_state_dict(state["model"])
    except (RuntimeError, TypeError) as e:
        reason = " ".join(str(e).split())[:300]
        raise UserError(f"{path} is not of the network that its config describes: {reason}") from e
    return Trained(model.to(device).eval(), config, state["step"], path, state.get("pictures"), saved_at)
