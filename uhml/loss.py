"""The hierarchical log-ratio loss (Yan et al., CVPR 2021, after Kim et al., CVPR 2019), without its triplets."""

import math

import torch
from torch import Tensor, nn

# Distances below this are taken for this: the logarithm of a duplicate's distance 0 must not rule a batch. It is a
# thousandth of the usual distance between pictures of a batch, which is about 1.
DISTANCE_FLOOR = 1e-3


def similarity_levels(levels: Tensor, anchors: Tensor, pictures: Tensor) -> Tensor:
    """Count the cuts of the hierarchy on which pairs of pictures share a cluster; a picture with itself gets one more.

    The cuts are nested, so this is an ultrametric similarity: 0 for pairs that no cut joins, K for those in one
    finest cluster, K + 1 for two views of one picture.

    Args:
        levels: ``[K, n]``, cluster of each of n pictures on each cut.
        anchors: ``[a]``, indices of pictures.
        pictures: ``[b]``, indices of pictures.

    Returns:
        ``[a, b]``, int64, s_ij.
    """
    shared = (levels[:, anchors, None] == levels[:, None, pictures]).sum(0)
    return shared + (anchors[:, None] == pictures[None, :])


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
        others = (~is_self).to(distances.dtype)
        a = distances.clamp_min(DISTANCE_FLOOR).log() - similarity.to(distances.dtype) * self.log_omega
        # Centring changes no difference a_ij - a_il and keeps the sums of squares below from cancelling.
        count = others.sum(1)
        a = (a - ((a * others).sum(1) / count)[:, None]) * others
        same_level = torch.zeros_like(count)
        same_level_pairs = torch.zeros_like(count)
        for level in range(self.num_levels + 1):
            members = others * (similarity == level)
            n = members.sum(1)
            same_level += n * (members * a.square()).sum(1) - (members * a).sum(1).square()
            same_level_pairs += n.square()
        # Sums over unordered pairs: of all others (their mean is 0), less those of pairs on one level.
        total = count * a.square().sum(1) - same_level
        # Ordered pairs on different levels.
        num_pairs = count.square() - same_level_pairs
        has_triplets = num_pairs > 0
        per_anchor = torch.where(has_triplets, 2 * total / num_pairs.clamp_min(1), 0)
        return per_anchor.sum(), has_triplets.sum()
