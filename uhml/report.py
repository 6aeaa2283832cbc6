"""What a run tells about itself: metrics.jsonl, TensorBoard, the final table. Rank 0 writes; elsewhere it is silent."""

import contextlib
import dataclasses
import json
import logging
import os
from collections.abc import Iterator
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
from uhml.errors import UserError
from uhml.files import write_whole
from uhml.metrics import Scores

logger = logging.getLogger(__name__)

SHEET_CLUSTERS, SHEET_PICTURES, THUMBNAIL = 10, 12, 64


class Reporter:
    """The files of a run that people look at. Closes them as a context manager.

    Args:
        run_dir: gets ``metrics.jsonl``, ``tensorboard/`` and ``result.json``.
        saved: the checkpoint that the run goes on from, if it does; what was recorded later comes again.
    """

    def __init__(self, run_dir: Path, saved: dict[str, Any] | None = None) -> None:
        self.run_dir = run_dir
        purge_step, metrics_size = (None, 0) if saved is None else (saved["step"] + 1, saved["metrics_size"])
        self.active = distributed.is_main()
        if self.active:
            self.metrics = (run_dir / "metrics.jsonl").open("a", buffering=1)
            if self.metrics.tell() < metrics_size:
                logger.warning("%s is shorter than it was: lines are lost.", self.metrics.name)
            else:
                self.metrics.truncate(metrics_size)
            self.tensorboard = SummaryWriter(str(run_dir / "tensorboard"), purge_step=purge_step)

    def __enter__(self) -> "Reporter":
        return self

    def __exit__(self, error: type[BaseException] | None, *_: object) -> None:
        if self.active:
            # What a full disk raises here once more should not hide what it raised first.
            with self._told() if error is None else contextlib.suppress(OSError):
                self.metrics.close()
                self.tensorboard.close()

    def settle(self) -> int:
        """Force all that is recorded to the disk and return the bytes of ``metrics.jsonl``."""
        if not self.active:
            return 0
        with self._told():
            self.tensorboard.flush()
            os.fsync(self.metrics.fileno())
        return self.metrics.tell()

    @contextlib.contextmanager
    def _told(self) -> Iterator[None]:
        try:
            yield
        except OSError as e:
            raise UserError(
                f"metrics.jsonl and tensorboard/ in {self.run_dir} cannot be written ({e}): make room, and start the "
                "same command again to go on from the last checkpoint."
            ) from e

    def scalars(self, kind: str, step: int, values: dict[str, float]) -> None:
        """Record numbers at a step; ``kind`` ("train", "hierarchy", ...) groups them."""
        if not self.active:
            return
        with self._told():
            self.metrics.write(json.dumps({"kind": kind, "step": step, **values}) + "\n")
            for name, value in values.items():
                self.tensorboard.add_scalar(f"{kind}/{name}", value, step)

    def scores(self, step: int, scores: dict[str, Scores] | None) -> None:
        """Record what :func:`uhml.evaluate.score_unseen` found, one curve over the steps for each way to score."""
        for name, found in (scores or {}).items():
            recall = {f"recall_at_{k}": value for k, value in found.recall_at_k.items()}
            self.scalars(f"unseen_{name}", step, {**recall, "map_at_r": found.map_at_r, "nmi": found.nmi})

    def hierarchy(self, step: int, levels: NDArray[np.int32], pictures: Pictures) -> None:
        """Record the sizes of the clusters on each level, and a sheet of some of them as pictures.

        Args:
            step: of the re-clustering.
            levels: ``[K, n]``, finest first.
            pictures: the n training pictures.
        """
        if not self.active:
            return
        summary: list[str] = []
        figures: dict[str, float] = {}
        for k, level in enumerate(levels, start=1):
            sizes = np.bincount(level)
            sizes = sizes[sizes > 0]
            figures[f"level{k}_clusters"] = len(sizes)
            figures[f"level{k}_largest"] = int(sizes.max())
            figures[f"level{k}_singletons"] = int((sizes == 1).sum())
            self.tensorboard.add_histogram(f"cluster_sizes/level{k}", sizes, step)
            self.tensorboard.add_image(f"clusters/level{k}", _sheet(level, pictures), step)
            summary.append(f"{len(sizes)} clusters (largest {sizes.max()})")
        self.scalars("hierarchy", step, figures)
        logger.info("step %d: hierarchy of %d pictures: %s", step, levels.shape[1], ", ".join(summary))

    def finish(
        self, before: dict[str, Scores] | None, after: dict[str, Scores] | None, num_steps: int, seconds: float
    ) -> dict[str, Any]:
        """Write ``result.json`` and show the final table. A collective.

        Args:
            before: scores before the first step, None where there is nothing to score.
            after: scores after the last step.
            num_steps: steps taken.
            seconds: the whole run took.

        Returns:
            What ``result.json`` holds.
        """
        result: dict[str, Any] = {
            "frozen": dataclasses.asdict(before["backbone"]) if before else None,
            "start": _plain(before) if before else None,
            "trained": _plain(after) if after else None,
            "steps": num_steps,
            "world_size": distributed.world_size(),
            "seconds": round(seconds, 1),
        }
        distributed.on_main(
            lambda: write_whole(self.run_dir / "result.json", json.dumps(result, indent=2) + "\n"), interruptible=False
        )
        if self.active:
            if before and after:
                # A pipe has no width of its own, and a table cut off at 80 columns helps nobody.
                Console(width=None if Console().is_terminal else 120).print(
                    _table(before, after, f"{num_steps} steps in {seconds:.0f} s on {_ranks()}")
                )
            else:
                logger.info("No classes are known for these pictures, so there is nothing to score.")
        logger.info("The run is in %s; tensorboard --logdir %s shows it.", self.run_dir, self.run_dir)
        return result


