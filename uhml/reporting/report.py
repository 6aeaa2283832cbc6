"""What a run tells about itself: metrics.jsonl, TensorBoard, the final table. Rank 0 writes; elsewhere it is silent."""

import contextlib
import dataclasses
import functools
import json
import logging
import os
import shutil
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.table import Table
from torch import Tensor
from torch.utils.tensorboard import SummaryWriter

from uhml import distributed
from uhml.config import Config
from uhml.console import console
from uhml.errors import UserError
from uhml.files import write_whole
from uhml.loss import Pairs
from uhml.metrics import Scores
from uhml.reporting import hyperparameters
from uhml.reporting.guards import GUARDS, Guard
from uhml.reporting.hierarchy import ShownHierarchy

logger = logging.getLogger(__name__)

TENSORBOARD = "tensorboard"
RECORDS = ("metrics.jsonl", f"{TENSORBOARD}/events.*")


def _unless_of_tensorboard(
    otherwise: Callable[[threading.ExceptHookArgs], object], args: threading.ExceptHookArgs
) -> None:
    """Pass on what a thread ends by; but of a full disk TensorBoard's thread tells whoever writes or flushes next."""
    if not (isinstance(args.exc_value, OSError) and type(args.thread).__module__.startswith("tensorboard.")):
        otherwise(args)


# Not for the life of a writer only: its thread may still be ending by what its last call has told of.
threading.excepthook = functools.partial(_unless_of_tensorboard, threading.excepthook)


