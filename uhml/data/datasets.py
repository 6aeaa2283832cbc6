"""The registry of data sets: every name that ``data.dataset`` may have."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np

from uhml.data.cars196 import cars196
from uhml.data.cub200 import cub200
from uhml.data.folder import folder
from uhml.data.glyphs import glyphs
from uhml.data.inshop import inshop
from uhml.data.listed import listed
from uhml.data.pictures import Pictures, Splits
from uhml.data.shards import shards
from uhml.data.sop import sop
from uhml.errors import UserError, did_you_mean

DATASETS: dict[str, Callable[[Path | None], Splits]] = {
    "glyphs": glyphs,
    "cub200": cub200,
    "cars196": cars196,
    "sop": sop,
    "inshop": inshop,
    "folder": folder,
    "list": listed,
    "shards": shards,
}
"""From the name of a data set to the function that reads it from ``data.root``."""


def load_splits(name: str, root: Path | None, num_classes: int | None = None) -> Splits:
    """List the pictures of a data set, train and test apart. A collective (glyphs are made by rank 0).

    Args:
        name: one of ``DATASETS``.
        root: where its files lie; only ``glyphs`` has a default.
        num_classes: keep only so many classes of train and of test each, evenly spaced over the order of the classes;
            None keeps all.

    Raises:
        UserError: the name is unknown, the files are not as the data set has them, or there are fewer classes than
            asked for.
    """
    if name not in DATASETS:
        raise UserError(f"data.dataset={name} is none of {', '.join(DATASETS)}.{did_you_mean(name, DATASETS)}")
    splits = DATASETS[name](root)
    if num_classes is None:
        return splits
    said = {"train": "train", "test": "test", "gallery": "test"}  # whose classes the gallery's are
    return Splits(**{name: _keep_classes(part, num_classes, said[name]) for name, part in splits.parts.items()})


def _keep_classes(pictures: Pictures, num_classes: int, part: str) -> Pictures:
    """Keep ``num_classes`` evenly spaced classes, numbered anew. The same for query and gallery, as names are."""
    total = len(pictures.class_names)
    if pictures.labels is None or not 1 <= num_classes <= total:
        found = "no classes are known" if pictures.labels is None else f"the {part} part has {total} classes"
        raise UserError(f"data.num_classes={num_classes} cannot be kept: {found}. Leave it out to keep all pictures.")
    kept = np.arange(num_classes) * total // num_classes
    pictures = pictures.select(np.flatnonzero(np.isin(pictures.labels, kept)))
    assert pictures.labels is not None
    return replace(
        pictures,
        labels=np.searchsorted(kept, pictures.labels),
        class_names=tuple(pictures.class_names[i] for i in kept),
    )
