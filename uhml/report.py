"""What a run tells about itself: metrics.jsonl, TensorBoard, the final table. Rank 0 writes; elsewhere it is silent."""

import json
import logging
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import ImageOps
from rich.console import Console
from rich.table import Table
from torch.utils.tensorboard import SummaryWriter
from torchvision.transforms.v2.functional import pil_to_tensor
from torchvision.utils import make_grid

from uhml import distributed
from uhml.data.decode import load_rgb
from uhml.data.pictures import Pictures
from uhml.evaluate import Scores

logger = logging.getLogger(__name__)

SHEET_CLUSTERS, SHEET_PICTURES, THUMBNAIL = 10, 12, 64


class Reporter:
    """The files of a run that people look at.

    Args:
        run_dir: gets ``metrics.jsonl`` and ``tensorboard/``.
    """

    def __init__(self, run_dir: Path) -> None:
        self.active = distributed.is_main()
        if self.active:
            self.metrics = (run_dir / "metrics.jsonl").open("a", buffering=1)
            self.tensorboard = SummaryWriter(str(run_dir / "tensorboard"))

    def scalars(self, kind: str, step: int, values: dict[str, float]) -> None:
        """Record numbers at a step; ``kind`` ("train", "hierarchy", ...) groups them."""
        if self.active:
            self.metrics.write(json.dumps({"kind": kind, "step": step, **values}) + "\n")
            for name, value in values.items():
                self.tensorboard.add_scalar(f"{kind}/{name}", value, step)

    def scores(self, name: str, step: int, scores: Scores) -> None:
        """Record the scores of an embedding: "frozen", "start" or "trained"."""
        recall = {f"recall_at_{k}": value for k, value in scores.recall_at_k.items()}
        self.scalars(name, step, {**recall, "map_at_r": scores.map_at_r, "nmi": scores.nmi})

    def hierarchy(self, step: int, levels: NDArray[np.int32], pictures: Pictures) -> None:
        """Record the sizes of the clusters on each level, and a sheet of some of them as pictures.

        Args:
            step: of the re-clustering.
            levels: ``[K, n]``, finest first.
            pictures: the n training pictures.
        """
        if not self.active:
            return
        summary = []
        for k, level in enumerate(levels, start=1):
            sizes = np.bincount(level)
            sizes = sizes[sizes > 0]
            figures = {"clusters": len(sizes), "largest": int(sizes.max()), "singletons": int((sizes == 1).sum())}
            self.scalars("hierarchy", step, {f"level{k}_{name}": value for name, value in figures.items()})
            self.tensorboard.add_histogram(f"cluster_sizes/level{k}", sizes, step)
            self.tensorboard.add_image(f"clusters/level{k}", _sheet(level, pictures), step)
            summary.append(f"{len(sizes)} clusters (largest {sizes.max()})")
        logger.info("step %d: hierarchy of %d pictures: %s", step, levels.shape[1], ", ".join(summary))

    def close(self) -> None:
        """Write out what is buffered."""
        if self.active:
            self.metrics.close()
            self.tensorboard.close()


def _sheet(level: NDArray[np.int32], pictures: Pictures) -> torch.Tensor:
    """Draw one row per cluster: clusters of all sizes from the largest down, the first pictures of each."""
    ids, sizes = np.unique(level, return_counts=True)
    by_size = ids[np.argsort(-sizes, kind="stable")]
    by_size = by_size[: max(1, int((sizes > 1).sum()))]
    chosen = by_size[np.unique(np.linspace(0, len(by_size) - 1, SHEET_CLUSTERS).astype(int))]
    blank = torch.full((3, THUMBNAIL, THUMBNAIL), 255, dtype=torch.uint8)
    tiles = []
    for cluster in chosen:
        members = np.flatnonzero(level == cluster)[:SHEET_PICTURES]
        # Square tiles, the whole picture in each.
        row = [
            pil_to_tensor(ImageOps.pad(load_rgb(pictures.paths[i]), (THUMBNAIL, THUMBNAIL), color="white"))
            for i in members
        ]
        tiles += row + [blank] * (SHEET_PICTURES - len(row))
    return make_grid(tiles, nrow=SHEET_PICTURES, padding=2, pad_value=200)


def result_table(rows: dict[str, Scores], steps: int, seconds: float, world_size: int) -> Table:
    """Return the final table: a row per embedding, a column per score, in per cent."""
    ranks = f"{world_size} ranks" if world_size > 1 else "1 process"
    table = Table(title=f"Unseen classes, {steps} steps in {seconds:.0f} s on {ranks} (per cent)")
    first = next(iter(rows.values()))
    table.add_column("embedding")
    for name in [f"R@{k}" for k in first.recall_at_k] + ["MAP@R", "NMI"]:
        table.add_column(name, justify="right")
    for name, scores in rows.items():
        figures = [*scores.recall_at_k.values(), scores.map_at_r, scores.nmi]
        table.add_row(name, *[f"{100 * figure:.1f}" for figure in figures])
    return table


def print_table(table: Table) -> None:
    """Print to the terminal, from rank 0."""
    if distributed.is_main():
        # A pipe has no width of its own, and a table cut off at 80 columns helps nobody.
        Console(width=None if Console().is_terminal else 120).print(table)


def write_json(path: Path, value: Any) -> None:
    """Write ``value`` as JSON, aside first, so that no half-written result is ever found."""
    aside = path.with_suffix(".partial")
    aside.write_text(json.dumps(value, indent=2) + "\n")
    aside.replace(path)
