"""Runs to be harmed: ``uhml train`` in processes of their own, started as cheaply as can be.

Each rank is forked from a server that has imported torch once; it leads a session of its own, so that nothing it starts
goes unnoticed.
"""

import contextlib
import json
import multiprocessing
import os
import random
import signal
import sys
import time
from pathlib import Path

import torch
from ranks import CONTEXT
from tensorboard.backend.event_processing.event_file_loader import EventFileLoader
from timm.models import is_model, register_model
from torch import nn
from torch.distributed import TCPStore  # noqa: TID251 (the part that torchrun's agent plays)

from uhml import cli
from uhml.run.status import read_status

CONFIG = """\
data: {dataset: folder, image_size: 32, fit: squash, num_workers: 1}
model: {backbone: faults_net, weights: random, embedding_dim: 8}
hierarchy: {recluster_every: 4, num_neighbors: 5, cut_by: counts, cuts: [12, 6, 3]}
mining: {pictures_per_cluster: 2}
optim: {learning_rate: 0.01}
train: {num_steps: 12, global_batch_size: 16, log_every: 1, checkpoint_every: 2, device: cpu}
eval: {recall_at: [1, 4], batch_size: 8}
"""
NUM_STEPS, EVERY = 12, 2
SECONDS_TO_END = 20  # of a rank whose fellow is gone; an idle worker looks for its parent every 5


if not is_model("faults_net"):

    @register_model
    def faults_net(pretrained=False, **options):
        """A network with dropout, which draws from torch's own generator."""
        layers = [nn.Conv2d(3, 16, 5, stride=4), nn.ReLU(), nn.Dropout(0.2), nn.AdaptiveAvgPool2d(1), nn.Flatten()]
        return nn.Sequential(*layers)


class Launch:
    """One launch of a run, on one or more ranks.

    Args:
        run_dir: of the run.
        config: a file of ``CONFIG``, beside a folder ``shapes``.
        world_size: number of ranks.
        overrides: of the config, or other options of ``uhml train``.
        fault: a function of no arguments, from :mod:`injected`, that every rank calls first.
    """

    def __init__(self, run_dir, config, world_size=1, overrides=(), fault=None):
        self.run_dir = run_dir
        self.output = run_dir.with_name(f"{run_dir.name}.out")
        self.output.write_text("")
        self.store, environments = None, [{}]
        if world_size > 1:
            self.store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
            everyones = {
                "WORLD_SIZE": str(world_size),
                "LOCAL_WORLD_SIZE": str(world_size),
                "MASTER_ADDR": "127.0.0.1",
                "MASTER_PORT": str(self.store.port),
                "TORCHELASTIC_USE_AGENT_STORE": "True",
                "TORCHELASTIC_RESTART_COUNT": "0",
            }
            environments = [{**everyones, "RANK": str(r), "LOCAL_RANK": str(r)} for r in range(world_size)]
        root = config.parent / "shapes"
        arguments = ["train", str(config), f"data.root={root}", "--run-dir", str(run_dir), *overrides]
        start_method = multiprocessing.get_start_method()
        self.ranks = [
            CONTEXT.Process(target=_rank, args=(environment, start_method, arguments, str(self.output), fault))
            for environment in environments
        ]
        for rank in self.ranks:
            rank.start()

    def signal(self, number, rank=None):
        """Send a signal to a rank, or to all; who has ended already gets none."""
        for process in self.ranks if rank is None else [self.ranks[rank]]:
            if process.is_alive():
                with contextlib.suppress(ProcessLookupError):
                    os.kill(process.pid, number)

    def wait(self, seconds=90):
        """Return every rank's exit status; no rank and no worker of theirs is left then, or the test fails."""
        deadline = time.monotonic() + seconds
        for process in self.ranks:
            process.join(max(0, deadline - time.monotonic()))
        hung = [number for number, process in enumerate(self.ranks) if process.is_alive()]
        deadline = time.monotonic() + SECONDS_TO_END
        while (left := self._left()) and not hung and time.monotonic() < deadline:
            time.sleep(0.05)
        for pid in left:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        assert not hung, f"ranks {hung} hang:\n{self.said}"
        assert not left, f"processes {left} are left over:\n{self.said}"
        return [process.exitcode for process in self.ranks]

    def _left(self):
        sessions = {process.pid for process in self.ranks}
        return [pid for pid, session, state in _processes() if session in sessions and state != "Z"]

    @property
    def said(self):
        """What all ranks have shown on the terminal."""
        return self.output.read_text()


