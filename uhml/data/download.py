"""Download one large file over a network that may fail, and go on where it stopped."""

import contextlib
import http.client
import logging
import os
import shutil
import ssl
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import uhml
from uhml.errors import UserError
from uhml.progress import progress

logger = logging.getLogger(__name__)

CHUNK = 2**20
TIMEOUT = 60.0
"""Seconds without a byte after which a connection is given up."""
MAX_TRIES = 6
"""Tries in a row that bring nothing new, after which the download is given up."""
FIRST_WAIT = 1.0
"""Seconds before the second try; they double with each that brings nothing new."""
TRY_AGAIN = (408, 425, 429, 500, 502, 503, 504)
"""What a server answers when it is the moment that is wrong, not the address."""


class _Cut(Exception):
    """The connection ended early, or the server cannot answer just now."""


def download(url: str, path: Path) -> None:
    """Download ``url`` to ``path``. What has come is kept in ``path`` + ".part", from where a later call goes on.

    Args:
        url: begins with http:// or https://.
        path: the file to be, in a folder that is there.

    Raises:
        UserError: there is no such file, the connection fails again and again, or the disk is full.
    """
    part = path.with_name(f"{path.name}.part")
    tries = longest = 0
    while True:
        try:
            _fetch(url, part)
            break
        except _Cut as e:
            had, longest = longest, max(longest, _size(part))
            tries = 1 if longest > had else tries + 1
            if tries == MAX_TRIES:
                kept = f"{_size(part) / CHUNK:.1f} MiB are kept in {part}: start the same command again to go on."
                raise UserError(f"{url} cannot be downloaded ({e}). {kept if part.exists() else 'Try later.'}") from e
            logger.info("%s: %s, trying again", path.name, e)
        time.sleep(FIRST_WAIT * 2 ** (tries - 1))
    part.replace(path)
    _tag(part).unlink(missing_ok=True)


def _fetch(url: str, part: Path) -> None:
    """Bring ``part`` from where it is to its end."""
    offset = _size(part)
    headers = {"User-Agent": f"uhml/{uhml.__version__}"}
    if offset:
        headers["Range"] = f"bytes={offset}-"
        # With it a server sends the rest only if the file is still the one that the beginning is of, else all of it.
        if _tag(part).exists() and (tag := _tag(part).read_text()):
            headers["If-Range"] = tag
    with _told(url, part), urllib.request.urlopen(urllib.request.Request(url, headers=headers), timeout=TIMEOUT) as got:
        if got.headers.get_content_type() == "text/html":
            raise UserError(f"{url} is a web page, not a file: open it in a browser, and give the file as --archive.")
        if got.status == 206 and not got.headers.get("Content-Range", "").startswith(f"bytes {offset}-"):
            part.unlink()
            raise _Cut("the server sent another part than it was asked for")
        said = got.headers.get("Content-Length", "")
        length = int(said) if said.isdecimal() else None
        _check_room(length or 0, part)
        if got.status != 206:
            offset = 0
            tag = got.headers.get("ETag", "")
            # A weak one (W/"...") says that files mean the same, not that they are.
            _tag(part).write_text(tag if tag.startswith('"') else got.headers.get("Last-Modified", ""))
        with part.open("r+b" if offset else "wb") as file:
            file.seek(offset)
            file.truncate()
            for chunk in _chunks(got, length, offset, part.stem):
                file.write(chunk)
        if length is not None and _size(part) < offset + length:
            raise _Cut(f"the connection ended after {_size(part) / CHUNK:.1f} MiB")


@contextlib.contextmanager
def _told(url: str, part: Path) -> Iterator[None]:
    """Turn what the network raises into :class:`_Cut`, or into a sentence where another try would not help."""
    try:
        yield
    except urllib.error.HTTPError as e:
        if e.code == 416:  # there is nothing after the end of the part
            if e.headers.get("Content-Range") == f"bytes */{_size(part)}":
                return
            part.unlink()
            raise _Cut("the file has become shorter") from e
        if e.code in TRY_AGAIN:
            raise _Cut(f"the server answers {e.code} {e.reason}") from e
        raise UserError(
            f"{url}: the server answers {e.code} {e.reason}. Give another address as --url, or a file as --archive."
        ) from e
    except (ValueError, http.client.InvalidURL) as e:
        raise UserError(f"{url} is no address: {e}. Give another as --url, or a file as --archive.") from e
    except urllib.error.URLError as e:
        raise _Cut(str(e.reason)) from e
    except (http.client.HTTPException, ConnectionError, TimeoutError, ssl.SSLError) as e:
        raise _Cut(str(e) or type(e).__name__) from e
    except OSError as e:  # of the disk, without a name
        raise UserError(f"{part} cannot be written: {e.strerror}. Make room, and start the same command again.") from e


def _chunks(got: Any, length: int | None, offset: int, name: str) -> Iterator[bytes]:
    chunks = iter(lambda: got.read(CHUNK), b"")
    if length is None:
        logger.info("%s: downloading; the server does not say how large it is", name)
        return chunks
    done = offset // CHUNK
    return progress(chunks, name, total=-(-(offset + length) // CHUNK), done=done, unit="MiB")


def _check_room(num_bytes: int, part: Path) -> None:
    free = shutil.disk_usage(part.parent).free
    if num_bytes > free:
        raise UserError(
            f"{part.stem} needs {num_bytes / 2**20:,.0f} MiB, and {free / 2**20:,.0f} MiB are free in {part.parent}."
        )


def _tag(part: Path) -> Path:
    """Where the server's name for this very version of the file is kept."""
    return part.with_name(f"{part.name}.etag")


def _size(path: Path) -> int:
    return os.path.getsize(path) if path.exists() else 0