def _sheet(level: NDArray[np.int32], pictures: Pictures) -> torch.Tensor:
    """Draw one row per cluster: clusters of all sizes from the largest down, pictures from all over each."""
    ids, sizes = np.unique(level, return_counts=True)
    by_size = ids[np.argsort(-sizes, kind="stable")]
    by_size = by_size[: max(1, int((sizes > 1).sum()))]
    chosen = by_size[np.unique(np.linspace(0, len(by_size) - 1, SHEET_CLUSTERS).astype(int))]
    blank = torch.full((3, THUMBNAIL, THUMBNAIL), 255, dtype=torch.uint8)
    tiles = []
    for cluster in chosen:
        members = np.flatnonzero(level == cluster)
        members = members[np.unique(np.linspace(0, len(members) - 1, SHEET_PICTURES).astype(int))]
        # Square tiles, the whole picture in each.
        row = [
            pil_to_tensor(ImageOps.pad(load_rgb(pictures.paths[i]), (THUMBNAIL, THUMBNAIL), color="white"))
            for i in members
        ]
        tiles += row + [blank] * (SHEET_PICTURES - len(row))
    return make_grid(tiles, nrow=SHEET_PICTURES, padding=2, pad_value=200)


def _plain(scores: dict[str, Scores]) -> dict[str, Any]:
    """The embedding's scores as it is deployed, by the ball's distance, and the others beside them."""
    others = {name: dataclasses.asdict(scores[name]) for name in ("cosine", "backbone")}
    return {**dataclasses.asdict(scores["ball"]), **others}


def _table(before: dict[str, Scores], after: dict[str, Scores], caption: str) -> Table:
    """The final table: a row per embedding, a column per score, in per cent."""
    table = Table(title="Unseen classes, per cent", caption=caption)
    table.add_column("embedding")
    for name in [f"R@{k}" for k in before["ball"].recall_at_k] + ["MAP@R", "NMI"]:
        table.add_column(name, justify="right")
    for name, scores, style in (
        ("frozen backbone, cosine", before["backbone"], None),
        ("untrained embedding, ball", before["ball"], None),
        ("trained embedding, ball", after["ball"], "bold"),
        ("trained embedding, cosine", after["cosine"], None),
        ("trained backbone, cosine", after["backbone"], None),
    ):
        figures = [*scores.recall_at_k.values(), scores.map_at_r, scores.nmi]
        table.add_row(name, *[f"{100 * figure:.1f}" for figure in figures], style=style)
    return table


def _ranks() -> str:
    return "1 process" if distributed.world_size() == 1 else f"{distributed.world_size()} ranks"
