"""Pictures to tensors in worker processes: all of a rank's share once, or the batches that mining chose."""

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset

from uhml import distributed
from uhml.data.decode import UnreadablePicture
from uhml.data.pictures import Pictures
from uhml.data.workers import Loader

Transform = Callable[..., Tensor]

PREFETCHED = 4
"""Batches of training that each worker makes ahead."""


class _Share(Dataset[Tensor]):
    """This rank's share of the pictures, in order."""

    def __init__(self, pictures: Pictures, transform: Transform) -> None:
        self.pictures, self.transform = pictures, transform
        self.rows = distributed.share(len(pictures))

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, i: int) -> Tensor:
        return self.transform(self.pictures.load(self.rows[i]))


class _ReadableShare(Dataset[tuple[Tensor, str]]):
    """The same with, beside each picture, why it is refused if it is, and a white one in its place then."""

    def __init__(self, share: _Share) -> None:
        self.share = share

    def __len__(self) -> int:
        return len(self.share)

    def __getitem__(self, i: int) -> tuple[Tensor, str]:
        try:
            return self.share[i], ""
        except UnreadablePicture as refusal:
            return self.share.transform(Image.new("RGB", (64, 64), "white")), str(refusal)


def share_loader(
    pictures: Pictures,
    transform: Transform,
    batch_size: int,
    num_workers: int,
    *,
    skip_corrupt: bool = False,
    pin_memory: bool = False,
) -> Loader:
    """Return a loader of this rank's share of ``pictures``: each once, in order, the last batch as short as it is.

    Yields:
        Images ``[b, 3, h, w]``; with ``skip_corrupt`` also, for each, why it cannot be read, or an empty text.
    """
    share = _Share(pictures, transform)
    return Loader(
        _ReadableShare(share) if skip_corrupt else share,
        batch_size=batch_size,
        num_workers=num_workers,
        pin_memory=pin_memory,
    )


class _View:
    """One row of the global batch of one step."""

    __slots__ = ("picture", "row", "step")

    def __init__(self, picture: int, step: int, row: int) -> None:
        self.picture, self.step, self.row = picture, step, row


class _Views(Dataset[Any]):
    """Augmented views, each a pure function of the seed, the step and its row in the global batch.

    So neither the number of ranks nor of workers, nor an interruption, changes what is seen.
    """

    def __init__(self, pictures: Pictures, transform: Transform, seed: int) -> None:
        self.pictures, self.transform, self.seed = pictures, transform, seed

    def __getitem__(self, view: _View) -> tuple[Tensor, int]:
        image = self.pictures.load(view.picture)
        # torchvision's transforms draw from torch's global generator; leave it as it was for the training process.
        with torch.random.fork_rng(devices=[]):
            seed = np.random.SeedSequence((self.seed, view.step, view.row)).generate_state(1, np.uint64)[0]
            torch.default_generator.manual_seed(int(seed))
            return self.transform(image), view.picture


class _RankBatches:
    """This rank's rows of the global batches of the steps at hand."""

    batch_of_step: Callable[[int], NDArray[np.int64]]
    steps: range

    def __init__(self, num_views: int) -> None:
        self.num_views = num_views

    def __iter__(self) -> Iterator[list[_View]]:
        for step in self.steps:
            rows = np.repeat(self.batch_of_step(step), self.num_views)
            own = len(rows) // distributed.world_size()
            first = distributed.rank() * own
            yield [_View(int(picture), step, first + i) for i, picture in enumerate(rows[first : first + own])]


class TrainingBatches:
    """Makes this rank's part of the global batches, by workers that last from some steps to the next.

    Args:
        pictures: the training pictures.
        transform: the augmentation.
        num_views: views of each picture.
        seed: of the run.
        num_workers: processes that read and augment.
        pin_memory: put batches where a GPU can fetch them by itself.
    """

    def __init__(
        self,
        pictures: Pictures,
        transform: Transform,
        *,
        num_views: int,
        seed: int,
        num_workers: int,
        pin_memory: bool = False,
    ) -> None:
        self._batches = _RankBatches(num_views)
        self._loader = Loader(
            _Views(pictures, transform, seed),
            batch_sampler=self._batches,
            num_workers=num_workers,
            prefetch_factor=PREFETCHED if num_workers else None,
            persistent_workers=num_workers > 0,
            pin_memory=pin_memory,
        )

    def close(self) -> None:
        """End the workers; the batches of other steps start new ones."""
        self._loader.close()

    def of_steps(
        self, steps: range, batch_of_step: Callable[[int], NDArray[np.int64]]
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """Return the batches of some steps, which are made ahead of their use; those of other steps end with it.

        Args:
            steps: the steps to make batches for.
            batch_of_step: step to the global batch, ``[B / num_views]`` indices of pictures.

        Yields:
            Images ``[B / world_size, 3, h, w]`` and their pictures' indices ``[B / world_size]``.
        """
        self._batches.steps, self._batches.batch_of_step = steps, batch_of_step
        return iter(self._loader)
