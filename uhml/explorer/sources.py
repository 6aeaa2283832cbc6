"""What a page is about: which pictures, and which trees of them the run has kept."""

import logging
import os
from pathlib import Path
from typing import NamedTuple

from uhml.data.fingerprint import fingerprint
from uhml.data.images import list_images
from uhml.data.names import common_folder
from uhml.data.pictures import Pictures, Splits
from uhml.data.verify import list_pictures, readable_pictures
from uhml.errors import UserError, known_everywhere
from uhml.hierarchy import Dendrogram
from uhml.run.run_dir import HIERARCHIES
from uhml.trained import Trained

logger = logging.getLogger(__name__)

FEWEST = 10
# Of a long run, every so many-th: each takes as much of the page as the pictures' neighbours do.
STEPS_SHOWN = 20


class Source(NamedTuple):
    """Pictures, and what is known of them.

    Attributes:
        pictures: all n of them.
        part: what they are called.
        trees: over these pictures, by step, up to that of the network; empty where the run has none of them.
    """

    pictures: Pictures
    part: str
    trees: dict[int, Dendrogram]


def find_source(trained: Trained, part: str, images: Path | None) -> Source:
    """Find the pictures. A collective.

    Args:
        trained: the network, with the config that says where the pictures of its run are.
        part: of the run's pictures, "train" or "test".
        images: a folder or a list of other pictures, in place of the run's.

    Raises:
        UserError: they are not there, or too few.
    """
    splits = list_pictures(trained.config.data) if images is None else Splits(train=list_images(images))
    if trained.config.data.skip_corrupt:
        splits = readable_pictures(splits, trained.config.data)
    if images is not None:
        source = Source(splits.train, images.resolve().name, {})
    elif part == "train":
        source = Source(splits.train, "train", _saved_trees(trained, splits))
    elif splits.test is None:
        said = "--part test: no classes are known for the run's pictures, so all of them are train."
        raise known_everywhere(UserError(said))
    else:
        source = Source(splits.test, trained.config.data.score_on, {})
    if len(source.pictures) < FEWEST:
        said = f"{len(source.pictures)} pictures are too few to explore: it takes {FEWEST} at least."
        raise known_everywhere(UserError(said))
    return source


def _saved_trees(trained: Trained, splits: Splits) -> dict[int, Dendrogram]:
    """Return the trees that the run has kept, if its training pictures are still the same."""
    paths = sorted((trained.folder / HIERARCHIES).glob("step-*.npz"))
    # Not a user's copy, step-00000100_old.npz.
    paths = [path for path in paths if path.stem.removeprefix("step-").isdecimal() and _step(path) <= trained.step]
    if not paths:
        return {}
    if trained.pictures != fingerprint(splits):
        logger.warning(
            "The pictures are not those that the run was trained on, so the tree is made anew and has no history."
        )
        return {}
    chosen = {paths[round(i * (len(paths) - 1) / (STEPS_SHOWN - 1))] for i in range(STEPS_SHOWN)}
    trees = {_step(path): Dendrogram.load(path) for path in chosen}
    for step, tree in trees.items():
        if tree.num_points != len(splits.train):
            raise UserError(
                f"The tree of step {step} in {trained.folder / HIERARCHIES} is of {tree.num_points} pictures, and the "
                f"run has {len(splits.train)}: it is another run's; remove it."
            )
    return trees


def _step(path: Path) -> int:
    return int(path.stem.removeprefix("step-"))


def short_names(pictures: Pictures) -> list[str]:
    """Return the pictures' names relative to the folder that they share."""
    paths = [os.path.abspath(path) for path in pictures.paths]
    shared = common_folder(paths)
    return [os.path.relpath(path, shared) for path in paths]
