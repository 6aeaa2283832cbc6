"""Embed a whole set of pictures: each rank its share, once, without padding."""

from collections.abc import Callable

import torch
from torch import Tensor

from uhml.config import Config
from uhml.data.loading import Transform, share_loader
from uhml.data.pictures import Pictures
from uhml.progress import progress


@torch.inference_mode()
def embed_share(
    embed: Callable[[Tensor], Tensor],
    pictures: Pictures,
    transform: Transform,
    config: Config,
    device: torch.device,
    description: str,
) -> Tensor:
    """Apply ``embed`` to this rank's share of the pictures.

    Args:
        embed: images ``[b, 3, h, w]`` on the device to rows ``[b, d]``; a network in evaluation mode.
        pictures: all n pictures.
        transform: picture to image.
        config: for ``eval.batch_size`` and ``data.num_workers``.
        device: where to compute.
        description: for the progress bar.

    Returns:
        ``[len(share(n)), d]``, on the device; :func:`uhml.distributed.all_gather_shares` puts the shares together.
    """
    loader = share_loader(pictures, transform, config.eval.batch_size, config.data.num_workers)
    rows = [embed(images.to(device, non_blocking=True)) for images in progress(loader, description, unit="batch")]
    # A rank without a picture of its own still brings zero rows of the right width to the gather.
    return torch.cat(rows) if rows else embed(torch.zeros(1, 3, *[config.data.image_size] * 2, device=device))[:0]
