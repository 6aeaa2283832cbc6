"""Pictures in tar files, read by their place: nothing is unpacked.

A tar file has no table of contents, so its headers are read once, from one to the next, and what they say of the
pictures is kept in ``$XDG_CACHE_HOME/uhml/shards`` or ``~/.cache/uhml/shards``, by name, size and time of the tar file.
"""

import bisect
import contextlib
import hashlib
import json
import logging
import os
import posixpath
import tarfile
from collections.abc import Iterator
from typing import IO, Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from uhml.data.archives import Careful
from uhml.data.formats import FORMATS
from uhml.errors import UserError
from uhml.files import NO_ARRAY, opened_aside, regular_file, user_cache

logger = logging.getLogger(__name__)

FORMAT = 1
"""To be raised whenever :func:`_read_headers` finds other things in the same file."""

SUFFIX = ".tar"
LABELS = ("cls", "json")
"""What follows the key in the name of a member that may tell a class; the first that is there does."""

MAX_LABEL = 255
"""Letters of a label: as of a class folder's name."""
MAX_BYTES_OF_LABELS = 2**24

COMPRESSED = (b"\x1f\x8b", b"BZh", b"\xfd7zXZ\0", b"\x28\xb5\x2f\xfd")
"""First bytes of gzip, bzip2, xz and zstd."""

MAX_PATH = 4096
"""Bytes of a path that no system takes."""

KINDS = [("name", "S"), ("offset", "i"), ("size", "i"), ("label", "S")]
"""Columns of an index' rows."""

Stamp = tuple[int, int]


class Index(NamedTuple):
    """Which pictures a tar file has.

    Attributes:
        stamp: size and time of the tar file when its headers were read.
        rows: of each picture, by the sorted names: ``name`` and ``label`` as bytes, the latter empty where there is
            none, ``offset`` and ``size`` in bytes.
    """

    stamp: Stamp
    rows: NDArray[Any]


_indexes: dict[str, Index] = {}
"""What this process knows. Workers that are forked off know the same, without copies."""


def index(shard: str) -> Index:
    """Return which pictures a tar file has, from what was kept if it has not changed.

    Raises:
        UserError: it is missing, compressed, cut off or otherwise damaged, or holds samples that are none.
    """
    with _opened(shard) as file:
        stamp = _stamp(file)
        if shard not in _indexes or _indexes[shard].stamp != stamp:
            _indexes[shard] = _kept(shard, file, stamp)
    return _indexes[shard]


def read_member(path: str) -> bytes | None:
    """Return the contents of ``shard.tar/member.jpg``; None if the path does not lead into a tar file.

    Raises:
        FileNotFoundError: the tar file has no such picture.
        UserError: the tar file cannot be read, or has changed since its headers were.
    """
    found = _find(path)
    if found is None:
        return None
    shard, stamp, offset, size = found
    with _opened(shard) as file:
        if _stamp(file) != stamp:
            raise UserError(f"The shard {shard} has changed since it was looked through: start the same command again.")
        return _read(file, offset, size)


def member_stamp(path: str) -> Stamp | None:
    """Return size and time of ``shard.tar/member.jpg``: its own size, and the time of the tar file.

    None if there is no such picture in a tar file. Units are bytes, and nanoseconds since 1970.
    """
    with contextlib.suppress(FileNotFoundError):
        if (found := _find(path)) is not None:
            _, (_, time), _, size = found
            return size, time
    return None


def _find(path: str) -> tuple[str, Stamp, int, int] | None:
    """Return tar file, its stamp, offset and size of a picture; None if the path does not lead into a tar file."""
    end = len(path)
    while (end := path.rfind("/", 0, end)) > 0:
        shard = path[:end]
        if shard[-len(SUFFIX) :].lower() == SUFFIX and (shard in _indexes or os.path.isfile(shard)):
            break
    else:
        return None
    known = _indexes.get(shard) or index(shard)
    names, name = known.rows["name"], os.fsencode(path[end + 1 :])
    row = bisect.bisect_left(names, name)
    if row == len(names) or names[row] != name:
        raise FileNotFoundError(path)
    return shard, known.stamp, int(known.rows["offset"][row]), int(known.rows["size"][row])


@contextlib.contextmanager
def _opened(shard: str) -> Iterator[IO[bytes]]:
    """Open a tar file: each time, as that costs little beside decoding, and thousands need not be open at once."""
    try:
        with open(shard, "rb", opener=regular_file) as file:
            yield file
    except OSError as e:
        raise UserError(f"The shard {shard} cannot be read: {e.strerror or e}.") from e


def _stamp(file: IO[bytes]) -> Stamp:
    about = os.fstat(file.fileno())
    return about.st_size, about.st_mtime_ns


def _read(file: IO[bytes], offset: int, size: int) -> bytes:
    file.seek(offset)
    return file.read(size)


def _kept(shard: str, file: IO[bytes], stamp: Stamp) -> Index:
    """Return what is kept of a tar file, or look through it and keep that."""
    digest = hashlib.sha256(f"{FORMAT}\0{os.path.abspath(shard)}\0{stamp}".encode(errors="surrogateescape"))
    keep = user_cache("shards") / f"{digest.hexdigest()}.npy"
    with contextlib.suppress(OSError, *NO_ARRAY):
        rows = np.load(keep, allow_pickle=False)
        if rows.ndim == 1 and [(name, rows.dtype[name].kind) for name in rows.dtype.names or ()] == KINDS:
            return Index(stamp, rows)
    rows = _read_headers(shard, file)
    if _stamp(file) != stamp:
        raise UserError(f"The shard {shard} changes while it is read: wait until it is written.")
    try:
        keep.parent.mkdir(parents=True, exist_ok=True)
        with opened_aside(keep) as out:
            np.save(out, rows)
    except OSError as e:
        logger.warning("What %s holds cannot be kept in %s (%s), and is read anew each time", shard, keep.parent, e)
    return Index(stamp, rows)


