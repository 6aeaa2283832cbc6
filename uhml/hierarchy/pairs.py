"""Pairs of clusters as single integers, to sort and to order them by."""

import torch
from torch import Tensor

# Multiplying by an odd number permutes the 64-bit integers. Ordering equally near pairs by what this makes of them,
# rather than by their numbers, keeps a chain of equal gaps from merging one pair a round.
# (2^64 / golden ratio, as a signed number, and its inverse.)
SHUFFLE = -7046029254386353131
UNSHUFFLE = -1018231460777725123


def pair(u: Tensor, v: Tensor) -> Tensor:
    """Return one int64 for each pair of numbers below 2^31, in whichever order it is given."""
    return (torch.minimum(u, v) << 32) | torch.maximum(u, v)


def ends(pairs: Tensor) -> tuple[Tensor, Tensor]:
    """Return the smaller and the greater number of each pair."""
    return pairs >> 32, pairs & (2**32 - 1)
