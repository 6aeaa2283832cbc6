"""Downloads from a local server that behaves as badly as real ones, and archives that mean harm."""

import errno
import hashlib
import http.server
import io
import json
import re
import shutil
import stat
import subprocess
import sys
import tarfile
import threading
import zipfile
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

from uhml import cli
from uhml.data import archives, download, official
from uhml.data.datasets import load_splits
from uhml.data.official import Official

# A data set of six pictures in the form of CUB, in place of the 11,788 of CUB.

IMAGES = ["001.A/a.png", "001.A/b.png", "100.B/c.png", "101.C/d.png", "101.C/e.png", "200.D/f.png"]
CLASSES = [1, 1, 100, 101, 101, 200]


def tiny_cub(folder):
    """Write the data set's files below ``folder``/CUB_200_2011, large enough to come in several chunks."""
    home = folder / "CUB_200_2011"
    random = np.random.default_rng(0)
    for image in IMAGES:
        (home / "images" / image).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(random.integers(0, 256, (150, 200, 3), np.uint8)).save(home / "images" / image)
    (home / "images.txt").write_text("".join(f"{i} {image}\n" for i, image in enumerate(IMAGES)))
    (home / "image_class_labels.txt").write_text("".join(f"{i} {number}\n" for i, number in enumerate(CLASSES)))
    return home


def digest(path, name="md5"):
    return hashlib.new(name, path.read_bytes()).hexdigest()


class Server(http.server.ThreadingHTTPServer):
    """Serves the files of a folder. The attributes are its faults."""

    def __init__(self, folder):
        super().__init__(("127.0.0.1", 0), Handler)
        self.folder = folder
        self.cuts = []  # for each answer to come, the bytes of the body after which it closes the connection
        self.has_range = True
        self.has_length = True
        self.tag = '"1"'
        self.content_type = "application/octet-stream"
        self.errors = []  # status of each answer to come
        self.modified = None  # the header Last-Modified
        self.asked = []  # the header Range of each request
        self.on_cut = lambda: None

    def url(self, name):
        return f"http://127.0.0.1:{self.server_port}/files/{name}"


class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        server = self.server
        ranged = self.headers.get("Range")
        server.asked.append(ranged)
        path = server.folder / Path(self.path).name
        if server.errors:
            return self.send_error(server.errors.pop(0))
        if not path.exists():
            return self.send_error(404)
        body = path.read_bytes()
        start = int(ranged.removeprefix("bytes=").removesuffix("-")) if ranged and server.has_range else 0
        if self.headers.get("If-Range", server.tag or server.modified) not in (server.tag, server.modified):
            start = 0
        if start >= len(body):
            self.send_response(416)
            self.send_header("Content-Range", f"bytes */{len(body)}")
            self.send_header("Content-Length", "0")
            self.end_headers()
            return None
        self.send_response(206 if start else 200)
        if start:
            self.send_header("Content-Range", f"bytes {start}-{len(body) - 1}/{len(body)}")
        if server.has_length:
            self.send_header("Content-Length", str(len(body) - start))
        if server.tag:
            self.send_header("ETag", server.tag)
        if server.modified:
            self.send_header("Last-Modified", server.modified)
        self.send_header("Content-Type", server.content_type)
        self.end_headers()
        cut = server.cuts.pop(0) if server.cuts else None
        self.wfile.write(body[start:][:cut])
        if cut is not None:
            server.on_cut()
        self.close_connection = True
        return None

    def log_message(self, *_):
        pass


@pytest.fixture
def server(tmp_path):
    (tmp_path / "served").mkdir()
    with Server(tmp_path / "served") as running:
        thread = threading.Thread(target=running.serve_forever, args=(0.02,))
        thread.start()
        yield running
        running.shutdown()
        thread.join()


@pytest.fixture(autouse=True)
def _no_waiting(monkeypatch):
    monkeypatch.setattr(download, "FIRST_WAIT", 0)
    monkeypatch.setattr(download, "CHUNK", 4096)
    for proxy in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(proxy, raising=False)


