"""From the data section of the config to pictures that are known to be readable."""

import logging
from dataclasses import replace

import numpy as np

from uhml import distributed
from uhml.config import DataConfig
from uhml.data.cache import cache_pictures
from uhml.data.datasets import load_splits
from uhml.data.decode import UnreadablePicture, find_unreadable
from uhml.data.fingerprint import refuse_different
from uhml.data.pictures import Pictures, Splits
from uhml.data.splitting import hold_out
from uhml.errors import known_everywhere
from uhml.files import expanded

logger = logging.getLogger(__name__)


def load_pictures(config: DataConfig) -> Splits:
    """List the pictures of the data set and decode each once. A collective; see the next two."""
    return readable_pictures(list_pictures(config), config)


def list_pictures(config: DataConfig) -> Splits:
    """List the pictures of the data set. A collective.

    Raises:
        UserError: the data set is not as it should be, or not the same for all ranks.
    """
    root = expanded(config.root) if config.root else None

    def listed() -> Splits:
        splits = load_splits(config.dataset, root, config.num_classes)
        return hold_out(splits) if config.score_on == "validation" else splits

    # Glyphs are drawn on rank 0 in the middle of this, for which all ranks wait.
    splits = distributed.on_every_rank(listed, interruptible=False)
    refuse_different(splits, f"data.root={config.root}")
    return splits


def readable_pictures(splits: Splits, config: DataConfig) -> Splits:
    """Decode each picture once, so that no run stumbles over a bad one. A collective.

    With ``data.cache`` this is where they come into the cache; those that are there already are known to be well.

    Raises:
        Preempted: the run was asked to end.
        UserError: the cache cannot be written.
        UnreadablePicture: a picture cannot be read, and ``data.skip_corrupt`` is not set.
    """
    parts, said = splits.parts, {"train": "train", "test": config.score_on, "gallery": "gallery"}
    if config.cache is not None:
        found = cache_pictures([part.paths for part in parts.values()], config)
        parts = {name: replace(part, cached=c) for (name, part), c in zip(parts.items(), found, strict=True)}
    readable = {name: _readable(part, said[name], config) for name, part in parts.items()}
    for name, part in readable.items():
        num_classes = 0 if part.labels is None else len(np.unique(part.labels))
        classes = f" of {num_classes} {'class' if num_classes == 1 else 'classes'}" if num_classes else ""
        logger.info("%s: %d pictures%s", said[name], len(part), classes)
    return Splits(**readable)


def _readable(pictures: Pictures, name: str, config: DataConfig) -> Pictures:
    if pictures.cached is None:
        refused = find_unreadable(pictures.paths, config.num_workers)
    else:
        absent = pictures.cached.absent()
        found = find_unreadable([pictures.paths[row] for row in absent], config.num_workers)
        refused = [(int(absent[i]), reason) for i, reason in found]
    if not refused:
        return pictures
    first = f"{pictures.paths[refused[0][0]]} {refused[0][1]}"
    if not config.skip_corrupt:
        others = len(refused) - 1
        more = f" (and {others} more of the {name} pictures cannot be read)" if others else ""
        raise known_everywhere(
            UnreadablePicture(
                f"The picture {first}{more}. Mend or remove it, or add data.skip_corrupt=true to go on without."
            )
        )
    logger.warning("Going on without %d unreadable %s pictures, the first being %s.", len(refused), name, first)
    for row, reason in refused:
        logger.info("left out: %s %s", pictures.paths[row], reason)
    if len(refused) == len(pictures):
        raise known_everywhere(
            UnreadablePicture(f"None of the {len(pictures)} {name} pictures can be read; the first, {first}.")
        )
    left = np.setdiff1d(np.arange(len(pictures)), [row for row, _ in refused])
    return pictures.select(left)
