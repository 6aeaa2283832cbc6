"""Progress of long work: a bar on a terminal, a plain line now and then elsewhere, and only on rank 0."""

import logging
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from typing import TypeVar

from tqdm import tqdm

from uhml import distributed

logger = logging.getLogger(__name__)
T = TypeVar("T")

SECONDS_BETWEEN_LINES = 15.0
SECONDS_BEFORE_FIRST = 1.0

_is_silent = False


def progress(
    iterable: Iterable[T],
    description: str,
    *,
    total: int | None = None,
    done: int = 0,
    unit: str = "it",
    note: Callable[[], str] = str,
) -> Iterator[T]:
    """Yield from ``iterable`` and show how far it is.

    Args:
        iterable: what to go through.
        description: what is being done, in a few words: "embed train pictures".
        total: number of items; by default ``len(iterable)``.
        done: items of the total that were done before, and do not come again.
        unit: what one item is, in the singular: "batch".
        note: what to say beside it, asked each time: "loss 0.12".
    """
    if total is None:
        total = done + len(iterable)  # type: ignore[arg-type]
    if _is_silent or not distributed.is_main():
        yield from iterable
    elif sys.stderr is not None and sys.stderr.isatty():  # None where it was closed
        bar = tqdm(
            iterable,
            description,
            total,
            initial=done,
            unit=unit,
            leave=False,
            delay=SECONDS_BEFORE_FIRST,
            dynamic_ncols=True,
        )
        for item in bar:
            yield item
            bar.set_postfix_str(note(), refresh=False)
    else:
        yield from _lines(iterable, description, done, total, note)


def silence() -> None:
    """Show nothing from here on: this process works beside another, which shows how far it is itself."""
    global _is_silent
    _is_silent = True


def _lines(iterable: Iterable[T], description: str, before: int, total: int, note: Callable[[], str]) -> Iterator[T]:
    start = last = time.monotonic()
    for done, item in enumerate(iterable, start=before):
        now = time.monotonic()
        if now - last > SECONDS_BETWEEN_LINES:
            last = now
            left = (now - start) / max(done - before, 1) * (total - done)
            said = [f"{description}: {done} of {total}", note(), f"{left:.0f} s left"]
            logger.info(", ".join(filter(None, said)))
        yield item