@pytest.fixture
def cub(tmp_path, server, monkeypatch):
    """The archive of the data set on the server, known as the official one."""
    home = tiny_cub(tmp_path / "source")
    archive = server.folder / "CUB_200_2011.tgz"
    with tarfile.open(archive, "w:gz") as tar:
        tar.add(home, "./CUB_200_2011")
        info, body = entry("attributes.txt", b"1 2 3")
        tar.addfile(info, io.BytesIO(body))
    known = Official(
        folder="CUB_200_2011",
        pictures={"train": 3, "test": 3},
        classes=(2, 2),
        url=server.url(archive.name),
        md5={archive.name: digest(archive)},
    )
    monkeypatch.setitem(official.OFFICIAL, "cub200", known)
    return archive


def entry(name, body=b"x", **attributes):
    """A member of a tar archive."""
    info = tarfile.TarInfo(name)
    info.size = len(body)
    for key, value in attributes.items():
        setattr(info, key, value)
    return info, body


def uhml(*words):
    return cli.main(["prepare", *(str(word) for word in words)])


def left_in(root):
    return sorted(path.name for path in root.iterdir())


def downloads_of(root):
    """The folder of what was downloaded so far, and nothing is beside it."""
    assert left_in(root) == [".CUB_200_2011.downloaded"]
    return root / ".CUB_200_2011.downloaded"


def check_complete(root):
    splits = load_splits("cub200", root)
    assert (len(splits.train), len(splits.test)) == (3, 3)
    assert left_in(root) == ["CUB_200_2011"]


# Downloads


def test_download_unpack_verify_and_then_nothing_more(cub, server, tmp_path, capsys):
    root = tmp_path / "new" / "root"
    assert uhml("cub200", "--root", root, "--json") == 0
    check_complete(root)
    assert (root / "CUB_200_2011" / "attributes.txt").read_bytes() == b"1 2 3"
    said = json.loads(capsys.readouterr().out)
    assert said["sha256"] == {"CUB_200_2011.tgz": digest(cub, "sha256")}
    assert said["pictures"] == {"train": 3, "test": 3}
    for again in (root, root / "CUB_200_2011"):
        assert uhml("cub200", "--root", again, "--json") == 0
        assert json.loads(capsys.readouterr().out) == {**said, "sha256": {}}
    assert server.asked == [None]
    (root / "CUB_200_2011" / "images" / IMAGES[0]).unlink()
    assert uhml("cub200", "--root", root) == 2
    assert "is there, but not complete: mend it, or move it away. " in (error := capsys.readouterr().err)
    assert "lists 6 pictures, of which 1 are missing" in error


def test_a_connection_that_is_cut_again_and_again(cub, server, tmp_path, caplog):
    size = cub.stat().st_size
    server.cuts = [50_000, 0, 0, 30_000, 1, 0]
    assert uhml("cub200", "--root", tmp_path / "root") == 0
    check_complete(tmp_path / "root")
    begins = [0, 50_000, 50_000, 50_000, 80_000, 80_001, 80_001]
    assert server.asked == [f"bytes={begin}-" if begin else None for begin in begins]
    assert size > 80_001
    assert "the connection ended after" in caplog.text


def test_a_command_that_is_cut_goes_on_where_it_stopped(cub, server, tmp_path, caplog):
    server.cuts = [60_000] + [0] * 100
    assert uhml("cub200", "--root", tmp_path / "root") == 2
    assert "cannot be downloaded (the connection ended after" in caplog.text
    assert "are kept in" in caplog.text
    kept = left_in(downloads_of(tmp_path / "root"))
    assert kept == ["CUB_200_2011.tgz.part", "CUB_200_2011.tgz.part.etag"]
    assert len(server.asked) == download.MAX_TRIES
    server.cuts = []
    assert uhml("cub200", "--root", tmp_path / "root") == 0
    assert server.asked[-1] == "bytes=60000-"
    check_complete(tmp_path / "root")


def test_a_second_command_is_told_to_wait(cub, tmp_path, caplog):
    holder = "import fcntl, sys; f = open(sys.argv[1], 'a'); fcntl.lockf(f, fcntl.LOCK_EX); print(flush=True); input()"
    downloaded = tmp_path / "root" / ".CUB_200_2011.downloaded"
    downloaded.mkdir(parents=True)
    words = [sys.executable, "-c", holder, str(downloaded / "lock")]
    with subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as other:
        other.stdout.readline()
        assert uhml("cub200", "--root", tmp_path / "root") == 2
        assert f"Another uhml prepare is at work in {downloaded}: wait" in caplog.text
        assert left_in(downloaded) == ["lock"]
        other.kill()
    assert uhml("cub200", "--root", tmp_path / "root") == 0
    check_complete(tmp_path / "root")


