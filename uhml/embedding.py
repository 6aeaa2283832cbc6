"""Embed a whole set of pictures: each rank its share, once, without padding."""

import contextlib
import math
from collections.abc import Generator
from typing import NamedTuple

import torch
from torch import Tensor

from uhml import distributed
from uhml.config import Config
from uhml.data.loading import share_loader
from uhml.data.pictures import Pictures
from uhml.data.transforms import plain_transform
from uhml.data.workers import next_together
from uhml.model import Embedder
from uhml.progress import progress

NO_MORE = torch.empty(0)


class Round(NamedTuple):
    """What one rank has embedded between two looks at whether all ranks are well.

    The ranks' rows of a round together are the next pictures in order, spread as
    :func:`uhml.distributed.share` spreads rows.

    Attributes:
        rows: ``[b, d]``.
        refused: for each row, why its picture cannot be read, so that the row means nothing; or an empty text.
    """

    rows: Tensor
    refused: list[str]


def pictures_per_round(config: Config) -> int:
    """Return how many pictures the ranks embed together in one round. Not a collective."""
    return distributed.world_size() * config.eval.batch_size


@torch.inference_mode()
def embed_rounds(
    model: Embedder,
    pictures: Pictures,
    config: Config,
    description: str,
    *,
    features: bool = False,
    skip_corrupt: bool = False,
    rounds_before: int = 0,
) -> Generator[Round]:
    """Embed this rank's share of the pictures, a batch at a time.

    Args:
        model: left in evaluation mode.
        pictures: all n pictures.
        config: for the size of pictures and batches and the number of workers.
        description: for the progress bar.
        features: return the backbone's features instead of points of the ball.
        skip_corrupt: go on where a picture cannot be read, and say so in the round.
        rounds_before: that were taken before these pictures, for the progress bar.

    Yields:
        As many rounds on every rank, though some may have a row less in the last.

    Raises:
        Preempted: the run was asked to end, before one of the rounds.
        UserError: a picture cannot be read any more.
    """
    model.eval()
    embed, width = (model.features, model.backbone.num_features) if features else (model, config.model.embedding_dim)
    transform = plain_transform(config.data, model.backbone.mean, model.backbone.std)
    loader = share_loader(
        pictures,
        transform,
        config.eval.batch_size,
        config.data.num_workers,
        skip_corrupt=skip_corrupt,
        pin_memory=model.device.type == "cuda",
    )
    # One at least, so that no pictures are zero rows of the right width.
    num_rounds = max(1, math.ceil(len(pictures) / pictures_per_round(config)))
    with contextlib.closing(iter(loader)) as batches:
        for _ in progress(
            range(num_rounds), description, total=rounds_before + num_rounds, done=rounds_before, unit="batch"
        ):
            batch = next_together(batches, NO_MORE)
            if batch is NO_MORE:
                yield Round(torch.empty(0, width, device=model.device), [])
            else:
                images, refused = batch if skip_corrupt else (batch, [""] * len(batch))
                yield Round(embed(images.to(model.device, non_blocking=True)), list(refused))


def embed_share(
    model: Embedder, pictures: Pictures, config: Config, description: str, *, features: bool = False
) -> Tensor:
    """Embed this rank's share of the pictures; arguments and errors as for :func:`embed_rounds`.

    Returns:
        ``[len(share(n)), d]``, on the model's device; :func:`uhml.distributed.all_gather_shares` puts the shares
        together.
    """
    width = model.backbone.num_features if features else config.model.embedding_dim
    # Made once, and not put together in the end, which would take all of it twice.
    rows, done = torch.empty(len(distributed.share(len(pictures))), width, device=model.device), 0
    for found in embed_rounds(model, pictures, config, description, features=features):
        rows[done : done + len(found.rows)] = found.rows
        done += len(found.rows)
    return rows
