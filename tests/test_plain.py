"""What is read of files that anything may have happened to."""

import dataclasses
import json
import os
import time

import pytest
from omegaconf import OmegaConf

from uhml.errors import UserError
from uhml.plain import MAX_ALIASES, Damaged, Text, parse_yaml, read_json


@dataclasses.dataclass
class Told:
    step: int
    names: list[Text]


def test_what_was_written_is_read(tmp_path):
    file = tmp_path / "told.json"
    file.write_text('{"step": 3, "names": ["a"]}')
    assert read_json(file, Told) == Told(3, ["a"])
    told = Told(4, ["no UTF-8: \udcff"])
    file.write_text(json.dumps(dataclasses.asdict(told)))
    assert read_json(file, Told) == told
    assert read_json(tmp_path / "other.json", Told) is None
    assert read_json(file / "told.json", Told) is None


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"{",
        b"null",
        b"[]",
        b"\xff",
        b'{"step": 3}',
        b'{"step": "x", "names": []}',
        b'{"step": 3, "names": [1]}',
        b'{"step": 1' + b"0" * 5000 + b', "names": []}',
        b"[" * 200_000,
    ],
    ids=range(10),
)
def test_what_is_damaged_is_told_with_its_file(tmp_path, content):
    (tmp_path / "told.json").write_bytes(content)
    with pytest.raises(Damaged, match=r"told\.json is damaged: .*\.$"):
        read_json(tmp_path / "told.json", Told)


def test_nobody_waits_for_a_pipe(tmp_path):
    os.mkfifo(tmp_path / "told.json")
    with pytest.raises(Damaged, match="it is no regular file"):
        read_json(tmp_path / "told.json", Told)


def test_yaml_is_as_omegaconf_has_it():
    text = "a: {b: 1e3, c: [x, null]}\nd: ${a.b}\n"
    assert OmegaConf.to_container(parse_yaml(text, "mine")) == OmegaConf.to_container(OmegaConf.create(text))
    assert parse_yaml("", "mine") == {}
    assert parse_yaml("a: &a 1\nb: *a\n", "mine") == {"a": 1, "b": 1}


def bomb(levels, times):
    rows = [f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * times)}]" for i in range(1, levels)]
    return "\n".join(["a0: &a0 [x]", *rows])


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (bomb(9, 10), f"more than {MAX_ALIASES} aliases"),
        ("[" * 5000, "is no YAML"),
        ("9" * 10, "is no YAML"),
        ("a: " + "9" * 5000, "is no YAML"),
        ("a: [", "is no YAML"),
        ("# \n" * 100_000, "is no config: it has 300,000 letters"),
        (7, "is no YAML: it is no text"),
    ],
)
def test_yaml_that_would_not_end_is_refused(text, said):
    began = time.process_time()
    with pytest.raises(UserError, match=f"^mine:? {said}"):
        parse_yaml(text, "mine")
    assert time.process_time() - began < 60


def test_as_many_aliases_as_are_followed_stay_small():
    for times in (2, 3, 4, 8):
        assert len(OmegaConf.to_yaml(parse_yaml(bomb(1 + MAX_ALIASES // times, times), "mine"))) < 20_000
