"""A trained network, taken out of its run to be used."""

import dataclasses
import datetime
from collections.abc import Sequence
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

from uhml.config import Config, parse_dump
from uhml.data.decode import as_rgb, load_rgb
from uhml.data.transforms import plain_transform
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

    model: Embedder = dataclasses.field(repr=False)
    config: Config = dataclasses.field(repr=False)
    step: int
    checkpoint: Path
    pictures: list[tuple[int, str]] | None = dataclasses.field(repr=False)
    saved_at: datetime.datetime

    @property
    def folder(self) -> Path:
        """The folder of the run; for a checkpoint that lies alone, the folder it lies in."""
        folder = self.checkpoint.parent
        return folder.parent if folder.name == "checkpoints" else folder

    def embed(self, images: Sequence[str | Path | Image.Image]) -> Tensor:
        """Map pictures to points of the ball, in this process. For very many, ``uhml embed`` reads ahead and survives.

        Args:
            images: n files, or images that Pillow has opened.

        Returns:
            ``[n, embedding_dim]`` float32, on the CPU; :func:`uhml.poincare.distance_matrix` says how far apart they
            are, with ``config.model.curvature``.

        Raises:
            UnreadablePicture: one of them cannot be read.
        """
        transform = plain_transform(self.config.data, self.model.backbone.mean, self.model.backbone.std)
        points = torch.empty(len(images), self.config.model.embedding_dim)
        with torch.inference_mode():
            for start in range(0, len(images), self.config.eval.batch_size):
                batch = images[start : start + self.config.eval.batch_size]
                decoded = [as_rgb(one) if isinstance(one, Image.Image) else load_rgb(one) for one in batch]
                tensors = torch.stack([transform(image) for image in decoded])
                points[start : start + len(batch)] = self.model(tensors.to(self.model.device)).cpu()
        return points


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
    if "config" not in state or type(state.get("step")) is not int:
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
    except (RuntimeError, TypeError, AttributeError) as e:
        reason = " ".join(str(e).split())[:300]
        raise UserError(f"{path} is not of the network that its config describes: {reason}") from e
    bad = next((name for name, value in model.state_dict().items() if not value.isfinite().all()), None)
    if bad is not None:
        raise UserError(f"{path}: {bad} holds NaN or infinite values, so nothing can be embedded by it.")
    return Trained(model.to(device).eval(), config, state["step"], path, state.get("pictures"), saved_at)
