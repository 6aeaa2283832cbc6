import os
import secrets
from pathlib import Path

import pytest

from uhml.files import opened_aside, write_whole


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def test_a_new_file_takes_the_place_of_the_old_in_one_step(tmp_path):
    path = tmp_path / "file"
    write_whole(path, "old")
    with path.open() as reader:
        with opened_aside(path) as file:
            file.write("neü".encode())
            file.flush()
            assert path.read_text() == "old"
        # Who reads the old one meanwhile reads all of it.
        assert reader.read() == "old"
    assert path.read_text(encoding="utf-8") == "neü"
    assert names(tmp_path) == ["file"]


@pytest.mark.parametrize("error", [OSError("disk full"), KeyboardInterrupt()])
@pytest.mark.parametrize("stage", ["write", "fsync", "replace"])
def test_a_failing_write_leaves_the_old_file_and_nothing_else(tmp_path, monkeypatch, error, stage):
    path = tmp_path / "file"
    write_whole(path, "old")

    def fail(*_):
        raise error

    def write():
        with opened_aside(path) as file:
            file.write(b"half of it")
            if stage == "write":
                fail()

    with monkeypatch.context() as patched:
        if stage != "write":
            patched.setattr(os, stage, fail)
        with pytest.raises(type(error)):
            write()
    assert path.read_text() == "old"
    assert names(tmp_path) == ["file"]


def test_the_file_is_on_the_disk_before_it_has_its_name(tmp_path, monkeypatch):
    monkeypatch.setattr(secrets, "token_hex", lambda length: "ab" * length)
    synced = []

    def fsync(descriptor):
        what = Path(os.readlink(f"/proc/self/fd/{descriptor}"))
        synced.append((what.name, names(tmp_path), what.stat().st_size if what.is_file() else None))

    monkeypatch.setattr(os, "fsync", fsync)
    write_whole(tmp_path / "file", "all of it")
    # The file, whole, under its first name; then the folder with the new one.
    aside = f"file.{'ab' * 8}.partial"
    assert synced == [(aside, [aside], 9), (tmp_path.name, ["file"], None)]
