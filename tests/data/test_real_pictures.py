"""Real archives, real files: counts, and that every picture can be read."""

import numpy as np
import pytest

from uhml.data.datasets import load_splits
from uhml.data.decode import find_unreadable, load_rgb

pytestmark = pytest.mark.real_data


def test_half_of_cars196(cars196_root):
    splits = load_splits("cars196", cars196_root)
    assert (len(splits.train), len(splits.test)) == (4052, 4092)
    assert len(splits.train.class_names) == len(splits.test.class_names) == 98
    assert splits.train.class_names[0] == "001 AM General Hummer SUV 2000"
    assert find_unreadable(splits.train.paths[::10], 2) == []


def test_omniglot_in_the_layout_of_sop(omniglot_root):
    splits = load_splits("sop", omniglot_root)
    assert (len(splits.train), len(splits.train.class_names)) == (19_280, 964)
    assert (len(splits.test), len(splits.test.class_names)) == (13_180, 659)
    assert set(np.bincount(splits.test.labels)) == {20}
    assert len({*splits.train.super_class_names, *splits.test.super_class_names}) == 50
    assert find_unreadable(splits.test.paths[::10], 2) == []
    assert set(np.unique(load_rgb(splits.test.paths[0]))) == {0, 255}


def test_omniglot_as_a_folder(omniglot_root):
    splits = load_splits("folder", omniglot_root)
    assert (len(splits.train.class_names), len(splits.test.class_names)) == (25, 25)
    assert len(splits.train) + len(splits.test) == 32_460