def test_a_server_without_ranges(cub, server, tmp_path):
    server.has_range, server.cuts = False, [50_000, 70_000]
    assert uhml("cub200", "--root", tmp_path / "root") == 0
    assert server.asked == [None, "bytes=50000-", "bytes=70000-"]
    check_complete(tmp_path / "root")


def test_a_server_without_ranges_that_never_gets_further(cub, server, tmp_path):
    server.has_range, server.cuts = False, [50_000] * 100
    assert uhml("cub200", "--root", tmp_path / "root") == 2
    assert len(server.asked) == download.MAX_TRIES


@pytest.mark.parametrize("known_by", ["tag", "date", "date and weak tag"])
def test_a_file_that_changes_between_two_parts_is_begun_anew(cub, server, tmp_path, known_by):
    good = cub.read_bytes()
    cub.write_bytes(bytes(len(good)))
    if known_by != "tag":
        server.tag = 'W/"1"' if "weak" in known_by else None
        server.modified = "Sat, 28 Nov 2026 05:00:00 GMT"

    def change():
        cub.write_bytes(good)
        if known_by == "tag":
            server.tag = '"2"'
        else:
            server.modified = "Sat, 28 Nov 2026 06:00:00 GMT"

    server.cuts, server.on_cut = [50_000], change
    assert uhml("cub200", "--root", tmp_path / "root") == 0
    check_complete(tmp_path / "root")


@pytest.mark.parametrize("tag", ['W/"1"', None])
def test_a_part_that_is_all_there(cub, server, tmp_path, tag):
    server.tag = tag
    downloads = tmp_path / "root" / ".CUB_200_2011.downloaded"
    downloads.mkdir(parents=True)
    shutil.copyfile(cub, downloads / "CUB_200_2011.tgz.part")
    assert uhml("cub200", "--root", tmp_path / "root") == 0
    assert server.asked == [f"bytes={cub.stat().st_size}-"]
    check_complete(tmp_path / "root")


def test_a_part_that_is_longer_than_the_file(cub, server, tmp_path):
    downloads = tmp_path / "root" / ".CUB_200_2011.downloaded"
    downloads.mkdir(parents=True)
    (downloads / "CUB_200_2011.tgz.part").write_bytes(bytes(cub.stat().st_size + 7))
    assert uhml("cub200", "--root", tmp_path / "root") == 0
    check_complete(tmp_path / "root")


def test_a_server_that_does_not_say_how_long_the_file_is(cub, server, tmp_path):
    server.has_length = False
    assert uhml("cub200", "--root", tmp_path / "root") == 0
    check_complete(tmp_path / "root")


@pytest.mark.parametrize("url", ["http://[::1/a.tgz", f"http://{'a' * 70}.example/a.tgz", "http://127.0.0.1:1x/a.tgz"])
def test_what_is_no_address(cub, tmp_path, caplog, url):
    assert uhml("cub200", "--root", tmp_path / "root", "--url", url) == 2
    assert f"{url} is no address: " in caplog.text


def test_answers_that_are_no_file(cub, server, tmp_path, caplog):
    root = tmp_path / "root"
    server.errors = [503, 429]
    assert uhml("cub200", "--root", root) == 0
    shutil.rmtree(root)
    for fault, words in (
        ({"errors": [403]}, "the server answers 403 Forbidden. Give another address as --url, or a file as --archive."),
        ({"content_type": "text/html"}, "is a web page, not a file"),
        ({"errors": [500] * 100}, "cannot be downloaded (the server answers 500"),
    ):
        for key, value in fault.items():
            setattr(server, key, value)
        caplog.clear()
        assert uhml("cub200", "--root", root) == 2
        assert words in caplog.text
        assert not (root / "CUB_200_2011").exists()
        server.errors = []
    assert uhml("cub200", "--root", root, "--url", "http://127.0.0.1:1/CUB_200_2011.tgz") == 2
    assert "Connection refused" in caplog.text


