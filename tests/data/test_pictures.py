import numpy as np

from uhml.data.pictures import Pictures, Splits
from uhml.data.splitting import hold_out


def test_classes_are_numbered_by_sorted_name():
    pictures = Pictures.from_names(["x", "y", "z"], ["b", "a", "b"], ["k", "k", "j"])
    assert pictures.class_names == ("a", "b")
    assert pictures.labels.tolist() == [1, 0, 1]
    assert pictures.labels.dtype == np.int64
    assert pictures.super_class_names == ("j", "k")
    assert pictures.super_labels.tolist() == [1, 1, 0]


def test_selected_pictures_keep_their_class_numbers():
    pictures = Pictures.from_names(["x", "y", "z"], ["b", "a", "c"], ["k", "k", "j"]).select([2, 0])
    assert pictures.paths == ("z", "x")
    assert pictures.labels.tolist() == [2, 1]
    assert pictures.super_labels.tolist() == [0, 1]
    assert pictures.class_names == ("a", "b", "c")


def test_pictures_without_classes():
    pictures = Pictures(paths=("x", "y")).select(np.array([1]))
    assert len(pictures) == 1
    assert pictures.labels is None
    assert pictures.super_labels is None


def test_the_last_quarter_of_the_training_classes_is_held_out():
    names = [f"class {i % 9}" for i in range(18)]
    train = Pictures.from_names([f"{i}.png" for i in range(18)], names, None)
    found = hold_out(Splits(train=train, test=None))
    assert found.test.paths == ("7.png", "8.png", "16.png", "17.png")
    assert set(found.train.paths) == set(train.paths) - set(found.test.paths)
