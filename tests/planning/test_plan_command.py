import dataclasses
import json

import pytest

from uhml import cli
from uhml.planning import command
from uhml.planning.plan import greatest

pytestmark = pytest.mark.usefixtures("quick", "one_thread")


def test_a_tiny_run_is_planned_as_tables(words, capsys):
    assert cli.main(["plan", *words]) == 0
    said = capsys.readouterr()
    assert "5 steps of 16 views, 24 training pictures, on this machine's CPU" in said.out
    assert "data.cache" not in said.out
    for part in ("training steps", "linkage", "evaluation", "rank 0, host", "checkpoints"):
        assert part in said.out
    assert "Rank 0 has the memory for" in said.err


def test_json_holds_the_whole_plan_and_its_parts_add_up(words, capsys):
    assert cli.main(["plan", *words, "--json", "--gpu", "h100", "--nodes", "2", "--gpus-per-node", "4"]) == 0
    plan = json.loads(capsys.readouterr().out)
    parts = dict(plan["seconds"])
    assert parts.pop("total") == pytest.approx(sum(parts.values()))
    assert parts["steps"] >= 5 * plan["seconds_per_step"] > 0
    assert plan["images_per_second"] == pytest.approx(16 / plan["seconds_per_step"])
    assert plan["sizes"] == {"train": 24, "test": 24, "gallery": 0}
    assert plan["memory_of_rank"] == 0.92 * 80e9
    assert plan["wire"] > plan["least_wire"] > plan["network"]["learned"]
    assert plan["num_hierarchies"] == plan["num_evaluations"] == 4


def test_a_cache_is_counted_and_not_yet_made(words, tmp_path, capsys):
    options = ["--json", "--gpu", "h100", "model.backbone=test_efficientnet.r160_in1k", "model.weights=random"]
    cache = tmp_path / "cache"
    assert cli.main(["plan", *words, f"data.cache={cache}", "data.reduce_to=40", *options]) == 0
    assert json.loads(capsys.readouterr().out)["cache"] == 48 * 40 * 40 * 3
    assert not cache.exists()


def test_reading_is_told_to_limit_a_fast_gpu_which_has_the_memory_of_its_data_sheet(words, capsys):
    plans = {}
    for gpu in ("l4", "h200"):
        assert cli.main(["plan", *words, "data.num_workers=1", "--json", "--gpu", gpu]) == 0
        plans[gpu] = json.loads(capsys.readouterr().out)
    assert "Reading limits the steps" in " ".join(plans["h200"]["limits"])
    assert plans["h200"]["memory_of_rank"] > plans["l4"]["memory_of_rank"]


@pytest.mark.parametrize(
    ("overrides", "options", "words_of_refusal"),
    [
        (
            ["hierarchy.num_neighbors=20"],
            ["--gpu", "h100", "--nodes", "8", "--gpus-per-node", "8", "--pictures", "100000000"],
            "with hierarchy.num_neighbors=20: hierarchy.num_neighbors=",
        ),
        (["hierarchy.mode=dense"], ["--pictures", "40000", "--gpu", "h200"], "take hierarchy.mode=graph"),
        (
            ["data.image_size=64", "train.global_batch_size=1048576"],
            ["--pictures", "2000000", "--gpu", "l4"],
            "train.global_batch_size=",
        ),
    ],
)
def test_what_cannot_fit_is_refused_by_the_option_to_change(words, overrides, options, words_of_refusal, capsys):
    overrides = [*overrides, *(["train.global_batch_size=64"] if "64" not in str(overrides) else [])]
    assert cli.main(["plan", *words, *overrides, *options]) == 2
    said = capsys.readouterr()
    refusal = said.err.strip().splitlines()[-1]
    assert "error: " in refusal
    assert words_of_refusal in refusal
    # What it would take is told all the same.
    assert "rank 0, " in said.out


@pytest.mark.parametrize(
    ("arguments", "words_of_refusal"),
    [
        (["data.root=/nowhere"], "--pictures"),
        (["data.root=null"], "--pictures"),
        (["--gpus-per-node", "3"], "train.global_batch_size=16 must be a multiple of the 3 ranks"),
        (["train.global_batch_size=96"], "of 24 training pictures train.global_batch_size=48 is the largest"),
        (["modl.backbone=x"], "model"),
    ],
)
def test_mistakes_are_told_before_anything_is_measured(words, arguments, words_of_refusal, capsys):
    assert cli.main(["plan", *words, *arguments]) == 2
    said = capsys.readouterr()
    assert words_of_refusal in said.err
    assert "Measuring" not in said.err


@pytest.mark.parametrize("root", ["/nowhere", "null"])
def test_pictures_that_are_elsewhere_are_planned_for_by_their_number(root, words, capsys):
    assert cli.main(["plan", *words, f"data.root={root}", "--pictures", "5000", "--json"]) == 0
    said = capsys.readouterr()
    assert json.loads(said.out)["sizes"] == {"train": 5000, "test": 0, "gallery": 0}
    assert "The pictures are not here" in said.err


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"disk": 1.0}, "GiB of disk, and 0.0 GiB are free here: lower train.keep_checkpoints"),
        ({"memory_of_node": 1.0}, "ranks of a node, with data.num_workers=1 processes each, need"),
    ],
)
def test_a_node_or_a_disk_that_is_too_small_is_refused(words, capsys, monkeypatch, fields, said):
    machine = command._machine
    monkeypatch.setattr(command, "_machine", lambda *options: dataclasses.replace(machine(*options), **fields))
    assert cli.main(["plan", *words]) == 2
    assert said in capsys.readouterr().err


def test_the_greatest_that_fits_is_found():
    assert [greatest(lambda i: i <= 37, below) for below in (1, 2, 37, 38, 39, 10**9)] == [0, 1, 36, 37, 37, 37]
