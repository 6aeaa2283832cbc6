"""uhml launch without a SLURM: what it would submit, what it refuses, and runs of processes on this machine."""

import concurrent.futures
import fcntl
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
from launched import assert_same_run, has_taken, is_finished, printed, uhml, view, wait_for

from launch import overview, submit
from launch.job import TrainingJob
from launch.launch import _minutes, _with_earlier
from launch.record import JobRecord, SweepRecord, read_record, write_record
from launch.submit import Resources
from launch.sweep import combinations, folder_name
from uhml import cli
from uhml.config import dump_config, load_config
from uhml.errors import UserError
from uhml.run.status import RunStatus, write_status


@pytest.fixture
def run_dir(tmp_path):
    """A folder for a run, whose processes do not outlive the test."""
    run_dir = tmp_path / "run"
    yield run_dir
    record = read_record(run_dir, JobRecord)
    if record is not None and record.cluster == "local" and overview.is_controller(int(record.job_id)):
        os.kill(int(record.job_id), signal.SIGINT)  # on which submitit kills what it started


def launch(*arguments):
    return cli.main(["launch", *map(str, arguments)])


def test_dry_run_shows_the_script_and_changes_nothing(sbatch_only, config, run_dir, capsys):
    options = ["--nodes", "2", "--gpus-per-node", "8", "--partition", "gpu", "--time", "3-12:30:00", "--mem", "64G"]
    more = ["--signal-delay", "120", "--cpus-per-task", "4", "--sbatch", "account=vision", "--sbatch", "exclusive"]
    before = sorted(run_dir.parent.rglob("*"))
    assert launch(config, "--run-dir", run_dir, *options, *more, "--dry-run") == 0
    assert sorted(run_dir.parent.rglob("*")) == before
    script = capsys.readouterr().out
    for line in (
        "nodes=2",
        "ntasks-per-node=8",
        "gpus-per-node=8",
        "cpus-per-task=4",
        "partition=gpu",
        "time=5070",
        "mem=64G",
        "signal=USR2@120",
        "account=vision",
        "exclusive",
        "requeue",
        "open-mode=append",
    ):
        assert f"#SBATCH --{line}\n" in script
    assert f"export PYTHONPATH={run_dir}/launch/snapshot\n" in script
    assert "--kill-on-bad-exit=1" in script
    assert f"Each of 16 ranks: uhml train {run_dir}/launch/config.yaml --run-dir {run_dir}\n" in script
    # Bash has nothing against it.
    text = script.partition("Would submit by sbatch:\n\n")[2].partition("Each of")[0]
    subprocess.run(["bash", "-n"], input=text, text=True, check=True)


@pytest.mark.parametrize(
    ("nodes", "options", "cores"),
    [
        ("256|(null)\n96|gpu:h100:8\n128|gpu:8\n", [], "6"),  # four workers, and two
        ("32|gpu:h100:8(S:0-1)\n", [], "4"),
        ("96|gpu:8\n", ["--cpus-per-task", "3"], "3"),
        ("4|gpu:8\n", [], "1"),
        ("32|gpu:8\n96|gpu:8\n", [], "4"),  # of the node with fewest
        ("96|gpu:8\n", ["--sweep", "data.num_workers=5,2"], "7"),  # of the run with most workers
        ("96|(null)\n", [], None),
    ],
)
def test_gpus_get_the_cores_that_feed_them(
    sbatch_only, config, run_dir, tmp_path, capsys, caplog, nodes, options, cores
):
    sinfo = tmp_path / "programs" / "sinfo"
    sinfo.write_text(f"#!/bin/sh\ncase $* in *--partition=gpu*) printf '{nodes}';; *) printf '2|gpu:8';; esac\n")
    sinfo.chmod(0o755)
    words = ["--gpus-per-node", "8", "--partition", "gpu", "--dry-run"]
    workers = [] if "--sweep" in options else ["data.num_workers=4"]
    assert launch(config, "--run-dir", run_dir, *words, *workers, *options) == 0
    asked = re.findall(r"#SBATCH --cpus-per-task=(\d+)\n", capsys.readouterr().out)
    assert asked == ([cores] if cores else [])
    chosen = cores is not None and "--cpus-per-task" not in options
    assert (f"Asking for {cores} cores for each GPU" in caplog.text) == chosen


