"""How a run stands, from what SLURM says and what the run says."""

import contextlib
import dataclasses
import datetime
import json
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from launch import cancel, overview, slurm
from launch.record import JobRecord, write_record
from uhml import cli
from uhml.errors import UserError
from uhml.run.status import RunStatus, StatusReport, read_status, reported, write_status

HERE = socket.gethostname()


def status(state, **changes):
    now = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    plain = RunStatus(
        state=state,
        phase="train",
        step=10,
        num_steps=100,
        restarts=2,
        seconds_per_step=60.0,
        updated_at=now,
        started_at=now,
        host="n17",
        pid=1,
        world_size=4,
        error="the loss is nan" if state == "failed" else None,
    )
    return dataclasses.replace(plain, **changes)


@pytest.fixture
def dead_pid():
    process = subprocess.Popen(["true"])
    process.wait()
    return process.pid


@contextlib.contextmanager
def in_folder(run_dir):
    """Another process that has the run open."""
    code = f"""
import contextlib, pathlib
from uhml.run.lock import lock
with contextlib.ExitStack() as stack:
    lock(pathlib.Path({str(run_dir)!r}), stack)
    print("in", flush=True)
    input()
"""
    with subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdout.readline() == b"in\n"
        yield process.pid
        process.communicate(b"\n")


@pytest.mark.parametrize(
    ("said_by_slurm", "said_by_run", "state", "note"),
    [
        (("PENDING", "Resources"), None, "queued", "Resources"),
        (("PENDING", "BeginTime"), "preempted", "requeued", "BeginTime"),
        (("PENDING", "Priority"), "running", "requeued", "Priority"),
        (("RUNNING", ""), None, "starting", ""),
        (("RUNNING", ""), "preempted", "starting", ""),
        (("RUNNING", ""), "running", "running", ""),
        (("RUNNING", ""), "failed", "failed", "the loss is nan"),
        (("COMPLETING", ""), "running", "stopping", ""),
        (("CANCELLED", ""), "preempted", "cancelled", ""),
        (("CANCELLED", ""), None, "cancelled", ""),
        (("FAILED", ""), "failed", "failed", "the loss is nan"),
        (("OUT_OF_MEMORY", ""), "running", "failed", "SLURM says OUT_OF_MEMORY"),
        (("FAILED", ""), None, "failed", "SLURM says FAILED"),
        (("COMPLETED", ""), "preempted", "preempted", "launch it again"),
        (("UNKNOWN", ""), "finished", "finished", ""),
    ],
)
def test_state_of_a_job(tmp_path, monkeypatch, said_by_slurm, said_by_run, state, note):
    (tmp_path / "launch").mkdir()
    record = JobRecord(cluster="slurm", job_id="7", host=HERE, submitted_at="", num_ranks=4, jobs=str(tmp_path / "no"))
    write_record(tmp_path, record)
    if said_by_run is not None:
        write_status(tmp_path, status(said_by_run))
    if said_by_run == "finished":
        (tmp_path / "result.json").write_text('{"frozen": null, "start": null, "trained": null}')
    monkeypatch.setattr(slurm, "ask", lambda job_id: slurm.Job(*said_by_slurm))
    found = overview.look(tmp_path)
    assert found.state == state
    assert note in found.note
    assert bool(note) == bool(found.note)
    assert found.job_id == "7"
    assert found.is_under_way == (state in ("queued", "requeued", "starting", "running", "stopping"))


def test_a_slot_that_failed_before_the_run_could_say_so_shows_its_error(tmp_path, monkeypatch):
    (tmp_path / "launch").mkdir()
    record = JobRecord(cluster="slurm", job_id="7", host=HERE, submitted_at="", num_ranks=4, jobs=str(tmp_path))
    write_record(tmp_path, record)
    write_status(tmp_path, status("preempted"))
    monkeypatch.setattr(slurm, "ask", lambda job_id: slurm.Job("FAILED"))
    assert overview.look(tmp_path).state == "preempted"
    (tmp_path / "7_0_log.err").write_text("12:00:00 error: data.root=/gone is no folder\n")
    found = overview.look(tmp_path)
    assert (found.state, found.note) == ("failed", "data.root=/gone is no folder")


