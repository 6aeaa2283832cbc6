import pytest

from uhml.data.datasets import load_splits
from uhml.errors import UserError


@pytest.fixture
def root(tmp_path, draw):
    """Ten classes in each part, the i-th with i + 1 pictures."""
    draw(tmp_path, *[f"{i:02d}/{k}.png" for i in range(20) for k in range(i % 10 + 1)])
    return tmp_path


def test_part_of_the_classes_is_evenly_spaced(root):
    splits = load_splits("folder", root, num_classes=4)
    assert splits.train.class_names == ("00", "02", "05", "07")
    assert splits.test.class_names == ("10", "12", "15", "17")
    assert splits.test.labels.tolist() == [0] * 1 + [1] * 3 + [2] * 6 + [3] * 8


def test_all_classes_may_be_asked_for(root):
    assert load_splits("folder", root, 10).train.paths == load_splits("folder", root).train.paths


@pytest.mark.parametrize("num_classes", [0, 11])
def test_other_numbers_of_classes_are_refused(root, num_classes):
    with pytest.raises(UserError, match=rf"data\.num_classes={num_classes} .* the train part has 10 classes"):
        load_splits("folder", root, num_classes)


def test_part_of_no_classes_is_refused(tmp_path, draw):
    draw(tmp_path, "1.png")
    with pytest.raises(UserError, match=r"data\.num_classes=2 .* no classes are known"):
        load_splits("folder", tmp_path, 2)


def test_unknown_data_set():
    with pytest.raises(UserError, match=r"data\.dataset=cub is none of glyphs, .*Did you mean 'cub200'\?"):
        load_splits("cub", None)
