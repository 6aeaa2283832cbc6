import errno
import logging
import os
import re
from pathlib import Path

import pytest

from uhml.data.datasets import load_splits
from uhml.data.folder import pictures_below
from uhml.errors import UserError


def names(pictures, root):
    return [str(Path(path).relative_to(root)) for path in pictures.paths]


def test_first_half_of_the_class_folders_trains(tmp_path, draw):
    draw(tmp_path, "d/1.png", "b/2.JPG", "b/deep/er/1.jpeg", "a/1.png", "c/1.webp", "e/1.bmp")
    splits = load_splits("folder", tmp_path)
    assert splits.train.class_names == ("a", "b", "c")
    assert splits.test.class_names == ("d", "e")
    assert names(splits.train, tmp_path) == ["a/1.png", "b/2.JPG", "b/deep/er/1.jpeg", "c/1.webp"]
    assert splits.train.labels.tolist() == [0, 1, 1, 2]


def test_without_class_folders_all_pictures_train(tmp_path, draw):
    draw(tmp_path, "2.png", "1.png")
    splits = load_splits("folder", tmp_path)
    assert names(splits.train, tmp_path) == ["1.png", "2.png"]
    assert splits.train.labels is None
    assert splits.test is None


def test_a_single_folder_is_looked_into(tmp_path, draw):
    draw(tmp_path, "all/here/b/1.png", "all/here/a/1.png")
    assert load_splits("folder", tmp_path).test.class_names == ("b",)
    draw(tmp_path / "flat", "photos/1.png", "photos/2.png")
    assert load_splits("folder", tmp_path / "flat").test is None


def test_loose_pictures_beside_folders_leave_no_classes(tmp_path, draw, caplog):
    draw(tmp_path, "a/1.png", "b/1.png", "loose.png")
    assert load_splits("folder", tmp_path).test is None
    assert "1 of the 3 pictures" in caplog.text
    assert "loose.png" in caplog.text


def test_hidden_files_and_other_files_are_passed_over(tmp_path, draw, caplog):
    draw(tmp_path, "a/1.png", "b/1.png", "a/.thumb.png", ".cache/x/1.png", "b/.git/1.png")
    (tmp_path / "a" / "notes.txt").write_text("")
    (tmp_path / "b" / "Thumbs.db").write_text("")
    with caplog.at_level(logging.INFO):
        splits = load_splits("folder", tmp_path)
    assert len(splits.train) == len(splits.test) == 1
    assert re.search(
        r"passed over 2 files that are no pictures: (1 .txt, 1 .db|1 .db, 1 .txt)$", caplog.text, re.MULTILINE
    )
    assert "not read" not in caplog.text


def test_pictures_of_a_kind_that_is_not_read_are_missed_aloud(tmp_path, draw, caplog):
    draw(tmp_path, "a/1.png", "b/1.png")
    for name in ("a/2.HEIC", "b/3.heic", "b/4.jxl"):
        (tmp_path / name).write_bytes(b"x")
    load_splits("folder", tmp_path)
    assert "pictures in .heic and .jxl are not read; convert them" in caplog.text


def test_a_root_that_is_not_there_is_told_with_the_folder_it_was_looked_for_in(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("folder", "shards", "cub200"):
        with pytest.raises(UserError, match=f"data.root=gone is no folder in {re.escape(str(tmp_path))}; "):
            load_splits(name, Path("gone"))
        with pytest.raises(UserError, match=f"data.root={re.escape(str(tmp_path))}/gone is no folder; "):
            load_splits(name, tmp_path / "gone")


def test_links_are_followed_but_not_round_and_round(tmp_path, draw):
    draw(tmp_path / "elsewhere", "1.png")
    draw(tmp_path / "root", "b/1.png")
    (tmp_path / "root" / "a").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "root" / "b" / "up").symlink_to(tmp_path / "root")
    (tmp_path / "root" / "b" / "all the way up").symlink_to("/")
    splits = load_splits("folder", tmp_path / "root")
    assert splits.train.class_names == ("a",)
    assert len(splits.test) == 1


def test_folders_that_link_to_each_other_are_followed_once(tmp_path, draw):
    names = "abc"
    for name in names:
        draw(tmp_path, f"{name}/1.png")
        for other in set(names) - {name}:
            (tmp_path / name / other).symlink_to(f"../{other}")
    found = pictures_below(tmp_path, "these")
    # Each by itself, by way of one other, and by way of both.
    assert len(found) == len(set(found)) == 3 * (1 + 2 + 2)


def test_a_folder_that_cannot_be_listed_is_told_of(tmp_path, draw, monkeypatch, caplog):
    draw(tmp_path, "a/1.png", "b/1.png", "c/1.png")
    scandir = os.scandir

    def refuse(number):
        def refused(path):
            if os.fspath(path).endswith("b"):
                raise OSError(number, os.strerror(number), path)
            return scandir(path)

        monkeypatch.setattr(os, "scandir", refused)

    refuse(errno.EACCES)
    assert len(pictures_below(tmp_path, "these")) == 2
    assert f"{tmp_path}/b cannot be looked into, and is passed over: Permission denied" in caplog.text
    refuse(errno.ESTALE)
    with pytest.raises(UserError, match=r"/b cannot be listed: Stale file handle"):
        pictures_below(tmp_path, "these")


def test_too_few_classes_to_score_on_are_told(tmp_path, draw, caplog):
    draw(tmp_path, "cat/1.png", "dog/1.png")
    load_splits("folder", tmp_path)
    assert "of 2 classes, at most one is left to score on" in caplog.text


@pytest.mark.parametrize(
    ("path", "match"),
    [
        (None, r"needs data\.root"),
        ("nowhere", "is no folder"),
        ("file.txt", "is no folder"),
        ("empty", r"holds no picture \(\.jpg"),
    ],
)
def test_refusals(tmp_path, path, match):
    (tmp_path / "empty").mkdir()
    (tmp_path / "file.txt").write_text("")
    with pytest.raises(UserError, match=match):
        load_splits("folder", path and tmp_path / path)


def test_train_and_test_folders_are_no_classes(tmp_path, draw):
    draw(tmp_path, "train/cat/1.png", "val/cat/1.png")
    with pytest.raises(UserError, match=r"named train, val: parts of a data set.*Point data\.root to one"):
        load_splits("folder", tmp_path)


def test_order_is_that_of_paths_and_none_begins_with_the_present_folder(tmp_path, monkeypatch):
    names = ["a/x.png", "a-b/x.png", "a b/x.png", "a/x-1.png", "a.png", "ä/x.png", "a/b/x.png", "Z.JPG"]
    for name in names:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    monkeypatch.chdir(tmp_path)
    assert load_splits("folder", Path()).train.paths == [str(path) for path in sorted(map(Path, names))]
