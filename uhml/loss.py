"""The hierarchical log-ratio loss (Yan et al., CVPR 2021, after Kim et al., CVPR 2019), without its triplets.

Beside it stands a contrast of the two views of a picture.
"""

import dataclasses
import math
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor, nn

from uhml import distributed, poincare
from uhml.config import LossConfig

# Distances below this are taken for this: the logarithm of a duplicate's distance 0 must not rule a batch. It is a
# thousandth of the usual distance between pictures of a batch, which is about 1.
DISTANCE_FLOOR = 1e-3

# Pairs that are compared at once: some 200 MiB in float32, and all pairs of a batch of 1,024 in one process.
PAIRS_AT_ONCE = 2**20


def similarity_levels(levels: Tensor, anchors: Tensor, others: Tensor) -> Tensor:
    """Count the cuts of the hierarchy on which pairs of pictures share a cluster; a picture with itself gets one more.

    The cuts are nested, so this is an ultrametric similarity: 0 for pairs that no cut joins, K for those in one
    finest cluster, K + 1 for two views of one picture.

    Args:
        levels: ``[K, n]``, cluster of each of n pictures on each cut.
        anchors: ``[a]``, indices of pictures.
        others: ``[b]``, likewise.

    Returns:
        ``[a, b]``, int64, s_ij.
    """
    shared = (levels[:, anchors, None] == levels[:, None, others]).sum(0)
    return shared + (anchors[:, None] == others[None, :])


class HierarchicalLogRatioLoss(nn.Module):
    """``L(i, j, l) = ( log(d_ij / d_il) - (s_ij - s_il) log omega )²`` over all triplets with s_ij != s_il.

    With ``a_ij = log d_ij - s_ij log omega`` a triplet costs ``(a_ij - a_il)²``, and the sum over all pairs (j, l) of
    anchor i is, by the identity behind the variance, a difference of sums over single j: exact in O(B²), with no
    tensor of triplets. It is least where distances are proportional to ``omega ** s``, hence ``0 < omega < 1``: the
    more levels a pair shares, the nearer it shall be.

    Args:
        omega: ratio of the distances of neighbouring levels.
        num_levels: the greatest s_ij there can be.

    Raises:
        ValueError: omega is not between 0 and 1.
    """

    def __init__(self, omega: float, num_levels: int) -> None:
        super().__init__()
        if not 0 < omega < 1:
            raise ValueError(f"omega must lie between 0 and 1, both excluded, not {omega}")
        self.log_omega, self.num_levels = math.log(omega), num_levels

    def forward(self, distances: Tensor, similarity: Tensor, is_self: Tensor) -> tuple[Tensor, Tensor]:
        """Sum the loss over anchors, each with the mean over its triplets.

        Args:
            distances: ``[a, b]``, d_ij >= 0, from each anchor to each embedding of the batch.
            similarity: ``[a, b]``, s_ij, int64 in 0..num_levels.
            is_self: ``[a, b]``, true where the embedding is the anchor itself, which is in none of its triplets.

        Returns:
            The sum over anchors of the mean over their triplets, and the number of anchors with at least one triplet
            (the rest have all others on one level), each a scalar. Their ratio is the loss; over ranks, the ratio of
            the sums is.
        """
        others = ~is_self
        count = others.sum(1).to(distances.dtype)
        a = distances.clamp_min(DISTANCE_FLOOR).log() - similarity.to(distances.dtype) * self.log_omega
        # Centring changes no difference a_ij - a_il and keeps the sums of squares below from cancelling.
        a = (a - ((a * others).sum(1) / count)[:, None]) * others
        level = torch.arange(self.num_levels + 1, device=a.device)[:, None]
        members = ((similarity[:, None, :] == level) & others[:, None, :]).to(a.dtype)  # [a, levels, b]
        # Each [a, levels]: number, sum and sum of squares on each level.
        n = members.sum(2)
        sums, squares = (torch.stack([a, a.square()], 1) @ members.mT).unbind(1)
        # Sums over unordered pairs: of all others (their mean is 0), less those of pairs on one level.
        total = count * squares.sum(1) - (n * squares - sums.square()).sum(1)
        # Ordered pairs on different levels.
        num_pairs = count.square() - n.square().sum(1)
        has_triplets = num_pairs > 0
        per_anchor = torch.where(has_triplets, 2 * total / num_pairs.clamp_min(1), 0)
        return per_anchor.sum(), has_triplets.sum()


class ViewContrast(nn.Module):
    """``C(i, v) = log( 1 + sum_l (d_iv / d_il)^p )`` for views i, v of a picture, over the l of other finest clusters.

    It is p times the soft maximum of the log-ratios, so that the nearest others weigh most, where the log-ratio loss
    asks all alike. That two views are one picture is known, which no cluster is; where the finest clusters are right,
    the pictures left out are those that it would wrongly drive apart. With all other pictures it would be the loss of
    SimCLR (Chen et al., ICML 2020, eq. 1) with ``-log d`` for the similarity and 1/p for the temperature.

    Args:
        sharpness: p > 0.
        view_level: s_ij of two views of a picture, the greatest there is.
    """

    def __init__(self, sharpness: float, view_level: int) -> None:
        super().__init__()
        self.sharpness, self.view_level = sharpness, view_level

    def forward(self, distances: Tensor, similarity: Tensor, is_self: Tensor) -> Tensor:
        """Sum the contrast over anchors, each with the mean over its picture's other views; arguments as above."""
        logits = -self.sharpness * distances.clamp_min(DISTANCE_FLOOR).log()
        of_cluster = similarity >= self.view_level - 1
        nearest_others = logits.masked_fill(of_cluster, -math.inf).logsumexp(1, keepdim=True)
        views = (similarity == self.view_level) & ~is_self
        contrast = torch.where(views, nn.functional.softplus(nearest_others - logits), 0)
        return (contrast.sum(1) / views.sum(1).clamp_min(1)).sum()


