"""Progress of long work: a bar on a terminal, a plain line now and then elsewhere, and only on rank 0."""

import logging
import sys
import time
from collections.abc import Iterable, Iterator
from typing import TypeVar

from tqdm import tqdm

from uhml import distributed

logger = logging.getLogger(__name__)
T = TypeVar("T")

SECONDS_BETWEEN_LINES = 15.0
SECONDS_BEFORE_FIRST = 1.0


def progress(iterable: Iterable[T], description: str, *, total: int | None = None, unit: str = "it") -> Iterator[T]:
    """Yield from ``iterable`` and show how far it is.

    Args:
        iterable: what to go through.
        description: what is being done, in a few words: "embed train pictures".
        total: number of items; by default ``len(iterable)``.
        unit: what one item is, in the singular: "batch".
    """
    if total is None:
        total = len(iterable)  # type: ignore[arg-type]
    if not distributed.is_main():
        yield from iterable
    elif sys.stderr.isatty():
        yield from tqdm(
            iterable,
            description,
            total,
            unit=f" {unit}",
            leave=False,
            delay=SECONDS_BEFORE_FIRST,
            dynamic_ncols=True,
        )
    else:
        yield from _lines(iterable, description, total, unit)


def _lines(iterable: Iterable[T], description: str, total: int, unit: str) -> Iterator[T]:
    start = last = time.monotonic()
    for done, item in enumerate(iterable):
        now = time.monotonic()
        if now - last > SECONDS_BETWEEN_LINES:
            last = now
            left = (now - start) / max(done, 1) * (total - done)
            logger.info("%s: %d of %d, %.0f s left", description, done, total, left)
        yield item
