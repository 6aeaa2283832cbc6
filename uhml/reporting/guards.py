"""What tells of a collapse before the scores do: rank and radii of the embedding, sizes of its clusters."""

import dataclasses

import scipy.linalg
import torch
from torch import Tensor

from uhml import distributed, poincare
from uhml.config import ModelConfig
from uhml.environment import one_thread_of_openblas
from uhml.model import FeatureMoments

GUARDS = ("effective_rank", "radius_spread", "largest_cluster")


@dataclasses.dataclass(frozen=True)
class Guard:
    """A figure that is watched.

    Attributes:
        name: one of :data:`GUARDS`, as in ``metrics.jsonl`` and TensorBoard.
        value: what was found.
        alarm: where the alarm line is.
        alarm_above: whether the alarm is for values above the line, or for those below it.
        meaning: what the alarm tells the user.
    """

    name: str
    value: float
    alarm: float
    alarm_above: bool
    meaning: str

    @property
    def rings(self) -> bool:
        """Whether the value is beyond the alarm line."""
        return self.value > self.alarm if self.alarm_above else self.value < self.alarm


def watch(own_points: Tensor, levels: Tensor, config: ModelConfig) -> list[Guard]:
    """Look at the embedding of the training pictures and at the levels made of it. A collective.

    The effective rank is Roy and Vetterli's (EUSIPCO 2007): the exponential of the entropy of the singular values,
    each taken as a share of their sum; from 1, all points on a line, to the number of dimensions.

    Args:
        own_points: ``[n / world_size, embedding_dim]``, this rank's share.
        levels: ``[K, n]``, clusters, finest level first.
        config: for curvature, clip radius and dimensions.
    """
    num_pictures = levels.shape[1]
    covariance = FeatureMoments.over_ranks(own_points).covariance.cpu()
    with one_thread_of_openblas():
        singular = torch.from_numpy(scipy.linalg.eigvalsh(covariance)).clamp_min(0).sqrt()
    shares = singular / singular.sum().clamp_min(1e-12)
    effective_rank = float(torch.special.entr(shares).sum().exp())
    radii = distributed.all_gather_shares(poincare.tangent_norm(own_points, config.curvature), num_pictures)
    low, high = (radii / config.clip_radius).sort().values[[num_pictures // 20, num_pictures - 1 - num_pictures // 20]]
    largest = int(torch.bincount(levels[-1].long()).max()) / num_pictures
    num_axes = min(config.embedding_dim, num_pictures - 1)
    # Whitened, no more pictures than dimensions are about equally long whatever they show.
    least_spread = 0.005 if num_pictures > config.embedding_dim else 0.0
    return [
        Guard("effective_rank", effective_rank, 0.1 * num_axes, False, "the embedding uses few of its dimensions"),
        Guard("radius_spread", float(high - low), least_spread, False, "all points lie equally far from the centre"),
        Guard("largest_cluster", largest, 0.5, True, "one cluster of the coarsest level holds most pictures"),
    ]
