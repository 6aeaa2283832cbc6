import os
from pathlib import Path

import pytest

from uhml import distributed
from uhml.data import reading, workers
from uhml.data.datasets import load_splits
from uhml.errors import UserError


@pytest.fixture
def listing(tmp_path, draw):
    """Write a list beside the pictures a.png to e.png in the folder p."""
    draw(tmp_path, *[f"p/{name}.png" for name in "abcde"])

    def _listing(text, name="list.csv"):
        (tmp_path / name).write_text(text, encoding="utf-8")
        return tmp_path / name

    return _listing


def test_text(listing, tmp_path):
    root = listing(f"p/b.png\r\n\n{tmp_path}/p/a.png  \n", "list.txt")
    splits = load_splits("list", root)
    assert splits.train.paths == (str(tmp_path / "p/b.png"), str(tmp_path / "p/a.png"))
    assert splits.train.labels is None
    assert splits.test is None


def test_csv_of_paths(listing):
    splits = load_splits("list", listing("path\np/a.png\n"))
    assert len(splits.train) == 1
    assert splits.test is None


def test_csv_with_an_end_of_line_in_a_quoted_path(listing, tmp_path, draw):
    draw(tmp_path, "p/two\nlines.png")
    splits = load_splits("list", listing('path\r\n"p/two\nlines.png"\r\np/b.png\r\n'))
    assert splits.train.paths == (str(tmp_path / "p/two\nlines.png"), str(tmp_path / "p/b.png"))


def test_csv_with_labels(listing):
    splits = load_splits(
        "list",
        listing('\ufefflabel,path,camera\nzebra,p/a.png,1\n"a, b",p/b.png,2\nbear,p/c.png,2\nbear,p/d.png,1\n'),
    )
    assert splits.train.class_names == ("a, b", "bear")
    assert splits.train.labels.tolist() == [0, 1, 1]
    assert splits.test.class_names == ("zebra",)
    assert splits.test.super_labels is None


def test_csv_with_split_and_super_labels(listing):
    splits = load_splits(
        "list",
        listing("path,label,super_label,split\np/a.png,1,x,test\np/b.png,2,y,train\np/c.png,3,x,train\n"),
    )
    assert splits.train.class_names == ("2", "3")
    assert splits.train.super_labels.tolist() == [1, 0]
    assert splits.test.class_names == ("1",)
    assert splits.test.super_class_names == ("x",)


def test_labels_in_both_parts_are_told(listing, caplog):
    load_splits("list", listing("path,label,split\np/a.png,k,test\np/b.png,k,train\n"))
    assert "1 labels, such as 'k', are in train and test" in caplog.text


def test_everything_may_train(listing):
    assert load_splits("list", listing("path,label,split\np/a.png,k,train\n")).test is None
    assert load_splits("list", listing("path,label\np/a.png,k\n")).test is None


@pytest.mark.parametrize(
    ("text", "match"),
    [
        ("", "expected a header with the column path, found nothing"),
        ("file,label\np/a.png,1\n", "expected a header with the column path, found file, label"),
        ("path;label\np/a.png;1\n", "found path;label. Between the columns there must be commas, not ;"),
        ("path\tlabel\np/a.png\t1\n", "there must be commas, not tabs"),
        ("Label,Path\n1,p/a.png\n", "found Label, Path. Did you mean 'path' by 'Path'?"),
        ("path\np\\a.png\n", "first .* Between folders there must be /"),
        ("path,lable\np/a.png,1\n", "the column 'lable' means nothing here. Did you mean 'label'?"),
        ("path,split\np/a.png,train\n", "the column split needs a column label"),
        ("path,label\np/a.png\n", "line 2: expected 2 fields"),
        ("path,label\np/a.png,1\np/b.png,2,3\n", "line 3: expected 2 fields"),
        ("path,label\np/a.png,\n", "line 2: .*none of path, label empty"),
        ("path,label,split\np/a.png,1,dev\n", "line 2: expected the split train or test, found 'dev'"),
        ("path,label,split\np/a.png,1,test\n", "no row has the split train"),
        ("path\n", "lists no pictures"),
        ('path,label\np/a.png,"12 inch\np/b.png,1\n', "line 2: unexpected end of data. Is a quote open there"),
        ('path,label\np/a.png,1\np/b.png,"1' + 30_000 * "\np/a.png,1", "line 3: field larger than field limit"),
        ("path\np/a.png\np/x.png\np/y.png\n", "lists 3 pictures, of which 2 are missing, first .*x.png"),
    ],
)
def test_refusals(listing, text, match):
    with pytest.raises(UserError, match=match):
        load_splits("list", listing(text))


