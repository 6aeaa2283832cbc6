"""The commands as people type them, ended from outside."""

import contextlib
import fcntl
import os
import pty
import signal
import subprocess
import sys
import termios
import time
from pathlib import Path

import pytest
from runs import checkpoints, logged

from uhml.run.status import read_status

pytestmark = [pytest.mark.slow, pytest.mark.ddp]
UHML = [sys.executable, "-m", "uhml"]
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "uhml"]


def at_work(run_dir):
    """The processes that have the run's folder on their command line: the command, its ranks, their workers."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            if str(run_dir).encode() in path.read_bytes().split(b"\0"):
                found.append(int(path.parent.name))
        except (FileNotFoundError, ProcessLookupError):
            continue
    return found


@pytest.mark.parametrize(
    ("command", "number", "to_all", "code"),
    [
        (UHML, signal.SIGINT, True, 130),  # Ctrl-C in a terminal goes to every process there
        (TORCHRUN, signal.SIGTERM, False, 1),
        (TORCHRUN, signal.SIGKILL, False, -signal.SIGKILL),
    ],
    ids=["uhml", "torchrun", "torchrun killed"],
)
def test_it_saves_goes_on_and_leaves_no_process(config, tmp_path, command, number, to_all, code):
    run_dir = tmp_path / "run"
    arguments = ["train", str(config), f"data.root={config.parent / 'shapes'}", "--run-dir", str(run_dir)]
    arguments += ["model.backbone=test_resnet", "optim.learning_rate=1e-4"]
    with (tmp_path / "out").open("w") as out:
        process = subprocess.Popen(
            [*command, *arguments, "train.num_steps=9999"], stdout=out, stderr=out, start_new_session=True
        )
    try:
        while logged(run_dir) < 3:
            assert process.poll() is None, (tmp_path / "out").read_text()
            time.sleep(0.1)
        assert len(at_work(run_dir)) >= (1 if command is UHML else 3)
        (os.killpg if to_all else os.kill)(process.pid, number)
        assert process.wait(60) == code
        deadline = time.monotonic() + 120
        while at_work(run_dir) and time.monotonic() < deadline:
            time.sleep(0.1)
        assert at_work(run_dir) == []
    finally:
        for pid in at_work(run_dir):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
    said, step = (tmp_path / "out").read_text(), logged(run_dir)
    assert said.count(f"after step {step} of 9999, which is saved: start the same command again to go on.") == 1
    assert read_status(run_dir).state == "preempted"
    assert checkpoints(run_dir)[-1] == step
    again = [*command, *arguments, f"train.num_steps={step + 2}", "--allow-change", "train.num_steps"]
    ended = subprocess.run(again, capture_output=True, text=True, check=False, timeout=120)
    assert ended.returncode == 0, ended.stderr
    assert f"Going on after step {step} of {step + 2}" in ended.stderr
    assert (read_status(run_dir).state, read_status(run_dir).restarts) == ("finished", 1)


def test_it_saves_when_its_terminal_is_closed(config, tmp_path):
    run_dir = tmp_path / "run"
    command = [*UHML, "train", str(config), f"data.root={config.parent / 'shapes'}", "--run-dir", str(run_dir)]
    command += ["model.backbone=test_resnet", "optim.learning_rate=1e-4", "train.num_steps=9999"]
    ours, terminal = pty.openpty()

    def at_terminal():
        fcntl.ioctl(0, termios.TIOCSCTTY, 0)
        signal.signal(signal.SIGHUP, signal.SIG_DFL)  # nohup may have had it ignored

    process = subprocess.Popen(
        command, stdin=terminal, stdout=terminal, stderr=terminal, start_new_session=True, preexec_fn=at_terminal
    )
    os.close(terminal)
    os.set_blocking(ours, False)
    said = b""
    try:
        while logged(run_dir) < 3:
            assert process.poll() is None, said.decode()
            try:
                said += os.read(ours, 4096)
            except BlockingIOError:
                time.sleep(0.1)
        os.close(ours)
        assert process.wait(60) == 75
    finally:
        for pid in at_work(run_dir):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
    assert read_status(run_dir).state == "preempted"
    assert checkpoints(run_dir)[-1] == logged(run_dir)
    assert "Stopped by SIGHUP" in (run_dir / "logs/rank0.log").read_text()
