"""From listed pictures to a train and a test part."""

import logging
from collections.abc import Sequence

from uhml.data.pictures import Pictures, Splits

logger = logging.getLogger(__name__)


def split(
    paths: Sequence[str], classes: Sequence[str], super_classes: Sequence[str] | None, trains: Sequence[bool]
) -> Splits:
    """Put each picture into the train or the test part; each part numbers its own classes.

    Args:
        paths: the n files.
        classes: the n names of the pictures' classes.
        super_classes: the n names of their classes on the coarser level, if there is one.
        trains: for each of the n pictures whether it trains. Where all do, there is no test part.
    """

    def part(rows: list[int]) -> Pictures:
        return Pictures.from_names(
            [paths[i] for i in rows],
            [classes[i] for i in rows],
            None if super_classes is None else [super_classes[i] for i in rows],
        )

    test = [i for i, train in enumerate(trains) if not train]
    return Splits(
        train=part([i for i, train in enumerate(trains) if train]),
        test=part(test) if test else None,
    )


def first_half(classes: Sequence[str]) -> list[bool]:
    """Tell of each picture whether its class is in the first half of the sorted ones, the greater half if they are odd.

    Args:
        classes: the n names of the pictures' classes.
    """
    names = sorted(set(classes))
    if len(names) < 4:
        logger.warning("of %d classes, at most one is left to score on, which any model finds", len(names))
    first = set(names[: (len(names) + 1) // 2])
    return [name in first for name in classes]
