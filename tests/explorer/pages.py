"""Make runs of seconds and their pages, and read a page back by Python's own parser of HTML."""

import base64
import gzip
import io
import json
from html.parser import HTMLParser
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageDraw

from uhml import cli


class Page(NamedTuple):
    meta: dict
    arrays: dict
    sheets: list
    elements: list

    def tile(self, picture):
        """The thumbnail of a picture."""
        side, columns, per_sheet = (self.meta["sheets"][key] for key in ("tile", "columns", "per_sheet"))
        y, x = divmod(picture % per_sheet, columns)
        return self.sheets[picture // per_sheet].crop((x * side, y * side, (x + 1) * side, (y + 1) * side))


class _Scripts(HTMLParser):
    def __init__(self):
        super().__init__()
        self.elements, self.texts, self.inside = [], {}, None

    def handle_starttag(self, tag, attributes):
        self.elements.append((tag, dict(attributes)))
        if tag == "script":
            self.inside = dict(attributes).get("id")
            self.texts[self.inside] = ""

    def handle_endtag(self, tag):
        if tag == "script":
            self.inside = None

    def handle_data(self, data):
        if self.inside:
            self.texts[self.inside] += data


def read_page(path: Path) -> Page:
    parser = _Scripts()
    parser.feed(path.read_text())
    parser.close()
    attributes = {found["id"]: found for tag, found in parser.elements if tag == "script" and "id" in found}
    arrays, sheets = {}, []
    for name, text in parser.texts.items():
        if name and name.startswith("array-"):
            found = attributes[name]
            shape = [int(side) for side in found["data-shape"].split(",")]
            content = gzip.decompress(base64.b64decode(text))
            dtype = np.dtype(found["data-dtype"]).newbyteorder("<")
            arrays[name.removeprefix("array-")] = np.frombuffer(content, dtype).reshape(shape)
        elif name and name.startswith("sheet-"):
            sheets.append(Image.open(io.BytesIO(base64.b64decode(text))))
    return Page(json.loads(parser.texts["meta"]), arrays, sheets, parser.elements)


NASTY = (
    "<img src=x onerror=alert(1)>.jpg",
    "</script>.png",
    "]]><svg onload=alert(1)>.png",
    "\"' onmouseover=alert(1) x='.png",
    "{{ 7 * 7 }}{% raise %}.png",
    "grün & 🐈 &lt;b&gt;.png",
)
"""Names of files that mean something to a browser or to a template. The second is in a folder."""


def draw_shapes(root: Path, num_classes: int, per_class: int) -> None:
    """Polygons, one folder for each number of corners, no two pictures of the same colours."""
    random = np.random.default_rng(0)
    for corners in range(3, 3 + num_classes):
        (root / f"corners{corners:02d}").mkdir(parents=True)
        for i in range(per_class):
            image = Image.new("RGB", (48, 40), tuple(random.integers(100, 255, 3).tolist()))
            circle = (*random.uniform(18, 30, 2).tolist(), random.uniform(8, 16))
            fill = tuple(random.integers(0, 120, 3).tolist())
            ImageDraw.Draw(image).regular_polygon(circle, corners, random.uniform(0, 360), fill)
            image.save(root / f"corners{corners:02d}" / f"{i}.png")


def train(root: Path, run_dir: Path, *overrides: str) -> Path:
    """Train for a few steps, and re-cluster after every second."""
    config = run_dir.with_suffix(".yaml")
    config.write_text(
        "data: {dataset: folder, image_size: 32, fit: squash, num_workers: 1}\n"
        "model: {embedding_dim: 16}\n"
        "hierarchy: {recluster_every: 2, num_neighbors: 8, cut_by: counts, cuts: [12, 6, 3]}\n"
        "mining: {pictures_per_cluster: 2}\n"
        "train: {num_steps: 4, global_batch_size: 16, log_every: 1, device: cpu}\n"
        "eval: {recall_at: [1], batch_size: 32}\n"
    )
    assert cli.main(["train", str(config), f"data.root={root}", "--run-dir", str(run_dir), *overrides]) == 0
    return run_dir


def explore(run_dir: Path, out: Path, *options: str) -> Path:
    assert cli.main(["explore", str(run_dir), "--out", str(out), *options]) == 0
    return out