def test_dry_run_of_a_sweep_is_one_array(sbatch_only, config, run_dir, capsys):
    sweep = ["--sweep", "train.seed=0,1,2", "--sweep", "hierarchy.cuts=[30,6],[10]"]
    assert launch(config, "--run-dir", run_dir, *sweep, "--dry-run") == 0
    script = capsys.readouterr().out
    assert "#SBATCH --array=0-5%6\n" in script
    assert script.count("uhml train ") == 6
    assert "train.seed=2,hierarchy.cuts=[30,6]" in script
    assert not run_dir.exists()


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["train.num_stepz=3"], "Did you mean 'train.num_steps'?"),
        (["--nodes", "3", "--tasks-per-node", "5"], "must be a multiple of the 15 ranks"),
        (["--gpus-per-node", "2", "--tasks-per-node", "2"], "one process for each GPU"),
        (["--cluster", "local", "--nodes", "2"], "--nodes is for SLURM"),
        (["--cluster", "local", "--sweep", "train.seed=0,1"], "--sweep is for SLURM"),
        (["--sbatch", "nodes=3"], "use the option of uhml launch for nodes"),
        (["--sbatch", "no-requeue"], "uhml launch sets no-requeue itself"),
        (["--sbatch", "array=0-3"], "uhml launch sets array itself"),
        (["--sbatch", "=3"], "'=3' names no option"),
        (["--time", "5"], "raise --time or lower --signal-delay"),
        (["--sweep", "train.seed"], "write section.key=value,value"),
        (["--sweep", "train.seed=0,0"], "a value is there twice"),
        (["--sweep", "train.seed=0,1", "--sweep", "train.seed=2"], "given twice"),
        (["--sweep", "train.sed=0,1"], "Did you mean 'train.seed'?"),
        (["train.seed=1", "--sweep", "train.seed=0,1"], "train.seed is given a value, and swept"),
        (["--sweep", "data.root=a/b,a_b"], "Two runs of the sweep would be called data.root=a_b"),
    ],
)
def test_what_cannot_be_is_refused_before_anything_is_made(sbatch_only, config, run_dir, caplog, arguments, said):
    assert launch(config, "--run-dir", run_dir, *arguments) == 2
    assert said in caplog.text
    assert not run_dir.exists()


def test_without_slurm_the_user_is_told_so(config, run_dir, monkeypatch, caplog):
    monkeypatch.setenv("PATH", str(run_dir))
    assert launch(config, "--run-dir", run_dir) == 2
    assert "There is no SLURM on this machine" in caplog.text
    assert not run_dir.exists()


@pytest.mark.parametrize("name", ["col:on", "p%j", "back\\slash"])
def test_a_folder_that_no_job_could_write_to_is_refused(sbatch_only, config, tmp_path, caplog, name):
    assert launch(config, "--run-dir", tmp_path / name) == 2
    assert "name another folder by --run-dir" in caplog.text
    assert not (tmp_path / name).exists()


@pytest.mark.parametrize("cluster", ["slurm", "local"])
def test_a_full_disk_leaves_nothing_and_is_told_once(sbatch_only, config, run_dir, caplog, monkeypatch, cluster):
    full = [("a.py", "b.py", "[Errno 28] No space left on device: 'b.py'"), ("c.py", "d.py", "[Errno 28] again")]

    def copy(folder):
        raise shutil.Error(full)

    monkeypatch.setattr(submit.snapshot, "take_snapshot", copy)
    assert launch(config, "--run-dir", run_dir, "--cluster", cluster) == 2
    assert caplog.text.count("Errno") == 1
    assert "The run's folder cannot be written: [Errno 28] No space left on device: 'b.py'" in caplog.text
    assert not run_dir.exists()


def test_the_second_of_two_launches_in_one_folder_sees_the_first(sbatch_only, config, run_dir, caplog, monkeypatch):
    monkeypatch.setattr(overview, "is_locked", lambda folder: True)
    lock = os.open(run_dir.parent, os.O_RDONLY)
    fcntl.flock(lock, fcntl.LOCK_EX)
    with concurrent.futures.ThreadPoolExecutor() as pool:
        second = pool.submit(launch, config, "--run-dir", run_dir, "--dry-run")
        time.sleep(1.0)
        assert not second.done()
        run_dir.mkdir()
        write_status(run_dir, RunStatus(**{**finished_status(), "state": "running"}))
        os.close(lock)
        assert second.result(60) == 2
    assert "is running already" in caplog.text


