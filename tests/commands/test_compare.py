import json
import re
import shutil
import statistics

import matplotlib
import numpy as np
import pytest
from PIL import Image

from uhml import cli
from uhml.config import dump_config, load_config


def compare(*words):
    return cli.main(["compare", *map(str, words)])


@pytest.fixture
def runs(tmp_path, tiny_config):
    """Three seeds, another curvature, and one that is not finished; as runs leave them, but for the scores."""
    recalls = {}

    def leave(name, *overrides, recall=(), finished=True):
        folder = tmp_path / name
        folder.mkdir()
        (folder / "config.yaml").write_text(dump_config(load_config(tiny_config, ["train.num_steps=40", *overrides])))
        lines = []
        for step, value in zip((0, 20, 40), recall, strict=False):
            scores = {"recall_at_1": value, "recall_at_4": value + 0.1, "map_at_r": value / 2, "nmi": value / 3}
            lines.append({"kind": "unseen_backbone", "step": step, **dict.fromkeys(scores, 0.25)})
            lines.append({"kind": "unseen_ball", "step": step, **scores})
            lines += [{"kind": "train", "step": step + i, "loss": 1 / (step + i)} for i in range(1, 20)]
        (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        if finished:
            (folder / "result.json").write_text(json.dumps({"seconds": 12.34}))
        else:
            with (folder / "metrics.jsonl").open("a") as file:
                file.write('{"kind": "train", "step": 3')
        recalls[name] = recall

    leave("s0", recall=(0.3, 0.5, 0.7))
    leave("s1", "train.seed=1", "data.num_workers=1", recall=(0.3, 0.6, 0.8))
    leave("s2", "train.seed=2", recall=(0.3, 0.55, 0.72))
    leave("flat $x_{", "model.curvature=0", recall=(0.3, 0.4, 0.6))
    leave("going", "train.seed=3", recall=(0.3, 0.9), finished=False)
    return tmp_path, recalls


def test_scores_settings_and_spread_over_seeds(runs, capsys):
    folder, recalls = runs
    assert compare(*[folder / name for name in recalls], "--json") == 0
    found = json.loads(capsys.readouterr().out)
    for run, (name, recall) in zip(found["runs"], recalls.items(), strict=True):
        assert run["run"] == str(folder / name)
        assert run["trained"]["recall_at_1"] == recall[-1]
        assert run["frozen"]["nmi"] == 0.25
        # What may change unasked is not named, though it differs.
        assert set(run["settings"]) == {"model.curvature", "train.seed"}
    assert [run["state"] for run in found["runs"]] == ["finished"] * 4 + ["unfinished"]
    assert found["runs"][0]["seconds"] == 12.34
    seeds, flat = found["groups"]
    assert seeds["runs"] == [str(folder / name) for name in ("s0", "s1", "s2", "going")]
    assert seeds["settings"] == {"model.curvature": 0.1}
    expected = [0.7, 0.8, 0.72]
    assert seeds["trained"]["recall_at_1"]["mean"] == pytest.approx(statistics.fmean(expected))
    assert seeds["trained"]["recall_at_1"]["deviation"] == pytest.approx(np.std(expected, ddof=1))
    assert flat["trained"]["map_at_r"] == {"mean": 0.3, "deviation": None}


def test_table_and_plot(runs, capsys):
    folder, recalls = runs
    out = folder / "c.png"
    assert compare(*[folder / name for name in recalls], "--out", out) == 0
    said, told = capsys.readouterr()
    assert f"The plot is in {out}." in told
    mean, deviation = 100 * statistics.fmean([0.7, 0.8, 0.72]), 100 * np.std([0.7, 0.8, 0.72], ddof=1)
    assert "mean of 3" in said
    assert f"{mean:.1f} ± {deviation:.1f}" in said
    assert "flat $x_{" in said
    assert "39 / 40" in said
    assert "unfinished" in said
    with Image.open(out) as image:
        colours = image.convert("RGB").getcolors(1 << 24)
        assert {(31, 119, 180), (255, 127, 14)} <= {colour for _, colour in colours}
    assert compare(folder / "s0", "--out", out) == 2
    assert "is there already" in capsys.readouterr().err
    assert compare(folder / "s0", "--out", out, "--overwrite") == 0


def test_a_name_that_matplotlib_would_hide_is_in_the_legend(runs):
    folder, _ = runs
    (folder / "s0").rename(folder / "_s0")
    assert compare(folder / "_s0", "--out", folder / "c.svg") == 0
    assert "<!--  _s0 -->" in (folder / "c.svg").read_text()


def test_a_run_as_uhml_leaves_it(finished_run, tmp_path, capsys):
    assert compare(finished_run, "--json", "--out", tmp_path / "c.svg") == 0
    (found,) = json.loads(capsys.readouterr().out)["runs"]
    result = json.loads((finished_run / "result.json").read_text())
    assert (found["state"], found["step"], found["seconds"]) == ("finished", 6, result["seconds"])
    assert found["trained"]["recall_at_4"] == result["trained"]["recall_at_k"]["4"]
    assert found["frozen"]["map_at_r"] == result["frozen"]["map_at_r"]
    assert (tmp_path / "c.svg").read_text().count("<path") > 10


def test_the_same_run_twice_over_is_no_second_seed(runs, capsys):
    folder, _ = runs
    shutil.copytree(folder / "s0", folder / "again")
    names = [str(folder / name) for name in ("s0", "again", "s1")]
    assert compare(*names, "--json") == 0
    groups = json.loads(capsys.readouterr().out)["groups"]
    assert [group["runs"] for group in groups] == [[names[0], names[2]], [names[1]]]
    assert compare(*names[:2]) == 0
    said = capsys.readouterr().out
    assert "70.0" in said
    assert "mean of" not in said


def test_seeds_that_come_twice_are_told_apart_in_table_and_plot(runs, capsys):
    folder, _ = runs
    for name in ("s0", "s1"):
        shutil.copytree(folder / name, folder / f"r{name[1:]}")
    names = ["s0", "s1", "r0", "r1"]
    out = folder / "c.svg"
    with matplotlib.rc_context({"svg.fonttype": "none"}):
        assert compare(*[folder / name for name in names], "--out", out) == 0
    said = " ".join(capsys.readouterr().out.split())
    assert "mean of 2, from s0" in said
    assert "mean of 2, from r0" in said
    assert ">2 seeds, from s0<" in out.read_text()
    assert ">2 seeds, from r0<" in out.read_text()


def test_runs_on_other_pictures_are_no_seeds_of_one_setting(runs, capsys):
    folder, _ = runs
    shutil.copytree(folder / "s1", folder / "elsewhere")
    config = (folder / "elsewhere" / "config.yaml").read_text()
    (folder / "elsewhere" / "config.yaml").write_text(re.sub("root: .*", r"root: else\\${where}", config))
    assert compare(folder / "s0", folder / "elsewhere") == 0
    said = capsys.readouterr().out
    assert "data.root=else${where}" in said
    assert "mean of" not in said


def test_a_run_without_labels(tmp_path, tiny_config, capsys):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.yaml").write_text(dump_config(load_config(tiny_config)))
    (tmp_path / "run" / "metrics.jsonl").write_text('{"kind": "train", "step": 1, "loss": 0.5}\n')
    (tmp_path / "run" / "result.json").write_text('{"seconds": 1.0}')
    assert compare(tmp_path / "run", "--out", tmp_path / "c.png") == 0
    assert "seconds" in capsys.readouterr().out


def test_what_is_no_run_is_passed_over_among_others(runs, tmp_path, capsys, caplog):
    folder, _ = runs
    (tmp_path / "notes.txt").touch()
    assert compare("--json", folder / "s0", tmp_path / "notes.txt", tmp_path) == 0
    assert [run["run"] for run in json.loads(capsys.readouterr().out)["runs"]] == [str(folder / "s0")]
    assert caplog.text.count(" holds no run: ") == 2


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["flat"], r"There is no run flat\. Did you mean 'flat \$x_\{'"),
        (["empty"], "empty holds no run: config.yaml or metrics.jsonl is missing"),
        (["s0", "./s0"], "A run is named twice"),
        (["broken"], "broken/metrics.jsonl is damaged"),
        (["s0", "--out", "absent/c.png"], "there is no folder"),
        (["s0", "--out", "c.txt"], "must end in .png"),
    ],
)
def test_what_is_refused(runs, monkeypatch, capsys, words, message):
    folder, _ = runs
    monkeypatch.chdir(folder)
    (folder / "empty").mkdir()
    (folder / "broken").mkdir()
    (folder / "broken" / "config.yaml").write_text((folder / "s0" / "config.yaml").read_text())
    (folder / "broken" / "metrics.jsonl").write_text("{}\nhalf a l\n{}\n")
    assert compare(*words) == 2
    assert re.search(message, capsys.readouterr().err)
