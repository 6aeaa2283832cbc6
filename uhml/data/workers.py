"""Worker processes that read pictures: they leave signals to the training process, and their errors are sentences."""

import contextlib
from collections.abc import Callable, Generator, Iterator, Sequence
from typing import Any, TypeVar

import torch
from torch.utils.data import DataLoader, Dataset, default_collate

from uhml import distributed, interruption
from uhml.environment import give_back_freed_memory
from uhml.errors import UserError
from uhml.progress import progress

T = TypeVar("T")

FEW_FILES = 20_000
"""One process has asked for so many before others have started."""

BLOCKS_AT_ONCE = 16
"""What is asked of a process at a time."""

MOST_WHO_ASK = 8
"""Processes of a rank that ask for files at a time."""

# What is said of a worker that is gone, by the loader and by the thread that pins memory for a GPU.
KILLED = ("DataLoader worker (pid", "Pin memory thread exited")


class _Tolerant(Dataset[Any]):
    """A data set whose errors of the user's are items, as raising would turn them into a worker's traceback."""

    def __init__(self, dataset: Dataset[Any]) -> None:
        self.dataset = dataset

    def __len__(self) -> int:
        return len(self.dataset)  # type: ignore[arg-type]

    def __getitem__(self, index: Any) -> Any:
        try:
            return self.dataset[index]
        except UserError as e:
            return e


class _Collate:
    """Makes a batch of items, or the first error among them."""

    def __init__(self, collate: Callable[[list[Any]], Any]) -> None:
        self.collate = collate

    def __call__(self, items: list[Any]) -> Any:
        return next((item for item in items if isinstance(item, UserError)), None) or self.collate(items)


def next_together(batches: Iterator[T], default: T | None = None) -> T:
    """Return this rank's next batch, if every rank is well and none was asked to end. A collective.

    Args:
        batches: of a :class:`Loader`.
        default: what to return when there are no more.

    Raises:
        Preempted: on every rank, if one was asked to end.
        UserError: on every rank, if a picture cannot be read or a worker died on one.
    """

    def fetch() -> T:
        interruption.check()
        return next(batches) if default is None else next(batches, default)

    # Not to be interrupted half-way, or a worker that is just handing over a batch would complain.
    return distributed.on_every_rank(fetch, interruptible=False)


class Loader(DataLoader[Any]):
    """A ``DataLoader``, of the same options, for runs that survive.

    Its workers ignore the signals that a terminal or a cluster sends to every process of a run. Close what ``iter``
    returns, if it is not exhausted: only then do they end. With ``persistent_workers`` they wait for the next ``iter``
    instead, and end by :meth:`close`.

    Raises:
        UserError: while iterating: what a worker raised, or a worker died.
    """

    def __init__(
        self, dataset: Dataset[Any], *, collate_fn: Callable[[list[Any]], Any] = default_collate, **options: Any
    ) -> None:
        collate = _Collate(collate_fn)
        super().__init__(
            _Tolerant(dataset),
            collate_fn=collate,
            worker_init_fn=interruption.leave_to_parent,
            # Its workers' seeds would be drawn from torch's global generator otherwise.
            generator=torch.Generator().manual_seed(0),
            **options,
        )

    def __iter__(self) -> Generator[Any]:  # type: ignore[override]
        if self.num_workers and self._iterator is None:
            give_back_freed_memory()
        batches: Any = None
        try:
            with interruption.workers_starting():
                batches = super().__iter__()
            for batch in batches:
                if isinstance(batch, UserError):
                    raise batch
                yield batch
        except (RuntimeError, ConnectionError, EOFError) as e:
            # The last two where it dies while it hands over a batch; the thread that pins memory meets them first.
            if isinstance(e, RuntimeError) and not any(words in str(e) for words in KILLED):
                raise
            raise UserError(
                "A process that reads pictures was killed, perhaps for want of memory: lower data.num_workers, and "
                "start the same command again to go on from the last checkpoint."
            ) from e
        finally:
            # Now, and not when the garbage is collected: an error's traceback may hold on to the workers until the
            # process ends, which would wait for them in vain, as they ignore what it asks them to end by.
            if self.num_workers and batches is not None and not self.persistent_workers:
                batches._shutdown_workers()

    def close(self) -> None:
        """End persistent workers, if there are any."""
        if self._iterator is not None:
            self._iterator._shutdown_workers()  # type: ignore[attr-defined]
            self._iterator = None


class _Blocks(Dataset[Any]):
    """What ``work`` makes of each of some blocks of paths."""

    def __init__(self, work: Callable[[Sequence[str]], Any], paths: Sequence[str], blocks: Sequence[slice]) -> None:
        self.work, self.paths, self.blocks = work, paths, blocks

    def __len__(self) -> int:
        return len(self.blocks)

    def __getitem__(self, i: int) -> Any:
        return self.work(self.paths[self.blocks[i]])


def of_blocks(
    work: Callable[[Sequence[str]], T], paths: Sequence[str], blocks: Sequence[slice], description: str
) -> Iterator[T]:
    """Yield what ``work`` makes of blocks of paths, in their order. Many are shared by this rank's cores.

    Args:
        work: asks the disk for files: it waits more than it computes.
        paths: of all files; as :class:`uhml.data.names.Names`, the processes need no copies of them.
        blocks: of the paths, which ones.
        description: of the work, for its progress.

    Raises:
        Preempted: the run was asked to end.
    """
    num_paths = sum(block.stop - block.start for block in blocks)
    processes = 1 if num_paths < FEW_FILES else min(MOST_WHO_ASK, distributed.threads_per_rank())
    num_workers = processes if processes > 1 else 0
    loader = Loader(_Blocks(work, paths, blocks), batch_size=BLOCKS_AT_ONCE, num_workers=num_workers, collate_fn=list)
    with contextlib.closing(iter(loader)) as found:
        for results in progress(found, description, total=len(loader), unit="batch"):
            interruption.check()
            yield from results
