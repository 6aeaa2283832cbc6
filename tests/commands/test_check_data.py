"""Trees of pictures with one fault of each kind, and the names by which they are told."""

import json
import re
import shutil

import numpy as np
import pytest
from PIL import Image

from uhml import cli
from uhml.data import check
from uhml.logs import shown

CLASSES = ["ape", "bear", "cat", "dog"]


def picture(path, seed, size=(40, 36), mode="RGB"):
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), np.uint8)
    Image.fromarray(pixels).convert(mode).save(path)


@pytest.fixture
def tree(tmp_path):
    """Four classes of four different pictures each, with nothing wrong."""
    root = tmp_path / "tree"
    for i in range(16):
        picture(root / CLASSES[i // 4] / f"{i:02d}.png", i)
    return root


@pytest.fixture
def report(tmp_path, capsys):
    """Run the command with --json, and return its exit status and what it found."""

    def _report(*words):
        status = cli.main(["check-data", *(str(word) for word in words), "--json"])
        said = capsys.readouterr()
        return status, json.loads(said.out), said.err

    return _report


FINDINGS = {
    *("missing", "unreadable", "counts", "extra", "empty", "single", "duplicates", "train_and_test"),
    *("grey", "cmyk", "large", "tiny"),
}
SMALL = ["data.image_size=32", "data.num_workers=0"]


def test_nothing_is_wrong(tree, report, capsys):
    status, found, err = report("folder", "--root", tree, *SMALL)
    assert status == 0
    assert found["pictures"] == {"train": 8, "test": 8}
    assert found["classes"] == {"train": 2, "test": 2}
    assert {name for name in FINDINGS if found[name] == []} == FINDINGS
    assert found["refused"] == []
    assert "error" not in err
    assert cli.main(["check-data", "folder", "--root", str(tree), *SMALL]) == 0
    assert "train pictures of 2 classes" in capsys.readouterr().out


def test_each_oddity_is_named_and_none_of_them_refused(tree, report, monkeypatch):
    monkeypatch.setattr(check, "LARGE_SIDE", 100)
    picture(tree / "ape" / "grey.png", 20, mode="L")
    Image.fromarray(np.arange(40 * 36, dtype=np.uint16).reshape(36, 40)).save(tree / "ape" / "deep.png")
    picture(tree / "bear" / "ink.jpg", 22, mode="CMYK")
    picture(tree / "cat" / "large.png", 23, size=(101, 40))
    picture(tree / "dog" / "tiny.png", 24, size=(60, 15))
    shutil.copyfile(tree / "ape" / "00.png", tree / "ape" / "same.png")
    shutil.copyfile(tree / "bear" / "04.png", tree / "cat" / "same.png")
    shutil.copyfile(tree / "bear" / "04.png", tree / "dog" / "same.png")
    picture(tree / "eel" / "alone.png", 25)
    (tree / "fox").mkdir()
    (tree / "gnu").mkdir()
    (tree / "gnu" / "1.heic").touch()
    (tree / "ape" / "notes.txt").touch()
    (tree / "ape" / ".hidden").touch()
    (tree / ".cache").mkdir()
    status, found, _ = report("folder", "--root", tree, *SMALL)
    assert status == 0
    assert found["refused"] == []
    expected = {
        "grey": ["ape/deep.png", "ape/grey.png"],
        "cmyk": ["bear/ink.jpg"],
        "large": ["cat/large.png"],
        "tiny": ["dog/tiny.png"],
        "extra": ["ape/notes.txt", "gnu/1.heic"],
        "empty": ["fox", "gnu"],
    }
    for name, paths in expected.items():
        assert sorted(found[name]) == [str(tree / path) for path in paths], name
    assert found["single"] == ["eel (test)"]
    groups = [["ape/00.png", "ape/same.png"], ["bear/04.png", "cat/same.png", "dog/same.png"]]
    assert sorted(map(sorted, found["duplicates"])) == [[str(tree / path) for path in group] for group in groups]
    # ape, bear and cat train; dog and eel test
    assert [sorted(group) for group in found["train_and_test"]] == [[str(tree / path) for path in groups[1]]]


def test_in_the_folder_at_hand(tree, report, monkeypatch):
    (tree / "ape" / "notes.txt").touch()
    (tree / "fox").mkdir()
    picture(tree / "loose.png", 30)
    monkeypatch.chdir(tree)
    _, found, _ = report("folder", "--root", ".", *SMALL)
    assert (found["extra"], found["empty"]) == (["ape/notes.txt"], ["fox"])


@pytest.mark.parametrize("num_workers", [0, 2])
def test_what_training_refuses_is_named_with_its_reason(tree, report, num_workers, capsys):
    whole = (tree / "ape" / "00.png").read_bytes()
    (tree / "ape" / "00.png").write_bytes(whole[: len(whole) // 2])
    (tree / "dog" / "12.png").write_bytes(b"")
    words = ["folder", "--root", tree, "data.image_size=32", f"data.num_workers={num_workers}"]
    status, found, err = report(*words)
    assert status == 2
    assert found["refused"] == ["unreadable"]
    (half, why), (empty, because) = found["unreadable"]
    assert (half, empty) == (str(tree / "ape" / "00.png"), str(tree / "dog" / "12.png"))
    assert why.startswith("cannot be decoded (")
    assert because == "is empty (0 bytes)"
    assert "2 unreadable pictures. Mend it, or add data.skip_corrupt" in err
    assert report(*words, "data.skip_corrupt=true")[0] == 0
    assert cli.main(["check-data", *map(str, words)]) == 2
    assert "  dog/12.png: is empty (0 bytes)\n" in capsys.readouterr().out


def test_nothing_left_is_refused_in_spite_of_skip_corrupt(tree, report):
    for path in tree.glob("[cd]*/*.png"):
        path.write_bytes(b"GIF89a")
    status, found, _ = report("folder", "--root", tree, *SMALL, "data.skip_corrupt=true")
    assert status == 2
    assert len(found["unreadable"]) == 8


def test_a_batch_must_do_with_the_pictures_that_can_be_read(tree, tmp_path, report):
    (tree / "ape" / "00.png").write_bytes(b"")
    path = tmp_path / "run.yaml"
    path.write_text(f"data: {{dataset: folder, root: {tree}, image_size: 32, num_workers: 0, skip_corrupt: true}}\n")
    words = [path, "mining.pictures_per_cluster=2", "mining.num_views=1"]
    assert report(*words, "train.global_batch_size=6")[0] == 0
    status, _, err = report(*words, "train.global_batch_size=8")
    assert status == 2
    assert "of 7 training pictures train.global_batch_size=6 is the largest that fits" in err


@pytest.fixture
def birds(tmp_path):
    """Six pictures in the form of CUB."""
    home = tmp_path / "CUB_200_2011"
    images = ["001.A/a.png", "001.A/b.png", "100.B/c.png", "101.C/d.png", "101.C/e.png", "200.D/f.png"]
    for i, image in enumerate(images):
        picture(home / "images" / image, i)
    (home / "images.txt").write_text("".join(f"{i} {image}\n" for i, image in enumerate(images)))
    labels = zip(range(6), [1, 1, 100, 101, 101, 200], strict=True)
    (home / "image_class_labels.txt").write_text("".join(f"{i} {label}\n" for i, label in labels))
    return home


@pytest.mark.parametrize("up", [0, 1])
def test_an_official_data_set(birds, report, up):
    for path in ("001.A/b.png", "200.D/f.png"):
        (birds / "images" / path).unlink()
    (birds / "images" / "300.E").mkdir()
    picture(birds / "images" / "001.A" / "more.png", 30)
    (birds / "images" / "001.A" / "Thumbs.db").touch()
    (birds / "README").touch()
    (birds / "images" / "101.C" / "d.png").write_bytes(b"no picture")
    status, found, err = report("cub200", "--root", birds.parent if up else birds, *SMALL)
    assert status == 2
    images = birds / "images"
    assert found["missing"] == [str(images / "001.A/b.png"), str(images / "200.D/f.png")]
    assert [path for path, _ in found["unreadable"]] == [str(images / "101.C/d.png")]
    assert found["extra"] == [str(images / "001.A/Thumbs.db"), str(images / "001.A/more.png")]
    assert found["empty"] == [str(images / "300.E")]
    assert found["counts"][0] == "3 train pictures instead of 5,864"
    assert len(found["counts"]) == 4
    assert found["single"] == ["100.B (train)", "200.D (test)"]
    assert "2 missing pictures, 1 unreadable pictures" in err


def test_a_data_set_of_which_no_picture_is_there(birds, report):
    for path in birds.rglob("*.png"):
        path.unlink()
    status, found, _ = report("cub200", "--root", birds, "data.num_workers=2")
    assert status == 2
    assert len(found["missing"]) == 6


def test_a_config_is_checked_as_a_run_would(tree, report, tmp_path, caplog):
    config = tmp_path / "config.yaml"
    config.write_text("data: {dataset: folder, image_size: 32, num_workers: 0}\ntrain: {global_batch_size: 16}\n")
    assert report(config, f"data.root={tree}")[0] == 0
    assert report(config, "--root", tree)[0] == 0
    status, found, err = report(config, "--root", tree, "train.global_batch_size=128")
    assert (status, found["refused"]) == (2, [])
    assert "train.global_batch_size=16 is the largest that fits" in err
    status, found, _ = report(config, "--root", tree, "data.num_classes=1")
    assert (status, found["pictures"]) == (2, {"train": 4, "test": 4})
    assert cli.main(["check-data", str(config), "--root", str(tree), "data.num_classes=9"]) == 2
    assert "data.num_classes=9 cannot be kept" in caplog.text


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["foldr"], "foldr is neither a config file nor one of glyphs, .*Did you mean 'folder'"),
        (["absent.yaml"], "There is no config file absent.yaml"),
        (["folder"], "data.root is missing"),
        (["folder", "--root", "absent"], "data.root=absent is no folder"),
        (["cub200", "--root", "."], "data.dataset=cub200 expects images.txt"),
        (["folder", "--root", ".", "loss.omega=0.9"], "loss.omega=0.9 says nothing of the pictures of folder"),
        (["folder", "--root", ".", "data.skip=1"], "Unknown key: 'data.skip'"),
    ],
)
def test_what_is_no_data_set(tmp_path, monkeypatch, caplog, capsys, words, said):
    monkeypatch.chdir(tmp_path)
    assert cli.main(["check-data", *words]) == 2
    (error,) = (record for record in caplog.records if record.levelname == "ERROR")
    assert re.search(said, error.getMessage())
    assert capsys.readouterr().out == ""


def test_names_do_nothing_on_a_terminal(tree, capsys):
    for i, name in enumerate(["[red]x.png", "\x1b[31m.png", "a\nb.png", "d\udcff.png", "Ä.png"]):
        (tree / "ape" / name).write_bytes(b"")
        assert (shown(name) == name) == (i in (0, 4))
    assert cli.main(["check-data", "folder", "--root", str(tree), *SMALL]) == 2
    out = capsys.readouterr().out
    for name in ("[red]x.png", r"\x1b[31m.png", r"a\nb.png", r"d\udcff.png", "Ä.png"):
        assert f"  ape/{name}: is empty (0 bytes)\n" in out


def test_more_cases_than_anyone_reads(tree, capsys):
    for i in range(25):
        (tree / "ape" / f"x{i:02d}.txt").touch()
    assert cli.main(["check-data", "folder", "--root", str(tree), *SMALL]) == 0
    out = capsys.readouterr().out
    assert "x09.txt" in out
    assert "x10.txt" not in out
    assert "and 15 more; --json names all" in out


def test_paths_from_here(tree, report, monkeypatch, capsys):
    monkeypatch.chdir(tree.parent)
    (tree / "fox").mkdir()
    (tree / "ape" / "notes.txt").touch()
    (tree / "ape" / "bad.png").touch()
    for root in ("tree", "./tree/", "../" + tree.parent.name + "/tree"):
        assert cli.main(["check-data", "folder", "--root", root, *SMALL]) == 2
        out = capsys.readouterr().out
        assert "  ape/bad.png: is empty (0 bytes)\n" in out
        assert "  ape/notes.txt\n" in out
        assert "  fox\n" in out
        assert "00.png" not in out
