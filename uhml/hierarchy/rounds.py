"""Tell how far the rounds of merging are."""

import logging
import time
from collections.abc import Iterable, Iterator

from uhml.hierarchy.dendrogram import Merges
from uhml.progress import SECONDS_BETWEEN_LINES

logger = logging.getLogger(__name__)

# Real features take 30 to 100 rounds, whatever their number.
UNUSUALLY_MANY = 1000


def reported(rounds: Iterable[Merges], num_clusters: int, description: str) -> Iterator[Merges]:
    """Yield rounds of merges; log how many clusters are left now and then, and the number of rounds at the end.

    Each round merges one pair at least, so there are never more rounds than points. Unusually many are worth a warning:
    they tell of points that are collapsed, or pure noise.

    Args:
        rounds: the merges, round by round.
        num_clusters: the number of clusters before the first.
        description: what is being done, in a few words.
    """
    number, left, last = 0, num_clusters, time.monotonic()
    for number, merges in enumerate(rounds, 1):
        yield merges
        left -= len(merges.kept)
        if time.monotonic() - last > SECONDS_BETWEEN_LINES:
            last = time.monotonic()
            logger.info("%s: %d of %d clusters left after %d rounds", description, left, num_clusters, number)
    logger.debug("%s: %d rounds, from %d clusters to %d", description, number, num_clusters, left)
    if number > UNUSUALLY_MANY:
        logger.warning(
            "%s took %d rounds for %d points: are the embeddings collapsed to a point, or noise?",
            description,
            number,
            num_clusters,
        )