def test_why_slurm_refuses():
    printed = """
sbatch: unrecognized option '--nosuch=3'
Try "sbatch --help" for more information
"""
    assert submit._sbatchs_words(printed) == "unrecognized option '--nosuch=3'"
    printed = (
        "sbatch: error: Memory specification can not be satisfied\nsbatch: error: Batch job submission failed: No\n"
    )
    assert (
        submit._sbatchs_words(printed) == "Memory specification can not be satisfied; Batch job submission failed: No"
    )
    assert "is SLURM_CONF set?" in submit._sbatchs_words("sbatch: fatal: Could not establish a configuration source")


def test_a_sweep_goes_on_with_what_is_not_finished(sbatch_only, config, run_dir, capsys, caplog):
    names = [f"train.seed={seed}" for seed in range(3)]
    (run_dir / "launch").mkdir(parents=True)
    write_record(run_dir, SweepRecord(runs=names, values=[{"train.seed": str(seed)} for seed in range(3)]))
    (run_dir / names[1] / "checkpoints").mkdir(parents=True)
    (run_dir / names[1] / "checkpoints" / "step-00000009.pt").touch()
    (run_dir / names[1] / "result.json").write_text('{"frozen": null, "start": null, "trained": null}')
    write_status(run_dir / names[1], RunStatus(**finished_status()))
    again = ["--run-dir", run_dir, "--sweep", "train.seed=0,1,2", "--dry-run"]
    (run_dir / names[1] / "config.yaml").write_text(dump_config(load_config(config, ["train.seed=1"])))
    assert launch(config, *again) == 0
    assert "#SBATCH --array=0-1%2\n" in capsys.readouterr().out
    assert "train.seed=1 is finished." in caplog.text
    assert launch(config, *again, "loss.omega=0.9") == 2
    assert "loss.omega: 0.8 -> 0.9" in caplog.text
    assert launch(config, "--run-dir", run_dir, "--sweep", "train.seed=1", "--dry-run") == 2
    assert "All runs of the sweep" in caplog.text
    # A part of it launched again is still a part of it.
    both = _with_earlier(
        run_dir, SweepRecord(runs=[names[2], "train.seed=3"], values=[{"train.seed": s} for s in "23"])
    )
    assert both.runs == [*names, "train.seed=3"]
    assert [values["train.seed"] for values in both.values] == ["0", "1", "2", "3"]
    other = SweepRecord(runs=["a"], values=[{"loss.omega": "0.9"}])
    assert _with_earlier(run_dir, other) == other


def test_a_submission_that_fails_leaves_nothing(sbatch_only, config, run_dir, caplog):
    assert launch(config, "--run-dir", run_dir) == 2
    assert "SLURM does not take the job" in caplog.text
    assert not run_dir.exists()
    (run_dir / "mine").mkdir(parents=True)
    assert launch(config, "--run-dir", run_dir) == 2
    assert "holds no run, but other files" in caplog.text
    assert list(run_dir.rglob("*")) == [run_dir / "mine"]


def test_an_unfinished_run_goes_on_with_its_own_config_only(sbatch_only, config, run_dir, caplog):
    (run_dir / "checkpoints").mkdir(parents=True)
    (run_dir / "checkpoints" / "step-00000010.pt").touch()
    (run_dir / "config.yaml").write_text(config.read_text())
    (run_dir / "status.json").write_text(json.dumps({**finished_status(), "state": "preempted"}))
    assert launch(config, "loss.omega=0.9", "--run-dir", run_dir, "--dry-run") == 2
    assert "loss.omega: 0.8 -> 0.9" in caplog.text
    assert launch(config, "--run-dir", run_dir, "--dry-run") == 0
    assert launch(config, "loss.omega=0.9", "--run-dir", run_dir, "--dry-run", "--allow-change", "loss.omega") == 0


