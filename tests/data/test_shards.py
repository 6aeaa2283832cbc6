"""Pictures in tar files, against the same pictures in a folder and against what the tarfile module reads."""

import gzip
import io
import os
import tarfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from ranks import run_ranks

from uhml import distributed
from uhml.config import DataConfig
from uhml.data import members, workers
from uhml.data.archives import unpack
from uhml.data.check import check
from uhml.data.datasets import load_splits
from uhml.data.decode import UnreadablePicture, load_rgb, stamp
from uhml.data.images import list_images
from uhml.data.verify import load_pictures
from uhml.errors import UserError

LONG = "/".join(["long" * 20] * 3)
NAMES = ["ape/1.png", "ape/2.jpg", "bear/1.JPEG", f"cat/{LONG}/1.png", f"cat/{LONG}/2.bmp", "dog/ünï 1.webp"]


@pytest.fixture(autouse=True)
def user_cache(tmp_path, monkeypatch):
    """Nothing is known of any shard, nor is anything kept in the user's own folder."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "user"))
    monkeypatch.setattr(members, "_indexes", {})
    return tmp_path / "user" / "uhml" / "shards"


def picture(seed=0, kind="PNG"):
    """The bytes of a picture of noise."""
    file = io.BytesIO()
    Image.fromarray(np.random.default_rng(seed).integers(0, 256, (20 + seed, 24, 3), np.uint8)).save(file, kind)
    return file.getvalue()


def pack(path, *contents, form=tarfile.PAX_FORMAT):
    """Write a tar file of names and bytes, or of headers alone."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w", format=form) as tar:
        for item in contents:
            if isinstance(item, tarfile.TarInfo):
                tar.addfile(item)
            else:
                name, content = item
                info = tarfile.TarInfo(name)
                info.size = len(content)
                tar.addfile(info, io.BytesIO(content))
    return path


def header(name, kind, **more):
    info = tarfile.TarInfo(name)
    info.type = kind
    for attribute, value in more.items():
        setattr(info, attribute, value)
    return info


def labelled(*names):
    """The contents of a shard: different pictures, each with its class."""
    return [item for i, name in enumerate(names) for item in ((f"{i}.png", picture(i)), (f"{i}.cls", name.encode()))]


def names_in(splits, root):
    return [path.removeprefix(f"{root}/") for path in splits.train.paths]


def arrays(paths):
    return [np.asarray(load_rgb(path)) for path in paths]


def assert_same(ours, theirs):
    assert len(ours) == len(theirs)
    assert all(np.array_equal(a, b) for a, b in zip(ours, theirs, strict=True))


