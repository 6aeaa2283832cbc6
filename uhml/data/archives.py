"""Unpack archives from strangers: all of an archive is looked at before any of it is written."""

import bz2
import contextlib
import gzip
import lzma
import shutil
import stat
import tarfile
import zipfile
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path, PurePosixPath
from typing import IO, Any, NamedTuple

from uhml.errors import UserError
from uhml.progress import progress

MAX_BYTES = 20 * 2**30
"""What an archive may unpack to; the largest data set has 3 GiB."""
MAX_MEMBERS = 1_000_000
MAX_READ = 2**24
"""No sane header of a tar archive is longer."""

DECOMPRESSED: dict[bytes, Callable[[Path], Any]] = {b"\x1f\x8b": gzip.open, b"BZh": bz2.open, b"\xfd7zXZ\0": lzma.open}
"""From the first bytes of a compressed file to what opens it."""


class _Member(NamedTuple):
    name: str
    size: int
    kind: str
    write: Callable[[Path], None]


def unpack(archive: Path, target: Path, place: Callable[[PurePosixPath], PurePosixPath]) -> None:
    """Unpack a zip or tar archive of plain files and folders.

    Args:
        archive: .zip, .tar, .tar.gz, .tar.bz2 or .tar.xz, whatever it is called.
        target: the folder to unpack to, which is there.
        place: where in ``target`` a file of the archive goes.

    Raises:
        UserError: it is no such archive, damaged, encrypted, larger than the disk or than ``MAX_BYTES``; or a member
            would lie outside of ``target``, or is a link, a device or a pipe. Nothing is written then, but where the
            damage shows only on unpacking.
    """
    try:
        with _opened(archive) as members:
            files = [member for member in _checked(members, archive) if member.kind == "file"]
            _check_room(sum(member.size for member in files), archive, target)
            for member in progress(files, f"unpack {archive.name}", unit="file"):
                to = target / place(PurePosixPath(member.name))
                to.parent.mkdir(parents=True, exist_ok=True)
                member.write(to)
    except OSError as e:
        # Errors of the system have a number, those of a decompressor none.
        if e.errno is None:
            raise _damaged(archive, e) from e
        raise UserError(f"{archive} cannot be unpacked to {target}: {e.strerror}.") from e
    except (tarfile.TarError, zipfile.BadZipFile, zlib.error, lzma.LZMAError, EOFError, ValueError) as e:
        raise _damaged(archive, e) from e
    except RuntimeError as e:  # zipfile's, of a password or a method that it does not know
        raise UserError(f"{archive} cannot be unpacked here ({e}): unpack it with another program.") from e


def _damaged(archive: Path, error: Exception) -> UserError:
    return UserError(f"{archive} is damaged ({' '.join(str(error).split())}): remove it, and fetch it again.")


@contextlib.contextmanager
def _opened(archive: Path) -> Iterator[Iterator[_Member]]:
    with archive.open("rb") as file:
        start = file.read(6)
    if start.startswith((b"PK\x03\x04", b"PK\x05\x06")):
        with zipfile.ZipFile(archive) as zipped:
            yield (_zip_member(zipped, info) for info in zipped.infolist())
        return
    decompressed = next((opener for magic, opener in DECOMPRESSED.items() if start.startswith(magic)), None)
    with contextlib.ExitStack() as stack:
        stream = stack.enter_context(decompressed(archive) if decompressed else archive.open("rb"))
        careful: Any = Careful(stream)
        try:
            tar = stack.enter_context(tarfile.open(fileobj=careful, mode="r:"))
        except tarfile.ReadError as e:
            raise UserError(f"{archive} is no zip or tar archive, or it is damaged ({e}).") from e
        yield _tar_members(tar, stream)


def _zip_member(zipped: zipfile.ZipFile, info: zipfile.ZipInfo) -> _Member:
    # The upper half is what Unix says of a file; archives from elsewhere leave it empty.
    mode = info.external_attr >> 16
    plain = stat.S_IFMT(mode) in (0, stat.S_IFREG, stat.S_IFDIR)
    kind = "folder" if info.is_dir() else "file" if plain else "link or device"

    def write(to: Path) -> None:
        # Never more than info.file_size, and checked against its CRC-32.
        with zipped.open(info) as source, to.open("wb") as out:
            shutil.copyfileobj(source, out)

    return _Member(info.filename, info.file_size, kind, write)


def _tar_members(tar: tarfile.TarFile, stream: IO[bytes]) -> Iterator[_Member]:
    for info in tar:
        kind = "folder" if info.isdir() else "file" if info.isreg() else "link or device"

        def write(to: Path, info: tarfile.TarInfo = info) -> None:
            # Its own judgement on top of ours.
            tar.extract(info.replace(name=to.name, deep=False), to.parent, filter="data")

        yield _Member(info.name, info.size, kind, write)
    # A compressed file has its checksum at its end, behind the padding.
    stream.read(MAX_READ)


class Careful:
    """The stream of a tar archive, without being taken in by a header that announces gigabytes of header."""

    def __init__(self, stream: Any) -> None:
        self._stream = stream
        self.seek, self.tell = stream.seek, stream.tell

    def read(self, size: int) -> bytes:
        """Return the next ``size`` bytes, or what is left.

        Raises:
            tarfile.ReadError: that are too many.
        """
        if not 0 <= size <= MAX_READ:
            raise tarfile.ReadError(f"a header of {size:,} bytes")
        return self._stream.read(size)


def _checked(members: Iterator[_Member], archive: Path) -> list[_Member]:
    """Return the members, if none of them means harm."""
    checked: list[_Member] = []
    num_bytes = 0
    for member in members:
        # Windows takes a backslash for a slash, and C: for the root.
        parts = member.name.replace("\\", "/").split("/")
        if not parts[0] or ".." in parts or ":" in parts[0] or (member.kind == "file" and set(parts) == {"."}):
            raise UserError(f"{archive} is not to be trusted: {member.name!r} would lie outside of its folder.")
        if member.kind not in ("file", "folder"):
            raise UserError(f"{archive} is not to be trusted: {member.name!r} is no plain file but a {member.kind}.")
        if member.size < 0:
            raise UserError(f"{archive} is not to be trusted: {member.name!r} has a negative size.")
        num_bytes += member.size
        if num_bytes > MAX_BYTES or len(checked) >= MAX_MEMBERS:
            raise UserError(
                f"{archive} is not to be trusted: it unpacks to more than {MAX_BYTES / 2**30:.0f} GiB or "
                f"{MAX_MEMBERS:,} files."
            )
        checked.append(member)
    return checked


def _check_room(num_bytes: int, archive: Path, target: Path) -> None:
    free = shutil.disk_usage(target).free
    if num_bytes > free:
        raise UserError(
            f"{archive} unpacks to {num_bytes / 2**20:,.0f} MiB, and {free / 2**20:,.0f} MiB are free for {target}."
        )
