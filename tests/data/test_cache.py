import errno
import os
import shutil
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import PIL
import pytest
import torch
from PIL import Image
from ranks import run_ranks

from uhml import distributed
from uhml.config import DataConfig
from uhml.data import cache, decode, workers
from uhml.data.decode import UnreadablePicture, load_rgb
from uhml.data.pictures import Pictures, Splits
from uhml.data.transforms import plain_transform, reduced, training_transform
from uhml.data.verify import readable_pictures
from uhml.environment import Place
from uhml.errors import UserError

NUM_TRAIN, NUM_TEST, NUM_FILES = 11, 4, 4 + 2


@pytest.fixture(autouse=True)
def few_per_file(monkeypatch):
    monkeypatch.setattr(cache, "PER_FILE", 3)


@pytest.fixture
def splits(tmp_path):
    """Fifteen pictures of noise, each of another shape."""
    random = np.random.default_rng(0)
    paths = []
    for i in range(NUM_TRAIN + NUM_TEST):
        paths.append(str(tmp_path / f"{i:02d}.{'png' if i % 2 else 'jpg'}"))
        Image.fromarray(random.integers(0, 256, (20 + i, 50 - 2 * i, 3), dtype=np.uint8)).save(paths[-1])
    return Splits(train=Pictures(paths=tuple(paths[:NUM_TRAIN])), test=Pictures(paths=tuple(paths[NUM_TRAIN:])))


@pytest.fixture
def config(tmp_path):
    return DataConfig(dataset="folder", cache=str(tmp_path / "cache"), num_workers=0, image_size=16)


@pytest.fixture
def decoded(monkeypatch):
    """The files that were decoded in this process."""
    seen, original = [], decode._decode

    def noting(path):
        seen.append(path)
        return original(path)

    monkeypatch.setattr(decode, "_decode", noting)
    return seen


def kept(config):
    return sorted(path for path in Path(config.cache).iterdir())


def pixels(pictures):
    return [np.asarray(pictures.load(i)) for i in range(len(pictures))]


def assert_same(ours, theirs):
    assert len(ours) == len(theirs)
    assert all(np.array_equal(a, b) for a, b in zip(ours, theirs, strict=True))


@pytest.mark.parametrize("reduce_to", [None, 24])
def test_pictures_are_those_of_the_files_and_are_decoded_once(splits, config, decoded, reduce_to):
    config = replace(config, reduce_to=reduce_to)
    expected = [np.asarray(reduced(load_rgb(path), reduce_to)) for path in splits.train.paths]
    assert max(min(picture.shape[:2]) for picture in expected) == (reduce_to or 30)
    for _ in range(2):
        found = readable_pictures(splits, config)
        decoded.clear()
        assert_same(pixels(found.train), expected)
        assert_same(pixels(found.train.select([7, 3, 3]).select([1, 0])), [expected[3], expected[7]])
        assert len(pixels(found.test)) == NUM_TEST
        assert not decoded
        assert len(kept(config)) == NUM_FILES


@pytest.mark.parametrize("make", [plain_transform, training_transform])
def test_reduced_or_not_the_network_sees_the_same_from_the_cache(splits, config, make):
    config = replace(config, reduce_to=22, augment_color=0.4)
    transform = make(config, (0.5,) * 3, (0.5,) * 3)
    found = readable_pictures(splits, config).train

    def seen(image):
        torch.manual_seed(0)
        return transform(image)

    for i, path in enumerate(splits.train.paths):
        assert torch.equal(seen(found.load(i)), seen(load_rgb(path)))


def _on_ranks(splits, config, ranks_per_machine):
    """Cache the pictures, on machines that each have a folder of their own."""
    cache.PER_FILE = 3
    machine, local = divmod(distributed.rank(), ranks_per_machine)
    cache.place = lambda: Place("torchrun", distributed.rank(), distributed.world_size(), local, ranks_per_machine)
    written, original = [], cache._write

    def noting(file, *arguments):
        written.append(str(file))
        original(file, *arguments)

    cache._write = noting
    own = replace(config, cache=f"{config.cache}{machine}")
    return pixels(readable_pictures(splits, own).train), written