def test_a_wrong_checksum_is_refused_and_nothing_of_it_kept(cub, server, tmp_path, caplog):
    good = cub.read_bytes()
    cub.write_bytes(good[:-9] + b"x" + good[-8:])
    assert uhml("cub200", "--root", tmp_path / "root") == 2
    assert f"its MD5 is {digest(cub)} instead of {official.OFFICIAL['cub200'].md5[cub.name]}. It is rem" in caplog.text
    assert left_in(tmp_path / "root") == []
    cub.write_bytes(good)
    assert uhml("cub200", "--root", tmp_path / "root") == 0
    check_complete(tmp_path / "root")


def test_a_file_of_the_users_under_the_name_of_the_download_is_taken_and_kept(cub, server, tmp_path, capsys, caplog):
    root = tmp_path / "root"
    root.mkdir()
    mine = root / "CUB_200_2011.tgz"
    mine.write_bytes(b"notes")
    assert uhml("cub200", "--root", root) == 2
    assert "is not what the authors published" in caplog.text
    assert "Rename it to go by its contents alone." in caplog.text
    assert left_in(root) == ["CUB_200_2011.tgz"]
    shutil.copyfile(cub, mine)
    assert uhml("cub200", "--root", root) == 0
    assert left_in(root) == ["CUB_200_2011", "CUB_200_2011.tgz"]
    shutil.rmtree(root / "CUB_200_2011")
    # Named as well, it is still one file.
    assert uhml("cub200", "--root", root, "--archive", mine, "--url", server.url(mine.name), "--json") == 0
    assert list(json.loads(capsys.readouterr().out)["sha256"]) == ["CUB_200_2011.tgz"]
    assert server.asked == []


def test_mirrors_and_files_of_ones_own_go_by_their_contents(cub, server, tmp_path, caplog):
    mirror = server.folder / "mirror%20of%20birds.zip"
    with zipfile.ZipFile(mirror, "w") as zipped:
        for path in sorted((tmp_path / "source").rglob("*")):
            zipped.write(path, path.relative_to(tmp_path / "source"))
    assert uhml("cub200", "--root", tmp_path / "a", "--url", server.url(mirror.name)) == 0
    check_complete(tmp_path / "a")
    assert "mirror of birds.zip has no published checksum here, so that the pictures' numbers decide; its SHA-256 is "
    assert digest(mirror, "sha256") in caplog.text
    assert uhml("cub200", "--root", tmp_path / "b", "--archive", mirror) == 0
    check_complete(tmp_path / "b")
    assert mirror.exists()
    # A file under a known name is to be the known one.
    repacked = tmp_path / cub.name
    shutil.copyfile(mirror, repacked)
    assert uhml("cub200", "--root", tmp_path / "c", "--archive", repacked) == 2
    assert "Rename it to go by its contents alone." in caplog.text
    assert repacked.exists()


def test_pictures_that_are_missing_in_the_archive(cub, server, tmp_path, caplog, monkeypatch):
    known = official.OFFICIAL["cub200"]
    more = Official(folder=known.folder, pictures={"train": 3, "test": 4}, classes=(2, 3), url=known.url, md5=known.md5)
    monkeypatch.setitem(official.OFFICIAL, "cub200", more)
    assert uhml("cub200", "--root", tmp_path / "root") == 2
    said = (
        "There is no complete cub200 in CUB_200_2011.tgz (3 test pictures instead of 4; 2 test classes instead of 3)."
    )
    assert said in caplog.text
    assert left_in(downloads_of(tmp_path / "root")) == ["CUB_200_2011.tgz"]
    assert len(server.asked) == 1


