"""An official data set from its archives to a folder that is known to be complete."""

import contextlib
import hashlib
import logging
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path, PurePosixPath
from typing import NamedTuple
from urllib.parse import unquote, urlsplit

from uhml.data.archives import unpack
from uhml.data.datasets import load_splits
from uhml.data.download import download
from uhml.data.official import OFFICIAL, Official, differences
from uhml.errors import UserError, did_you_mean
from uhml.files import is_taken
from uhml.progress import progress

logger = logging.getLogger(__name__)

NO_ARCHIVE = (".mat", ".txt", ".csv")
"""Suffixes of files that belong to a data set as they are."""


class Prepared(NamedTuple):
    """What :func:`prepare` found or did: the data set's folder, and the SHA-256 of each file that it is from."""

    folder: Path
    sha256: dict[str, str]


def prepare(name: str, root: Path, urls: Sequence[str], archives: Sequence[Path]) -> Prepared:
    """Make a data set complete below ``root``, by download or from files that the user has. Does nothing if it is.

    Args:
        name: what ``data.dataset`` says.
        root: the folder to put the data set's own folder in.
        urls: where to download it, if not where its authors put it.
        archives: files of it that need no download.

    Raises:
        UserError: the data set cannot be had in this way, a file is not what its authors published, pictures are
            missing, or another process is at it. What was downloaded is kept.
    """
    if name not in OFFICIAL:
        known = ", ".join(OFFICIAL)
        raise UserError(f"{name} is no data set to prepare; those are {known}.{did_you_mean(name, OFFICIAL)}")
    official = OFFICIAL[name]
    # As with data.root, the data set's own folder may be named as well as the one that it lies in.
    root = root.parent if root.name == official.folder else root
    folder = root / official.folder
    if folder.exists():
        _check_complete(name, folder, f"{folder} is there, but not complete: mend it, or move it away")
        return Prepared(folder, {})
    if not (urls or archives or official.url):
        raise UserError(f"{name} cannot be downloaded by a program, as {official.how}.")
    if not urls and not archives:
        assert official.url is not None
        urls = [official.url]
    for file in archives:
        if not file.is_file():
            raise UserError(f"--archive {file}: there is no such file.")
    # In a folder of its own: what lies in the root is the user's, and stays.
    downloaded = root / f".{official.folder}.downloaded"
    named = {_file_name(url): url for url in urls}
    if len(named) < len(urls):
        raise UserError("Two --url end in the same name of a file: give one of the files as --archive.")
    # What the user has fetched into the root already is not fetched again.
    fetched = {name: root / name for name in named if (root / name).is_file()}
    here = {file.resolve(): file for file in [*fetched.values(), *archives]}
    downloads = {downloaded / name: url for name, url in named.items() if name not in fetched}
    with _alone_in(downloaded):
        for file, url in downloads.items():
            if not file.exists():
                download(url, file)
        files = [*downloads, *here.values()]
        sha256 = {file.name: _check_sums(file, official, file in downloads) for file in files}
        # Aside first, so that a folder of the right name is always a complete one.
        aside = root / f".{official.folder}.partial"
        shutil.rmtree(aside, ignore_errors=True)
        aside.mkdir()
        try:
            for file in files:
                _put(file, aside, official)
            _check_complete(name, aside, f"There is no complete {name} in {', '.join(file.name for file in files)}")
            aside.replace(folder)
        finally:
            shutil.rmtree(aside, ignore_errors=True)
        for file in downloads:
            file.unlink()
    return Prepared(folder, sha256)


@contextlib.contextmanager
def _alone_in(downloaded: Path) -> Iterator[None]:
    """Make the folder of the downloads, for one process at a time; remove it if nothing in it is to be gone on with."""
    downloaded.mkdir(parents=True, exist_ok=True)
    lock = downloaded / "lock"
    with lock.open("a") as file:
        if is_taken(downloaded, file):
            raise UserError(f"Another uhml prepare is at work in {downloaded}: wait until it ends.")
        try:
            yield
        finally:
            lock.unlink()
            with contextlib.suppress(OSError):
                downloaded.rmdir()


def _check_complete(name: str, folder: Path, sentence: str) -> None:
    try:
        found = differences(name, load_splits(name, folder))
    except UserError as e:
        raise UserError(f"{sentence}. {e}") from e
    if found:
        raise UserError(f"{sentence} ({'; '.join(found)}).")


def _file_name(url: str) -> str:
    try:
        parts = urlsplit(url)
    except ValueError as e:
        raise UserError(f"--url {url} is no address: {e}.") from e
    name = PurePosixPath(unquote(parts.path)).name
    if parts.scheme not in ("http", "https") or not name or name == "..":
        raise UserError(f"--url {url} must be http:// or https:// and end in the name of a file.")
    return name


def _check_sums(file: Path, official: Official, ours: bool) -> str:
    """Return the SHA-256 of a file, and refuse one that is not what its name says."""
    md5, sha256 = hashlib.md5(usedforsecurity=False), hashlib.sha256()
    with file.open("rb") as opened:
        chunks = iter(lambda: opened.read(2**20), b"")
        for chunk in progress(chunks, f"check {file.name}", total=-(-file.stat().st_size // 2**20), unit="MiB"):
            md5.update(chunk)
            sha256.update(chunk)
    expected = official.md5.get(file.name)
    if expected is not None and md5.hexdigest() != expected:
        if ours:
            file.unlink()  # or the next call would meet it again
        cure = "It is removed: try again, or another --url." if ours else "Rename it to go by its contents alone."
        raise UserError(
            f"{file.name} is not what the authors published: its MD5 is {md5.hexdigest()} instead of {expected}. {cure}"
        )
    known = "is as published" if expected else "has no published checksum here, so that the pictures' numbers decide"
    logger.info("%s %s; its SHA-256 is %s", file.name, known, sha256.hexdigest())
    return sha256.hexdigest()


def _put(file: Path, folder: Path, official: Official) -> None:
    """Unpack a file into the data set's folder, or copy one that is no archive."""

    def place(path: PurePosixPath) -> PurePosixPath:
        parts = path.parts[1:] if path.parts[0] == official.folder and len(path.parts) > 1 else path.parts
        return PurePosixPath(official.inside.get(parts[0], ""), *parts)

    if file.suffix.lower() in NO_ARCHIVE:
        to = folder / place(PurePosixPath(file.name))
        to.parent.mkdir(exist_ok=True)
        shutil.copyfile(file, to)
    else:
        unpack(file, folder, place)
