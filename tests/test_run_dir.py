import logging

import pytest

from uhml.config import Config, load_config
from uhml.errors import UserError
from uhml.run_dir import CONTENTS, open_run_dir


def test_a_new_folder_gets_the_config_and_a_log_while_the_run_lasts(tmp_path):
    run_dir = tmp_path / "runs" / "mine"
    with open_run_dir(run_dir, Config(), overwrite=False):
        logging.getLogger("uhml").error("in the run")
    logging.getLogger("uhml").error("after it")
    assert {path.name for path in run_dir.iterdir()} == {"config.yaml", "checkpoints", "logs"} <= set(CONTENTS)
    assert load_config(run_dir / "config.yaml") == Config()
    log = (run_dir / "logs" / "rank0.log").read_text()
    assert "in the run" in log
    assert "after it" not in log


def test_a_run_is_replaced_only_when_told_so_and_only_what_a_run_leaves(tmp_path):
    for name in CONTENTS:
        if "." in name:
            (tmp_path / name).write_text("old")
        else:
            (tmp_path / name).mkdir()
            (tmp_path / name / "old").touch()
    with pytest.raises(UserError, match="holds a run already: name another folder by --run-dir, or add --overwrite"):
        open_run_dir(tmp_path, Config(), overwrite=False).__enter__()
    assert (tmp_path / "result.json").read_text() == "old"
    with open_run_dir(tmp_path, Config(), overwrite=True):
        pass
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoints", "config.yaml", "logs"]
    assert list((tmp_path / "checkpoints").iterdir()) == []


@pytest.mark.parametrize("overwrite", [False, True])
def test_a_folder_with_anything_else_in_it_is_left_alone(tmp_path, overwrite):
    (tmp_path / "thesis.tex").write_text("years of work")
    (tmp_path / "config.yaml").write_text("mine")
    with pytest.raises(UserError, match=r"holds 'thesis\.tex', which no run leaves"):
        open_run_dir(tmp_path, Config(), overwrite).__enter__()
    assert (tmp_path / "thesis.tex").read_text() == "years of work"
    assert (tmp_path / "config.yaml").read_text() == "mine"


def test_a_folder_that_cannot_be_made_is_the_users_to_mend(tmp_path):
    (tmp_path / "file").touch()
    for place in (tmp_path / "file", tmp_path / "file" / "run"):
        with pytest.raises(UserError, match="cannot be written"):
            open_run_dir(place, Config(), overwrite=False).__enter__()