def test_a_disk_that_is_too_small(cub, server, tmp_path, caplog, monkeypatch):
    root, size = tmp_path / "root", cub.stat().st_size
    unpacked = sum(path.stat().st_size for path in (tmp_path / "source").rglob("*") if path.is_file())
    unpacked += len(b"1 2 3")
    free = {"download": size - 1, "unpack": unpacked - 1}

    def disk_usage(path):
        return SimpleNamespace(free=free["download" if path.name.endswith(".downloaded") else "unpack"])

    monkeypatch.setattr(shutil, "disk_usage", disk_usage)
    assert uhml("cub200", "--root", root) == 2
    assert re.search(r"CUB_200_2011\.tgz needs \d MiB, and \d MiB are free", caplog.text)
    assert left_in(root) == []
    free["download"] = size
    assert uhml("cub200", "--root", root) == 2
    assert re.search(r"CUB_200_2011\.tgz unpacks to \d MiB, and \d MiB are free", caplog.text)
    assert left_in(downloads_of(root)) == ["CUB_200_2011.tgz"]
    free["unpack"] = unpacked
    assert uhml("cub200", "--root", root) == 0
    check_complete(root)
    assert len(server.asked) == 2


@pytest.mark.parametrize("when", ["download", "unpack"])
def test_a_disk_that_fills_up_meanwhile(cub, tmp_path, caplog, monkeypatch, when):
    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")
        yield

    module = {"download": download, "unpack": archives}[when]
    monkeypatch.setattr(module, "progress", lambda chunks, *_, **__: full())
    root = tmp_path / "root"
    assert uhml("cub200", "--root", root) == 2
    assert {"download": "tgz.part cannot be written: No", "unpack": "cannot be unpacked to"}[when] in caplog.text
    assert "No space left on device." in caplog.text
    assert not (root / "CUB_200_2011").exists()


def test_what_is_refused(cub, tmp_path, caplog, monkeypatch):
    def refused(words, *more):
        caplog.clear()
        assert uhml(*more, "--root", tmp_path / "root") == 2
        assert words in caplog.text
        assert not (tmp_path / "root").exists()

    refused("cub20 is no data set to prepare; those are cub200, cars196, sop, inshop. Did you mean 'cub200'?", "cub20")
    refused("glyphs is no data set to prepare", "glyphs")
    refused("cars196 cannot be downloaded by a program, as its authors no longer serve it", "cars196")
    refused("agree to their terms: do so at https://mmlab", "inshop")
    refused("--url file:///etc/passwd must be http:// or https://", "cub200", "--url", "file:///etc/passwd")
    refused("end in the name of a file", "cub200", "--url", "https://example.org/")
    refused("end in the name of a file", "cub200", "--url", "https://example.org/a/..")
    refused("there is no such file", "cub200", "--archive", tmp_path / "absent.zip")
    same = ("--url", "https://a.example/x.zip", "--url", "https://b.example/x.zip")
    refused("Two --url end in the same name", "cub200", *same)
    assert uhml("cub200", "--root", "~nobody-here/data") == 2
    assert "nobody knows what folder ~ stands for" in caplog.text
    assert not Path("~nobody-here").exists()


def test_the_parts_of_in_shop_find_their_places(tmp_path, monkeypatch):
    lines = ["6", "image_name item_id evaluation_status"]
    monkeypatch.setitem(
        official.OFFICIAL,
        "inshop",
        Official(
            folder=official.OFFICIAL["inshop"].folder,
            inside=official.OFFICIAL["inshop"].inside,
            pictures={"train": 2, "test": 2, "gallery": 2},
            classes=(1, 2),
        ),
    )
    with zipfile.ZipFile(tmp_path / "img.zip", "w") as zipped:
        for i, (item, status) in enumerate(
            [("1", "train")] * 2 + [("2", "query"), ("2", "gallery")] + [("3", s) for s in ("query", "gallery")]
        ):
            zipped.writestr(f"img/MEN/Denim/id_{item}/{i}.jpg", b"picture")
            lines.append(f"img/MEN/Denim/id_{item}/{i}.jpg id_{item} {status}")
    (tmp_path / "list_eval_partition.txt").write_text("\n".join(lines) + "\n")
    files = ["--archive", tmp_path / "img.zip", "--archive", tmp_path / "list_eval_partition.txt"]
    assert uhml("inshop", "--root", tmp_path / "root", *files) == 0
    home = tmp_path / "root" / "In-shop Clothes Retrieval Benchmark"
    assert (home / "Img" / "img" / "MEN" / "Denim" / "id_1" / "0.jpg").read_bytes() == b"picture"
    assert (home / "Eval" / "list_eval_partition.txt").exists()


# Archives that mean harm


