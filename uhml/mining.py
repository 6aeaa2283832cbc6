"""Batches from the hierarchy: P clusters of the finest level, M pictures of each, the same for any number of ranks."""

import numpy as np
from numpy.typing import NDArray

from uhml.errors import UserError


class ClusterBatches:
    """The batch of every step, as a pure function of seed, step and levels.

    Clusters are drawn in proportion to their size, so that their pictures all have about the same chance; a cluster of
    one is drawn only where there are fewer than P larger ones. A cluster with fewer than M pictures is filled up from
    its nearest relatives in the tree: first from the cluster that holds it on the next level, then the next, at last
    from all pictures. No picture is in a batch twice.

    Of clusters drawn one by one hardly two are related in a large tree: their pairs are on the lowest level, and the
    levels between teach little. So they may be drawn some at a time from one cluster of the coarsest level.

    Args:
        levels: ``[K, n]``, int32, nested clusters, finest level first.
        num_clusters: P.
        pictures_per_cluster: M.
        seed: of the run.
        clusters_together: how many of them come from one cluster of the coarsest level, if it has as many.

    Raises:
        UserError: a batch needs more pictures than there are.
    """

    def __init__(
        self,
        levels: NDArray[np.int32],
        num_clusters: int,
        pictures_per_cluster: int,
        seed: int,
        clusters_together: int = 1,
    ) -> None:
        num_pictures = levels.shape[1]
        if num_clusters * pictures_per_cluster > num_pictures:
            raise UserError(
                f"A batch takes {num_clusters} clusters x {pictures_per_cluster} pictures and there are only "
                f"{num_pictures} training pictures: lower train.global_batch_size."
            )
        self.num_clusters, self.pictures_per_cluster, self.seed = num_clusters, pictures_per_cluster, seed
        self.clusters_together = clusters_together
        # In this order every cluster of every level is one run of pictures, since the levels are nested.
        self.order = np.lexsort(levels)
        starts = starts_of_runs(levels[0][self.order])
        # For each cluster of the finest level the run it lies in, on each level and at last among all pictures.
        self.runs = []  # [2, clusters of the finest level]
        for level in (*levels, np.zeros(num_pictures)):
            bounds = np.r_[starts_of_runs(level[self.order]), num_pictures]
            at = np.searchsorted(bounds, starts, side="right")
            self.runs.append(np.stack([bounds[at - 1], bounds[at]]))
        # Of the finest clusters, those in one cluster of the coarsest level are a run, too: [2, finest clusters].
        _, first, family, count = np.unique(
            self.runs[-2][0], return_index=True, return_inverse=True, return_counts=True
        )
        self.families = np.stack([first, first + count])[:, family]
        sizes = self.runs[0][1] - self.runs[0][0]
        self.weights = np.where(sizes > 1, sizes, 0) if (sizes > 1).sum() >= num_clusters else sizes
        # One that brings relatives is drawn so much the less often itself.
        together = np.minimum(np.add.reduceat(self.weights > 0, first, dtype=int), clusters_together)[family]
        chances = self.weights / np.maximum(together, 1)
        self.probability = chances / chances.sum()

    def __call__(self, step: int) -> NDArray[np.int64]:
        """Return the batch of a step: ``[P * M]`` indices of pictures, cluster by cluster."""
        random = np.random.default_rng((self.seed, step))
        # With fewer clusters than P, some of them come twice.
        twice = bool(np.count_nonzero(self.probability) < self.num_clusters)
        clusters = random.choice(len(self.probability), self.num_clusters, replace=twice, p=self.probability)
        if self.clusters_together > 1 and not twice:
            clusters = self._with_relatives(random, clusters)
        taken: set[int] = set()
        batch: list[int] = []
        for cluster in clusters:
            wanted = self.pictures_per_cluster
            for starts, ends in self.runs:
                free = [row for row in self._draw(random, starts[cluster], ends[cluster]) if row not in taken][:wanted]
                taken.update(free)
                batch += free
                wanted -= len(free)
                if not wanted:
                    break
        return self.order[batch]

    def _with_relatives(self, random: np.random.Generator, clusters: NDArray[np.int64]) -> NDArray[np.int64]:
        """Put relatives behind each of the clusters, in proportion to their size; the last ones drawn give way."""
        chosen: list[int] = []
        is_free = self.weights > 0
        for cluster in clusters:
            if not is_free[cluster]:
                continue
            chosen.append(cluster)
            is_free[cluster] = False
            start, end = self.families[:, cluster]
            others = start + np.flatnonzero(is_free[start:end])
            if number := min(self.clusters_together - 1, len(others)):
                weights = self.weights[others]
                relatives = random.choice(others, number, replace=False, p=weights / weights.sum())
                chosen += relatives.tolist()
                is_free[relatives] = False
        return np.array(chosen[: self.num_clusters])

    def _draw(self, random: np.random.Generator, start: int, end: int) -> NDArray[np.int64]:
        """Draw different rows of a run, enough that M of them are free whatever is taken; all of a short run."""
        most = self.num_clusters * self.pictures_per_cluster
        return start + random.choice(end - start, min(most, end - start), replace=False)


def starts_of_runs(values: NDArray[np.generic]) -> NDArray[np.int64]:
    """Return where runs of equal values begin."""
    return np.flatnonzero(np.r_[True, values[1:] != values[:-1]])
