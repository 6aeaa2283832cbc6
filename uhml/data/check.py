"""Look at a data set as training would, and at what training lets pass: everything that is odd in it, by name."""

import collections
import contextlib
import dataclasses
import hashlib
import os
import warnings
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image
from torch.utils.data import Dataset

from uhml.config import DataConfig
from uhml.data.decode import find_unreadable, opened
from uhml.data.formats import FORMATS
from uhml.data.names import common_folder
from uhml.data.official import OFFICIAL, differences
from uhml.data.pictures import Pictures, Splits
from uhml.data.reading import missing_noted
from uhml.data.verify import list_pictures
from uhml.data.workers import Loader
from uhml.logs import shown
from uhml.progress import progress

BATCH = 32
LARGE_SIDE = 4096
GREY_MODES = ("1", "L", "LA", "La", "F")


@dataclasses.dataclass(frozen=True)
class Finding:
    """Something odd.

    Attributes:
        name: in one word, for scripts.
        what: in a few words.
        items: each case: a text, or a group of texts that belong together.
        refused: whether training would not start.
    """

    name: str
    what: str
    items: Sequence[str | Sequence[str]]
    refused: bool = False


@dataclasses.dataclass(frozen=True)
class Report:
    """What :func:`check` found.

    Attributes:
        splits: the pictures, those that are missing included.
        num_to_train: of them on, without those that cannot be read.
        base: the folder that all of them lie below.
        findings: of every kind that was looked for, also where there are none.
    """

    splits: Splits
    num_to_train: int
    base: Path
    findings: list[Finding]


class _Facts(NamedTuple):
    digest: bytes
    mode: str
    short_side: int
    long_side: int


def check(config: DataConfig) -> Report:
    """Look at every picture, and at what lies beside them.

    Raises:
        UserError: the files do not have the form of the data set, so that nothing more can be said.
    """
    with missing_noted() as missing:
        splits = list_pictures(config)
    parts = splits.parts
    listed = list(dict.fromkeys(path for part in parts.values() for path in part.paths))
    absent = set(missing)
    present = [path for path in listed if path not in absent]
    refused = find_unreadable(present, config.num_workers)
    unreadable = {present[row] for row, _ in refused}
    readable = [path for path in present if path not in unreadable]
    facts = _look_at(readable, config.num_workers)
    base = Path(common_folder(listed))
    extra, empty = _beside(base, listed, config.dataset)
    same = _same_contents(facts)
    tiny = config.image_size // 2
    findings = [
        Finding("missing", "missing pictures", missing, refused=bool(missing)),
        Finding(
            "unreadable",
            "unreadable pictures",
            [(present[row], reason) for row, reason in refused],
            refused=bool(refused) and (not config.skip_corrupt or _is_nothing_left(parts, absent | unreadable)),
        ),
        Finding("counts", "numbers unlike the official ones", _counts(config, splits)),
        Finding("extra", "files beside the pictures that are not taken", extra),
        Finding("empty", "class folders without a picture", empty),
        Finding("single", "classes of a single picture", _singles(parts)),
        Finding("duplicates", "groups of pictures that are the same file", same),
        Finding("train_and_test", "of these in train and in test", _in_both(same, parts)),
        Finding("grey", "grey pictures", [p for p, f in facts.items() if f.mode in GREY_MODES or f.mode[0] == "I"]),
        Finding("cmyk", "CMYK pictures", [p for p, f in facts.items() if f.mode == "CMYK"]),
        Finding("large", f"sides over {LARGE_SIDE} px", [p for p, f in facts.items() if f.long_side > LARGE_SIDE]),
        Finding("tiny", f"sides under {tiny} px", [p for p, f in facts.items() if f.short_side < tiny]),
    ]
    lost = absent | unreadable
    num_to_train = sum(path not in lost for path in splits.train.paths)
    return Report(splits, num_to_train, base, findings)


def _is_nothing_left(parts: dict[str, Pictures], lost: set[str]) -> bool:
    return any(lost.issuperset(part.paths) for part in parts.values())


def _counts(config: DataConfig, splits: Splits) -> list[str]:
    is_whole = config.num_classes is None and config.score_on == "test"
    return differences(config.dataset, splits) if config.dataset in OFFICIAL and is_whole else []


