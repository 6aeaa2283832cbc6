"""One self-contained HTML page of pictures, their tree and their place in the Poincaré disk."""

import base64
import gzip
import hashlib
import json
import logging
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jinja2
import numpy as np
import torch
from torch import Tensor

from uhml import logs, poincare
from uhml.explorer.drawing import draw, places
from uhml.explorer.levels import central_and_unusual, heights, level_counts, shown_levels
from uhml.explorer.sheets import COLUMNS, PER_SHEET, choose_look, sheets
from uhml.explorer.sources import Source, short_names
from uhml.files import opened_aside
from uhml.hierarchy import average_linkage
from uhml.hierarchy.geometry import Geometry
from uhml.hierarchy.knn import nearest_neighbors
from uhml.run.reclustering import linkage_options
from uhml.trained import Trained

logger = logging.getLogger(__name__)

MAX_BYTES = 100_000_000
# The page's own program and the tags around the data.
PROGRAM_BYTES = 500_000
NUM_NEIGHBORS = 12


class Contents(NamedTuple):
    """What a page shows of m of the pictures.

    Attributes:
        shown: ``[m]`` these, in the order of the tree.
        meta: names and numbers, for JSON.
        arrays: by their names in the page.
    """

    shown: np.ndarray
    meta: dict[str, Any]
    arrays: dict[str, np.ndarray]


class _Array(NamedTuple):
    name: str
    dtype: str
    shape: str
    text: str