class HierarchicalLoss(nn.Module):
    """What is learned from: the log-ratio loss on all levels, and the contrast of views beside it.

    Args:
        options: the weights of both.
        num_cuts: levels of the hierarchy.
        num_views: of each picture in a batch; two views of one picture are one level above the finest cluster.
    """

    def __init__(self, options: LossConfig, num_cuts: int, num_views: int) -> None:
        super().__init__()
        num_levels = num_cuts + (num_views > 1)
        self.log_ratio = HierarchicalLogRatioLoss(options.omega, num_levels)
        self.view_weight = options.view_weight if num_views > 1 else 0.0
        self.view_contrast = ViewContrast(options.view_sharpness, num_levels)

    def forward(self, distances: Tensor, similarity: Tensor, is_self: Tensor) -> tuple[Tensor, Tensor]:
        """Sum the loss over anchors; arguments and result as of :class:`HierarchicalLogRatioLoss`."""
        total, num_anchors = self.log_ratio(distances, similarity, is_self)
        if self.view_weight:
            total = total + self.view_weight * self.view_contrast(distances, similarity, is_self)
        return total, num_anchors


class Pairs(NamedTuple):
    """Of some rows ``[a]`` of a batch with all of its ``[B]``, each ``[a, B]``: what the loss is a function of."""

    distances: Tensor
    similarity: Tensor
    is_self: Tensor


@dataclasses.dataclass(frozen=True)
class Batch:
    """The global batch, wherever it was embedded.

    Attributes:
        points: ``[B, d]``, in the order of the ranks, without gradient.
        indices: ``[B]``, of their pictures.
        own: ``[b]``, the rows that this rank brought: the anchors that it compares with the whole batch.
    """

    points: Tensor
    indices: Tensor
    own: range

    @classmethod
    def over_ranks(cls, points: Tensor, indices: Tensor) -> "Batch":
        """Put together the batch of which this rank brings ``[b, d]`` and ``[b]``. A collective."""
        start = distributed.rank() * len(points)
        # One message instead of two: the bits of a picture's index travel as one more coordinate of its point.
        number = torch.int32 if points.element_size() == 4 else torch.int64
        own = torch.cat([points.detach(), indices.to(number).view(points.dtype)[:, None]], 1)
        gathered = distributed.all_gather(own)
        numbers = gathered[:, -1].contiguous().view(number).long()
        return cls(gathered[:, :-1].contiguous(), numbers, range(start, start + len(points)))

    def blocks(self) -> Iterator[range]:
        """Yield this rank's rows, as many at once as may be compared with the whole batch at once."""
        rows_at_once = max(1, PAIRS_AT_ONCE // len(self.points))
        for start in range(0, len(self.own), rows_at_once):
            yield self.own[start : start + rows_at_once]

    def pairs(self, rows: range, levels: Tensor, curvature: float) -> Pairs:
        """Compare some rows with all of the batch, by ``levels`` ``[K, n]`` and in the ball of ``curvature``."""
        chosen = slice(rows.start, rows.stop)
        place = torch.arange(len(self.points), device=self.points.device)
        return Pairs(
            poincare.distance_matrix(self.points[chosen], self.points, curvature),
            similarity_levels(levels, self.indices[chosen], self.indices),
            place[chosen, None] == place,
        )


class GlobalLoss(NamedTuple):
    """The loss of a global batch.

    Attributes:
        loss: of the global batch, the same on every rank.
        own: this rank's part of it; the parts add up to it.
        gradient: ``[b, d]``, of the loss, by this rank's points.
    """

    loss: Tensor
    own: Tensor
    gradient: Tensor


def global_loss(loss_function: nn.Module, batch: Batch, levels: Tensor, curvature: float) -> GlobalLoss:
    """Return the loss of a global batch and its gradient, which also other ranks' anchors have a part in. A collective.

    Each block of anchors goes back at once, so memory grows by the batch and not by its square.

    Args:
        loss_function: of the pairs of some anchors, as :class:`HierarchicalLogRatioLoss` is.
        batch: gathered.
        levels: ``[K, n]``, cluster of each picture on each cut.
        curvature: c >= 0.
    """
    batch = dataclasses.replace(batch, points=batch.points.detach().requires_grad_())
    total = batch.points.new_zeros(())
    num_anchors = total.clone()
    for rows in batch.blocks():
        of_block, anchors_of_block = loss_function(*batch.pairs(rows, levels, curvature))
        of_block.backward()
        total += of_block.detach()
        num_anchors += anchors_of_block
    assert batch.points.grad is not None
    gradient = distributed.all_reduce_sum(batch.points.grad)[batch.own.start : batch.own.stop]
    loss, num_anchors = distributed.all_reduce_sum(torch.stack([total, num_anchors]))
    num_anchors = num_anchors.clamp_min(1)
    return GlobalLoss(loss / num_anchors, total / num_anchors, gradient / num_anchors)
