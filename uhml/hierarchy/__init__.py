"""Average-linkage hierarchical clustering, from a handful to tens of millions of points; of use without any training.

    from uhml.hierarchy import average_linkage
    tree = average_linkage(embeddings, geometry="cosine")  # [n, d] array or tensor
    levels = tree.cut(counts=[1000, 100, 10])              # [3, n] cluster ids, nested, finest first

Average linkage (UPGMA) starts with every point by itself and keeps merging the two clusters whose points are, on
average, nearest to each other. What the average is taken over is the mode. Of two clusters A, of 3 points, and B, of 5:

          graph                     exact                     dense
            points of B               points of B               points of B
         A  d . . d .              A  s s s s s              A  d d d d d
            . . . . d                 s s s s s                 d d d d d
            . d . . .                 s s s s s                 d d d d d

    d  the distance of the pair
    .  the pair is not seen, as neither point is among the other's k nearest: it counts as far as the farthest pair seen
    s  the same for all pairs, but of something whose mean follows from the means of A and B alone, so that no pair is
       ever looked at: 1 - cosine, the squared Euclidean distance, or, in the Poincaré ball, cosh(sqrt(c) d)

    mode     takes memory for    good for
    graph    n k neighbours      any number of points, tens of millions
    exact    n d coordinates     some hundred thousand
    dense    n^2 distances       30,000

Which to use?

* ``graph`` to find clusters (pseudo-labels, groups, a taxonomy) among real features. It is the fastest, and its
  clusters fit true classes best: with averages over *all* pairs, real features tend to grow one giant cluster and
  stragglers. As all far pairs count the same, heights bunch near the top, at the greatest distance seen: cut it by
  ``counts`` or ``quantiles``. Where classes are tighter than k neighbours reach, the graph falls into parts; they are
  joined at that height, in the order of average linkage over all their pairs.
* ``exact`` where the answer has to be that of textbook average linkage, or heights matter: the tree is that of scipy
  on the full matrix, without the matrix.
* ``dense`` for the mean of the plain hyperbolic distance, as the article behind uhml defines it. It is scipy itself,
  and meant as the reference for small sets.

Points that are equal are one point of greater weight. The tree is the same on every run, for any number of threads and
ranks; where distances tie, an arbitrary but fixed order decides. There is one exception: points too many to be searched
exactly and too large to be held by every rank are put into cells by each rank for its share, so that another number of
ranks finds another nine tenths (``min_recall``) of the neighbours.
"""

from uhml.hierarchy.dendrogram import Dendrogram
from uhml.hierarchy.linkage import average_linkage, average_linkage_over_ranks, merging_over_ranks

__all__ = ["Dendrogram", "average_linkage", "average_linkage_over_ranks", "merging_over_ranks"]