def write_page(trained: Trained, source: Source, embeddings: Tensor, out: Path, max_pictures: int) -> None:
    """Write the page of some pictures.

    Args:
        trained: the network.
        source: the n pictures, and the trees of them that there are.
        embeddings: ``[n, d]`` what the network makes of them.
        out: the file.
        max_pictures: of more, a sample is shown, spread evenly over the tree.

    Raises:
        UserError: a picture cannot be read any more, or they are too many for the page.
    """
    shown, meta, arrays = contents(trained, source, embeddings.cpu(), max_pictures)
    encoded = [_encode(name, array) for name, array in arrays.items()]
    paths = [source.pictures.paths[i] for i in shown]
    used = PROGRAM_BYTES + sum(len(array.text) for array in encoded) + len(json.dumps(meta["names"]))
    # Base64 makes four bytes of three.
    look = choose_look(paths, (MAX_BYTES - used) * 3 // 4)
    drawn = sheets(paths, look, trained.config.data.num_workers)
    meta["sheets"] = {"count": len(drawn), "tile": look.side, "columns": COLUMNS, "per_sheet": PER_SHEET}
    size = used + sum(len(sheet) for sheet in drawn) * 4 / 3
    logger.info("%s: about %.1f MB, thumbnails of %d pixels", out, size / 1e6, look.side)
    with opened_aside(out) as file:
        file.writelines(chunk.encode() for chunk in render(meta, encoded, map(_base64, drawn)))


def contents(trained: Trained, source: Source, embeddings: Tensor, max_pictures: int) -> Contents:
    """Return what the page of some pictures shows, but for the pictures. Arguments are as for :func:`write_page`."""
    pictures, curvature = source.pictures, trained.config.model.curvature
    geometry = Geometry("poincare", curvature)
    points = geometry.points(embeddings)
    tree = source.trees.get(trained.step) or average_linkage(embeddings, **linkage_options(trained.config))
    drawing = draw(tree, points, geometry)
    shown = drawing.order
    if len(shown) > max_pictures:
        shown = shown[np.linspace(0, len(shown) - 1, max_pictures).round().astype(int)]
        logger.info("showing %s of %s pictures, evenly from all clusters", f"{max_pictures:,}", f"{len(pictures):,}")
    counts = level_counts(len(shown))
    trees = {**source.trees, trained.step: tree}
    levels = {step: shown_levels(trees[step], counts, shown) for step in sorted(trees)}
    neighbors, distances = _neighbors(points, shown, geometry)

    arrays = {
        "disk": places(drawing.turn[shown], drawing.rank[shown]),
        "radius": 2 * poincare.tangent_norm(points[shown].double(), curvature).numpy().astype(np.float32),
        "neighbors": neighbors,
        "distances": distances,
    }
    for kind, labels in (("label", pictures.labels), ("super_label", pictures.super_labels)):
        if labels is not None:
            arrays[kind] = labels[shown].astype(np.int32)
    for i, step in enumerate(levels):
        arrays[f"levels-{i}"] = levels[step]
    for i, (level, count) in enumerate(zip(levels[trained.step], counts, strict=True)):
        arrays[f"central-{i}"], arrays[f"unusual-{i}"] = central_and_unusual(points[shown], level, geometry)
        height = np.zeros(level.max() + 1, np.float32)
        height[level] = heights(tree, drawing.standing, count)[shown]
        arrays[f"height-{i}"] = height

    names, name = short_names(pictures), logs.shown(trained.folder.resolve().name)
    meta = {
        "title": f"{name}: {source.part} pictures",
        "run": name,
        "step": trained.step,
        "created": trained.saved_at.date().isoformat(),
        "curvature": curvature,
        "num_pictures": len(shown),
        "num_all": len(pictures),
        "part": source.part,
        "names": [names[i] for i in shown],
        "labels": None if pictures.labels is None else list(pictures.class_names),
        "super_labels": None if pictures.super_labels is None else list(pictures.super_class_names),
        "steps": [{"step": step, "levels": [_name_level(row) for row in rows]} for step, rows in levels.items()],
    }
    return Contents(shown, meta, arrays)


def _neighbors(points: Tensor, shown: np.ndarray, geometry: Geometry) -> tuple[np.ndarray, np.ndarray]:
    """Return each shown picture's nearest ones, as places among the shown ones, and their distances, ``[m, k]``."""
    # By rising numbers: equal distances stand in the order of the pictures' list, as in every other search.
    ids = torch.from_numpy(np.sort(shown))
    k = min(NUM_NEIGHBORS, len(ids) - 1)
    found, distances = nearest_neighbors(points[ids], ids, points[ids], ids, k, geometry)
    place = np.empty(len(points), np.int32)
    place[shown] = np.arange(len(shown))
    rows = np.argsort(np.argsort(shown))
    return place[found.numpy()[rows]], distances.numpy()[rows].astype(np.float32)


def _name_level(level: np.ndarray) -> dict[str, Any]:
    clusters = int(level.max()) + 1
    return {"name": f"{clusters:,} clusters", "clusters": clusters}


def render(meta: dict[str, Any], arrays: Iterable[_Array], sheet_texts: Iterable[str]) -> Iterator[str]:
    """Yield the page in pieces.

    Nothing that comes from a file name or a label can end the element it is in: in JSON ``<``, ``>`` and ``&`` are
    escaped, in text jinja2 does it. Scripts run by a nonce alone, a digest of all names, which no
    name can hold.
    """
    text = json.dumps(meta)
    nonce = hashlib.sha256(text.encode()).hexdigest()
    for mark in "<>&":
        text = text.replace(mark, f"\\u{ord(mark):04x}")
    environment = jinja2.Environment(autoescape=True, loader=jinja2.PackageLoader("uhml.explorer", "page"))
    template = environment.get_template("template.html")
    return template.generate(title=meta["title"], nonce=nonce, meta=text, arrays=arrays, sheets=sheet_texts)


def _encode(name: str, array: np.ndarray) -> _Array:
    little_endian = array.astype(array.dtype.newbyteorder("<"))
    return _Array(
        name,
        array.dtype.name,
        ",".join(map(str, array.shape)),
        _base64(gzip.compress(little_endian.tobytes(), compresslevel=6, mtime=0)),
    )


def _base64(content: bytes) -> str:
    return base64.b64encode(content).decode()
