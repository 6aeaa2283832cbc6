"""``uhml search``: the pictures that are most like one."""

import argparse
import contextlib
import dataclasses
import hashlib
import json
import logging
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.table import Table

from uhml import distributed
from uhml.cli import count
from uhml.commands.options import add_network_arguments, opened
from uhml.console import cell, console
from uhml.data.decode import load_rgb
from uhml.data.images import list_images
from uhml.data.names import common_folder
from uhml.data.pictures import Pictures
from uhml.data.sampling import evenly
from uhml.data.verify import list_pictures
from uhml.embedding import embed_share
from uhml.errors import UserError, known_everywhere
from uhml.files import check_out
from uhml.hierarchy.geometry import Geometry
from uhml.hierarchy.knn import nearest_neighbors
from uhml.reporting.sheets import Answer, Tile, write_sheet
from uhml.trained import Trained
from uhml.trained.gallery import embedded_gallery
from uhml.trained.vectors import Vectors, read_vectors

logger = logging.getLogger(__name__)

EXAMPLES = """\
  uhml search runs/mine --query picture.jpg
  uhml search runs/mine --query a.jpg b.jpg --top 50 --sheet answers.png
  uhml search runs/mine --images my/pictures --query a.jpg --json
  uhml search runs/mine --vectors vectors.npy --query a.jpg
"""

SHEET_SUFFIXES = (".png", ".jpg")

# Pictures whose vectors in a file are compared with the network's, and how far apart, relative to their length, they
# may be: those of two networks are as far apart as strangers.
CHECKED = 8
MOST_APART = 0.1


