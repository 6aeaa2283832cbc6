"""Faults: each a callable that a rank runs before ``uhml train``, and that makes something go wrong later."""

import dataclasses
import os
import pathlib
import resource
import signal
import time
from collections.abc import Callable

import torch
from in_place import InPlace

import uhml.train
from uhml import environment


def _at_step(step, rank, action):
    """Do something in the middle of a step, on one rank or, with None, on all."""
    if rank is not None and environment.place().rank != rank:
        return
    true_step = uhml.train.train_step

    def harmed(model, images, pictures, state, *rest):
        if state.step == step:
            action()
        return true_step(model, images, pictures, state, *rest)

    uhml.train.train_step = harmed


def _kill():
    os.kill(os.getpid(), signal.SIGKILL)


@dataclasses.dataclass
class KillSelf:
    step: int
    rank: int = 0

    def __call__(self):
        _at_step(self.step, self.rank, _kill)


@dataclasses.dataclass
class Bug:
    step: int
    rank: int = 0

    def __call__(self):
        def fail():
            raise ZeroDivisionError(f"a bug on rank {self.rank}")

        _at_step(self.step, self.rank, fail)


@dataclasses.dataclass
class Signal:
    """A signal to this very rank and, as Ctrl-C in a terminal does, to its workers."""

    step: int
    number: int
    rank: int | None = None

    def __call__(self):
        _at_step(self.step, self.rank, lambda: os.killpg(os.getpid(), self.number))


@dataclasses.dataclass
class SignalIn:
    """A signal while one of the functions that the training loop calls is at work."""

    function: str
    number: int
    rank: int = 0
    times: int = 1

    def __call__(self):
        true = getattr(uhml.train, self.function)
        calls = []

        def signalled(*args, **options):
            calls.append(1)
            if len(calls) == self.times and environment.place().rank == self.rank:
                os.kill(os.getpid(), self.number)
            return true(*args, **options)

        setattr(uhml.train, self.function, signalled)


@dataclasses.dataclass
class FailingClustering:
    def __call__(self):
        from uhml.hierarchy import linkage

        true, calls = linkage.graph_linkage, []

        def fail(*args):
            calls.append(1)
            if len(calls) == 2:
                raise MemoryError("no memory for the graph")
            return true(*args)

        linkage.graph_linkage = fail


@dataclasses.dataclass
class SlowClustering:
    """Rank 0 clusters for an hour, the second time, and says so by a file."""

    sign: str

    def __call__(self):
        from uhml.hierarchy import linkage

        true, calls = linkage.graph_linkage, []

        def slow(*args):
            calls.append(1)
            if len(calls) == 2:
                pathlib.Path(self.sign).touch()
                for _ in range(36_000):
                    time.sleep(0.1)
            return true(*args)

        linkage.graph_linkage = slow


@dataclasses.dataclass
class KilledWorker:
    step: int
    rank: int = 0

    def __call__(self):
        def kill_workers():
            children = pathlib.Path(f"/proc/{os.getpid()}/task/{os.getpid()}/children").read_text().split()
            assert children
            for child in children:
                os.kill(int(child), signal.SIGKILL)

        _at_step(self.step, self.rank, kill_workers)


@dataclasses.dataclass
class CorruptPictures:
    """All pictures become rubbish, long after they were looked at."""

    step: int
    root: str

    def __call__(self):
        def corrupt():
            for path in pathlib.Path(self.root).rglob("*.png"):
                path.write_bytes(b"rubbish")

        _at_step(self.step, 0, corrupt)


def _limit_files(size):
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))


@dataclasses.dataclass
class FullDisk:
    """From a step on no file can be longer than what is shown on the terminal; the system itself refuses."""

    step: int

    def __call__(self):
        _at_step(self.step, 0, lambda: _limit_files(16_384))


@dataclasses.dataclass
class FullDiskInSave:
    """The same, but only while one checkpoint is written."""

    name: str

    def __call__(self):
        true = uhml.run.checkpoint.write_file

        def write_file(path, *args):
            if path.name == self.name:
                _limit_files(4096)
            try:
                true(path, *args)
            finally:
                _limit_files(resource.RLIM_INFINITY)

        uhml.run.checkpoint.write_file = write_file


@dataclasses.dataclass
class JumpingClock:
    def __call__(self):
        true, calls = time.time, []

        def jumping():
            calls.append(1)
            return true() + (-1) ** len(calls) * 3600

        time.time = jumping


@dataclasses.dataclass
class KillInSave:
    """SIGKILL at a stage of saving: every call of the system that a save makes is one, and half of a write is, too."""

    stage: int
    save: int

    def __call__(self):
        true_save, saving, stages = uhml.run.checkpoint.write_file, [0], []

        def write_file(*args):
            saving[0] += 1
            return true_save(*args)

        def stage():
            if saving[0] == self.save:
                stages.append(1)
                if len(stages) == self.stage:
                    _kill()

        def before(module, name):
            true = getattr(module, name)

            def call(*args, **options):
                stage()
                return true(*args, **options)

            setattr(module, name, call)

        true_torch_save = torch.save

        def half_then_whole(state, file, **options):
            # With options it is torch itself, which pickles tensors for other ranks by it.
            if saving[0] == self.save and not options:
                file.write(b"PK\x03\x04 half of it")
                file.flush()
                stage()
                file.seek(0)
                file.truncate()
            true_torch_save(state, file, **options)

        uhml.run.checkpoint.write_file = write_file
        before(os, "replace")
        before(os, "fsync")
        before(os, "unlink")
        torch.save = half_then_whole


@dataclasses.dataclass
class ClusteringInPlace:
    """No process in the background, which takes seconds to start; and another fault."""

    other: Callable[[], None] | None = None

    def __call__(self):
        uhml.train.Background = InPlace
        if self.other is not None:
            self.other()


@dataclasses.dataclass
class KilledBackground:
    """The process in the background is killed as soon as it has something to do."""

    def __call__(self):
        from uhml.run.background import Background

        true = Background.start

        def start(background, work):
            true(background, work)
            background._process.kill()

        Background.start = start


STAGES = 6
"""Half the file, its fsync, its new name, the folder's fsync, no more file aside, no more oldest checkpoint."""


@dataclasses.dataclass
class OtherUser:
    """A user who may read but not write what the tests' user owns."""

    def __call__(self):
        if os.getuid() == 0:
            os.setgroups([])
            os.setresgid(65534, 65534, 65534)
            os.setresuid(65534, 65534, 65534)
