"""TensorBoard's projector: the embedding as a cloud of pictures."""

import os

import torch

from uhml import distributed
from uhml.config import Config
from uhml.data.names import common_folder
from uhml.data.pictures import Pictures, Splits
from uhml.data.sampling import evenly
from uhml.embedding import embed_share
from uhml.model import Embedder
from uhml.reporting.figures import thumbnails
from uhml.reporting.report import Reporter

MOST = 2500
"""Pictures that are shown: as one image, of 50 x 50 thumbnails, which browsers can still draw."""


def project(model: Embedder, splits: Splits, step: int, config: Config, report: Reporter) -> None:
    """Show unseen pictures, or those of the training where there are no others. A collective."""
    pictures = splits.test or splits.train
    chosen = pictures.select(evenly(len(pictures), MOST))
    own = embed_share(model, chosen, config, "embed pictures for TensorBoard")
    points = distributed.all_gather_shares(own, len(chosen))

    def show() -> None:
        images = torch.stack(thumbnails(chosen))
        report.embedding(step, points, ("picture", "class"), _rows(chosen), images)

    distributed.on_main(show)


def _rows(pictures: Pictures) -> list[list[str]]:
    labels = [-1] * len(pictures) if pictures.labels is None else pictures.labels
    names = [*pictures.class_names, "unknown"]
    root = common_folder(pictures.paths)
    paths = [os.path.relpath(path, root) for path in pictures.paths]
    return [[_in_a_cell(path), _in_a_cell(names[label])] for path, label in zip(paths, labels, strict=True)]


def _in_a_cell(text: str) -> str:
    """Return the text without what would end its line or its column, or be no UTF-8."""
    return "".join(letter if letter.isprintable() else "?" for letter in text)
