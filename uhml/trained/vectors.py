"""Vectors of pictures in a file: written piece by piece, so that a command that is killed goes on, and read again.

A finished ``vectors.npy`` is a plain float32 matrix, and ``vectors.csv`` beside it names the picture of each row; that
is also a list which ``data.dataset=list`` takes. A ``vectors.parquet`` holds both, in the columns path and vector.

Until then there is a folder ``vectors.npy.unfinished`` with the rows so far, and ``state.json``, which says how many
pictures they are of. What was written after the last state is written again.
"""

import contextlib
import csv
import dataclasses
import hashlib
import importlib.util
import io
import json
import logging
import os
import shutil
import time
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import IO, Annotated, Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from uhml.data.decode import stamp
from uhml.errors import UserError
from uhml.files import NO_ARRAY, csv_writer, is_taken, opened_aside, write_whole
from uhml.plain import Damaged, Text, read_json

logger = logging.getLogger(__name__)

SUFFIXES = (".npy", ".parquet")
SECONDS_BETWEEN_STATES = 2.0
ROWS_PER_BLOCK = 16384


class Vectors(NamedTuple):
    """Embedded pictures.

    Attributes:
        rows: ``[n, d]``, floats; of a ``.npy`` read from the disk as needed.
        paths: the n pictures.
    """

    rows: NDArray[Any]
    paths: list[str]


@dataclasses.dataclass
class State:
    """How far a file of vectors has come.

    Attributes:
        key: what the rows depend on.
        seen: pictures from the first on.
        files: digest of what these pictures' files are recognised by, see :func:`digest_of_files`.
        left_out: which of them were left out, and why.
    """

    key: dict[str, str]
    seen: Annotated[int, Field(ge=0)]
    files: str
    left_out: list[tuple[int, Text]]


class Unfinished:
    """A file of vectors on its way. Made by :func:`unfinished`.

    Attributes:
        seen: how many pictures have been embedded or left out.
        left_out: which of them were left out, and why.
    """

    def __init__(
        self,
        folder: Path,
        file: IO[bytes],
        width: int,
        key: dict[str, str],
        paths: Sequence[str],
        state: State,
        files: "hashlib._Hash",
    ) -> None:
        self._folder, self._file, self._width, self._key, self._paths = folder, file, width, key, paths
        self._settled = time.monotonic()
        self.seen, self.left_out = state.seen, state.left_out
        self._files = files

    def go_back(self, multiple: int) -> int:
        """Forget the last pictures, so that their number is a multiple, and return it."""
        if self.seen % multiple:
            self.seen -= self.seen % multiple
            self.left_out = [(row, reason) for row, reason in self.left_out if row < self.seen]
            self._files = digest_of_files(self._paths[: self.seen])
        self._file.truncate(len(_header(0, self._width)) + self._num_rows * self._width * 4)
        self._file.seek(0, os.SEEK_END)
        return self.seen

    def append(self, rows: NDArray[np.float32], refused: Sequence[str]) -> None:
        """Add the next pictures.

        Args:
            rows: ``[b, d]``.
            refused: for each, why it is left out, or an empty text.
        """
        kept = [not reason for reason in refused]
        self._file.write(np.ascontiguousarray(rows[kept], "<f4").tobytes())
        self.left_out += [(self.seen + i, reason) for i, reason in enumerate(refused) if reason]
        self._files = digest_of_files(self._paths[self.seen : self.seen + len(refused)], self._files)
        self.seen += len(refused)
        if time.monotonic() - self._settled > SECONDS_BETWEEN_STATES:
            self.settle()

    def settle(self) -> None:
        """Force all to the disk, so that it need not be done again."""
        self._file.flush()
        os.fsync(self._file.fileno())
        state = State(self._key, self.seen, self._files.hexdigest(), self.left_out)
        write_whole(self._folder / "state.json", json.dumps(dataclasses.asdict(state)))
        self._settled = time.monotonic()

    def finish(self, out: Path) -> None:
        """Put the finished file in its place, ``out``."""
        left_out = {row for row, _ in self.left_out}
        paths = [path for row, path in enumerate(self._paths) if row not in left_out]
        self._file.seek(0)
        self._file.write(_header(self._num_rows, self._width))
        self.settle()
        rows = self._folder / "rows.npy"
        if out.suffix.lower() == ".parquet":
            _write_parquet(out, Vectors(np.load(rows, mmap_mode="r"), paths))
        else:
            with opened_aside(names_of(out)) as file:
                csv_writer(file, paths).writerows([["path"], *([path] for path in paths)])
            rows.replace(out)
        shutil.rmtree(self._folder)

    @property
    def _num_rows(self) -> int:
        return self.seen - len(self.left_out)


