"""Which points are equal. Equal points are merged before anything else, so that they crowd out no neighbours."""

import torch
from torch import Tensor

from uhml.hierarchy.dendrogram import Merges
from uhml.hierarchy.pairs import SHUFFLE

ROWS_PER_BLOCK = 8192


def row_hashes(points: Tensor) -> Tensor:
    """Return a 64-bit hash of each row's bits, ``[n]`` int64: equal rows have equal hashes, on every device and rank.

    Two rows of n that differ share a hash with probability n^2 / 2^65: three in a million at ten million points.
    """
    words = torch.int64 if points.dtype == torch.float64 else torch.int32
    hashes = torch.zeros(len(points), dtype=torch.long, device=points.device)
    for start in range(0, len(points), ROWS_PER_BLOCK):
        block = points[start : start + ROWS_PER_BLOCK] + 0.0  # -0.0 equals 0.0
        mixed = hashes[start : start + ROWS_PER_BLOCK]
        for column in block.view(words).T.contiguous():
            mixed.bitwise_xor_(column).mul_(SHUFFLE)
            mixed.bitwise_xor_(mixed >> 29)
    return hashes


def first_equal(hashes: Tensor) -> Tensor:
    """Return the first row that has each row's hash, ``[n]`` int64."""
    in_order, rows = hashes.sort(stable=True)
    group = in_order.unique_consecutive(return_inverse=True)[1]
    starts = torch.ones_like(group, dtype=torch.bool)
    starts[1:] = group[1:] != group[:-1]
    return torch.empty_like(rows).scatter_(0, rows, rows[starts][group])


def merge_equal(first_equal: Tensor) -> Merges:
    """Return the merges, at height 0, of each point with the first point that equals it (see :func:`first_equal`)."""
    names = torch.arange(len(first_equal), device=first_equal.device)
    by_first = first_equal.sort(stable=True).indices
    first = first_equal[by_first]
    before = first.bincount(minlength=len(first)).cumsum(0) - first_equal.bincount(minlength=len(first))
    sizes = names - before[first] + 1
    later = (by_first != first).nonzero()[:, 0]
    heights = torch.zeros(len(later), dtype=torch.float64, device=first_equal.device)
    return Merges(first[later], by_first[later], heights, sizes[later])
