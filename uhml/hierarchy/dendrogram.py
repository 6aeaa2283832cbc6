"""The tree that hierarchical clustering builds, and its cuts."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple, Self

import numpy as np
import torch
from torch import Tensor

from uhml.errors import UserError
from uhml.files import NO_ARRAY, opened_aside, regular_file

EXAMPLES = {"counts": "1000, 100, 10", "heights": "0.5, 0.9", "quantiles": "0.9, 0.99"}


class Merges(NamedTuple):
    """Some merges between clusters that are named by one of their points.

    Attributes:
        kept: ``[m]`` int64; after merge t the new cluster goes by the name of ``kept[t]``...
        absorbed: ``[m]`` int64; ...and ``absorbed[t]`` is never named again.
        heights: ``[m]`` float64.
        sizes: ``[m]`` int64, the number of points after the merge.
    """

    kept: Tensor
    absorbed: Tensor
    heights: Tensor
    sizes: Tensor


class Dendrogram:
    """A binary tree over n points with a height at each of its n - 1 merges.

    Cuts of it are nested: points that share a cluster at one height share one at every greater height.

    Args:
        linkage: ``[n - 1, 4]`` float64, as scipy defines it: row t merges clusters ``Z[t, 0] < Z[t, 1]`` into cluster
            ``n + t`` of ``Z[t, 3]`` points at height ``Z[t, 2]``; heights never fall.
    """

    def __init__(self, linkage: np.ndarray) -> None:
        self._linkage = linkage

    def __repr__(self) -> str:
        heights = f", merged at heights {self.heights[0]:.4g} to {self.heights[-1]:.4g}" if len(self.heights) else ""
        return f"<Dendrogram of {self.num_points:,} {'point' if self.num_points == 1 else 'points'}{heights}>"

    @classmethod
    def from_merges(cls, merges: Sequence[Merges]) -> Self:
        """Build the tree from all its n - 1 merges, in any order in which children stand before their parents.

        Rounding may have put a parent below a child; it is raised to the child's height.
        """
        kept, absorbed, heights, sizes = (
            np.concatenate([part.cpu().numpy() for part in parts] or [np.empty(0, np.int64)])
            for parts in (zip(*merges, strict=True) if merges else [()] * 4)
        )
        num_merges = len(kept)
        num_points = num_merges + 1
        # The cluster named `kept[t]` before merge t is the last earlier merge that kept that name, or the point.
        # Ordered by (name, t), that is the row before; for `absorbed[t]` it is the last row of its name.
        order = np.argsort(kept, kind="stable")
        names = kept[order]
        children = np.stack([kept, absorbed], 1).astype(np.int64)
        follows = np.flatnonzero(names[1:] == names[:-1])
        children[order[follows + 1], 0] = num_points + order[follows]
        last = np.searchsorted(names, absorbed, side="right") - 1
        merged_before = np.flatnonzero((last >= 0) & (names[last.clip(0)] == absorbed)) if num_merges else last
        children[merged_before, 1] = num_points + order[last[merged_before]]

        heights = heights.astype(np.float64)
        while True:
            below = np.concatenate([np.full(num_points, -np.inf), heights])[children].max(1)
            if not (below > heights).any():
                break
            heights = np.maximum(heights, below)

        # Stable: where heights tie, a parent still comes after its children.
        by_height = np.argsort(heights, kind="stable")
        position = np.arange(num_points + num_merges)
        position[num_points + by_height] = num_points + np.arange(num_merges)
        linkage = np.empty((num_merges, 4))
        linkage[:, :2] = np.sort(position[children[by_height]], axis=1)
        linkage[:, 2] = heights[by_height]
        linkage[:, 3] = sizes[by_height]
        return cls(linkage)

    @property
    def num_points(self) -> int:
        """The number of points, n."""
        return len(self._linkage) + 1

    @property
    def heights(self) -> np.ndarray:
        """The heights of the merges, ``[n - 1]`` float64, never falling."""
        return self._linkage[:, 2]

    def to_scipy(self) -> np.ndarray:
        """Return the linkage matrix ``[n - 1, 4]`` float64 that ``scipy.cluster.hierarchy`` works on."""
        return self._linkage.copy()

    def cut(
        self,
        *,
        counts: Sequence[int] | None = None,
        heights: Sequence[float] | None = None,
        quantiles: Sequence[float] | None = None,
    ) -> Tensor:
        """Return the clusters of K cuts, finest first.

        Args:
            counts: numbers of clusters, each at least 1; more than n means n.
            heights: merges up to and including this height are made.
            quantiles: the same with quantiles, in [0, 1], of the n - 1 merge heights. At the greatest height, at which
                parts of a graph are joined, however many, only so many merges are made as make up the quantile.

        Returns:
            ``[K, n]`` int32 ids of clusters, on the CPU; in each cut they count 0, 1, ... in the order of the
            clusters' first points. Where i and j share a cluster in one row they do in every later row.

        Raises:
            UserError: not exactly one of the three is given, or a value is out of range.
        """
        given = {k: v for k, v in (("counts", counts), ("heights", heights), ("quantiles", quantiles)) if v is not None}
        if len(given) != 1:
            raise UserError(
                f"Cut by exactly one of counts, heights and quantiles, not by {' and '.join(given) or 'none'}."
            )
        ((name, values),) = given.items()
        if np.ndim(values) != 1 or len(values) == 0:
            raise UserError(
                f"{name}={values} must be a list with a number for each cut, as in {name}=[{EXAMPLES[name]}]."
            )
        num_merges = len(self._linkage)
        if counts is not None:
            if any(not (math.isfinite(count) and count >= 1 and count == int(count)) for count in counts):
                raise UserError(f"counts={list(counts)} must be whole numbers of clusters, 1 or more.")
            made = [num_merges - min(int(count), self.num_points) + 1 for count in counts]
        elif quantiles is not None:
            if any(not 0 <= quantile <= 1 for quantile in quantiles):
                raise UserError(f"quantiles={list(quantiles)} must lie between 0 and 1.")
            made = [self._merges_up_to(quantile) for quantile in quantiles]
        else:
            assert heights is not None
            if any(np.isnan(height) for height in heights):
                raise UserError(f"heights={list(heights)} must be numbers.")
            made = [int(np.searchsorted(self.heights, height, side="right")) for height in heights]
        return torch.stack([torch.from_numpy(self._clusters(merges)) for merges in sorted(made)])

    def _merges_up_to(self, quantile: float) -> int:
        """Return how many merges a cut at a quantile of their heights makes."""
        if not len(self.heights):
            return 0
        reached = int(quantile * (len(self.heights) - 1))
        # Points that are equal are never told apart.
        if self.heights[reached] == self.heights[-1] > 0:
            return reached + 1
        return int(np.searchsorted(self.heights, self.heights[reached], side="right"))

    def _clusters(self, num_merges: int) -> np.ndarray:
        """Return the clusters, ``[n]`` int32, after the first ``num_merges`` merges."""
        n = self.num_points
        root = np.arange(n + num_merges)
        root[self._linkage[:num_merges, :2].astype(np.int64)] = n + np.arange(num_merges)[:, None]
        # Jump to the parent's parent until all stand at the top: about log2(depth) times, also for a chain.
        while True:
            higher = root[root]
            if (higher == root).all():
                break
            root = higher
        _, first, cluster = np.unique(root[:n], return_index=True, return_inverse=True)
        rank = np.empty(len(first), np.int32)
        rank[np.argsort(first)] = np.arange(len(first), dtype=np.int32)
        return rank[cluster]

    def top(self, num_leaves: int) -> tuple[np.ndarray, np.ndarray]:
        """Return the tree above a cut, with the cut's clusters as leaves.

        Returns:
            its linkage matrix ``[m - 1, 4]``, whose sizes count leaves, and the number of points in each leaf ``[m]``,
            where m is ``num_leaves`` or, if that is less, n.

        Raises:
            UserError: there must be a leaf at least.
        """
        if num_leaves < 1:
            raise UserError(f"num_leaves={num_leaves} must be at least 1.")
        n, m = self.num_points, min(num_leaves, self.num_points)
        made = n - m
        merges = self._linkage[made:].copy()
        children = merges[:, :2].astype(np.int64)
        leaves = np.sort(children[children < n + made])
        children = np.where(children < n + made, np.searchsorted(leaves, children), children - n - made + m)
        merges[:, :2] = np.sort(children, axis=1)
        sizes = np.concatenate([np.ones(n), self._linkage[:, 3]])
        counts = np.ones(2 * m - 1)
        for t, (left, right) in enumerate(children):
            counts[m + t] = counts[left] + counts[right]
        merges[:, 3] = counts[m:]
        return merges, sizes[leaves].astype(np.int64)

    def save(self, path: str | Path) -> None:
        """Write the tree to ``path`` as an ``.npz`` file: complete, or not at all.

        Raises:
            OSError: it cannot be written.
        """
        with opened_aside(Path(path)) as file:
            np.savez(file, linkage=self._linkage)

    @classmethod
    def load(cls, path: str | Path) -> Self:
        """Read a tree that :meth:`save` wrote. Nothing in the file is executed.

        Raises:
            UserError: the file is missing or holds no tree.
        """
        try:
            with open(path, "rb", opener=regular_file) as opened, np.load(opened, allow_pickle=False) as file:
                linkage = file["linkage"]
        except (FileNotFoundError, IsADirectoryError):
            raise UserError(f"There is no file {path}.") from None
        except (*NO_ARRAY, KeyError):
            raise UserError(f"{path} is not a tree written by uhml.") from None
        except OSError as e:
            raise UserError(f"{path} cannot be read: {e.strerror or e}.") from None
        if not _is_tree(linkage):
            raise UserError(f"{path} is not a tree written by uhml.")
        return cls(linkage)


def _is_tree(linkage: np.ndarray) -> bool:
    """Return whether an array is of n - 1 merges, each of clusters that are there, once, by then."""
    if linkage.ndim != 2 or linkage.shape[1] != 4 or linkage.dtype != np.float64 or not np.isfinite(linkage).all():
        return False
    merges, children, heights = len(linkage), linkage[:, :2], linkage[:, 2]
    is_whole = (children == np.floor(children)).all() and (children >= 0).all()
    come_before = (children < merges + 1 + np.arange(merges)[:, None]).all()
    return bool(
        is_whole and come_before and len(np.unique(children)) == children.size and (np.diff(heights) >= 0).all()
    )
