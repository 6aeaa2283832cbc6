"""Launched runs on a real SLURM: whatever it does to them, they end as if nothing had happened."""

import contextlib
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from launched import assert_same_run, has_taken, is_finished, printed, uhml, view, wait_for, write_config

from launch import slurm as queue
from launch.record import JobRecord, read_record

pytestmark = [pytest.mark.slurm, pytest.mark.slow, pytest.mark.ddp, pytest.mark.usefixtures("slurm")]

SLURM_FOLDER = Path(__file__).parent.parent.parent / "slurm"
ON_FOUR_RANKS = ("--nodes", "2", "--tasks-per-node", "2", "--cpus-per-task", "1")


def sh(*command):
    return subprocess.run(
        [str(word) for word in command], capture_output=True, text=True, check=True, timeout=60
    ).stdout


def job_of(run_dir):
    record = read_record(run_dir, JobRecord)
    assert record is not None
    return record.job_id


@pytest.fixture(scope="module")
def config(tmp_path_factory, glyphs_root):
    return write_config(tmp_path_factory.mktemp("config"), glyphs_root)


@pytest.fixture(scope="module")
def unbroken(config, tmp_path_factory):
    """The run that all others must equal: two nodes of two ranks, left in peace."""
    run_dir = tmp_path_factory.mktemp("unbroken") / "run"
    uhml("launch", config, "--run-dir", run_dir, *ON_FOUR_RANKS)
    assert view(run_dir)["state"] in ("queued", "starting")
    status = wait_for(run_dir, "finished", is_finished)
    assert (status.world_size, status.restarts, status.step) == (4, 0, 50)
    return run_dir


@pytest.fixture
def run_dir(tmp_path):
    """A folder for a run, whose job does not outlive the test."""
    run_dir = tmp_path / "run"
    yield run_dir
    for path in tmp_path.rglob("job.json"):
        sh("scancel", job_of(path.parent.parent))


@pytest.mark.timeout(400)
def test_signal_requeue_preemption_and_lost_node_leave_no_trace(unbroken, config, run_dir):
    uhml("launch", config, "--run-dir", run_dir, *ON_FOUR_RANKS, "--time", "20")
    job = job_of(run_dir)

    wait_for(run_dir, "training", has_taken(3))
    sh("scancel", "--signal=USR2", job)
    wait_for(run_dir, "preempted", lambda status: status.state == "preempted")
    wait_for_slurm(job, lambda found: found.waits)
    assert view(run_dir)["state"] == "requeued"

    wait_for(run_dir, "training", has_taken(12))
    sh("scontrol", "requeue", job)
    status = wait_for(run_dir, "started again", lambda status: status.restarts == 2)

    wait_for(run_dir, "training", has_taken(max(20, status.step + 1)))
    # In the grace that SLURM gives, the run ends by itself: SLURM would take that for its end.
    urgent = sh("sbatch", "--parsable", "--partition=urgent", "--nodes=2", "--gpus-per-node=2", "--ntasks-per-node=1",
                "--cpus-per-task=4", "--output=/dev/null", "--wrap=sleep 2").strip()  # fmt: skip
    wait_for(run_dir, "preempted", lambda status: status.state == "preempted")
    wait_for_slurm(urgent, lambda found: found.state == "COMPLETED")

    wait_for(run_dir, "training", has_taken(32))
    try:
        sh("scontrol", "update", "NodeName=n2", "State=DOWN", "Reason=test")
        wait_for_slurm(job, lambda found: found.waits)
    finally:
        sh("scontrol", "update", "NodeName=n2", "State=RESUME")

    status = wait_for(run_dir, "finished", is_finished)
    assert status.restarts == 4
    assert_same_run(unbroken, run_dir)
    wait_for_slurm(job, lambda found: found.state == "COMPLETED")