@pytest.mark.parametrize("state", ["FAILED", "TIMEOUT"])
def test_what_srun_says_last_is_not_the_error(tmp_path, monkeypatch, state):
    (tmp_path / "launch").mkdir()
    record = JobRecord(cluster="slurm", job_id="7", host=HERE, submitted_at="", num_ranks=4, jobs=str(tmp_path))
    write_record(tmp_path, record)
    monkeypatch.setattr(slurm, "ask", lambda job_id: slurm.Job(state))
    printed = "12:00:00 error: data.root=/gone is no folder\nsrun: error: n1: task 0: Exited with exit code 2\n"
    (tmp_path / "7_0_log.err").write_text(f"{printed}slurmstepd-n1: error: x\nsrun: error: n2: task 1: Terminated\n")
    assert overview.look(tmp_path).note == "data.root=/gone is no folder"
    write_status(tmp_path, status("running"))
    (tmp_path / "7_0_log.err").write_text("srun: error: n1: task 0: Killed\n")
    found = overview.look(tmp_path)
    assert (found.state, found.seconds_left) == ("failed", None)
    assert "killed, perhaps for want of memory" in found.note
    (tmp_path / "7_0_log.err").write_text("srun: error: n2: task 1: Terminated\n")
    assert f"SLURM says {state}; see " in overview.look(tmp_path).note
    write_record(tmp_path, dataclasses.replace(record, jobs=str(tmp_path / "before" / "jobs")))
    assert "was the run's folder moved?" in overview.look(tmp_path).note


def test_a_run_of_the_batch_script_has_the_job_that_it_names(tmp_path, monkeypatch):
    cancelled = []
    monkeypatch.setattr(slurm, "ask", lambda job_id: slurm.Job("PENDING", "Priority"))
    monkeypatch.setattr(slurm, "cancel", cancelled.append)
    monkeypatch.setenv("UHML_SLURM_JOB", "34")
    with reported(StatusReport(tmp_path, 100, 2, active=True, before=None)):
        pass
    write_status(tmp_path, dataclasses.replace(read_status(tmp_path), state="preempted"))
    found = overview.look(tmp_path)
    assert (found.state, found.note, found.job_id, found.cluster) == ("requeued", "Priority", "34", "slurm")
    assert cli.main(["cancel", str(tmp_path)]) == 0
    assert cancelled == ["34"]
    # The last launch counts, however the run was started before.
    (tmp_path / "launch").mkdir()
    later = (datetime.datetime.now(datetime.UTC) + datetime.timedelta(hours=1)).isoformat(timespec="seconds")
    for submitted_at, job_id in ((later, "35"), ("", "34")):
        record = JobRecord(
            cluster="slurm", job_id="35", host=HERE, submitted_at=submitted_at, num_ranks=2, jobs=str(tmp_path)
        )
        write_record(tmp_path, record)
        assert overview.look(tmp_path).job_id == job_id
    monkeypatch.delenv("UHML_SLURM_JOB")
    with reported(StatusReport(tmp_path, 100, 2, active=True, before=read_status(tmp_path))):
        assert read_status(tmp_path).slurm_job is None


@pytest.mark.parametrize("says", ["nothing", "preempted"])
def test_a_batch_script_is_requeued_only_by_what_its_own_slot_has_said(tmp_path, says):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "status.json").write_text('{"state": "preempted", "step": 3}')
    programs = {"srun": 'echo "job $UHML_SLURM_JOB"; exit 1', "scontrol": 'echo "scontrol $*"'}
    if says == "preempted":
        told = f'echo \'{{"state": "preempted", "step": 9}}\' > {tmp_path}/run/status.json'
        programs["srun"] = f"echo job $UHML_SLURM_JOB; {told}; exit 1"
    for name, does in programs.items():
        (tmp_path / name).write_text(f"#!/bin/sh\n{does}\n")
        (tmp_path / name).chmod(0o755)
    environment = {"PATH": f"{tmp_path}:{os.environ['PATH']}", "SLURM_JOB_NODELIST": "n1", "SLURM_JOB_ID": "7"}
    script = Path(overview.__file__).parent.parent / "slurm" / "train.sbatch"
    command = ["bash", str(script), str(tmp_path / "run"), "some.yaml"]
    ended = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert ("scontrol requeue 7" in ended.stdout) == (says == "preempted")
    assert ended.returncode == (0 if says == "preempted" else 1), ended.stderr
    assert "job 7" in ended.stdout  # which the run is to name