class _Looked(Dataset[_Facts]):
    """What is to be known of each picture."""

    def __init__(self, paths: Sequence[str]) -> None:
        self.paths = paths

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> _Facts:
        with opened(self.paths[index]) as file, warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Pillow's doubts are no refusals
            digest = hashlib.file_digest(file, "sha256").digest()
            with Image.open(file, formats=sorted(set(FORMATS.values()))) as image:
                return _Facts(digest, image.mode, min(image.size), max(image.size))


def _look_at(paths: Sequence[str], num_workers: int) -> dict[str, _Facts]:
    loader = Loader(_Looked(paths), batch_size=BATCH, num_workers=num_workers, collate_fn=list)
    facts: list[_Facts] = []
    with contextlib.closing(iter(loader)) as batches:
        for batch in progress(batches, "look at pictures", total=len(loader), unit="batch"):
            facts += batch
    return dict(zip(paths, facts, strict=True))


def _beside(base: Path, listed: Iterable[str], dataset: str) -> tuple[list[str], list[str]]:
    """Return the files that are not taken, and the folders below ``base`` without a picture; hidden ones are no matter.

    A list chooses among pictures, so there it says nothing that others lie beside them, and glyphs are our own. Of the
    official data sets, files are meant that are pictures or lie among them, and folders without any file.
    """
    if dataset not in OFFICIAL and dataset != "folder":
        return [], []
    # A list may name a path in more ways than one.
    taken = {os.path.normpath(path) for path in listed}
    picture_folders = {os.path.dirname(path) or os.curdir for path in taken}
    extra: list[str] = []
    holds_something = set(picture_folders)
    folders = []
    for walked, below, files in os.walk(base):
        below[:] = sorted(name for name in below if not name.startswith("."))
        where = os.path.normpath(walked)
        folders.append(where)
        visible = (name for name in sorted(files) if not name.startswith("."))
        for path in (os.path.normpath(os.path.join(where, name)) for name in visible):
            if dataset != "folder":
                holds_something.add(where)
            is_picture = os.path.splitext(path)[1].lower() in FORMATS
            if path not in taken and (dataset == "folder" or is_picture or where in picture_folders):
                extra.append(path)
    for folder in list(holds_something):
        holds_something.update(str(parent) for parent in Path(folder).parents)
    return extra, [folder for folder in folders if folder not in holds_something]


def _singles(parts: dict[str, Pictures]) -> list[str]:
    """Return the names of classes of which no two pictures are known, so that they teach and score nothing."""
    counts: collections.Counter[tuple[str, str]] = collections.Counter()
    for name, part in parts.items():
        if part.labels is not None:
            # The gallery's classes are those of the test part.
            where = "train" if name == "train" else "test"
            numbers, sizes = np.unique(part.labels, return_counts=True)
            counts.update({(where, part.class_names[i]): int(n) for i, n in zip(numbers, sizes, strict=True)})
    return [f"{label} ({where})" for (where, label), count in counts.items() if count == 1]


def _same_contents(facts: dict[str, _Facts]) -> list[list[str]]:
    of_digest: dict[bytes, list[str]] = {}
    for path, fact in facts.items():
        of_digest.setdefault(fact.digest, []).append(path)
    return [paths for paths in of_digest.values() if len(paths) > 1]


def _in_both(groups: Sequence[Sequence[str]], parts: dict[str, Pictures]) -> list[Sequence[str]]:
    train = set(parts["train"].paths)
    others = {path for name, part in parts.items() if name != "train" for path in part.paths}
    return [group for group in groups if not train.isdisjoint(group) and not others.isdisjoint(group)]


def relative(item: str | Sequence[str], base: Path) -> Iterator[str]:
    """Yield the texts of an item, paths from ``base``."""
    for text in [item] if isinstance(item, str) else item:
        yield shown(str(text).removeprefix(f"{base}{os.sep}"))


def as_json(report: Report) -> dict[str, Any]:
    """Return the report for scripts: numbers of pictures, and every case of every finding by its name."""
    parts = report.splits.parts
    return {
        "pictures": {name: len(part) for name, part in parts.items()},
        "classes": {name: len(np.unique(p.labels)) for name, p in parts.items() if p.labels is not None},
        "refused": [finding.name for finding in report.findings if finding.refused],
        **{finding.name: list(finding.items) for finding in report.findings},
    }
