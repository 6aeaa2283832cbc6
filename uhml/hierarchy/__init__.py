"""Average-linkage hierarchical clustering, from a handful to tens of millions of points."""

from uhml.hierarchy.dendrogram import Dendrogram
from uhml.hierarchy.linkage import average_linkage, average_linkage_over_ranks

__all__ = ["Dendrogram", "average_linkage", "average_linkage_over_ranks"]
