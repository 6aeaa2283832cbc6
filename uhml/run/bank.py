"""The features that training batches had, kept for the next clustering, which then needs no pass of its own."""

import contextlib
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from uhml import distributed

GREATEST = torch.finfo(torch.float16).max


class FeatureBank:
    """Of each training picture the features it had when it was last in a batch, the mean over its views there.

    In half precision, which is finer than what the augmentation of a picture changes: 2 bytes a feature, on the device,
    in checkpoints, and of each view on the wire. Rows are spread over ranks as :func:`uhml.distributed.share` does.

    Args:
        own: ``[len(share(n)), num_features]``, what this rank's pictures begin with.
    """

    def __init__(self, own: Tensor) -> None:
        # A last row takes the features of other ranks' pictures: to select our own would wait for the GPU.
        self._rows = torch.cat([_half(own), own.new_zeros(1, own.shape[1], dtype=torch.float16)])

    @property
    def own(self) -> Tensor:
        """``[len(share(n)), num_features]`` float16, of this rank's pictures."""
        return self._rows[:-1]

    def update(self, features: Tensor, indices: Tensor, num_views: int) -> None:
        """Take in the features of a global batch. A collective, which waits for no GPU.

        Args:
            features: ``[b, num_features]``, of this rank's rows of the batch.
            indices: ``[B]``, of the pictures of all rows; the views of one lie side by side, and none is there again.
            num_views: of each picture.
        """
        views = distributed.all_gather(_half(features))
        means = views.unflatten(0, (-1, num_views)).float().mean(1)
        indices, world = indices[::num_views], distributed.world_size()
        is_own = indices % world == distributed.rank()
        self._rows[torch.where(is_own, indices // world, len(self._rows) - 1)] = _half(means)


@contextlib.contextmanager
def features_seen(backbone: nn.Module) -> Iterator[list[Tensor]]:
    """Within it, every forward pass through the backbone adds its features to the list, without gradient."""
    seen: list[Tensor] = []
    handle = backbone.register_forward_hook(lambda _, __, features: seen.append(features.detach()))
    try:
        yield seen
    finally:
        handle.remove()


def _half(features: Tensor) -> Tensor:
    # What is too large stays finite, and NaN stays NaN, which the next clustering refuses.
    # In float32 first: to bfloat16 the greatest number of float16 is a greater one.
    return features.float().clamp(-GREATEST, GREATEST).half()
