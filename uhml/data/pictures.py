"""What a data set is to the rest of uhml: lists of picture files, and classes that only ever score."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from uhml.data.cache import Cached
from uhml.data.decode import load_rgb
from uhml.data.names import Names


@dataclass(frozen=True, eq=False, kw_only=True)
class Pictures:
    """One list of pictures, with the class of each where that is known.

    Labels never reach training: they score an embedding, or a hierarchy, from outside.
    """

    paths: Sequence[str]
    """The n files; kept as :class:`uhml.data.names.Names`, whatever they are given as."""
    labels: NDArray[np.int64] | None = None
    """``[n]``, the class of each picture, an index into ``class_names``; None where classes are not known."""
    super_labels: NDArray[np.int64] | None = None
    """``[n]``, the class of each picture on the coarser level that some data sets have, into ``super_class_names``."""
    class_names: tuple[str, ...] = ()
    """In sorted order. A class may be without pictures, after :meth:`select`."""
    super_class_names: tuple[str, ...] = ()
    """In sorted order."""
    cached: Cached | None = None
    """Where they are kept decoded, if they are."""

    def __post_init__(self) -> None:
        if not isinstance(self.paths, Names):
            object.__setattr__(self, "paths", Names(self.paths))

    @classmethod
    def from_names(
        cls,
        paths: Sequence[str],
        classes: Sequence[str],
        super_classes: Sequence[str] | None = None,
    ) -> "Pictures":
        """Number the classes by their sorted names.

        Args:
            paths: the n files.
            classes: the n names of the pictures' classes.
            super_classes: the n names of their classes on the coarser level, if there is one.
        """
        labels, class_names = _number(classes)
        super_labels, super_class_names = (None, ()) if super_classes is None else _number(super_classes)
        return cls(
            paths=paths,
            labels=labels,
            super_labels=super_labels,
            class_names=class_names,
            super_class_names=super_class_names,
        )

    def __len__(self) -> int:
        return len(self.paths)

    def load(self, i: int) -> Image.Image:
        """Return the i-th picture for the network, from the cache where there is one.

        Raises:
            UnreadablePicture: it cannot be decoded.
        """
        image = None if self.cached is None else self.cached.load(i)
        return load_rgb(self.paths[i]) if image is None else image

    def select(self, indices: Sequence[int] | NDArray[np.integer]) -> "Pictures":
        """Return the pictures at ``indices``, in that order. Classes keep their numbers and names."""
        rows = np.asarray(indices, dtype=np.int64)
        return replace(
            self,
            paths=Names(self.paths[i] for i in rows),
            labels=None if self.labels is None else self.labels[rows],
            super_labels=None if self.super_labels is None else self.super_labels[rows],
            cached=None if self.cached is None else self.cached.select(rows),
        )


@dataclass(frozen=True, eq=False, kw_only=True)
class Splits:
    """The pictures to train on and those to score on, of other classes."""

    train: Pictures
    test: Pictures | None = None
    """What retrieval is scored on; the queries when there is a gallery. None: no classes are known, so no score."""
    gallery: Pictures | None = None
    """Where the queries search, with ``test``'s class numbers (In-shop). None: ``test`` searches itself."""

    @property
    def parts(self) -> dict[str, Pictures]:
        """Those of "train", "test" and "gallery" that there are."""
        every = {"train": self.train, "test": self.test, "gallery": self.gallery}
        return {name: part for name, part in every.items() if part is not None}


def _number(names: Sequence[str]) -> tuple[NDArray[np.int64], tuple[str, ...]]:
    """Return the place of each of ``names`` among the sorted different ones, and these."""
    different = sorted(set(names))
    number = {name: i for i, name in enumerate(different)}
    return np.array([number[name] for name in names], dtype=np.int64), tuple(different)
