import dataclasses
import logging
import subprocess
import sys

import pytest
import torch

from uhml.config import Config, TrainConfig, load_config
from uhml.errors import UserError
from uhml.interruption import Preempted
from uhml.run.checkpoint import save_checkpoint
from uhml.run.run_dir import CONTENTS, open_run_dir, record_config
from uhml.run.status import read_status


def refusal(*args, **options):
    with pytest.raises(UserError) as caught, open_run_dir(*args, **options):
        pass
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.fixture
def unfinished(tmp_path):
    """A run that was preempted after step 4."""
    run_dir = tmp_path / "run"

    def run():
        with open_run_dir(run_dir, Config()):
            save_checkpoint(run_dir / "checkpoints", 2, {"step": 2}, 3)
            save_checkpoint(run_dir / "checkpoints", 4, {"step": 4, "a": torch.ones(99)}, 3)
            raise Preempted(15)

    with pytest.raises(Preempted):
        run()
    return run_dir


def test_a_new_folder_gets_the_config_and_a_log_while_the_run_lasts(tmp_path):
    run_dir = tmp_path / "runs" / "mine"
    with open_run_dir(run_dir, Config()) as run:
        logging.getLogger("uhml").error("in the run")
        assert (run.folder, run.checkpoint) == (run_dir, None)
        assert read_status(run_dir).state == "starting"
    logging.getLogger("uhml").error("after it")
    names = {path.name for path in run_dir.iterdir()}
    assert names == {"config.yaml", "checkpoints", "hierarchies", "logs", "status.json", "lock"} <= set(CONTENTS)
    assert load_config(run_dir / "config.yaml") == Config()
    assert read_status(run_dir).state == "finished"
    log = (run_dir / "logs" / "rank0.log").read_text()
    assert "in the run" in log
    assert "after it" not in log


def test_an_unfinished_run_goes_on_from_its_newest_whole_checkpoint(unfinished, caplog):
    (unfinished / "checkpoints" / "step-00000006.pt.partial").write_bytes(b"half")
    (unfinished / "hierarchies" / "step-00000006.npz.partial").write_bytes(b"half")
    for step in (2, 4, 6):
        (unfinished / "hierarchies" / f"step-0000000{step}.npz").write_bytes(b"tree")
    assert (read_status(unfinished).state, read_status(unfinished).restarts) == ("preempted", 0)
    with open_run_dir(unfinished, Config()) as run:
        assert run.checkpoint.name == "step-00000004.pt"
        assert run.status.status.restarts == 1
    assert not list(unfinished.rglob("*.partial"))
    # What comes after the checkpoint comes again, or with another config perhaps never.
    trees = [f"step-0000000{step}.npz" for step in (2, 4)]
    assert sorted(path.name for path in (unfinished / "hierarchies").iterdir()) == trees
    path = unfinished / "checkpoints" / "step-00000004.pt"
    path.write_bytes(path.read_bytes()[:-100])
    with open_run_dir(unfinished, Config()) as run:
        assert run.checkpoint.name == "step-00000002.pt"
    assert str(path) in caplog.text
    for path in (unfinished / "checkpoints").iterdir():
        path.write_bytes(b"half")
    assert refusal(unfinished, Config()).endswith("checkpoints are damaged. Begin anew with --overwrite.")


def test_a_users_copy_of_a_checkpoint_is_not_gone_on_from_and_not_lost(unfinished):
    newest = unfinished / "checkpoints" / "step-00000004.pt"
    copy = newest.with_stem("step-00000004_old")
    copy.write_bytes(newest.read_bytes())
    with open_run_dir(unfinished, Config()) as run:
        assert run.checkpoint == newest
    for path in {*newest.parent.iterdir()} - {copy}:
        path.unlink()
    assert f"{copy} is of no step's name: move it elsewhere" in refusal(unfinished, Config())
    assert copy.exists()


def test_fewer_steps_than_are_taken_are_refused(unfinished):
    fewer = dataclasses.replace(Config(), train=TrainConfig(num_steps=3))
    said = refusal(unfinished, fewer, allow_change=["train.num_steps"])
    assert said == "train.num_steps=3: the run has taken 4 steps already."
    # Nor is it recorded as what the run goes on with.
    assert load_config(unfinished / "config.yaml") == Config()
    just_enough = dataclasses.replace(Config(), train=TrainConfig(num_steps=4))
    with open_run_dir(unfinished, just_enough, allow_change=["train.num_steps"]) as run:
        assert run.checkpoint.name == "step-00000004.pt"


def test_another_config_is_refused_field_by_field_unless_allowed(unfinished):
    changed = dataclasses.replace(Config(), train=TrainConfig(seed=5, num_steps=7, log_every=3, checkpoint_every=9))
    message = refusal(unfinished, changed)
    assert "train.seed: 0 -> 5" in message
    assert "train.num_steps: 1000 -> 7" in message
    assert "--allow-change train.num_steps,train.seed" in message
    assert "log_every" not in message
    assert "train.seed: 0 -> 5" in refusal(unfinished, changed, allow_change=["train.num_steps"])
    assert "Did you mean 'train.seed'?" in refusal(unfinished, changed, allow_change=["train.sed"])
    assert load_config(unfinished / "config.yaml") == Config()
    with open_run_dir(unfinished, changed, allow_change=["train.num_steps", "train.seed"]) as run:
        assert run.checkpoint is not None
        # Whether the checkpoint fits it is yet to be seen.
        assert load_config(unfinished / "config.yaml") == Config()
        record_config(run.folder, changed)
    assert load_config(unfinished / "config.yaml") == changed