@pytest.mark.ddp
@pytest.mark.parametrize(
    ("world_size", "ranks_per_machine", "num_workers"), [(2, 2, 0), (4, 4, 0), (4, 2, 0), (2, 1, 1)]
)
def test_all_ranks_fill_it_together_on_each_machine(splits, config, world_size, ranks_per_machine, num_workers):
    config = replace(config, num_workers=num_workers)
    expected = [np.asarray(load_rgb(path)) for path in splits.train.paths]
    found = run_ranks(_on_ranks, world_size, splits, config, ranks_per_machine)
    for pictures, _ in found:
        assert_same(pictures, expected)
    machines = range(world_size // ranks_per_machine)
    assert all(len(kept(replace(config, cache=f"{config.cache}{machine}"))) == NUM_FILES for machine in machines)
    if not num_workers:
        # Every file once, and the work shared.
        written = [files for _, files in found]
        assert len({file for files in written for file in files}) == sum(map(len, written)) == NUM_FILES * len(machines)
        assert max(map(len, written)) - min(map(len, written)) <= 2


def test_several_processes_find_what_one_has_kept(splits, config, decoded, monkeypatch):
    readable_pictures(splits, config)
    decoded.clear()
    monkeypatch.setattr(workers, "FEW_FILES", 0)
    monkeypatch.setattr(distributed, "threads_per_rank", lambda: 2)
    monkeypatch.setattr(workers, "BLOCKS_AT_ONCE", 2)
    found = readable_pictures(splits, config)
    assert not decoded
    assert len(kept(config)) == NUM_FILES
    assert_same(pixels(found.train), [np.asarray(load_rgb(path)) for path in splits.train.paths])


def test_a_picture_that_changes_costs_one_file(splits, config, decoded):
    readable_pictures(splits, config)
    before = set(kept(config))
    Image.new("RGB", (30, 40), "red").save(splits.train.paths[4])
    decoded.clear()
    found = readable_pictures(splits, config).train
    assert np.array_equal(found.load(4), np.asarray(load_rgb(splits.train.paths[4])))
    assert len(set(kept(config)) - before) == 1
    assert set(decoded) == set(splits.train.paths[3:6])
    readable_pictures(splits, replace(config, reduce_to=24))
    assert len(kept(config)) == 2 * NUM_FILES + 1


def test_pictures_of_one_size_and_time_are_told_apart_by_their_folders(config, tmp_path):
    for name in ("red", "blue"):
        (tmp_path / name).mkdir()
        path = tmp_path / name / "0.bmp"
        Image.new("RGB", (30, 30), name).save(path)
        os.utime(path, times=(0, 10**9))
        found = readable_pictures(Splits(train=Pictures(paths=(str(path),))), config).train
        assert np.array_equal(found.load(0), np.asarray(load_rgb(path)))


@pytest.mark.parametrize(("owner", "name"), [(cache, "FORMAT"), (PIL, "__version__")], ids=["format", "pillow"])
def test_what_another_version_has_decoded_is_not_taken(splits, config, monkeypatch, owner, name):
    readable_pictures(splits, config)
    monkeypatch.setattr(owner, name, "another")
    readable_pictures(splits, config)
    assert len(kept(config)) == 2 * NUM_FILES


def test_what_was_interrupted_goes_on(splits, config, monkeypatch, decoded):
    original = cache._write
    calls = []

    def dying(file, *arguments):
        calls.append(file)
        if len(calls) > 4:
            raise KeyboardInterrupt
        original(file, *arguments)

    with monkeypatch.context() as patched:
        patched.setattr(cache, "_write", dying)
        with pytest.raises(KeyboardInterrupt):
            readable_pictures(splits, config)
    assert len(kept(config)) == 4
    # What a killed one was writing, long ago and just now.
    old, new = (Path(config.cache) / f"{'0' * 64}.pixels.{host}-1.partial" for host in "ab")
    for path in (old, new):
        path.write_bytes(b"half")
    os.utime(old, times=(0, time.time() - cache.SECONDS_UNTIL_ABANDONED - 60))
    # And one that something else has cut off.
    cut = next(path for path in kept(config) if path.suffix == ".pixels")
    os.truncate(cut, cut.stat().st_size - 1)
    monkeypatch.setattr(cache, "SAMPLED", 0)
    decoded.clear()
    found = readable_pictures(splits, config)
    assert 1 < len(decoded) <= 9
    assert_same(pixels(found.train), [np.asarray(load_rgb(path)) for path in splits.train.paths])
    assert new.exists()
    assert not old.exists()


def test_a_file_is_found_whole_or_not_at_all(splits, config, monkeypatch):
    def failing(image, side):
        assert not any(path.suffix == ".pixels" for path in kept(config))
        raise KeyboardInterrupt

    monkeypatch.setattr(cache, "SAMPLED", 0)
    monkeypatch.setattr(cache, "reduced", failing)
    with pytest.raises(KeyboardInterrupt):
        readable_pictures(splits, config)
    assert not kept(config)


@pytest.mark.parametrize("content", [b"", b"1234567", b"\0" * 100, b"\xff" * 100], ids=range(4))
def test_rubbish_in_the_place_of_a_file_is_replaced(splits, config, content):
    readable_pictures(splits, config)
    for path in kept(config):
        path.write_bytes(content)
    found = readable_pictures(splits, config)
    assert_same(pixels(found.train), [np.asarray(load_rgb(path)) for path in splits.train.paths])


def test_unreadable_pictures_are_refused_or_left_out_as_without_a_cache(splits, config):
    for i in (3, 4, 5, 8):
        Path(splits.train.paths[i]).write_bytes(b"rubbish")
    for _ in range(2):
        said = r"03\.png is in none of .* \(and 3 more of the train pictures cannot be read\)"
        with pytest.raises(UnreadablePicture, match=said):
            readable_pictures(splits, config)
        found = readable_pictures(splits, replace(config, skip_corrupt=True)).train
        assert found.paths == tuple(splits.train.paths[i] for i in (0, 1, 2, 6, 7, 9, 10))
        assert_same(pixels(found), [np.asarray(load_rgb(path)) for path in found.paths])


def test_a_picture_that_could_not_be_read_for_a_moment_is_not_lost(splits, config, monkeypatch):
    def failing(path):
        raise UnreadablePicture(f"{path} is on a file system that is away.")

    with monkeypatch.context() as patched:
        patched.setattr(cache, "load_rgb", failing)
        readable_pictures(splits, config)
    found = readable_pictures(splits, config).train
    assert_same(pixels(found), [np.asarray(load_rgb(path)) for path in splits.train.paths])


def test_a_cache_that_is_removed_meanwhile_costs_time_only(splits, config):
    found = readable_pictures(splits, config).train
    shutil.rmtree(config.cache)
    assert_same(pixels(found), [np.asarray(load_rgb(path)) for path in splits.train.paths])


def test_the_room_it_takes_is_told_and_must_be_there(splits, config, monkeypatch, caplog):
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: shutil._ntuple_diskusage(0, 0, 1000))
    with pytest.raises(UserError, match=r"for 15 pictures, and 0\.0 GiB are free there: .*data\.reduce_to.*=null"):
        readable_pictures(splits, config)
    assert not kept(config)
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: shutil._ntuple_diskusage(0, 0, 2**40))
    with caplog.at_level("INFO"):
        readable_pictures(splits, config)
    assert "15 pictures into the cache, where they take about 0.00 GiB; 1024.0 GiB are free" in caplog.text
    size = sum(path.stat().st_size for path in kept(config)) - 24 * (NUM_TRAIN + NUM_TEST)
    paths = [*splits.train.paths, *splits.test.paths]
    assert cache.bytes_per_picture(paths, None) * len(paths) == size


@pytest.mark.parametrize("num_workers", [0, 1])
def test_a_full_disk_is_one_sentence_and_leaves_nothing_half(splits, config, monkeypatch, num_workers):
    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patched:
        patched.setattr(os, "fsync", full)
        with pytest.raises(UserError, match=r"data\.cache=.* cannot be used \(No space left on device\): make room"):
            readable_pictures(splits, replace(config, num_workers=num_workers))
    assert not kept(config)
    readable_pictures(splits, config)
    assert len(kept(config)) == NUM_FILES


def test_a_folder_that_cannot_be(splits, config, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"data\.cache=.*file/in it cannot be used \(Not a directory\)"):
        readable_pictures(splits, replace(config, cache=str(tmp_path / "file" / "in it")))