def test_a_run_on_another_machine_is_not_cancelled_from_here(run_dir, monkeypatch, caplog):
    signals = []
    monkeypatch.setattr(os, "kill", lambda *arguments: signals.append(arguments))
    monkeypatch.setattr(overview, "is_locked", lambda folder: True)
    run_dir.mkdir()
    write_status(run_dir, RunStatus(**{**finished_status(), "state": "running", "phase": "train"}))
    assert cli.main(["cancel", str(run_dir)]) == 2
    assert "runs on elsewhere: cancel it there" in caplog.text
    assert signals == []


@pytest.mark.parametrize("names", [["."], ["a", "b"]])
def test_a_job_has_its_own_config_and_what_may_change(config, run_dir, monkeypatch, names):
    jobs = []

    class Executor:
        folder = run_dir / "launch" / "jobs"

        def submit(self, job):
            jobs.append(job)
            return SimpleNamespace(job_id=f"7_{len(jobs)}")

        def submit_array(self, array):
            return [self.submit(job) for job in array]

    monkeypatch.setattr(submit, "_executor", lambda *_: Executor())
    monkeypatch.setattr(submit.snapshot, "take_snapshot", lambda folder: None)
    runs = {run_dir / name: load_config(config, [f"train.seed={seed}"]) for seed, name in enumerate(names)}
    submit.submit(Resources(minutes=60, signal_delay=300), run_dir, runs, ["loss.omega"])
    assert [job.run_dir for job in jobs] == list(runs)
    assert [load_config(job.config) for job in jobs] == list(runs.values())
    assert [job.allow_change for job in jobs] == [["loss.omega"]] * len(names)
    assert [read_record(folder, JobRecord).job_id for folder in runs] == [f"7_{i + 1}" for i in range(len(names))]


def test_a_job_that_is_requeued_as_its_run_has_just_finished_trains_no_more(tmp_path):
    (tmp_path / "result.json").write_text('{"steps": 9}')
    code = Path(overview.__file__).parent.parent
    assert TrainingJob(tmp_path, tmp_path / "no.yaml", code)._train() == {"steps": 9}


@pytest.mark.parametrize(
    ("text", "minutes"),
    [("90", 90), ("10:30", 11), ("24:00:00", 1440), ("1-12", 2160), ("2-00:30", 2910), ("1-02:03:04", 1564)],
)
def test_times_are_understood_as_slurm_does(text, minutes):
    assert _minutes(text) == minutes


def test_sweep_values():
    assert combinations(["a.b=1,2", "c.d=[1,2],[3]"]) == [
        {"a.b": "1", "c.d": "[1,2]"},
        {"a.b": "1", "c.d": "[3]"},
        {"a.b": "2", "c.d": "[1,2]"},
        {"a.b": "2", "c.d": "[3]"},
    ]
    assert combinations([]) == [{}]
    assert folder_name({"a.b": "1", "model.init_from": "runs/x"}) == "a.b=1,model.init_from=runs_x"
    with pytest.raises(UserError, match="twice"):
        combinations(["a.b=1,1"])


@pytest.mark.parametrize("platform", ["linux", "darwin"])
def test_a_controller_is_known_behind_a_long_path_and_in_a_narrow_terminal(monkeypatch, platform):
    if platform != sys.platform:
        if platform == "linux" or shutil.which("ps") is None:
            pytest.skip("not to be had here")
        monkeypatch.setattr(sys, "platform", platform)
    monkeypatch.setenv("COLUMNS", "80")
    sleeping = [sys.executable, "-c", "import time; time.sleep(60)", "/a/long/path" * 20]
    with subprocess.Popen([*sleeping, "submitit.local._local"]) as named, subprocess.Popen(sleeping) as other:
        try:
            assert overview.is_controller(named.pid)
            assert not overview.is_controller(other.pid)
        finally:
            named.kill()
            other.kill()


@pytest.mark.skipif(sys.platform != "linux", reason="without /proc it takes ps")
def test_no_controller_is_looked_for_by_ps_which_slim_images_lack(monkeypatch):
    monkeypatch.setenv("PATH", "/nonexistent")
    assert not overview.is_controller(os.getpid())


