"""``uhml evaluate``: how good a trained network is, class by class, and what its answers look like."""

import argparse
import dataclasses
import json
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from rich.table import Table
from torch import Tensor

from uhml import distributed
from uhml.commands.options import add_network_arguments, opened
from uhml.console import cell, console
from uhml.data.fingerprint import fingerprint
from uhml.data.pictures import Pictures, Splits
from uhml.data.sampling import evenly
from uhml.data.verify import load_pictures
from uhml.embedding import embed_share
from uhml.errors import UserError
from uhml.evaluate import ClassScore, Confusion, Evaluation, Neighbors, by_class, confusions, evaluate, find_neighbors
from uhml.files import write_whole
from uhml.hierarchy.geometry import Geometry
from uhml.reporting.confusion import Pair, draw_confusion, matrix
from uhml.reporting.sheets import COLUMNS, Answer, Tile, write_sheet
from uhml.trained import Trained

logger = logging.getLogger(__name__)

EXAMPLES = """\
  uhml evaluate runs/mine
  uhml evaluate runs/mine data.root=/data/elsewhere --out report --json > scores.json
  torchrun --nproc-per-node 8 -m uhml evaluate runs/mine/checkpoints/best.pt
"""

SHEET_QUERIES = 14
# Classes in the terminal's table, from either end.
SHOWN = 5
MOST_CONFUSED = 100


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of ``uhml evaluate``."""
    add_network_arguments(parser, EXAMPLES)
    parser.add_argument(
        "--out", type=Path, metavar="FOLDER", help="where to write scores.json and pictures (default: RUN/evaluation)"
    )
    parser.add_argument("--json", action="store_true", help="print what scores.json holds, and nothing else")
    parser.add_argument("--overwrite", action="store_true", help="replace an earlier evaluation in --out")


def run(args: argparse.Namespace) -> None:
    """Score the network on the test pictures of its run, or of others; write scores and pictures.

    Raises:
        UserError: no network or no pictures there, or an earlier evaluation is in the way.
    """
    with opened(args.run_folder, args.overrides) as trained:
        out: Path = args.out or trained.folder / "evaluation"
        distributed.on_main(lambda: _make_folder(out, args.overwrite))
        splits = load_pictures(trained.config.data)
        has_labels = splits.test is not None and splits.test.labels is not None
        if has_labels:
            if trained.pictures not in (None, fingerprint(splits)) and distributed.is_main():
                logger.warning(
                    "The pictures are not those that the run knew: of classes that it was trained on, if there are "
                    "any, the scores are too good."
                )
            found = evaluate(trained.model, splits, trained.config, COLUMNS)
            pairs = most_confused(splits, found.neighbors)
            report = summary(trained, splits, found, pairs)
        else:
            logger.info("No classes are known for these pictures, so there is nothing to score; see their neighbours.")
            report = _about(trained, splits) | {"ball": None, "backbone": None, "classes": [], "super_classes": []}
            neighbors = _unlabelled_neighbors(trained, splits.train)

        def write() -> None:
            write_whole(out / "scores.json", json.dumps(report, indent=2) + "\n")
            if splits.test is not None and has_labels:
                _draw_confusion(out / "confusion.png", splits, found.neighbors, pairs, report)
                _draw_neighbors(out / "neighbors.png", splits.test, splits.gallery, found.neighbors, report)
            else:
                _draw_neighbors(out / "neighbors.png", splits.train, None, neighbors, report)
            if args.json:
                print(json.dumps(report, indent=2))
            elif has_labels:
                for table in tables(report):
                    console().print(table)
            logger.info("Scores and pictures are in %s.", out)

        distributed.on_main(write)


def most_confused(splits: Splits, neighbors: Neighbors) -> list[Confusion]:
    """Return which classes are taken for which, as far as it happens more than once, at most MOST_CONFUSED."""
    assert splits.test is not None
    assert splits.test.labels is not None
    found = confusions(splits.test.labels, _labels_of_nearest(splits, neighbors))
    return [pair for pair in found if pair.pictures > 1][:MOST_CONFUSED]


def summary(trained: Trained, splits: Splits, found: Evaluation, pairs: Sequence[Confusion]) -> dict[str, Any]:
    """Return what ``scores.json`` holds."""
    test = splits.test
    assert test is not None
    assert test.labels is not None
    classes = by_class(test.labels, test.class_names, found.is_right, found.average_precision)
    super_classes: list[ClassScore] = []
    if test.super_labels is not None:
        super_classes = by_class(test.super_labels, test.super_class_names, found.is_right, found.average_precision)
    return {
        **_about(trained, splits),
        **{name: dataclasses.asdict(scores) | {"ami": found.ami[name]} for name, scores in found.scores.items()},
        "classes": [dataclasses.asdict(score) for score in classes],
        "super_classes": [dataclasses.asdict(score) for score in super_classes],
        "confused": [
            {
                "class": test.class_names[pair.label],
                "taken_for": test.class_names[pair.taken_for],
                "pictures": pair.pictures,
                "share": pair.share,
            }
            for pair in pairs
        ],
    }


def tables(report: dict[str, Any]) -> list[Table]:
    """Return the scores, and the classes that find themselves worst and best, as tables for a terminal."""
    whole = Table(title=f"{report['pictures']:,} pictures of {len(report['classes']):,} classes, per cent")
    whole.add_column("embedding")
    for name in [*(f"R@{k}" for k in report["ball"]["recall_at_k"]), "MAP@R", "NMI", "AMI"]:
        whole.add_column(name, justify="right")
    for name, key, style in (("ball", "ball", "bold"), ("backbone, cosine", "backbone", None)):
        scores = report[key]
        figures = [*scores["recall_at_k"].values(), scores["map_at_r"], scores["nmi"], scores["ami"]]
        whole.add_row(name, *[_per_cent(figure) for figure in figures], style=style)
    shown = [whole]
    for what, key in (("super-class", "super_classes"), ("class", "classes")):
        scores = report[key]
        if not scores:
            continue
        table = Table(title=f"{len(scores):,} {what}es, the worst and the best by R@1, per cent", min_width=60)
        table.add_column(what, ratio=1)
        for name in ("pictures", "R@1", "MAP@R"):
            table.add_column(name, justify="right")
        ends = [scores] if len(scores) <= 2 * SHOWN else [scores[:SHOWN], scores[-SHOWN:]]
        for end in ends:
            for score in end:
                table.add_row(
                    cell(score["name"]),
                    f"{score['pictures']:,}",
                    _per_cent(score["recall_at_1"]),
                    "" if score["map_at_r"] is None else _per_cent(score["map_at_r"]),
                )
            table.add_section()
        shown.append(table)
    return shown


def _make_folder(out: Path, overwrite: bool) -> None:
    if out.exists() and not out.is_dir():
        raise UserError(f"--out {out} is a file: name a folder.")
    if not out.absolute().parent.is_dir():
        raise UserError(f"--out {out}: there is no folder {out.absolute().parent} to make it in.")
    if (out / "scores.json").exists() and not overwrite:
        raise UserError(f"{out} holds an evaluation already: name another folder by --out, or add --overwrite.")
    out.mkdir(exist_ok=True)


def _about(trained: Trained, splits: Splits) -> dict[str, Any]:
    data, shown = trained.config.data, splits.test if splits.test is not None else splits.train
    return {
        "checkpoint": str(trained.checkpoint),
        "step": trained.step,
        "dataset": data.dataset,
        "root": data.root,
        "scored_on": data.score_on if splits.test is not None else None,
        "pictures": len(shown),
        "gallery": None if splits.gallery is None else len(splits.gallery),
    }


def _unlabelled_neighbors(trained: Trained, pictures: Pictures) -> Neighbors:
    own: Tensor = embed_share(trained.model, pictures, trained.config, "embed pictures")
    rows = distributed.all_gather_shares(own, len(pictures))
    return find_neighbors(rows, None, Geometry("poincare", trained.config.model.curvature), COLUMNS)


def _labels_of_nearest(splits: Splits, neighbors: Neighbors) -> NDArray[np.int64]:
    searched = splits.test if splits.gallery is None else splits.gallery
    assert searched is not None
    assert searched.labels is not None
    return searched.labels[neighbors.rows[:, 0]]


def _draw_confusion(
    path: Path, splits: Splits, neighbors: Neighbors, pairs: Sequence[Confusion], report: dict[str, Any]
) -> None:
    test = splits.test
    gallery = test if splits.gallery is None else splits.gallery
    assert test is not None
    assert test.labels is not None
    assert gallery is not None
    grid = matrix("class", test.class_names, test.labels, _labels_of_nearest(splits, neighbors))
    if grid is None and test.super_labels is not None and gallery.super_labels is not None:
        of_nearest = gallery.super_labels[neighbors.rows[:, 0]]
        grid = matrix("super-class", test.super_class_names, test.super_labels, of_nearest)
    drawn = [
        Pair(
            test.class_names[pair.label],
            test.class_names[pair.taken_for],
            pair.pictures,
            pair.share,
            test.paths[pair.example],
            gallery.paths[neighbors.rows[pair.example, 0]],
        )
        for pair in pairs
    ]
    recall = np.array([score["recall_at_1"] for score in report["classes"]])
    title = f"What is taken for what: {len(test):,} pictures, R@1 {_per_cent(report['ball']['recall_at_k']['1'])} %"
    draw_confusion(path, title, grid, drawn, recall)


def _draw_neighbors(
    path: Path, pictures: Pictures, gallery: Pictures | None, neighbors: Neighbors, report: dict[str, Any]
) -> None:
    searched = pictures if gallery is None else gallery
    chosen = evenly(len(pictures), SHEET_QUERIES)
    answers = [
        Answer(
            Tile(pictures.paths[query], (_class(pictures, query) or Path(pictures.paths[query]).name,)),
            [
                Tile(
                    searched.paths[row],
                    tuple(filter(None, (f"{distance:.3f}", _class(searched, row)))),
                    None
                    if pictures.labels is None or searched.labels is None
                    else bool(pictures.labels[query] == searched.labels[row]),
                )
                for row, distance in zip(neighbors.rows[query], neighbors.distances[query], strict=True)
                if distance < np.inf
            ],
        )
        for query in chosen
    ]
    scored = report["ball"]
    result = f"R@1 {_per_cent(scored['recall_at_k']['1'])} %. " if scored else ""
    write_sheet(
        path,
        answers,
        "Pictures and their nearest neighbours",
        f"{result}{len(chosen)} of {len(pictures):,} queries, evenly drawn; distances in the ball. "
        + ("Green with a tick: of the query's class. Red with a cross: of another." if scored else ""),
    )


def _class(pictures: Pictures, row: int) -> str:
    return "" if pictures.labels is None else pictures.class_names[pictures.labels[row]]


def _per_cent(share: float) -> str:
    return f"{100 * share:.1f}"
