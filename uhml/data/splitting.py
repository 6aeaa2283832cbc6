"""From listed pictures to a train and a test part."""

import logging
from collections.abc import Sequence

import numpy as np

from uhml.data.pictures import Pictures, Splits
from uhml.errors import UserError

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


def hold_out(splits: Splits) -> Splits:
    """Take the last quarter of the training classes for the test part, in place of the one there is.

    Whoever compares settings on them does not look at the test classes.

    Raises:
        UserError: the classes of the training pictures are not known, or too few.
    """
    train = splits.train
    labels = np.empty(0, np.int64) if train.labels is None else train.labels
    classes = np.unique(labels)
    if len(classes) < 8:
        raise UserError(
            f"data.score_on=validation holds out a quarter of the training classes, and {len(classes)} are known: it "
            "takes 8 at least."
        )
    is_held_out = np.isin(labels, classes[-(len(classes) // 4) :])
    return Splits(train=train.select(np.flatnonzero(~is_held_out)), test=train.select(np.flatnonzero(is_held_out)))


def first_half(classes: Sequence[str]) -> list[bool]:
    """Tell of each picture whether its class is in the first half of the sorted ones, the greater half if they are odd.

    Args:
        classes: the n names of the pictures' classes.
    """
    names = sorted(set(classes))
    if len(names) < 4:
        logger.warning(
            "of %d classes, at most one is left to score on, which any model finds; if these are no classes, a list of "
            "the paths alone (data.dataset=list) trains on all pictures",
            len(names),
        )
    first = set(names[: (len(names) + 1) // 2])
    return [name in first for name in classes]