class Reporter:
    """The files of a run that people look at. Closes them as a context manager.

    Args:
        run_dir: gets ``metrics.jsonl``, ``tensorboard/`` and ``result.json``.
        config: of the run, for the table of hyper-parameters.
        saved: the checkpoint that the run goes on from, if it does; what was recorded later comes again.
    """

    def __init__(self, run_dir: Path, config: Config, saved: dict[str, Any] | None = None) -> None:
        self.run_dir = run_dir
        self.active = distributed.is_main()
        if self.active:
            if saved is not None:
                self._forget_later(saved["recorded"])
            self.metrics = (run_dir / "metrics.jsonl").open("a", buffering=1)
            # Tells a TensorBoard that has read what is forgotten.
            purge_step = None if saved is None else saved["step"] + 1
            self.tensorboard = SummaryWriter(str(run_dir / TENSORBOARD), purge_step=purge_step)
            if saved is None:
                for summary in hyperparameters.summaries(config):
                    self.tensorboard.file_writer.add_summary(summary, 0)  # type: ignore[attr-defined]
                # A chart for each guard, with the alarm line in it.
                charts = {name: ["Multiline", [f"guards/{name}$", f"guards/{name}_alarm$"]] for name in GUARDS}
                self.tensorboard.add_custom_scalars({"guards": charts})

    def _forget_later(self, recorded: dict[str, int]) -> None:
        for path in self._records():
            size = recorded.get(str(path.relative_to(self.run_dir)))
            if size is None:
                path.unlink()
            elif path.stat().st_size < size:
                logger.warning("%s is shorter than it was: something is lost.", path)
            else:
                os.truncate(path, size)

    def _records(self) -> list[Path]:
        return [path for pattern in RECORDS for path in self.run_dir.glob(pattern)]

    def __enter__(self) -> "Reporter":
        return self

    def __exit__(self, error: type[BaseException] | None, *_: object) -> None:
        if self.active:
            # What a full disk raises here once more should not hide what it raised first.
            with self._told() if error is None else contextlib.suppress(OSError):
                self.metrics.close()
                self.tensorboard.close()

    def settle(self) -> dict[str, int]:
        """Force all that is recorded to the disk and return the files and their bytes: what a checkpoint is to keep."""
        if not self.active:
            return {}
        with self._told():
            self.tensorboard.flush()
            os.fsync(self.metrics.fileno())
            return {str(path.relative_to(self.run_dir)): path.stat().st_size for path in self._records()}

    @contextlib.contextmanager
    def _told(self) -> Iterator[None]:
        try:
            yield
        except OSError as e:
            raise UserError(
                f"metrics.jsonl and tensorboard/ in {self.run_dir} cannot be written ({e}): make room, and start the "
                "same command again to go on from the last checkpoint."
            ) from e

    def scalars(self, kind: str, step: int, values: Mapping[str, float | Tensor]) -> None:
        """Record numbers at a step; ``kind`` ("train", "hierarchy", ...) groups them."""
        if not self.active:
            return
        numbers = {name: float(value) for name, value in values.items()}
        with self._told():
            self.metrics.write(json.dumps({"kind": kind, "step": step, **numbers}) + "\n")
            for name, value in numbers.items():
                self.tensorboard.add_scalar(f"{kind}/{name}", value, step)

    def scores(self, step: int, scores: dict[str, Scores] | None) -> None:
        """Record what :func:`uhml.evaluate.score_unseen` found, one curve over the steps for each way to score."""
        for name, found in (scores or {}).items():
            recall = {f"recall_at_{k}": value for k, value in found.recall_at_k.items()}
            self.scalars(f"unseen_{name}", step, {**recall, "map_at_r": found.map_at_r, "nmi": found.nmi})

    def hierarchy(self, step: int, shown: ShownHierarchy) -> None:
        """Record the sizes of the clusters on each level, and the pictures of them.

        Args:
            step: of the network that embedded the pictures, whenever their clustering was done.
            shown: see :func:`uhml.reporting.hierarchy.show_hierarchy`.
        """
        if not self.active:
            return
        summary: list[str] = []
        figures: dict[str, float] = {}
        with self._told():
            for k, (sizes, clusters) in enumerate(zip(shown.sizes, shown.clusters, strict=True), start=1):
                figures[f"level{k}_clusters"] = len(sizes)
                figures[f"level{k}_largest"] = int(sizes.max())
                figures[f"level{k}_singletons"] = int((sizes == 1).sum())
                self.tensorboard.add_histogram(f"cluster_sizes/level{k}", sizes, step)
                self.tensorboard.add_image(f"clusters/level{k}", clusters, step)
                summary.append(f"{len(sizes)} clusters (largest {sizes.max()})")
            self.tensorboard.add_image("hierarchy/tree", shown.tree, step)
            self.tensorboard.add_image("hierarchy/batch", shown.batch, step)
        self.scalars("hierarchy", step, figures | shown.purity)
        logger.info("step %d: hierarchy of %d pictures: %s", step, shown.num_pictures, ", ".join(summary))

    def guards(self, step: int, guards: Sequence[Guard]) -> None:
        """Record the figures that are watched beside their alarm lines, and warn of those beyond."""
        self.scalars("guards", step, {guard.name: guard.value for guard in guards})
        if not self.active:
            return
        with self._told():
            for guard in guards:
                self.tensorboard.add_scalar(f"guards/{guard.name}_alarm", guard.alarm, step)
        for guard in guards:
            if guard.rings:
                beyond = "above" if guard.alarm_above else "below"
                found = f"{guard.name} is {guard.value:.3g}, {beyond} {guard.alarm:g}"
                logger.warning("step %d: %s: %s.", step, found, guard.meaning)

    def distances(self, step: int, pairs: Pairs, num_levels: int) -> None:
        """Record how far apart pairs of a batch are, by the finest level on which they share a cluster.

        Args:
            step: of the batch.
            pairs: of some of its rows with all of them.
            num_levels: K.
        """
        if not self.active:
            return
        names = ["apart", *(f"level{k}" for k in range(num_levels, 0, -1)), "views_of_one_picture"]
        with self._told():
            for s, name in enumerate(names):
                if len(chosen := pairs.distances[(pairs.similarity == s) & ~pairs.is_self]):
                    self.tensorboard.add_histogram(f"distances/{name}", chosen, step)

    def embedding(
        self, step: int, points: Tensor, columns: Sequence[str], rows: Sequence[Sequence[str]], images: Tensor
    ) -> None:
        """Show pictures in TensorBoard's projector.

        Args:
            step: of the embedding.
            points: ``[n, d]``.
            columns: names of what is said of each picture.
            rows: of each picture, n of them; without tabs and line ends.
            images: ``[n, 3, h, w]`` uint8, h = w.
        """
        if not self.active:
            return
        # What a launch has left that was killed before the run was finished.
        shutil.rmtree(self.run_dir / TENSORBOARD / f"{step:05d}", ignore_errors=True)
        with self._told():
            self.tensorboard.add_embedding(
                points, [list(row) for row in rows], images.float() / 255, step, "embedding", list(columns)
            )

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

        def write() -> None:
            # First all else: with this file the run is finished, and nothing goes on with it.
            self.settle()
            write_whole(self.run_dir / "result.json", json.dumps(result, indent=2) + "\n")

        distributed.on_main(write, interruptible=False)
        if self.active:
            if before and after:
                console().print(_table(before, after, f"{num_steps} steps in {seconds:.0f} s on {_ranks()}"))
            else:
                logger.info("No classes are known for these pictures, so there is nothing to score.")
        logger.info("The run is in %s; tensorboard --logdir %s shows it.", self.run_dir, self.run_dir)
        return result


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