@pytest.mark.ddp
@pytest.mark.slow
@pytest.mark.timeout(900)
def test_local_run_from_launch_to_end_preempted_and_cancelled_on_the_way(config, run_dir, tmp_path):
    """Two ranks; SIGUSR2 starts it again, uhml cancel does not, and a second launch goes on to the same end."""
    assert "uhml status" in uhml("launch", config, "--cluster", "local", "--tasks-per-node", "2", "--run-dir", run_dir)
    assert view(run_dir)["state"] in ("starting", "running")
    assert load_config(run_dir / "launch" / "config.yaml") == load_config(config)
    status = wait_for(run_dir, "training", has_taken(2))
    os.kill(status.pid, signal.SIGUSR2)
    wait_for(run_dir, "started again", lambda status: status.restarts == 1 and status.state == "running")
    wait_for(run_dir, "training", has_taken(status.step + 2))
    uhml("cancel", run_dir)
    wait_for(run_dir, "preempted", lambda status: status.state == "preempted")
    job = int(read_record(run_dir, JobRecord).job_id)
    wait_until(lambda: not overview.is_controller(job))
    assert view(run_dir)["state"] == "preempted"
    assert "nothing to cancel" in uhml("cancel", run_dir, expect=2)

    uhml("launch", config, "--cluster", "local", "--tasks-per-node", "2", "--run-dir", run_dir)
    assert wait_for(run_dir, "finished", is_finished).restarts == 2
    found = view(run_dir)
    assert (found["state"], found["step"], found["num_steps"]) == ("finished", 50, 50)
    assert set(found["recall"]) == {"frozen", "untrained", "trained"}
    assert "is finished" in uhml("launch", config, "--cluster", "local", "--run-dir", run_dir, expect=2)

    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "uhml"]
    unbroken = tmp_path / "unbroken"
    subprocess.run([*torchrun, "train", config, "--run-dir", unbroken], check=True, capture_output=True, timeout=200)
    assert_same_run(unbroken, run_dir)


@pytest.mark.slow
def test_a_run_keeps_to_the_code_of_its_launch(config, run_dir, tmp_path, monkeypatch):
    """Code that is edited after the launch, also between two starts, does not reach the run."""
    repository = Path(__file__).parent.parent.parent
    checkout = tmp_path / "checkout"
    for package in ("uhml", "launch"):
        shutil.copytree(repository / package, checkout / package, ignore=shutil.ignore_patterns("__pycache__"))
    monkeypatch.setenv("PYTHONPATH", str(checkout))
    monkeypatch.chdir(checkout)
    uhml("launch", config, "--cluster", "local", "--run-dir", run_dir)
    # At once, long before the ranks have imported anything of it; and what they start later imports it later still.
    edited = checkout / "uhml" / "train.py"
    edited.write_text("raise RuntimeError('edited')\n")
    status = wait_for(run_dir, "training", has_taken(2))
    os.kill(status.pid, signal.SIGUSR2)
    wait_for(run_dir, "finished", is_finished)
    assert read_record(run_dir, JobRecord).cluster == "local"
    assert "edited" not in printed(run_dir)
    # The edit is there for who launches next.
    failed = tmp_path / "next"
    uhml("launch", config, "--cluster", "local", "--run-dir", failed)
    wait_until(lambda: not overview.is_controller(int(read_record(failed, JobRecord).job_id)))
    assert "RuntimeError: edited" in printed(failed)


@pytest.mark.slow
def test_failed_local_run_says_why(config, run_dir, tmp_path):
    wrong = [f"data.root={tmp_path}/mistyped", "data.dataset=folder"]
    uhml("launch", config, *wrong, "--cluster", "local", "--run-dir", run_dir)
    wait_until(lambda: not overview.is_controller(int(read_record(run_dir, JobRecord).job_id)))
    found = view(run_dir)
    assert found["state"] == "failed"
    assert "mistyped is no folder" in found["note"]


