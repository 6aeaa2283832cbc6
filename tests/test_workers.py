import contextlib
import ctypes
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from torch.utils.data import Dataset

from uhml import distributed
from uhml.data import workers
from uhml.data.names import Names
from uhml.data.workers import Loader, next_together, of_blocks
from uhml.errors import UserError
from uhml.interruption import SIGNALS, Preempted, handled


class Rows(Dataset):
    def __init__(self, action=None):
        self.action = action

    def __len__(self):
        return 12

    def __getitem__(self, i):
        if self.action is not None and i == 6:
            self.action()
        return torch.tensor([i, os.getpid()])


def refuse():
    raise UserError("the picture p.png is empty")


def bug():
    raise ZeroDivisionError("a bug")


def die():
    os.kill(os.getpid(), signal.SIGKILL)


def children():
    return [int(pid) for pid in Path(f"/proc/{os.getpid()}/task/{os.getpid()}/children").read_text().split()]


@pytest.mark.parametrize("num_workers", [0, 2])
def test_an_error_of_the_users_is_the_sentence_that_it_was(num_workers):
    with pytest.raises(UserError) as caught:
        list(Loader(Rows(refuse), batch_size=2, num_workers=num_workers))
    assert str(caught.value) == "the picture p.png is empty"


def test_a_bug_keeps_its_traceback():
    with pytest.raises(ZeroDivisionError, match="line"):
        list(Loader(Rows(bug), batch_size=2, num_workers=1))


def test_a_dead_worker_is_told_where_its_work_is_fetched():
    before = signal.getsignal(signal.SIGCHLD)
    with contextlib.closing(iter(Loader(Rows(die), batch_size=2, num_workers=1))) as batches:
        seen = [next(batches)[:, 0].tolist()]
        assert signal.getsignal(signal.SIGCHLD) == before
        time.sleep(1)  # the worker dies meanwhile, and nothing happens here
        with pytest.raises(UserError, match="A process that reads pictures was killed"):
            seen += [batch[:, 0].tolist() for batch in batches]
    assert seen == [[0, 1], [2, 3], [4, 5]][: len(seen)]


def test_a_dead_worker_is_told_by_the_thread_that_pins_memory_too(monkeypatch):
    def fail(self):
        raise RuntimeError("Pin memory thread exited unexpectedly")

    monkeypatch.setattr(torch.utils.data.DataLoader, "__iter__", fail)
    with pytest.raises(UserError, match="A process that reads pictures was killed"):
        list(Loader(Rows(), batch_size=2))


def test_a_worker_that_died_between_two_uses_is_told_of():
    loader = Loader(Rows(), batch_size=2, num_workers=1, persistent_workers=True)
    with contextlib.closing(loader):
        before = set(children())
        assert len(list(loader)) == 6
        (worker,) = set(children()) - before
        os.kill(worker, signal.SIGKILL)
        with pytest.raises(UserError, match="A process that reads pictures was killed"):
            list(loader)
    assert set(children()) <= before


def test_workers_leave_signals_to_their_parent_and_end_when_it_stops_asking():
    others = set(children())
    with handled(), contextlib.closing(iter(Loader(Rows(), batch_size=2, num_workers=2))) as batches:
        assert next(batches)[0, 0] == 0
        workers = set(children()) - others
        assert len(workers) == 2
        for number in SIGNALS:
            for pid in workers:
                os.kill(pid, number)
        assert [int(batch[0, 0]) for batch in batches] == [2, 4, 6, 8, 10]
    with handled(), contextlib.closing(iter(Loader(Rows(), batch_size=2, num_workers=2))) as batches:
        next_together(batches)
        assert len(set(children()) - others) == 2
        os.kill(os.getpid(), signal.SIGTERM)
        with pytest.raises(Preempted):
            next_together(batches)
    assert set(children()) - others == set()


def test_the_next_batch_or_what_comes_when_there_is_none():
    batches = iter(Loader(Rows(), batch_size=12, num_workers=0))
    assert len(next_together(batches, ())) == 12
    assert next_together(batches, ()) == ()


FREED = """
import ctypes, re
from torch.utils.data import Dataset
from uhml.data.workers import Loader
from uhml.environment import keep_freed_memory

class Held(Dataset):
    def __len__(self):
        return 1

    def __getitem__(self, i):
        return 1024 * int(re.search(r"RssAnon:\\s*(\\d+)", open("/proc/self/status").read())[1])

keep_freed_memory()
before = Held()[0]
blocks = [b"x" * 2**20 for _ in range(300)]
last = b"x" * 2**20
del blocks
(held,) = Loader(Held(), num_workers=1, collate_fn=lambda items: items[0])
print(Held()[0] - before, held - before)
"""


@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "malloc_trim"), reason="needs glibc")
def test_workers_do_not_hold_what_the_training_process_has_freed():
    told = subprocess.run([sys.executable, "-c", FREED], capture_output=True, text=True, check=True).stdout
    of_trainer, of_worker = map(int, told.split())
    assert of_trainer < 200 * 2**20
    assert of_worker < 200 * 2**20


def who_saw(paths):
    return os.getpid(), paths


@pytest.mark.parametrize("few", [1, 100])
def test_many_files_are_asked_for_by_other_processes_and_answered_in_order(monkeypatch, few):
    monkeypatch.setattr(workers, "FEW_FILES", few)
    monkeypatch.setattr(workers, "BLOCKS_AT_ONCE", 2)
    monkeypatch.setattr(distributed, "threads_per_rank", lambda: 3)
    names = [f"{i}.jpg" for i in range(90)]
    blocks = [slice(start, start + 4) for start in range(0, 90, 4)]
    found = list(of_blocks(who_saw, Names(names), blocks[::2], "look"))
    assert [paths for _, paths in found] == [tuple(names[block]) for block in blocks[::2]]
    pids = {pid for pid, _ in found}
    assert (pids == {os.getpid()}) == (few > 50)
    assert len(pids) == (1 if few > 50 else 3)


@pytest.mark.parametrize("few", [0, 100])
def test_a_signal_ends_the_asking_between_blocks(monkeypatch, few):
    monkeypatch.setattr(workers, "FEW_FILES", few)
    monkeypatch.setattr(workers, "BLOCKS_AT_ONCE", 1)
    monkeypatch.setattr(distributed, "threads_per_rank", lambda: 2)
    before = children()
    with handled():
        found = of_blocks(who_saw, Names("abc"), [slice(i, i + 1) for i in range(3)], "look")
        pid, paths = next(found)
        assert paths == ("a",)
        assert (pid == os.getpid()) == (few > 0)
        os.kill(os.getpid(), signal.SIGUSR2)
        with pytest.raises(Preempted):
            next(found)
    assert children() == before