def test_a_run_without_a_job(tmp_path, dead_pid):
    assert overview.look(tmp_path) is None
    write_status(tmp_path, status("running", host=HERE, pid=os.getpid()))
    # There is such a process, but it is not in the folder: the number is another's by now.
    assert overview.look(tmp_path).state == "lost"
    with in_folder(tmp_path):
        found = overview.look(tmp_path)
        assert (found.state, found.seconds_left, found.restarts) == ("running", 90 * 60.0, 2)
    assert overview.look(tmp_path).state == "lost"
    write_status(tmp_path, status("running", host=HERE, pid=dead_pid))
    assert overview.look(tmp_path).state == "lost"
    write_status(tmp_path, status("preempted", host=HERE, pid=os.getpid()))
    assert overview.look(tmp_path).state == "preempted"
    write_status(tmp_path, status("failed", host=HERE, pid=dead_pid))
    assert (overview.look(tmp_path).state, overview.look(tmp_path).note) == ("failed", "the loss is nan")


def test_a_run_that_was_killed_on_its_way_out_is_finished(tmp_path, dead_pid):
    write_status(tmp_path, status("running", host=HERE, pid=dead_pid))
    assert overview.look(tmp_path).state == "lost"
    (tmp_path / "result.json").write_text(json.dumps({"frozen": None, "start": None, "trained": None}))
    assert (overview.look(tmp_path).state, overview.look(tmp_path).note) == ("finished", "")


@pytest.mark.parametrize("host", [HERE, "n17"])
def test_a_run_that_goes_on_by_itself_after_its_job(tmp_path, dead_pid, monkeypatch, host):
    (tmp_path / "launch").mkdir()
    job = JobRecord(cluster="local", job_id=str(dead_pid), host=host, submitted_at="", num_ranks=2, jobs=str(tmp_path))
    write_record(tmp_path, job)
    write_status(tmp_path, status("running", host=HERE, pid=os.getpid()))
    assert overview.look(tmp_path).state == "lost"
    signals = []
    with in_folder(tmp_path) as pid:
        write_status(tmp_path, status("running", host=HERE, pid=pid))
        assert overview.look(tmp_path).state == "running"
        with monkeypatch.context() as patched:
            patched.setattr(cancel.os, "kill", lambda *words: signals.append(words))
            assert cli.main(["cancel", str(tmp_path)]) == 0
    assert signals[-1] == (pid, signal.SIGTERM)


def test_a_run_that_goes_on_by_hand_after_its_job_in_slurm(tmp_path, monkeypatch):
    (tmp_path / "launch").mkdir()
    job = JobRecord(cluster="slurm", job_id="7", host=HERE, submitted_at="", num_ranks=2, jobs=str(tmp_path))
    write_record(tmp_path, job)
    write_status(tmp_path, status("running", host=HERE, pid=os.getpid()))
    said, done = ["CANCELLED"], []
    monkeypatch.setattr(slurm, "ask", lambda job_id: slurm.Job(said[-1]))
    monkeypatch.setattr(slurm, "cancel", done.append)
    monkeypatch.setattr(cancel.os, "kill", lambda *words: done.append(words) if words[1] else None)
    assert overview.look(tmp_path).state == "cancelled"
    with in_folder(tmp_path) as pid:
        write_status(tmp_path, status("running", host=HERE, pid=pid))
        assert (overview.look(tmp_path).state, overview.look(tmp_path).job_id) == ("running", None)
        assert cli.main(["cancel", str(tmp_path)]) == 0
        # The job's own ranks are on this machine, too, where a node is.
        said.append("RUNNING")
        assert (overview.look(tmp_path).state, overview.look(tmp_path).job_id) == ("running", "7")
        assert cli.main(["cancel", str(tmp_path)]) == 0
    assert done == [(pid, signal.SIGTERM), "7"]


