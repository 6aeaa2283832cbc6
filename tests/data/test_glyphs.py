import collections
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

from uhml.data import glyphs as module
from uhml.data.datasets import load_splits
from uhml.data.glyphs import MIN_DRAWINGS, SIDE, glyphs
from uhml.errors import UserError


def drawings_below(root, code):
    """Return the files of the characters below a code point."""
    files = sorted(root.glob("v1/U+*/*.png"))
    return {str(f.relative_to(root)): f.read_bytes() for f in files if int(f.parent.name[2:], 16) < code}


def test_counts_are_those_of_the_documentation(glyphs_root):
    splits = load_splits("glyphs", glyphs_root)
    blocks = set(splits.train.super_class_names) | set(splits.test.super_class_names)
    assert (len(splits.train.class_names), len(splits.train)) == (1052, 12_950)
    assert (len(splits.test.class_names), len(splits.test)) == (1052, 12_895)
    assert len(blocks) == 36
    documented = module.__doc__
    assert "2,104 characters of 36 blocks in 25,845 pictures" in documented
    assert "1,052 characters train (12,950 pictures)" in documented


def test_train_and_test_characters_are_apart(glyphs_root):
    splits = load_splits("glyphs", glyphs_root)
    assert not set(splits.train.class_names) & set(splits.test.class_names)
    # No part has most of the capitals, or of a block.
    capitals = [sum("CAPITAL" in name for name in part.class_names) for part in (splits.train, splits.test)]
    assert 0.8 < capitals[0] / capitals[1] < 1.25
    assert "U+0041 LATIN CAPITAL LETTER A" in splits.train.class_names + splits.test.class_names
    assert "U+0391 GREEK CAPITAL LETTER ALPHA" not in splits.train.class_names + splits.test.class_names


def test_every_drawing_is_seen_and_is_of_one_character_only(glyphs_root):
    splits = load_splits("glyphs", glyphs_root)
    drawings = set()
    for part in (splits.train, splits.test):
        assert np.bincount(part.labels).min() >= MIN_DRAWINGS
        for path in part.paths:
            with Image.open(path) as picture:
                assert (picture.size, picture.mode) == ((SIDE, SIDE), "L")
                darkest, lightest = picture.getextrema()
                assert darkest < 128
                assert lightest == 255
                drawings.add(picture.tobytes())
    assert len(drawings) == len(splits.train) + len(splits.test)


def test_a_part_is_spread_over_the_blocks(glyphs_root):
    splits = load_splits("glyphs", glyphs_root, num_classes=100)
    assert len(splits.train.class_names) == len(splits.test.class_names) == 100
    blocks = collections.Counter(splits.train.super_labels.tolist())
    assert len(blocks) > 15


@pytest.mark.ddp
def test_two_ranks_draw_once_and_the_same_bytes(glyphs_root, tmp_path):
    script = tmp_path / "draw.py"
    script.write_text(
        "import sys\n"
        "from pathlib import Path\n"
        "from uhml import distributed\n"
        "from uhml.data import glyphs\n"
        "from uhml.data.decode import find_unreadable\n"
        "every = glyphs._characters\n"
        "glyphs._characters = lambda name: [c for c in every(name) if ord(c) < 0x250]\n"
        "with distributed.process_group('cpu'):\n"
        "    splits = glyphs.glyphs(Path(sys.argv[1]))\n"
        "    paths = [*splits.test.paths[:5], 'none.png', *splits.test.paths[5:10], 'nor this.png']\n"
        "    assert [row for row, _ in find_unreadable(paths, 1)] == [5, 11]\n"
    )
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    subprocess.run([*command, str(script), str(tmp_path / "root")], check=True, timeout=200)
    drawn = drawings_below(tmp_path / "root", 0x250)
    assert len(drawn) > 5000
    assert drawn == drawings_below(glyphs_root, 0x250)


@pytest.fixture
def few(monkeypatch):
    """Draw a handful of characters only."""
    monkeypatch.setattr(module, "_characters", lambda name: list("ABCDEFGHab"))


def test_default_root_is_the_users_cache(few, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    assert glyphs(None).train.paths[0].startswith(str(tmp_path / "cache" / "uhml" / "glyphs" / "v1"))
    monkeypatch.setenv("XDG_CACHE_HOME", "")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert glyphs(None).train.paths[0].startswith(str(tmp_path / "home" / ".cache" / "uhml" / "glyphs" / "v1"))


def test_an_interruption_leaves_nothing_behind(few, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(module, "_write_index", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            glyphs(tmp_path)
    assert list(tmp_path.iterdir()) == []
    assert len(glyphs(tmp_path).train.class_names) == 5


def test_another_run_may_be_faster(few, tmp_path, monkeypatch):
    other = tmp_path / "other"
    expected = len(glyphs(other).train)
    write_index = module._write_index

    def slow(file, kept):
        write_index(file, kept)
        (tmp_path / "mine").mkdir(exist_ok=True)
        (other / "v1").rename(tmp_path / "mine" / "v1")

    monkeypatch.setattr(module, "_write_index", slow)
    assert len(glyphs(tmp_path / "mine").train) == expected
    assert [path.name for path in (tmp_path / "mine").iterdir()] == ["v1"]


def test_what_is_drawn_is_not_drawn_again(few, tmp_path, monkeypatch):
    first = glyphs(tmp_path)
    monkeypatch.setattr(module, "_draw_all", None)
    assert glyphs(tmp_path).train.paths == first.train.paths


def test_unwritable_root(few, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"Cannot keep the glyphs in .*Set data\.root to a folder that can be written"):
        glyphs(tmp_path / "file" / "below")
