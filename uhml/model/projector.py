"""The projector: what the loss acts on while a network is trained, and what is thrown away then."""

import torch
from torch import Tensor, nn

from uhml.model.head import FeatureMoments, HyperbolicHead

PROJECTED_DIM = 128
"""Dimensions of the ball that the loss acts in, as of SimCLR's projector; it is not the embedding's."""

WHITENING = 0.5
"""With which its head begins to learn, whatever ``model.whitening`` says of the head that is deployed."""


def projected_dim(num_features: int) -> int:
    """Return the dimensions of the projector's ball behind a backbone of so many features."""
    return min(PROJECTED_DIM, num_features)


class Projector(nn.Module):
    """A hidden layer before a hyperbolic head of its own (after Chen et al., ICML 2020).

    What the loss asks for and the embedding must not lose, such as colour where views differ in it, is lost here. The
    layer is normalised within a picture, not over a batch: neither ranks nor micro-batches make a difference.

    Args:
        num_features: of the backbone, and of the hidden layer.
        curvature: of the ball, as the head's.
        clip_radius: likewise.
    """

    mean: Tensor

    def __init__(self, num_features: int, curvature: float, clip_radius: float) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(num_features))
        # Without a scale and shift of its own: the head behind it learns both.
        norm = nn.LayerNorm(num_features, elementwise_affine=False)
        self.hidden = nn.Sequential(nn.Linear(num_features, num_features), norm, nn.ReLU())
        self.head = HyperbolicHead(num_features, projected_dim(num_features), curvature, clip_radius)

    def forward(self, features: Tensor) -> Tensor:
        """Map features ``[b, num_features]`` to points of the ball ``[b, projected dimensions]``, float32."""
        with torch.autocast(features.device.type, enabled=False):
            return self.head(self.hidden_units(features))

    def hidden_units(self, features: Tensor) -> Tensor:
        """Return the hidden layer's ``[b, num_features]``."""
        return self.hidden(features.float() - self.mean)

    @torch.no_grad()
    def fit(self, own_features: Tensor, mean: Tensor, start_norm: float) -> None:
        """Centre the features, and fit the head to the hidden layer. A collective.

        Args:
            own_features: ``[n, num_features]``, of this rank's training pictures.
            mean: ``[num_features]``, of all ranks', as the head has it.
            start_norm: as :meth:`HyperbolicHead.fit` takes it.
        """
        self.mean.copy_(mean)
        moments = FeatureMoments.over_ranks(own_features, self.hidden_units)
        self.head.fit("whitened_pca", moments, start_norm, WHITENING, ball="the projector's ball")