@pytest.mark.parametrize("form", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
@pytest.mark.parametrize("before", ["", "./"])
def test_the_same_as_the_pictures_in_a_folder(tmp_path, form, before):
    names = [name.replace(LONG, LONG[:170]) for name in NAMES] if form == tarfile.USTAR_FORMAT else NAMES
    contents = []
    for i, name in enumerate(names):
        kind = {".webp": "WEBP", ".bmp": "BMP", ".png": "PNG"}.get(Path(name).suffix, "JPEG")
        (tmp_path / "folder" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "folder" / name).write_bytes(picture(i, kind))
        contents += [
            (before + name, picture(i, kind)),
            (f"{before}{Path(name).with_suffix('.cls')}", name[:3].encode()),
        ]
    folders = [header(before + name, tarfile.DIRTYPE) for name in ("ape", "dog.x")]
    root = tmp_path / "shards"
    pack(root / "b.tar", *folders, *contents[6:], form=form)
    pack(root / "a.tar", *contents[:6], form=form)
    theirs, ours = load_splits("folder", tmp_path / "folder"), load_splits("shards", root)
    for their, our in ((theirs.train, ours.train), (theirs.test, ours.test)):
        assert our.class_names == tuple(name[:3] for name in their.class_names)
        assert our.labels.tolist() == their.labels.tolist()
        inside = [path.removeprefix(f"{root}/").partition(".tar/") for path in our.paths]
        assert [name for _, _, name in inside] == [
            str(Path(path).relative_to(tmp_path / "folder")) for path in their.paths
        ]
        assert_same(arrays(our.paths), arrays(their.paths))
        assert [members.read_member(path) for path in our.paths] == [Path(path).read_bytes() for path in their.paths]
        assert [stamp(path)[0] for path in our.paths] == [stamp(path)[0] for path in their.paths]


def test_a_picture_lies_where_tarfile_says(tmp_path):
    random = np.random.default_rng(0)
    contents = [
        (f"{'x' * random.integers(1, 300)}/{i:03d}.jpg", random.bytes(random.integers(0, 2000))) for i in range(200)
    ]
    shard = pack(tmp_path / "shards" / "0.tar", *contents)
    splits = load_splits("shards", shard.parent)
    with tarfile.open(shard) as tar:
        expected = {f"{shard}/{info.name}": tar.extractfile(info).read() for info in tar}
    assert list(splits.train.paths) == list(expected)
    assert {path: members.read_member(path) for path in splits.train.paths} == expected


def test_without_classes_all_pictures_train(tmp_path, caplog):
    root = pack(
        tmp_path / "s" / "1.TAR", ("b.png", picture()), ("a.jpg", picture(1, "JPEG")), ("a.txt", b"text")
    ).parent
    splits = load_splits("shards", root)
    assert names_in(splits, root) == ["1.TAR/b.png", "1.TAR/a.jpg"]
    assert splits.train.labels is None
    assert splits.test is None
    pack(root / "2.tar", ("b.png", picture()), ("b.cls", b"3"))
    assert load_splits("shards", root).train.labels is None
    assert "2 of the 3 pictures, first" in caplog.text


def test_classes_as_text_and_json(tmp_path):
    said = {
        "0.cls": b" 10\n",
        "1.json": b'{"label": 9, "x": [1]}',
        "2.JSON": b'{"label": "b b"}',
        "3.json": b"[",
        "3.cls": b"x",
    }
    contents = [
        item for key in "0123" for item in [(f"{key}.png", picture()), *((n, said[n]) for n in said if n[0] == key)]
    ]
    splits = load_splits("shards", pack(tmp_path / "s" / "0.tar", *contents).parent)
    assert splits.train.class_names == ("10", "9")
    assert splits.test.class_names == ("b b", "x")
    pack(
        tmp_path / "t" / "0.tar",
        ("0.png", picture()),
        ("0.json", b'{"label": null}'),
        ("1.png", picture()),
        ("1.json", b"{}"),
    )
    assert load_splits("shards", tmp_path / "t").train.labels is None


def test_what_is_no_sample_is_passed_over(tmp_path):
    root = tmp_path / "s"
    others = [("._1.png", b"x"), ("README", b"x"), ("2.heic", b"x"), ("3.cls", b"x"), header("4.txt", tarfile.SYMTYPE)]
    pack(root / "0.tar", *others, ("1.seen.png", picture()), header("5.png", tarfile.DIRTYPE))
    pack(root / ".hidden.tar", ("1.png", picture()))
    pack(root / "empty.tar")
    (root / "notes.txt").write_text("")
    pack(root / "below" / "0.tar", ("1.png", picture()))
    assert names_in(load_splits("shards", root), root) == ["0.tar/1.seen.png"]


def test_names_lead_nowhere_but_into_the_shard(tmp_path):
    root = pack(tmp_path / "s" / "0.tar", ("../../up.png", picture(1)), ("/etc/abs.png", picture(2))).parent
    paths = load_splits("shards", root).train.paths
    assert paths == (f"{root}/0.tar/up.png", f"{root}/0.tar/etc/abs.png")
    assert all(os.path.abspath(path) == path for path in paths)
    assert [members.read_member(path) for path in paths] == [picture(1), picture(2)]
    pack(root / "0.tar", ("a/../1.png", picture(1)), ("1.png", picture(2)))
    with pytest.raises(UserError, match=r"'1\.png' is one too many"):
        load_splits("shards", root)


PNG = ("1.png", picture())
REFUSED = {
    "compressed": ((gzip.compress(b"x"),), "is compressed"),
    "no tar": ((b"rubbish" * 999,), "no tar file"),
    "nothing": ((b"",), "cut off or damaged"),
    "two places": ((PNG, ("2.png", picture()), ("1.cls", b"1")), "the sample '1' in two places"),
    "two pictures": ((PNG, ("1.jpg", picture())), r"'1\.jpg' is one too many, as the sample '1' .* has a picture"),
    "two classes": ((PNG, ("1.cls", b"1"), ("1.cls", b"1")), r"'1\.cls' is one too many"),
    "symlink": ((header("1.png", tarfile.SYMTYPE, linkname="/etc/passwd"),), r"'1\.png' is a link, a device or sparse"),
    "hard link": ((PNG, header("2.png", tarfile.LNKTYPE, linkname="1.png")), r"'2\.png' is a link"),
    "device": ((header("1.png", tarfile.CHRTYPE),), r"'1\.png' is a link, a device"),
    "class is a link": ((PNG, header("1.cls", tarfile.SYMTYPE, linkname="x")), r"'1\.cls' is a link"),
    "sparse": (
        (header("1.png", tarfile.REGTYPE, pax_headers={"GNU.sparse.map": "0,0", "GNU.sparse.size": "9"}),),
        r"'1\.png' is a link, a device or sparse",
    ),
    "NUL": ((header("1.png", tarfile.REGTYPE, pax_headers={"path": "a\0b.png"}),), "no file can have the name"),
    "too long": (((f"{'x/' * 3000}1.png", b""),), "no file can have the name"),
    "no picture": ((("1.txt", b""),), r"holds no picture \(\.jpg.* in its 1 shards"),
    "cls empty": ((PNG, ("1.cls", b" \n")), r"expected '1\.cls' to hold one line, the number or name"),
    "cls lines": ((PNG, ("1.cls", b"a\nb")), r"expected '1\.cls'"),
    "cls bytes": ((PNG, ("1.cls", b"\xff")), r"expected '1\.cls'"),
    "cls long": ((PNG, ("1.cls", b"x" * 256)), r"expected '1\.cls'"),
    "json broken": ((PNG, ("1.json", b"{")), r"expected '1\.json' to hold a JSON object whose label is"),
    "json deep": ((PNG, ("1.json", b"[" * 99_999)), r"expected '1\.json'"),
    "json list": ((PNG, ("1.json", b"[1]")), r"expected '1\.json'"),
    "json true": ((PNG, ("1.json", b'{"label": true}')), r"expected '1\.json'"),
    "json float": ((PNG, ("1.json", b'{"label": 1.5}')), r"expected '1\.json'"),
    "json surrogate": ((PNG, ("1.json", rb'{"label": "\ud800"}')), r"expected '1\.json'"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused_shards(tmp_path, case):
    contents, match = REFUSED[case]
    root = tmp_path / "s"
    pack(root / "good.tar", ("1.txt" if case == "no picture" else "1.png", picture()))
    if isinstance(contents[0], bytes):
        (root / "bad.tar").write_bytes(contents[0])
    else:
        pack(root / "bad.tar", *contents)
    if case == "no picture":
        (root / "good.tar").unlink()
    with pytest.raises(UserError, match=match) as refusal:
        load_splits("shards", root)
    assert "bad.tar" in str(refusal.value) or case == "no picture"


@pytest.mark.timeout(60)
def test_a_member_of_negative_size_is_refused(tmp_path):
    """Python's tarfile goes back by it, and comes to the same member again and again."""
    first, bad = (bytearray(header(name, tarfile.REGTYPE).tobuf()) for name in (".a", ".b"))
    bad[124:136] = b"\xff" + (256**11 - 1024).to_bytes(11, "big")
    bad[148:156] = b" " * 8
    bad[148:156] = b"%06o\0 " % sum(bad)
    (tmp_path / "s.tar").write_bytes(first + bad + bytes(1024))
    with pytest.raises(UserError, match="cut off or damaged"):
        load_splits("shards", tmp_path)
    with pytest.raises(UserError, match=r"is not to be trusted: '\.b' has a negative size"):
        unpack(tmp_path / "s.tar", tmp_path, lambda path: path)


def test_a_shard_that_is_cut_off_anywhere_is_refused(tmp_path):
    shard = pack(tmp_path / "s" / "0.tar", ("1.png", picture()), ("2.png", picture(1)), ("2.cls", b"1"))
    whole = shard.read_bytes()
    with tarfile.open(shard) as tar:
        end = tar.getmembers()[-1].offset_data + 512
    for length in range(0, end, 256):
        shard.write_bytes(whole[:length])
        with pytest.raises(UserError, match=r"0\.tar is cut off or damaged"):
            load_splits("shards", shard.parent)
    shard.write_bytes(whole[: end + 512])
    assert len(load_splits("shards", shard.parent).train) == 2


def test_rubbish_between_members_is_refused(tmp_path):
    shard = pack(tmp_path / "s" / "0.tar", ("1.png", picture()), ("2.png", picture(1)))
    whole = bytearray(shard.read_bytes())
    with tarfile.open(shard) as tar:
        start = tar.getmembers()[1].offset
    whole[start + 3] ^= 1
    shard.write_bytes(whole)
    with pytest.raises(UserError, match=f"damaged at byte {start:,}"):
        load_splits("shards", shard.parent)


def test_refused_roots(tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "file.tar").touch()
    (tmp_path / "compressed").mkdir()
    (tmp_path / "compressed" / "0.tar.gz").touch()
    for root, match in (
        (None, r"needs data\.root"),
        ("none", "is no folder"),
        ("file.tar", "is no folder"),
        ("empty", r"holds no shard \(\*\.tar\)"),
        ("compressed", r"holds 0\.tar\.gz, which is compressed"),
    ):
        with pytest.raises(UserError, match=match):
            load_splits("shards", root and tmp_path / root)
    pack(tmp_path / "s" / "0.tar", ("1.png", picture()))
    with pytest.raises(UserError, match=r"holds no picture .* read with data\.dataset=shards"):
        load_splits("folder", tmp_path / "s")


def test_headers_are_read_once_and_again_when_a_shard_changes(tmp_path, user_cache, monkeypatch):
    root = pack(tmp_path / "s" / "0.tar", *labelled("a", "b")).parent
    pack(root / "1.tar", *labelled("c"))
    looked, original = [], members._read_headers
    monkeypatch.setattr(members, "_read_headers", lambda shard, file: looked.append(shard) or original(shard, file))

    def again():
        looked.clear()
        members._indexes.clear()
        splits = load_splits("shards", root)
        return len(splits.train) + len(splits.test), [Path(shard).name for shard in looked]

    assert again() == (3, ["0.tar", "1.tar"])
    assert again() == (3, [])
    assert len(list(user_cache.iterdir())) == 2
    pack(root / "1.tar", *labelled("c", "d"))
    assert again() == (4, ["1.tar"])
    for kept in user_cache.iterdir():
        kept.write_bytes(kept.read_bytes()[:-9])
    assert again() == (4, ["0.tar", "1.tar"])
    assert again() == (4, [])
    for odd in (
        b"PK\x03\x04 no zip",
        b"\x93NUMPY\x01\x00\x10\x00{'descr': ((((, 0",
        np.zeros(3),
        np.zeros(2, [("name", "S3")]),
        np.array("x"),
    ):
        for kept in user_cache.iterdir():
            kept.write_bytes(odd) if isinstance(odd, bytes) else np.save(kept, odd)
        assert again() == (4, ["0.tar", "1.tar"])


def test_where_nothing_can_be_kept_it_goes_on(tmp_path, user_cache, caplog):
    user_cache.parent.mkdir(parents=True)
    user_cache.touch()
    root = pack(tmp_path / "s" / "0.tar", *labelled("a", "b")).parent
    assert len(load_splits("shards", root).train) == 1
    assert "cannot be kept" in caplog.text


def test_a_shard_that_changes_under_a_run_is_refused(tmp_path):
    shard = pack(tmp_path / "s" / "0.tar", *labelled("a", "b"))
    (path,) = load_splits("shards", shard.parent).train.paths
    assert members.read_member(path) == picture(0)
    pack(shard, *labelled("a", "b", "c"))
    with pytest.raises(UserError, match=r"0\.tar has changed since it was looked through"):
        load_rgb(path)
    shard.unlink()
    with pytest.raises(UnreadablePicture, match=r"0\.tar/0\.png does not exist"):
        load_rgb(path)


def test_no_file_stays_open(tmp_path):
    for i in range(50):
        pack(tmp_path / "s" / f"{i}.tar", (f"{i}.png", picture(i)))
    before = len(os.listdir("/proc/self/fd"))
    paths = load_splits("shards", tmp_path / "s").train.paths
    arrays(paths)
    assert len(paths) == 50
    assert len(os.listdir("/proc/self/fd")) == before


@pytest.fixture
def some_bad(tmp_path):
    """Shards with a picture that is cut off, an empty one and one that is text."""
    bad = [
        ("3.png", picture(3)[:200]),
        ("3.cls", b"b"),
        ("4.png", b""),
        ("4.cls", b"b"),
        ("5.jpg", b"text"),
        ("5.cls", b"a"),
    ]
    return pack(tmp_path / "s" / "0.tar", *labelled("a", "a", "b"), *bad).parent


@pytest.mark.parametrize("num_workers", [0, 1])
def test_corrupt_pictures_are_named_or_left_out(some_bad, num_workers):
    config = DataConfig(dataset="shards", root=str(some_bad), num_workers=num_workers)
    with pytest.raises(UnreadablePicture, match=r"s/0\.tar/5\.jpg is in none of the formats .*skip_corrupt"):
        load_pictures(config)
    splits = load_pictures(replace(config, skip_corrupt=True))
    assert (len(splits.train), len(splits.test)) == (2, 1)
    for name, match in (
        ("3.png", r"0\.tar/3\.png cannot be decoded"),
        ("4.png", r"0\.tar/4\.png is empty \(0 bytes\)"),
    ):
        with pytest.raises(UnreadablePicture, match=match):
            load_rgb(some_bad / "0.tar" / name)
    with pytest.raises(UnreadablePicture, match=r"0\.tar/9\.png does not exist"):
        load_rgb(some_bad / "0.tar" / "9.png")
    assert stamp(f"{some_bad}/0.tar/9.png") == (0, 0)


def test_check_names_what_is_odd(some_bad):
    report = check(DataConfig(dataset="shards", root=str(some_bad), num_workers=0, image_size=16))
    found = {finding.name: finding for finding in report.findings}
    assert [path for path, _ in found["unreadable"].items] == [
        f"{some_bad}/0.tar/{n}" for n in ("5.jpg", "3.png", "4.png")
    ]
    assert found["unreadable"].refused
    pack(some_bad / "1.tar", ("1.png", picture(1)), ("1.cls", b"b"))
    report = check(DataConfig(dataset="shards", root=str(some_bad), num_workers=0, image_size=16))
    found = {finding.name: finding for finding in report.findings}
    assert [sorted(group) for group in found["train_and_test"].items] == [
        [f"{some_bad}/0.tar/1.png", f"{some_bad}/1.tar/1.png"]
    ]


def test_the_cache_keeps_them(tmp_path):
    root = pack(tmp_path / "s" / "0.tar", *labelled("a", "a", "b")).parent
    config = DataConfig(dataset="shards", root=str(root), cache=str(tmp_path / "cache"), num_workers=0)
    expected = arrays(load_splits("shards", root).train.paths)
    for _ in range(2):
        train = load_pictures(config).train
        assert_same([np.asarray(train.load(i)) for i in range(len(train))], expected)
        assert len(list((tmp_path / "cache").iterdir())) == 2
    pack(root / "0.tar", *labelled("a", "a", "b")[2:], ("0.png", picture(7)), ("0.cls", b"a"))
    train = load_pictures(config).train
    assert_same([np.asarray(train.load(i)) for i in range(2)], [expected[1], arrays([f"{root}/0.tar/0.png"])[0]])


def test_images_and_lists_may_be_in_shards(tmp_path, draw, monkeypatch):
    root = pack(tmp_path / "s" / "0.tar", *labelled("a", "b")).parent
    expected = [f"{root}/0.tar/0.png", f"{root}/0.tar/1.png"]
    assert list(list_images(root).paths) == expected
    (tmp_path / "list.txt").write_text("\n".join(expected[::-1]))
    assert list(list_images(tmp_path / "list.txt").paths) == expected[::-1]
    (tmp_path / "list.txt").write_text(f"{root}/0.tar/9.png")
    with pytest.raises(UserError, match="1 are missing"):
        list_images(tmp_path / "list.txt")
    # Those whom processes look for in shards, this one knows, and so do its later processes.
    monkeypatch.setattr(workers, "FEW_FILES", 0)
    monkeypatch.setattr(distributed, "threads_per_rank", lambda: 2)
    members._indexes.clear()
    (tmp_path / "list.txt").write_text("\n".join(expected))
    assert list(list_images(tmp_path / "list.txt").paths) == expected
    assert list(members._indexes) == [f"{root}/0.tar"]
    # A tar file beside pictures is only one of the other files.
    draw(root, "a/1.png")
    assert list(list_images(root).paths) == [f"{root}/a/1.png"]


def test_paths_that_lead_into_no_shard_are_as_they_were(tmp_path, draw):
    draw(tmp_path, "folder.tar/1.png", "2.png")
    (tmp_path / "text.tar").write_text("x" * 2000)
    assert_same(
        arrays([tmp_path / "folder.tar" / "1.png"]), [np.asarray(Image.open(tmp_path / "folder.tar" / "1.png"))]
    )
    with pytest.raises(UnreadablePicture, match=r"2\.png/x\.png cannot be decoded .*Not a directory"):
        load_rgb(tmp_path / "2.png" / "x.png")
    assert stamp(f"{tmp_path}/2.png/x.png") == (0, 0)
    with pytest.raises(UserError, match="no tar file"):
        load_rgb(tmp_path / "text.tar" / "x.png")


def _on_a_rank(root, cache_home):
    """List the pictures and read them, in a process that knows nothing of them."""
    os.environ["XDG_CACHE_HOME"] = str(cache_home / str(distributed.rank()))
    splits = load_pictures(DataConfig(dataset="shards", root=str(root), num_workers=0))
    return splits.train.paths, [np.asarray(splits.train.load(i)) for i in range(len(splits.train))]


@pytest.mark.ddp
def test_ranks_find_the_same_with_or_without_a_shared_folder(tmp_path):
    for i in range(3):
        pack(tmp_path / "s" / f"{i}.tar", *labelled("a", "b"))
    train = load_splits("shards", tmp_path / "s").train
    for paths, pictures in run_ranks(_on_a_rank, 2, tmp_path / "s", tmp_path):
        assert paths == train.paths
        assert_same(pictures, arrays(train.paths))