def tar_of(*members, mode="w:gz", **options):
    def write(path):
        with tarfile.open(path, mode, **options) as tar:
            for info, body in members:
                tar.addfile(info, io.BytesIO(body))

    return write


def zip_of(*names, mode=None):
    def write(path):
        with zipfile.ZipFile(path, "w") as zipped:
            for name in names:
                info = zipfile.ZipInfo(name)
                info.external_attr = (mode or 0) << 16
                zipped.writestr(info, b"/etc/passwd")

    return write


GOOD = entry("CUB_200_2011/good.txt")
HARMFUL = {
    "tar: up": tar_of(GOOD, entry("../outside.txt")),
    "tar: up from inside": tar_of(GOOD, entry("CUB_200_2011/../../outside.txt")),
    "tar: absolute": tar_of(GOOD, entry("/tmp/uhml-outside.txt")),
    "tar: symlink out": tar_of(GOOD, entry("CUB_200_2011/l", b"", type=tarfile.SYMTYPE, linkname="../../..")),
    "tar: symlink, then through it": tar_of(
        entry("CUB_200_2011/l", b"", type=tarfile.SYMTYPE, linkname="/tmp"), entry("CUB_200_2011/l/outside.txt")
    ),
    "tar: hardlink": tar_of(GOOD, entry("CUB_200_2011/l", b"", type=tarfile.LNKTYPE, linkname="/etc/passwd")),
    "tar: device": tar_of(GOOD, entry("CUB_200_2011/null", b"", type=tarfile.CHRTYPE, devmajor=1, devminor=3)),
    "tar: block device": tar_of(GOOD, entry("CUB_200_2011/sda", b"", type=tarfile.BLKTYPE)),
    "tar: pipe": tar_of(GOOD, entry("CUB_200_2011/pipe", b"", type=tarfile.FIFOTYPE)),
    "tar: nameless": tar_of(GOOD, entry(".")),
    "plain tar: up": tar_of(GOOD, entry("../outside.txt"), mode="w:"),
    "xz: up": tar_of(GOOD, entry("../outside.txt"), mode="w:xz"),
    "bz2: up": tar_of(GOOD, entry("../outside.txt"), mode="w:bz2"),
    "zip: up": zip_of("good.txt", "../outside.txt"),
    "zip: up from inside": zip_of("good.txt", "a/../../outside.txt"),
    "zip: up for Windows": zip_of("good.txt", "..\\outside.txt"),
    "zip: absolute": zip_of("good.txt", "/tmp/uhml-outside.txt"),
    "zip: absolute for Windows": zip_of("good.txt", "C:\\outside.txt"),
    "zip: symlink": zip_of("good.txt", mode=stat.S_IFLNK | 0o777),
    "zip: device": zip_of("good.txt", mode=stat.S_IFCHR | 0o666),
}


@pytest.mark.parametrize("harm", HARMFUL)
def test_nothing_of_an_archive_that_means_harm_is_written(tmp_path, caplog, harm):
    root = tmp_path / "a" / "root"
    root.mkdir(parents=True)
    archive = tmp_path / "a" / "birds.archive"
    HARMFUL[harm](archive)
    before = sorted(tmp_path.rglob("*"))
    assert uhml("cub200", "--root", root, "--archive", archive) == 2
    assert "birds.archive is not to be trusted: " in caplog.text
    assert sorted(tmp_path.rglob("*")) == before
    assert not Path("/tmp/uhml-outside.txt").exists()
    assert not Path("/tmp/outside.txt").exists()


def zip_bomb(path):
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as zipped, zipped.open("zeros", "w") as member:
        for _ in range(64):
            member.write(bytes(2**20))


def tar_bomb(path):
    tar_of(*(entry(f"zeros{i}", bytes(2**20)) for i in range(64)))(path)


def bomb_that_is_not_there(path):
    """A header that announces more than any disk has."""
    info, _ = entry("zeros")
    info.size = 2**50
    path.write_bytes(info.tobuf(tarfile.GNU_FORMAT) + bytes(10240))


def many_files(path):
    with zipfile.ZipFile(path, "w") as zipped:
        for i in range(1001):
            zipped.writestr(f"{i}", b"")


