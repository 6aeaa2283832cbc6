"""From a tree to what the steps learn from and what is shown of it; and when the steps get it."""

from collections.abc import Callable
from typing import Any, NamedTuple

from torch import Tensor

from uhml.config import Config
from uhml.data.pictures import Pictures
from uhml.hierarchy import Dendrogram
from uhml.mining import ClusterBatches
from uhml.reporting.hierarchy import ShownHierarchy, show_hierarchy


class Hierarchy(NamedTuple):
    """What a clustering found.

    Attributes:
        tree: of the pictures.
        levels: ``[K, n]`` int32, cut from it, finest first.
        shown: for the reporter.
    """

    tree: Dendrogram
    levels: Tensor
    shown: ShownHierarchy


def grow_hierarchy(
    cluster: Callable[[], Dendrogram], step: int, first_step: int, pictures: Pictures, config: Config
) -> Hierarchy:
    """Cluster, cut the tree into levels, and draw them. No collective, and for any process.

    Args:
        cluster: makes the tree.
        step: at which the pictures were embedded.
        first_step: that learns from the levels.
        pictures: the n training pictures.
        config: for the cuts and the batches.
    """
    tree = cluster()
    levels = tree.cut(**{config.hierarchy.cut_by: config.hierarchy.cuts})  # type: ignore[arg-type]
    batch = clusters_to_learn(levels, config)(first_step).reshape(-1, config.mining.pictures_per_cluster)
    return Hierarchy(tree, levels, show_hierarchy(step, tree, levels.numpy(), pictures, batch))


def clusters_to_learn(levels: Tensor, config: Config) -> ClusterBatches:
    """Return the batch of each step, as indices of pictures."""
    options, seed = config.mining, config.train.seed
    return ClusterBatches(
        levels.cpu().numpy(), config.clusters_per_batch, options.pictures_per_cluster, seed, options.clusters_together
    )


def linkage_options(config: Config) -> dict[str, Any]:
    """Return how the engine is to cluster points of the ball."""
    options = config.hierarchy
    return {
        "mode": options.mode,
        "geometry": options.geometry,
        "curvature": config.model.curvature,
        "num_neighbors": options.num_neighbors,
        "exact_search_up_to": options.exact_search_up_to,
        "min_recall": options.min_recall,
    }


def reclusters_at(step: int, config: Config) -> bool:
    """Return whether the pictures are clustered again at a step: every so many, unless none would learn from it."""
    options = config.hierarchy
    return step % options.recluster_every == 0 and step + options.overlap_steps < config.train.num_steps


def next_levels_at(step: int, config: Config) -> int:
    """Return the next step that may have other levels than this one; the number of steps if there is none."""
    every, overlap = config.hierarchy.recluster_every, config.hierarchy.overlap_steps
    return min((max(step - overlap, 0) // every + 1) * every + overlap, config.train.num_steps)


def is_first_of_levels(step: int, config: Config) -> bool:
    """Return whether the step that follows so many is the first to learn from its levels."""
    return step == 0 or next_levels_at(step - 1, config) == step


def embeds_at(step: int, config: Config) -> bool:
    """Return whether pictures go through the network outside of the steps, once so many have been taken."""
    anew = config.hierarchy.features == "fresh" or config.eval.at_reclustering
    return step == config.train.num_steps or (anew and reclusters_at(step, config))
