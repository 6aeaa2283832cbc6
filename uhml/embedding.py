"""Embed a whole set of pictures: each rank its share, once, without padding."""

import contextlib
import math

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


@torch.inference_mode()
def embed_share(
    model: Embedder, pictures: Pictures, config: Config, description: str, *, features: bool = False
) -> Tensor:
    """Embed this rank's share of the pictures.

    Args:
        model: left in evaluation mode.
        pictures: all n pictures.
        config: for the size of pictures and batches and the number of workers.
        description: for the progress bar.
        features: return the backbone's features instead of points of the ball.

    Returns:
        ``[len(share(n)), d]``, on the model's device; :func:`uhml.distributed.all_gather_shares` puts the shares
        together.

    Raises:
        Preempted: the run was asked to end, before one of the batches.
        UserError: a picture cannot be read any more.
    """
    model.eval()
    embed = model.features if features else model
    transform = plain_transform(config.data, model.backbone.mean, model.backbone.std)
    loader = share_loader(pictures, transform, config.eval.batch_size, config.data.num_workers)
    rows = []
    # As many rounds on every rank, though some may have a batch less: in each they agree that all is well.
    num_rounds = math.ceil(len(pictures) / (distributed.world_size() * config.eval.batch_size))
    with contextlib.closing(iter(loader)) as batches:
        for _ in progress(range(num_rounds), description, unit="batch"):
            images = next_together(batches, NO_MORE)
            if images is not NO_MORE:
                rows.append(embed(images.to(model.device, non_blocking=True)))
    if rows:
        return torch.cat(rows)
    # A rank without a picture of its own still brings zero rows of the right width to the gather.
    side = config.data.image_size
    return embed(torch.zeros(1, 3, side, side, device=model.device))[:0]