@pytest.mark.parametrize("bomb", [zip_bomb, tar_bomb, bomb_that_is_not_there, many_files])
def test_bombs_are_not_unpacked(tmp_path, caplog, monkeypatch, bomb):
    monkeypatch.setattr(archives, "MAX_BYTES", 32 * 2**20)
    monkeypatch.setattr(archives, "MAX_MEMBERS", 1000)
    bomb(tmp_path / "bomb")
    assert (tmp_path / "bomb").stat().st_size < 2**18
    (tmp_path / "root").mkdir()
    assert uhml("cub200", "--root", tmp_path / "root", "--archive", tmp_path / "bomb") == 2
    assert "it unpacks to more than 0 GiB or 1,000 files" in caplog.text
    assert left_in(tmp_path / "root") == []


def test_a_header_as_large_as_memory_is_not_read(tmp_path, caplog, monkeypatch):
    monkeypatch.setattr(archives, "MAX_READ", 2**16)
    header = tarfile.TarInfo("././@PaxHeader")
    header.type, header.size = tarfile.XHDTYPE, 2**32
    archive = tmp_path / "bomb"
    archive.write_bytes(header.tobuf(tarfile.PAX_FORMAT) + bytes(2**17))
    assert uhml("cub200", "--root", tmp_path / "root", "--archive", archive) == 2
    assert "it is damaged (a header of 4,294,967,296 bytes)" in caplog.text


def flipped(path, at):
    body = bytearray(path.read_bytes())
    body[at] ^= 255
    path.write_bytes(body)


@pytest.mark.parametrize("kind", ["tgz", "zip", "tar.xz", "tar.bz2"])
@pytest.mark.parametrize("damage", ["cut", "middle", "checksum"])
def test_damaged_archives(cub, tmp_path, caplog, kind, damage):
    archive = tmp_path / f"birds.{kind}"
    if kind == "zip":
        with zipfile.ZipFile(archive, "w", zipfile.ZIP_DEFLATED) as zipped:
            for path in sorted((tmp_path / "source").rglob("*")):
                zipped.write(path, path.relative_to(tmp_path / "source"))
    else:
        with tarfile.open(archive, f"w:{ {'tgz': 'gz'}.get(kind, kind[4:]) }") as tar:
            tar.add(tmp_path / "source" / "CUB_200_2011", "CUB_200_2011")
    assert uhml("cub200", "--root", tmp_path / "good", "--archive", archive) == 0
    size = archive.stat().st_size
    if damage == "cut":
        archive.write_bytes(archive.read_bytes()[: size // 2])
    else:
        # The last bytes of gzip are its checksum and length.
        flipped(archive, size // 2 if damage == "middle" or kind != "tgz" else size - 6)
    assert uhml("cub200", "--root", tmp_path / "root", "--archive", archive) == 2
    assert re.search(rf"birds\.{kind} (is no zip or tar archive, or it )?is damaged \(", caplog.text)
    assert left_in(tmp_path / "root") == []


def test_what_is_no_archive_and_what_is_encrypted(cub, tmp_path, caplog):
    for name, body in (("empty.tgz", b""), ("page.tgz", b"<html>" * 999), ("other.7z", b"7z\xbc\xaf\x27\x1c" * 99)):
        (tmp_path / name).write_bytes(body)
        assert uhml("cub200", "--root", tmp_path / "root", "--archive", tmp_path / name) == 2
        assert f"{name} is no zip or tar archive, or it is damaged" in caplog.text
    path = tmp_path / "secret.zip"
    zip_of("a.txt")(path)
    body = bytearray(path.read_bytes())
    for magic, offset in ((b"PK\x03\x04", 6), (b"PK\x01\x02", 8)):
        body[body.index(magic) + offset] |= 1  # the flag of encryption
    path.write_bytes(body)
    assert uhml("cub200", "--root", tmp_path / "root", "--archive", path) == 2
    assert "password required for extraction): unpack it with another program." in caplog.text
    assert left_in(tmp_path / "root") == []


def test_the_readme_and_the_code_know_the_same_numbers():
    readme = (Path(__file__).parents[2] / "README.md").read_text()
    for name, known in official.OFFICIAL.items():
        (row,) = (line for line in readme.splitlines() if line.startswith(f"| `{name}` |"))
        for count in (*known.pictures.values(),):
            assert f"{count:,}" in row, (name, count)