def _processes():
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = path.read_text().rpartition(")")[2].split()
        except (FileNotFoundError, ProcessLookupError):
            continue
        yield int(path.parent.name), int(fields[3]), fields[0]


def _rank(environment, start_method, arguments, output, fault):
    os.setsid()
    signal.signal(signal.SIGINT, signal.default_int_handler)
    terminal = os.open(output, os.O_WRONLY | os.O_APPEND)
    os.dup2(terminal, 1)
    os.dup2(terminal, 2)
    multiprocessing.set_start_method(start_method, force=True)
    os.environ.update(environment)
    if fault is not None:
        fault()
    sys.exit(cli.main(arguments))


def run(run_dir, config, world_size=1, overrides=(), fault=None):
    """Launch, wait, and return the exit status of each rank and what they said."""
    launch = Launch(run_dir, config, world_size, overrides, fault)
    return launch.wait(), launch.said


def recorded(run_dir):
    """The lines of metrics.jsonl."""
    path = run_dir / "metrics.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def logged(run_dir):
    """The last step whose loss is in metrics.jsonl."""
    return max((line["step"] for line in recorded(run_dir) if line["kind"] == "train"), default=0)


def checkpoints(run_dir):
    """The steps that are saved."""
    return sorted(int(path.stem[5:]) for path in (run_dir / "checkpoints").glob("step-*.pt"))


def events(run_dir):
    """What TensorBoard is told, and of which step, as it stands in the files: nothing twice, nothing missing."""
    files = [list(EventFileLoader(str(path)).Load()) for path in (run_dir / "tensorboard").glob("events.*")]
    # The first event tells when the file was begun. Its name tells the second and the process, and two launches may
    # begin in one second, the later one with the smaller number when these have begun anew.
    files.sort(key=lambda loaded: loaded[0].wall_time)
    return [(event.step, value.tag) for loaded in files for event in loaded for value in event.summary.value]


def assert_same(run_dir, whole):
    """The run ended as the unbroken one did: all it has to keep, every line it recorded, every score, to the bit."""
    assert read_status(run_dir).state == "finished"
    for name in ("metrics.jsonl", "config.yaml"):
        assert (run_dir / name).read_text() == (whole / name).read_text()
    assert events(run_dir) == events(whole)
    results = [json.loads((path / "result.json").read_text()) for path in (run_dir, whole)]
    assert {**results[0], "seconds": 0} == {**results[1], "seconds": 0}
    name = f"checkpoints/step-{NUM_STEPS:08d}.pt"
    saved = [torch.load(path / name, weights_only=True) for path in (run_dir, whole)]
    for state in saved:
        del state["recorded"]  # the names of event files; what is in them is compared above
    mine, theirs = (dict(_flat(state)) for state in saved)
    assert mine.keys() == theirs.keys()
    assert any("/exp_avg" in key for key in mine)
    assert any("/random_states/" in key for key in mine)
    differ = [key for key in mine if key != "/seconds" and not _equal(mine[key], theirs[key])]
    assert differ == []
    assert not list(run_dir.rglob("*.partial"))


def _flat(value, key=""):
    if isinstance(value, dict):
        for name, item in value.items():
            yield from _flat(item, f"{key}/{name}")
    elif isinstance(value, list | tuple):
        for place, item in enumerate(value):
            yield from _flat(item, f"{key}/{place}")
    else:
        yield key, value


def _equal(a, b):
    return torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b


def seed():
    """The seed of the moments at which faults strike: another each time, printed where a test fails."""
    chosen = int(os.environ.get("UHML_FAULT_SEED", time.time_ns() % 10**6))
    print(f"UHML_FAULT_SEED={chosen}")
    return random.Random(chosen)