def test_a_finished_run_is_replaced_only_when_told_so_and_only_what_a_run_leaves(tmp_path):
    for name in CONTENTS:
        path = tmp_path / name.replace("*", "00000001")
        if "." in name or name == "lock":
            path.write_text("old")
        else:
            path.mkdir()
            (path / "old").touch()
    assert "holds a finished run: name another folder by --run-dir, or add --overwrite" in refusal(tmp_path, Config())
    assert (tmp_path / "result.json").read_text() == "old"
    with open_run_dir(tmp_path, Config(), overwrite=True) as run:
        assert run.checkpoint is None
    names = ["checkpoints", "config.yaml", "hierarchies", "launch", "lock", "logs", "status.json"]
    assert sorted(path.name for path in tmp_path.iterdir()) == names
    assert list((tmp_path / "checkpoints").iterdir()) == []
    assert (tmp_path / "launch" / "old").exists()


def test_a_link_in_the_place_of_a_folder_is_removed_and_what_it_leads_to_stays(unfinished, tmp_path):
    (unfinished / "checkpoints").rename(tmp_path / "large")
    (unfinished / "checkpoints").symlink_to(tmp_path / "large")
    with open_run_dir(unfinished, Config(), overwrite=True) as run:
        assert run.checkpoint is None
    assert not (unfinished / "checkpoints").is_symlink()
    assert len(list((tmp_path / "large").iterdir())) == 2


def test_a_log_takes_names_that_are_no_utf8(tmp_path):
    program = (
        "import logging, pathlib, sys; from uhml import logs\n"
        "with logs.to_file(pathlib.Path(sys.argv[1])):\n"
        "    logging.getLogger('uhml').error('left out: %s', 'caf\\udce9.png')\n"
    )
    command = [sys.executable, "-c", program, tmp_path / "log"]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    assert r"left out: caf\udce9.png" in (tmp_path / "log").read_text()
    assert "Logging error" not in ended.stderr


def test_a_run_that_ended_before_its_first_checkpoint_begins_again_whatever_its_config(tmp_path):
    with pytest.raises(Preempted), open_run_dir(tmp_path / "run", Config()):
        raise Preempted(15)
    log = (tmp_path / "run" / "logs" / "rank0.log").read_text()
    assert "Stopped by SIGTERM" in log
    assert "Traceback" not in log  # it is no error
    (tmp_path / "run" / "metrics.jsonl").write_text("old")
    with open_run_dir(tmp_path / "run", dataclasses.replace(Config(), train=TrainConfig(seed=5))) as run:
        assert run.checkpoint is None
        assert run.status.status.restarts == 1
    assert not (tmp_path / "run" / "metrics.jsonl").exists()


def test_a_users_mistake_before_the_first_checkpoint_leaves_no_folder(tmp_path):
    for there in (False, True):
        run_dir = tmp_path / f"run{there}"
        if there:
            (run_dir / "launch").mkdir(parents=True)
        with pytest.raises(UserError, match="typo"), open_run_dir(run_dir, Config()):
            raise UserError("typo")
        assert run_dir.exists() == there
    assert read_status(run_dir).state == "failed"
    assert read_status(run_dir).error == "typo"
    with pytest.raises(ZeroDivisionError), open_run_dir(tmp_path / "bug", Config()):
        _ = 1 / 0
    assert "ZeroDivisionError" in (tmp_path / "bug" / "logs" / "rank0.log").read_text()


def test_a_second_launch_is_refused_and_told_where_the_first_is(tmp_path):
    code = "import sys; from pathlib import Path; from uhml.config import Config\n"
    code += "from uhml.run.run_dir import open_run_dir\n"
    code += "with open_run_dir(Path(sys.argv[1]), Config()): print('in', flush=True); sys.stdin.read()"
    command = [sys.executable, "-c", code, str(tmp_path / "run")]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as first:
        assert first.stdout.readline() == "in\n"
        for overwrite in (False, True):
            message = refusal(tmp_path / "run", Config(), overwrite)
            assert "is in use by another launch" in message
            assert f"process {first.pid}" in message
        first.kill()
    # However it ended, its lock is gone.
    with open_run_dir(tmp_path / "run", Config()):
        pass


@pytest.mark.parametrize("overwrite", [False, True])
def test_a_folder_with_anything_else_in_it_is_left_alone(tmp_path, overwrite):
    (tmp_path / "thesis.tex").write_text("years of work")
    (tmp_path / "config.yaml").write_text("mine")
    assert "holds 'thesis.tex', which no run leaves" in refusal(tmp_path, Config(), overwrite)
    assert (tmp_path / "thesis.tex").read_text() == "years of work"
    assert (tmp_path / "config.yaml").read_text() == "mine"
    (tmp_path / "thesis.tex").unlink()
    if not overwrite:
        assert "holds 'config.yaml' but no run to go on with" in refusal(tmp_path, Config())
        assert [path.name for path in tmp_path.iterdir()] == ["config.yaml"]


def test_a_name_that_is_no_utf8_is_refused(tmp_path):
    assert "b\\udcff' is no name in UTF-8" in refusal(tmp_path / "b\udcff", Config())
    assert not list(tmp_path.iterdir())


def test_a_folder_that_cannot_be_made_is_the_users_to_mend(tmp_path):
    (tmp_path / "file").touch()
    assert f"--run-dir {tmp_path / 'file'} is a file" in refusal(tmp_path / "file", Config())
    assert "cannot be written" in refusal(tmp_path / "file" / "run", Config())
