import os
import pickle

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from uhml.data.names import Names, absolute, common_folder

FILE_NAMES = st.lists(st.text(st.characters(codec="utf-8", exclude_characters="\0"), min_size=1), max_size=20)


@given(FILE_NAMES, st.integers(-25, 25), st.integers(-25, 25), st.sampled_from([None, 1, 2, -1]))
def test_names_are_those_that_were_given(names, start, stop, step):
    packed = Names(names)
    assert len(packed) == len(names)
    assert list(packed) == names == [packed[i] for i in range(len(names))]
    assert packed[start:stop:step] == tuple(names)[start:stop:step]
    assert packed == tuple(names) == pickle.loads(pickle.dumps(packed))
    assert packed != [*names, "another"]
    if names:
        assert packed[-1] == packed[np.int64(len(names) - 1)] == names[-1]
        assert packed != [*names[:-1], names[-1] + "x"]


def test_names_that_are_no_text_survive_and_places_that_are_none_are_refused():
    name = os.fsdecode(b"caf\xe9.jpg")
    assert list(Names([name, "b"])) == [name, "b"]
    assert os.fsencode(Names([name])[0]) == b"caf\xe9.jpg"
    for place in (1, -2):
        with pytest.raises(IndexError):
            Names(["a"])[place]


@pytest.mark.parametrize("many", [10, 9000])
def test_names_take_eight_bytes_more_than_their_letters(many):
    packed = Names(f"folder/{i:010d}.jpg" for i in range(many))
    assert len(packed._bytes) + packed._ends.nbytes == many * (7 + 14 + 1 + 8)
    assert list(packed)[-1] == f"folder/{many - 1:010d}.jpg"


def test_absolute_paths_are_those_of_the_system_and_so_is_their_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    paths = ["a.jpg", "b/c.jpg", "./b/../d/e.jpg", "/x/y.jpg", "b//c.jpg", "../z.jpg", "b/..", "/y.jpg"]
    assert list(absolute(paths)) == [os.path.abspath(path) for path in paths]
    assert common_folder(["/x/yz/a", "/x/y/a", "/x/y-/b/a"]) == "/x"
    assert common_folder(["y/a", "y/b"]) == "y"
    assert common_folder(["a", "y/b"]) == ""