def test_a_name_that_no_file_can_have_is_missing(listing):
    with pytest.raises(UserError, match="lists 3 pictures, of which 2 are missing"):
        load_splits("list", listing("p/a.png\0p/b.png\np/c.png\np/x.png\n", "list.txt"))


def test_what_is_missing_is_the_same_for_several_processes(listing, monkeypatch):
    monkeypatch.setattr(workers, "FEW_FILES", 0)
    monkeypatch.setattr(distributed, "threads_per_rank", lambda: 2)
    monkeypatch.setattr(reading, "FILES_PER_BLOCK", 2)
    names = [*"abxcdeyaz", *"abcde" * 20, "v"]
    with pytest.raises(UserError, match=r"lists 110 pictures, of which 4 are missing, first .*p/x\.png"):
        load_splits("list", listing("".join(f"p/{name}.png\n" for name in names), "list.txt"))


@pytest.mark.parametrize("end", ["\r", "\n", "\r\n"])
def test_csv_with_any_end_of_line_in_a_quoted_path(listing, tmp_path, draw, end):
    draw(tmp_path, f"p/two{end}lines.png")
    root = tmp_path / "list.csv"
    root.write_bytes(f'path\n"p/two{end}lines.png"\n'.encode())
    assert load_splits("list", root).train.paths == (str(tmp_path / f"p/two{end}lines.png"),)


@pytest.mark.parametrize("name", ["list.csv", "list.txt"])
def test_nobody_waits_for_a_pipe(tmp_path, name):
    os.mkfifo(tmp_path / name)
    with pytest.raises(UserError, match=rf"Cannot read .*{name}: it is no regular file"):
        load_splits("list", tmp_path / name)


def test_columns_in_a_list_of_paths_are_told(listing):
    for mark in (",", "\t"):
        with pytest.raises(UserError, match=r"must be named \.csv"):
            load_splits("list", listing(f"p/a.png{mark}1\n", "list.tsv"))


def test_pictures_listed_twice_are_told(listing, caplog):
    load_splits("list", listing("path\np/a.png\np/b.png\np/a.png\np/a.png\n"))
    assert "lists 2 pictures more than once" in caplog.text


def test_refused_roots(tmp_path):
    with pytest.raises(UserError, match=r"needs data\.root"):
        load_splits("list", None)
    with pytest.raises(UserError, match="is a folder"):
        load_splits("list", tmp_path)
    with pytest.raises(UserError, match=r"Cannot read .*No such file"):
        load_splits("list", tmp_path / "none.csv")
    (tmp_path / "empty.txt").write_text("\n")
    with pytest.raises(UserError, match="lists no pictures"):
        load_splits("list", tmp_path / "empty.txt")


def test_paths_of_both_kinds_have_a_folder_in_common(listing, tmp_path, monkeypatch):
    listing(f"p/a.png\n{tmp_path}/p/b.png\n", "list.txt")
    monkeypatch.chdir(tmp_path)
    assert list(load_splits("list", Path("list.txt")).train.paths) == [f"{tmp_path}/p/a.png", f"{tmp_path}/p/b.png"]
    listing("p/a.png\n", "list.txt")
    assert list(load_splits("list", Path("list.txt")).train.paths) == ["p/a.png"]