@pytest.mark.timeout(400)
def test_time_limit(unbroken, config, run_dir):
    uhml("launch", config, "--run-dir", run_dir, *ON_FOUR_RANKS, "--time", "10", "--signal-delay", "120")
    job = job_of(run_dir)
    # Rank 0 stands still, so that the run does not finish before its time is over, until SLURM's signal wakes it.
    pid = wait_for(run_dir, "training", has_taken(3)).pid
    os.kill(pid, signal.SIGSTOP)
    try:
        # SLURM looks at time limits every half minute. This one leaves one to two minutes.
        elapsed = int(sh("squeue", "--noheader", f"--jobs={job}", "--Format=TimeUsed:.20").strip().split(":")[-2])
        sh("scontrol", "update", f"JobId={job}", f"TimeLimit={elapsed + 2}")
        wait_for(run_dir, "preempted", lambda status: status.state == "preempted")
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGCONT)
    sh("scontrol", "update", f"JobId={job}", "TimeLimit=10")
    status = wait_for(run_dir, "finished", is_finished)
    assert status.restarts == 1
    assert "Stopped by SIGUSR2" in printed(run_dir)
    assert_same_run(unbroken, run_dir)


@pytest.mark.timeout(400)
def test_sbatch_and_torchrun(unbroken, config, run_dir, tmp_path):
    script = ["--parsable", "--nodes=2", "--cpus-per-task=2", "--time=20", f"--output={tmp_path}/%j.log"]
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    export = f"--export=ALL,RANKS_PER_NODE=2,PATH={path}"
    job = sh("sbatch", *script, export, SLURM_FOLDER / "train.sbatch", run_dir, config).strip()
    try:
        wait_for(run_dir, "training", has_taken(3))
        sh("scancel", "--signal=USR2", job)
        status = wait_for(run_dir, "finished", is_finished)
        assert (status.restarts, status.world_size) == (1, 4)
        assert_same_run(unbroken, run_dir)
        wait_for_slurm(job, lambda found: found.state == "COMPLETED")
    finally:
        sh("scancel", job)


def test_srun_alone(unbroken, config, run_dir):
    started = ["srun", "--nodes=2", "--ntasks-per-node=2", "--kill-on-bad-exit=1"]
    sh_log = subprocess.run(
        [*started, sys.executable, "-m", "uhml", "train", str(config), "--run-dir", str(run_dir)],
        capture_output=True, text=True, timeout=200, check=False,
    )  # fmt: skip
    assert sh_log.returncode == 0, sh_log.stderr
    assert_same_run(unbroken, run_dir)


def test_cancelled_run_is_not_requeued(config, run_dir):
    uhml("launch", config, "--run-dir", run_dir, "--tasks-per-node", "2")
    wait_for(run_dir, "training", has_taken(3))
    assert "is running already" in uhml("launch", config, "--run-dir", run_dir, expect=2)
    uhml("cancel", run_dir)
    wait_for(run_dir, "preempted", lambda status: status.state == "preempted")
    wait_for_slurm(job_of(run_dir), lambda found: found.state == "CANCELLED")
    assert view(run_dir)["state"] == "cancelled"
    assert "nothing to cancel" in uhml("cancel", run_dir, expect=2)


def test_failed_run_is_not_requeued_and_says_why(config, run_dir, tmp_path):
    uhml("launch", config, f"data.root={tmp_path}/mistyped", "data.dataset=folder", "--run-dir", run_dir)
    wait_for_slurm(job_of(run_dir), lambda found: found.state == "FAILED")
    found = view(run_dir)
    assert found["state"] == "failed"
    assert "mistyped is no folder" in printed(run_dir)
    assert found["job_id"] == job_of(run_dir)


def test_sweep_is_one_array_and_one_table(config, tmp_path, run_dir):
    sweep = tmp_path / "sweep"
    uhml("launch", config, "train.num_steps=2", "--sweep", "train.seed=0,1", "--run-dir", sweep)
    runs = [sweep / "train.seed=0", sweep / "train.seed=1"]
    jobs = [job_of(run) for run in runs]
    array = jobs[0].partition("_")[0]
    assert jobs == [f"{array}_0", f"{array}_1"]
    for run in runs:
        wait_for(run, "finished", is_finished)
    table = uhml("status", sweep)
    assert table.count("finished") == 2
    assert "2 seeds" in table
    assert "±" in table
    assert "train.seed" in table


def test_refused_by_slurm_leaves_nothing(config, run_dir):
    said = uhml("launch", config, "--run-dir", run_dir, "--partition", "nope", expect=2)
    assert "SLURM does not take the job" in said
    assert "nvalid partition" in said
    assert not run_dir.exists()


def wait_for_slurm(job, condition):
    deadline = time.monotonic() + 120
    found = queue.ask(job)
    while not condition(found):
        assert time.monotonic() < deadline, f"job {job} is {found}"
        time.sleep(0.3)
        found = queue.ask(job)
