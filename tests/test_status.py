import dataclasses
import os
import socket

import pytest

from uhml.errors import UserError
from uhml.interruption import Preempted
from uhml.run import status
from uhml.run.status import StatusReport, read_status, reported, write_status


def report(folder, **options):
    return StatusReport(folder, 10, 2, **{"active": True, "before": None, **options})


def test_what_is_written_is_read(tmp_path):
    assert read_status(tmp_path) is None
    report(tmp_path)
    found = read_status(tmp_path)
    assert (found.state, found.step, found.num_steps, found.restarts, found.world_size) == ("starting", 0, 10, 0, 2)
    assert (found.host, found.pid) == (socket.gethostname(), os.getpid())
    assert found.updated_at.endswith("+00:00")
    later = dataclasses.replace(found, step=7)
    write_status(tmp_path, later)
    assert read_status(tmp_path) == later
    no_utf8 = dataclasses.replace(later, state="failed", error="The picture \udcff.png is empty.")
    write_status(tmp_path, no_utf8)
    assert read_status(tmp_path) == no_utf8
    assert [path.name for path in tmp_path.iterdir()] == ["status.json"]


def test_steps_are_told_once_a_second_with_their_pace(tmp_path, monkeypatch):
    now = [100.0]
    monkeypatch.setattr(status.time, "monotonic", lambda: now[0])
    running = report(tmp_path)
    running.phase("train")
    told = []
    for step in range(1, 11):
        now[0] += 0.25
        running.step(step)
        told.append(read_status(tmp_path).step)
    assert told == [0, 0, 0, 0, 5, 5, 5, 5, 5, 10]
    assert read_status(tmp_path).seconds_per_step == pytest.approx(0.25)
    running.phase("evaluate")
    assert (read_status(tmp_path).phase, read_status(tmp_path).step) == ("evaluate", 10)


def test_the_pace_is_that_of_the_last_steps_and_no_single_one_s(tmp_path, monkeypatch):
    now = [100.0]
    monkeypatch.setattr(status.time, "monotonic", lambda: now[0])
    running = report(tmp_path)
    for step, took in enumerate((1.0, 2.0, 2.0, 12.0), 1):
        now[0] += took
        running.step(step)
    # Two, a tenth of the way to twelve.
    assert read_status(tmp_path).seconds_per_step == pytest.approx(3.0)


def test_the_end_is_told_and_the_next_launch_counts_on(tmp_path):
    for error, state, said in (
        (Preempted(15), "preempted", None),
        (ZeroDivisionError("two\nlines"), "failed", "two lines"),
        (KeyError(), "failed", "KeyError"),
    ):
        with pytest.raises(type(error)), reported(report(tmp_path)):
            raise error
        assert (read_status(tmp_path).state, read_status(tmp_path).error) == (state, said)
    first = read_status(tmp_path)
    with reported(report(tmp_path, before=first)):
        now = read_status(tmp_path)
        assert (now.state, now.restarts, now.error, now.started_at) == ("starting", 1, None, first.started_at)
    assert read_status(tmp_path).state == "finished"


@pytest.mark.parametrize("state", ["running", "failed"])
def test_with_its_result_a_run_is_finished_though_it_was_killed_before_it_could_say_so(tmp_path, state):
    report(tmp_path)
    write_status(tmp_path, dataclasses.replace(read_status(tmp_path), state=state, error="the disk is full"))
    assert read_status(tmp_path).state == state
    (tmp_path / "result.json").write_text("{}")
    assert (read_status(tmp_path).state, read_status(tmp_path).error) == ("finished", None)


def test_other_ranks_write_nothing(tmp_path):
    with reported(report(tmp_path, active=False)) as running:
        running.phase("train")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("text", ["", "{", "[]", '{"state": "running"}', '{"state": "running", "new": 1}'])
def test_what_is_no_status_is_refused_in_a_sentence(tmp_path, text):
    (tmp_path / "status.json").write_text(text)
    with pytest.raises(UserError, match=r"status\.json is no status of a run; remove it, and the run can go on"):
        read_status(tmp_path)