@pytest.mark.parametrize("cluster", ["slurm", "local"])
@pytest.mark.parametrize("state", ["running", "preempted", "failed"])
def test_what_a_run_said_before_it_was_launched_again_is_of_the_past(tmp_path, monkeypatch, cluster, state):
    (tmp_path / "launch").mkdir()
    was, submitted, now = (f"2026-11-29T05:00:{second}+00:00" for second in ("07", "08", "08"))
    alive = [True]
    monkeypatch.setattr(slurm, "ask", lambda job_id: slurm.Job("RUNNING" if alive[-1] else "NODE_FAIL"))
    monkeypatch.setattr(overview, "is_controller", lambda pid: alive[-1])
    record = JobRecord(
        cluster=cluster, job_id="7", host=HERE, submitted_at=submitted, num_ranks=2, jobs=str(tmp_path / "no")
    )
    write_record(tmp_path, record)
    write_status(tmp_path, status(state, host="n17", updated_at=was))
    assert (overview.look(tmp_path).state, overview.look(tmp_path).note) == ("starting", "")
    write_status(tmp_path, status(state, host="n17", updated_at=now))
    assert overview.look(tmp_path).state == ("starting" if state == "preempted" else state)
    alive.append(False)
    write_status(tmp_path, status(state, host="n17", updated_at=was))
    assert overview.look(tmp_path).state == ("failed" if cluster == "slurm" else "lost")


def test_a_local_job_that_was_cancelled_is_stopping_until_it_is_gone(tmp_path, monkeypatch):
    (tmp_path / "launch").mkdir()
    alive = [True]
    monkeypatch.setattr(overview, "is_controller", lambda pid: alive[-1])
    monkeypatch.setattr(cancel.os, "kill", lambda *words: None)
    job = JobRecord(cluster="local", job_id="7", host=HERE, submitted_at="", num_ranks=2, jobs=str(tmp_path / "no"))
    write_record(tmp_path, job)
    assert overview.look(tmp_path).state == "starting"
    assert cli.main(["cancel", str(tmp_path)]) == 0
    assert overview.look(tmp_path).state == "stopping"
    alive.append(False)
    assert overview.look(tmp_path).state == "cancelled"
    alive.append(True)
    for said in ("running", "preempted"):
        write_status(tmp_path, status(said))
        assert overview.look(tmp_path).state == "stopping"
    alive.append(False)
    assert overview.look(tmp_path).state == "preempted"


def test_what_is_no_run_is_passed_over_among_others(tmp_path, capsys, caplog):
    for name in ("run", "empty"):
        (tmp_path / name).mkdir()
    (tmp_path / "notes.txt").touch()
    write_status(tmp_path / "run", status("preempted"))
    every = sorted(str(path) for path in tmp_path.iterdir())
    assert cli.main(["status", "--json", *every]) == 0
    assert [view["run"] for view in json.loads(capsys.readouterr().out)] == [str(tmp_path / "run")]
    for name in ("empty", "notes.txt"):
        assert f"{tmp_path / name} holds no run." in caplog.text
        assert cli.main(["status", str(tmp_path / name)]) == 2
        assert cli.main(["cancel", str(tmp_path / name)]) == 2
    assert cli.main(["status", *every, str(tmp_path / "rum")]) == 2
    assert "There is no run" in caplog.text