def test_table_of_a_sweep(tmp_path, capsys):
    """Two of three seeds have finished, with known scores."""
    names = [f"train.seed={seed}" for seed in range(3)]
    for name, recall in zip(names, (0.5, 0.7, None), strict=True):
        folder = tmp_path / name
        (folder / "launch").mkdir(parents=True)
        status = finished_status() if recall else {**finished_status(), "state": "preempted", "step": 3}
        (folder / "status.json").write_text(json.dumps(status))
        if recall:
            row = {"recall_at_k": {"1": recall, "4": 0.9}, "map_at_r": 0.1, "nmi": 0.2}
            frozen = {**row, "recall_at_k": {"1": 0.4, "4": 0.8}}
            (folder / "result.json").write_text(json.dumps({"frozen": frozen, "start": row, "trained": row}))
    (tmp_path / "launch").mkdir()
    write_record(tmp_path, SweepRecord(runs=names, values=[{"train.seed": str(seed)} for seed in range(3)]))
    assert cli.main(["status", str(tmp_path)]) == 0
    shown = capsys.readouterr().out
    assert "R@1 of unseen classes" in shown
    assert "60.0 ± 14.1" in shown
    assert "40.0 ± 0.0" in shown
    assert "preempted" in shown
    assert cli.main(["status", "--json", str(tmp_path)]) == 0
    assert [found["state"] for found in json.loads(capsys.readouterr().out)] == ["finished", "finished", "preempted"]


def test_status_of_no_run_suggests_one(tmp_path, caplog):
    (tmp_path / "sop-lite0").mkdir()
    assert cli.main(["status", str(tmp_path / "sop-lit0")]) == 2
    assert "Did you mean 'sop-lite0'?" in caplog.text
    assert cli.main(["status", str(tmp_path / "sop-lite0")]) == 2
    assert "holds no run" in caplog.text
    assert "Those in it" not in caplog.text
    (tmp_path / "sop-lite0" / "a").mkdir()
    write_status(tmp_path / "sop-lite0" / "a", RunStatus(**finished_status()))
    (tmp_path / "sop-lite0" / "a" / "result.json").write_text('{"frozen": null, "start": null, "trained": null}')
    assert cli.main(["status", str(tmp_path / "sop-lite0")]) == 2
    assert f"Those in it are shown by uhml status {tmp_path}/sop-lite0/*" in caplog.text


def test_a_sweep_keeps_out_of_other_runs_folders(sbatch_only, config, run_dir, caplog, monkeypatch):
    monkeypatch.setattr(overview, "is_locked", lambda folder: True)
    sweep = ["--sweep", "train.seed=0,1", "--dry-run"]
    run_dir.mkdir()
    write_status(run_dir, RunStatus(**{**finished_status(), "state": "preempted"}))
    assert launch(config, "--run-dir", run_dir, *sweep) == 2
    assert f"{run_dir} holds a run: name another folder for the sweep" in caplog.text
    (run_dir / "status.json").unlink()
    # An earlier sweep, one run of which has yet to go on.
    names = [f"train.seed={seed}" for seed in (7, 8)]
    (run_dir / "launch").mkdir()
    write_record(run_dir, SweepRecord(runs=names, values=[{"train.seed": str(seed)} for seed in (7, 8)]))
    (run_dir / names[1]).mkdir()
    write_status(run_dir / names[1], RunStatus(**{**finished_status(), "state": "running"}))
    assert launch(config, "--run-dir", run_dir, *sweep) == 2
    assert f"The sweep in {run_dir} goes on: train.seed=8 is running." in caplog.text
    write_status(run_dir / names[1], RunStatus(**{**finished_status(), "state": "preempted"}))
    assert launch(config, "--run-dir", run_dir, *sweep) == 0


def test_names_in_a_note_are_no_markup(tmp_path, capsys):
    error = "The picture /data/[old]/a[/y].jpg is cut off."
    write_status(tmp_path, RunStatus(**{**finished_status(), "state": "failed", "error": error}))
    assert cli.main(["status", str(tmp_path)]) == 0
    assert error in " ".join(capsys.readouterr().out.split())


def finished_status():
    return {
        "state": "finished",
        "phase": "evaluate",
        "step": 9,
        "num_steps": 9,
        "restarts": 1,
        "seconds_per_step": 0.5,
        "updated_at": "2026-01-01T00:00:00+00:00",
        "started_at": "2026-01-01T00:00:00+00:00",
        "host": "elsewhere",
        "pid": 1,
        "world_size": 1,
        "error": None,
    }


def wait_until(condition, timeout=120):
    deadline = time.monotonic() + timeout
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.1)