@dataclasses.dataclass(frozen=True)
class Found:
    """A picture found.

    Attributes:
        path: of its file.
        distance: from the query, in the ball.
        label: its class, where that is known.
    """

    path: str
    distance: float
    label: str | None


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of ``uhml search``."""
    add_network_arguments(parser, EXAMPLES)
    parser.add_argument("--query", nargs="+", required=True, metavar="PICTURE", help="find what is like these pictures")
    parser.add_argument(
        "--top", type=count, default=20, metavar="N", help="how many to find for each (default: %(default)s)"
    )
    gallery = parser.add_mutually_exclusive_group()
    gallery.add_argument(
        "--images",
        type=Path,
        metavar="FOLDER_OR_LIST",
        help="search these pictures, not the run's training pictures; either are embedded once, into RUN/search",
    )
    gallery.add_argument(
        "--vectors", type=Path, metavar="VECTORS", help="search what uhml embed has written with the same network"
    )
    parser.add_argument(
        "--skip-corrupt",
        action="store_true",
        help="leave out pictures that cannot be read, as after a run with data.skip_corrupt=true",
    )
    parser.add_argument("--sheet", type=Path, metavar="SHEET.png", help="where to draw the pictures found")
    parser.add_argument("--json", action="store_true", help="print an object for scripts instead of a table")
    parser.add_argument("--overwrite", action="store_true", help="replace SHEET.png if it is there already")


def run(args: argparse.Namespace) -> None:
    """Find the nearest pictures of each query, by the ball's distance, exactly.

    A query that is itself among the pictures, by its path, is not found.

    Raises:
        UserError: an option, a query or a picture is not usable.
    """
    queries = [os.path.abspath(path) for path in args.query]
    with opened(args.run_folder, args.overrides) as trained:

        def check() -> None:
            if args.sheet is not None:
                check_out(args.sheet, "--sheet", SHEET_SUFFIXES, args.overwrite)
            for query in queries:
                load_rgb(query)

        distributed.on_main(check)
        gallery, label_of = _gallery(trained, args)
        found = search(trained, gallery, queries, args.top, label_of)

        def show() -> None:
            if args.sheet is not None:
                _draw(args.sheet, queries, found, len(gallery.paths))
                logger.info("The pictures found are in %s.", args.sheet)
            if args.json:
                print(json.dumps(_plain(trained, queries, found, len(gallery.paths)), indent=2))
                return
            for query, answers in zip(queries, found, strict=True):
                console().print(_table(query, answers, len(gallery.paths)))

        distributed.on_main(show)


def search(
    trained: Trained, gallery: Vectors, queries: Sequence[str], top: int, label_of: dict[str, str]
) -> list[list[Found]]:
    """Find the nearest pictures of each query. A collective.

    A query that is among the gallery, by its path, is searched for by the vector it has there, and is not found itself.

    Args:
        trained: the network.
        gallery: points of its ball, the same on every rank.
        queries: absolute paths of m pictures.
        top: how many to find for each.
        label_of: path to class, as far as known.

    Returns:
        For each query, the nearest first; fewer than ``top`` where there are no more.

    Raises:
        UserError: a query cannot be read.
    """
    config, device = trained.config, trained.model.device
    geometry = Geometry("poincare", config.model.curvature)
    points = geometry.points(torch.from_numpy(np.array(gallery.rows, np.float32)).to(device))
    row_of = {os.path.abspath(path): row for row, path in enumerate(gallery.paths)}
    # What is none of the gallery has an id that none of the gallery has.
    ids = [row_of.get(query, row_of.get(os.path.realpath(query), len(points) + i)) for i, query in enumerate(queries)]
    strangers = [i for i, row in enumerate(ids) if row >= len(points)]
    query_points = points.new_empty(len(queries), points.shape[1])
    known = [i for i, row in enumerate(ids) if row < len(points)]
    query_points[known] = points[[ids[i] for i in known]]
    if strangers:
        pictures = Pictures(paths=tuple(queries[i] for i in strangers))
        own = embed_share(trained.model, pictures, config, "embed queries")
        query_points[strangers] = geometry.points(distributed.all_gather_shares(own, len(pictures)))
    rows, distances = nearest_neighbors(
        query_points,
        torch.tensor(ids, device=device),
        points,
        torch.arange(len(points), device=device),
        min(top, len(points)),
        geometry,
    )
    return [
        [
            Found(gallery.paths[row], distance, label_of.get(gallery.paths[row]))
            for row, distance in zip(near, far, strict=True)
            if distance < float("inf")
        ]
        for near, far in zip(rows.tolist(), distances.tolist(), strict=True)
    ]


def _gallery(trained: Trained, args: argparse.Namespace) -> tuple[Vectors, dict[str, str]]:
    """Return what is searched, and the classes of its pictures as far as they are known. A collective."""
    if args.vectors is not None:
        vectors = distributed.on_every_rank(lambda: read_vectors(args.vectors))
        _refuse_others_vectors(trained, vectors, args.vectors)
        return vectors, {}
    data, folder = trained.config.data, trained.folder / "search"
    skip_corrupt = args.skip_corrupt or data.skip_corrupt
    if args.images is not None:
        pictures = list_images(args.images)
        source = os.path.abspath(args.images)
        folder /= f"{Path(source).stem}-{hashlib.sha256(os.fsencode(source)).hexdigest()[:8]}"
        return embedded_gallery(trained, pictures, folder, skip_corrupt=skip_corrupt), {}
    train = list_pictures(data).train
    labels = {}
    if train.labels is not None:
        labels = {path: train.class_names[label] for path, label in zip(train.paths, train.labels, strict=True)}
    return embedded_gallery(trained, train, folder / "train", skip_corrupt=skip_corrupt), labels


def _refuse_others_vectors(trained: Trained, vectors: Vectors, file: Path) -> None:
    """See whether some of the pictures that are still there have the vectors that the network gives them. A collective.

    Raises:
        UserError: they have not.
    """
    width = trained.config.model.embedding_dim
    cure = "take those that uhml embed made with this run and the same data.* overrides, without --features."
    if vectors.rows.shape[1] != width:
        said = f"The vectors of {file} have {vectors.rows.shape[1]} dimensions, and the network's have {width}: {cure}"
        raise known_everywhere(UserError(said))

    def there() -> list[int]:
        rows = []
        for row in evenly(len(vectors.paths), CHECKED):
            with contextlib.suppress(UserError):
                load_rgb(vectors.paths[row])
                rows.append(int(row))
        return rows

    if rows := distributed.from_main(there):
        pictures = Pictures(paths=[vectors.paths[row] for row in rows])
        own = embed_share(trained.model, pictures, trained.config, "compare the vectors with the network's")
        expected = distributed.all_gather_shares(own, len(rows)).cpu()
        found = torch.from_numpy(np.array(vectors.rows[rows], np.float32))
        # Of most of them: a picture may have changed. Another precision or device changes the third digit at most.
        gap = ((found - expected).norm(dim=1) / expected.norm(dim=1)).median()
        if not gap < MOST_APART:
            raise known_everywhere(UserError(f"The vectors of {file} are not those that the network gives: {cure}"))


def _plain(trained: Trained, queries: Sequence[str], found: Sequence[Sequence[Found]], num: int) -> dict[str, Any]:
    return {
        "checkpoint": str(trained.checkpoint),
        "step": trained.step,
        "pictures": num,
        "queries": [
            {"query": query, "neighbors": [dataclasses.asdict(answer) for answer in answers]}
            for query, answers in zip(queries, found, strict=True)
        ],
    }


def _table(query: str, found: Sequence[Found], num: int) -> Table:
    # Brackets in a name are the name's, and no markup.
    base = common_folder(answer.path for answer in found) if found else ""
    table = Table(
        title=cell(f"{Path(query).name}, among {num:,} pictures"),
        title_justify="left",
        caption=cell(f"in {base}"),
        caption_justify="left",
    )
    table.add_column("", justify="right")
    table.add_column("distance", justify="right")
    table.add_column("picture", overflow="fold")
    has_labels = any(answer.label is not None for answer in found)
    if has_labels:
        table.add_column("class", overflow="fold")
    for number, answer in enumerate(found, start=1):
        cells = [str(number), f"{answer.distance:.4f}", cell(os.path.relpath(answer.path, base))]
        table.add_row(*cells, *([cell(answer.label or "")] if has_labels else []))
    return table


def _draw(path: Path, queries: Sequence[str], found: Sequence[Sequence[Found]], num: int) -> None:
    answers = [
        Answer(
            Tile(query, (Path(query).name,)),
            [Tile(one.path, (f"{one.distance:.3f}", one.label or Path(one.path).name)) for one in nearest],
        )
        for query, nearest in zip(queries, found, strict=True)
    ]
    subtitle = f"Among {num:,} pictures; the nearest first, with their distance in the ball."
    write_sheet(path, answers, "Pictures most like these" if len(queries) > 1 else "Pictures most like this", subtitle)