@pytest.mark.skipif(sys.platform != "linux", reason="asks Linux who has a lock")
@pytest.mark.parametrize("lock", ["another's", "a folder", "a link to itself"])
def test_no_process_is_ended_that_is_not_seen_at_work(tmp_path, caplog, lock):
    """A number of a dead run's may be another's by now, and a folder may be a stranger's."""
    with subprocess.Popen(["sleep", "300"]) as bystander, contextlib.ExitStack() as stack:
        write_status(tmp_path, status("running", host=HERE, pid=bystander.pid))
        if lock == "another's":
            stack.enter_context(in_folder(tmp_path))
        elif lock == "a folder":
            (tmp_path / "lock").mkdir()
        else:
            (tmp_path / "lock").symlink_to("lock")
        assert overview.look(tmp_path).state == "running"
        assert cli.main(["cancel", str(tmp_path)]) == 2
        assert f"process {bystander.pid}, which its status.json names, is not seen to have the folder" in caplog.text
        assert bystander.poll() is None
        bystander.kill()


@pytest.mark.parametrize("content", ["", "[]", "null", '{"x": ', "{}", "5"])
@pytest.mark.parametrize("file", ["status.json", "result.json", "launch/job.json", "launch/sweep.json"])
def test_a_damaged_file_of_one_run_hides_no_other(tmp_path, capsys, caplog, file, content):
    for name in ("good", "bad"):
        (tmp_path / name / "launch").mkdir(parents=True)
        write_status(tmp_path / name, status("preempted"))
    (tmp_path / "bad" / file).write_text(content)
    folders = [str(tmp_path / name) for name in ("bad", "good")]
    assert cli.main(["status", "--json", *folders]) == 0
    seen = [view["run"] for view in json.loads(capsys.readouterr().out)]
    if file == "result.json" and content == "{}":
        assert seen == folders  # it may be an older version's
        return
    assert seen == folders[1:]
    assert str(tmp_path / "bad" / file) in caplog.text
    for command in ("status", "cancel"):
        assert cli.main([command, folders[0]]) == 2


@pytest.mark.parametrize(
    "changes",
    [
        {"state": "great"},
        {"slurm_job": "--me"},
        {"pid": 0},
        {"pid": -1},
        {"pid": 10**30},
        {"step": "x"},
        {"restarts": None},
        {"error": 5},
        {"updated_at": "now"},
        {"updated_at": "2026-11-29T10:00"},
    ],
    ids=str,
)
def test_a_status_that_cannot_be_is_refused(tmp_path, changes):
    write_status(tmp_path, dataclasses.replace(status("running"), **changes))
    with pytest.raises(UserError, match=r"status\.json is no status of a run; remove it, and the run can go on"):
        read_status(tmp_path)


def test_the_terminal_obeys_nothing_that_a_run_says(tmp_path, capsys):
    folder = tmp_path / "a\x1b[31mb[red]"
    folder.mkdir()
    write_status(folder, status("failed", error="x\x1b]0;PWNED\a\x1b[2J[/x]"))
    assert cli.main(["status", str(folder)]) == 0
    shown = capsys.readouterr().out
    assert "\x1b" not in shown
    assert "PWNED" in shown


def test_silence_is_told(tmp_path, monkeypatch):
    monkeypatch.setattr(overview, "is_locked", lambda folder: True)
    write_status(tmp_path, status("running"))
    assert overview.look(tmp_path).note == "on n17"
    long_ago = (datetime.datetime.now(datetime.UTC) - datetime.timedelta(hours=2, minutes=5)).isoformat()
    write_status(tmp_path, status("running", updated_at=long_ago))
    assert overview.look(tmp_path).note.startswith("not heard of for 2 h 5 min")
    # Killed on its machine, or copied from there.
    monkeypatch.setattr(overview, "is_locked", lambda folder: False)
    assert overview.look(tmp_path).state == "lost"
    # Clustering says nothing for longer.
    write_status(tmp_path, status("running", updated_at=long_ago, phase="cluster"))
    assert overview.look(tmp_path).note == "on n17"


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0.4, "0 s"),
        (59, "59 s"),
        (59.6, "1 min"),
        (61, "1 min"),
        (3599.8, "1 h"),
        (3600, "1 h"),
        (7500, "2 h 5 min"),
        (90000, "1 d 1 h"),
    ],
)
def test_durations(seconds, text):
    assert overview.readable(seconds) == text