class _Sample:
    """The members of one key that matter, as offsets and sizes."""

    def __init__(self, key: str) -> None:
        self.key = key
        self.picture: tuple[str, int, int] | None = None
        self.labels: dict[str, tuple[str, int, int]] = {}


def _read_headers(shard: str, file: IO[bytes]) -> NDArray[Any]:
    """Return the rows of :class:`Index`."""
    if file.read(6).startswith(COMPRESSED):
        raise UserError(
            f"The shard {shard} is compressed, so that no picture in it can be reached without all before it: "
            "decompress it. Pictures are compressed already."
        )
    rows: list[tuple[bytes, int, int, bytes]] = []
    for sample in _samples(shard, file):
        if sample.picture is not None:
            name, offset, size = sample.picture
            rows.append((os.fsencode(name), offset, size, _label(shard, file, sample).encode()))
    rows.sort()
    longest_name = max((len(name) for name, *_ in rows), default=1)
    longest_label = max((len(label) for *_, label in rows), default=1) or 1
    kinds = [("name", f"S{longest_name}"), ("offset", "<i8"), ("size", "<i8"), ("label", f"S{longest_label}")]
    return np.array(rows, dtype=kinds)


def _samples(shard: str, file: IO[bytes]) -> Iterator[_Sample]:
    """Yield the samples: runs of members with the same key, which is their path up to the first dot of the name."""
    sample, seen = None, set()
    for info in _headers(shard, file):
        # As if the tar file were the root of all: no name leads out of it, and none has two forms.
        name = posixpath.normpath("/" + info.name).lstrip("/")
        folder, _, base = name.rpartition("/")
        stem, _, extension = base.partition(".")
        if info.isdir() or not stem or not extension:
            continue
        key = f"{folder}/{stem}" if folder else stem
        if sample is None or sample.key != key:
            if sample is not None:
                yield sample
            if key in seen:
                raise UserError(
                    f"The shard {shard} has the sample {key!r} in two places: give each a name of its own, and write "
                    "its files one after another."
                )
            seen.add(key)
            sample = _Sample(key)
        is_picture = os.path.splitext(base)[1].lower() in FORMATS
        kind = extension.lower()
        if not is_picture and kind not in LABELS:
            continue
        if not info.isreg() or info.issparse():
            raise UserError(
                f"The shard {shard}: {name!r} is a link, a device or sparse: write it as a plain file, as tar does "
                "with --dereference --hard-dereference."
            )
        if (sample.picture is not None) if is_picture else (kind in sample.labels):
            raise UserError(
                f"The shard {shard}: {name!r} is one too many, as the sample {key!r} (all up to the first dot) has a "
                f"{'picture' if is_picture else kind} already."
            )
        if "\0" in name or len(os.fsencode(f"{os.path.abspath(shard)}/{name}")) >= MAX_PATH:
            raise UserError(f"The shard {shard}: no file can have the name {name[:100]!r}...")
        place = (name, info.offset_data, info.size)
        if is_picture:
            sample.picture = place
        else:
            sample.labels[kind] = place
    if sample is not None:
        yield sample


def _headers(shard: str, file: IO[bytes]) -> Iterator[tarfile.TarInfo]:
    """Yield the headers of a tar file, to the mark at its end."""
    file.seek(0)
    careful: Any = Careful(file)
    try:
        tar: Any = tarfile.TarFile(fileobj=careful)
        while (info := tar.next()) is not None:
            if info.size < 0:  # after which it would come to the same members again and again
                raise tarfile.ReadError("a member of negative size")
            # It would keep them all.
            tar.members.clear()
            yield info
    except (tarfile.TarError, ValueError, EOFError) as e:
        raise UserError(f"The shard {shard} is cut off or damaged, or no tar file ({e}): write it anew.") from e
    # tarfile takes the first rubbish behind a member for the end.
    if _read(file, tar.offset, tarfile.BLOCKSIZE) != bytes(tarfile.BLOCKSIZE):
        raise UserError(f"The shard {shard} is cut off or damaged at byte {tar.offset:,}: write it anew.")


def _label(shard: str, file: IO[bytes], sample: _Sample) -> str:
    """Return the class of a sample: its ``.cls``, or else the ``label`` in its ``.json``; empty if there is neither."""
    kind = next((kind for kind in LABELS if kind in sample.labels), None)
    if kind is None:
        return ""
    name, offset, size = sample.labels[kind]
    label: Any = False  # if nothing can be made of it
    if size <= MAX_BYTES_OF_LABELS:
        with contextlib.suppress(ValueError, RecursionError, AttributeError):
            text = _read(file, offset, size).decode()
            label = text if kind == "cls" else json.loads(text).get("label")
    if label is None:
        return ""
    if isinstance(label, int) and not isinstance(label, bool):
        label = str(label)
    if not isinstance(label, str) or not label.strip().isprintable() or not 0 < len(label.strip()) <= MAX_LABEL:
        expected = "one line" if kind == "cls" else "a JSON object whose label is"
        raise UserError(f"The shard {shard}: expected {name!r} to hold {expected}, the number or name of a class.")
    return label.strip()