@contextlib.contextmanager
def unfinished(
    out: Path, width: int, key: dict[str, str], paths: Sequence[str], overwrite: bool
) -> Iterator[Unfinished]:
    """Open a file of vectors to go on with, or to begin: anew, if a picture's file has changed that was seen already.

    Args:
        out: the file as it will be called.
        width: d.
        key: what the rows depend on, in JSON's terms; what was begun with another key is not gone on with.
        paths: of the n pictures.
        overwrite: whether to begin anew where there is such.

    Raises:
        UserError: the file is of another key, or another process is at it.
    """
    folder = unfinished_folder(out)
    folder.mkdir(exist_ok=True)
    with (folder / "lock").open("a") as lock:
        if is_taken(folder, lock):
            raise UserError(f"Another command is writing {out}: wait until it ends, or name another file.")
        state, files, rows = State(key, 0, "", []), digest_of_files(()), folder / "rows.npy"
        begun = _begun(folder)
        if rows.exists() and begun is not None:
            if begun.key == key:
                seen = digest_of_files(paths[: begun.seen])
                if begun.seen <= len(paths) and seen.hexdigest() == begun.files:
                    state, files = begun, seen
                else:
                    logger.warning("%s: pictures that were embedded already have changed: beginning anew.", out)
            elif not overwrite:
                other = [name for name in key if begun.key.get(name) != key[name]]
                raise UserError(
                    f"{folder} holds the unfinished work of another command (it differs in: {', '.join(other)}): start "
                    "that one again, or add --overwrite to begin anew."
                )
        with rows.open("r+b" if state.seen else "w+b") as file:
            if not state.seen:
                file.write(_header(0, width))
            opened = Unfinished(folder, file, width, key, paths, state, files)
            try:
                yield opened
            finally:
                if opened.seen == 0:
                    shutil.rmtree(folder)
                elif folder.exists():
                    opened.settle()


def _begun(folder: Path) -> State | None:
    """Return how far an earlier call has come that was not ended, if that can be told."""
    try:
        return read_json(folder / "state.json", State)
    except Damaged as e:
        logger.warning("%s Beginning anew.", e)
        return None


def digest_of_files(paths: Iterable[str], before: "hashlib._Hash | None" = None) -> "hashlib._Hash":
    """Return a digest of what pictures' files are recognised by without reading them, after that of others before."""
    digest = hashlib.sha256() if before is None else before
    for path in paths:
        digest.update(f"{stamp(path)}\n".encode())
    return digest


def unfinished_folder(out: Path) -> Path:
    """Return where a file of vectors is while it is being made."""
    return out.with_name(f"{out.name}.unfinished")


def names_of(out: Path) -> Path:
    """Return the file that names the pictures of a ``.npy``."""
    return out.with_suffix(".csv")


def require_parquet(path: Path) -> None:
    """Check that there is what Parquet takes, if the file is one.

    Raises:
        UserError: pyarrow is missing.
    """
    if path.suffix.lower() == ".parquet" and importlib.util.find_spec("pyarrow") is None:
        raise UserError(
            f"{path} takes pyarrow, which is not installed: pip install 'uhml[parquet]', or use a .npy file."
        )


def read_vectors(path: Path) -> Vectors:
    """Read what :func:`unfinished` has made, or another program in the same form.

    Raises:
        UserError: it is not of this form.
    """
    if not path.is_file():
        raise UserError(f"There is no file {path}.")
    if path.suffix.lower() not in SUFFIXES:
        raise UserError(f"{path} must end in {' or '.join(SUFFIXES)}.")
    require_parquet(path)
    found = _read_parquet(path) if path.suffix.lower() == ".parquet" else _read_npy(path)
    if found.rows.ndim != 2 or found.rows.dtype.kind != "f":
        raise UserError(f"{path} holds {found.rows.dtype} of shape {found.rows.shape}; vectors are a matrix of floats.")
    if len(found.rows) != len(found.paths):
        raise UserError(f"{path} holds {len(found.rows):,} vectors, and {len(found.paths):,} pictures are named.")
    return found


def _header(num_rows: int, width: int) -> bytes:
    """Return the head of a ``.npy``. numpy leaves room in it, so it is as long for any number of rows."""
    head = io.BytesIO()
    shape = {"descr": "<f4", "fortran_order": False, "shape": (num_rows, width)}
    np.lib.format.write_array_header_1_0(head, shape)
    return head.getvalue()


def _write_parquet(out: Path, vectors: Vectors) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    width = vectors.rows.shape[1]
    schema = pa.schema([("path", pa.string()), ("vector", pa.list_(pa.float32(), width))])
    with opened_aside(out) as file, pq.ParquetWriter(file, schema) as writer:
        for start in range(0, len(vectors.paths), ROWS_PER_BLOCK):
            block = slice(start, start + ROWS_PER_BLOCK)
            rows = pa.FixedSizeListArray.from_arrays(pa.array(vectors.rows[block].reshape(-1)), width)
            writer.write_table(pa.table([pa.array(vectors.paths[block]), rows], schema=schema))


def _read_npy(path: Path) -> Vectors:
    try:
        rows = np.load(path, mmap_mode="r", allow_pickle=False)
    except NO_ARRAY as e:
        raise UserError(f"{path} is not a .npy file of numbers.") from e
    if not isinstance(rows, np.ndarray):
        raise UserError(f"{path} is an archive of arrays: give the .npy file that uhml embed wrote.")
    names = names_of(path)
    try:
        with names.open(encoding="utf-8", errors="surrogateescape", newline="") as file:
            paths = [row["path"] for row in csv.DictReader(file)]
        if not all(paths):
            raise UserError(f"{names}: the path of a row is empty.")
    except FileNotFoundError as e:
        raise UserError(f"{path} needs {names} beside it, which names the picture of each row.") from e
    except (KeyError, csv.Error) as e:
        raise UserError(f"{names} is no CSV file with a column path.") from e
    return Vectors(rows, paths)


def _read_parquet(path: Path) -> Vectors:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        table = pq.read_table(path, columns=["path", "vector"]).combine_chunks()
        vectors = table["vector"].combine_chunks()
        rows = vectors.flatten().to_numpy(zero_copy_only=False).reshape(len(table), -1)
        return Vectors(rows, table["path"].to_pylist())
    except (pa.ArrowException, KeyError, ValueError) as e:
        raise UserError(f"{path} is no Parquet file with the columns path and vector.") from e
