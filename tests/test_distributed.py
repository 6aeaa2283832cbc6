import datetime
import logging
import os
import signal
import socket
import subprocess
import sys
import threading
import time

import pytest
import torch
from ranks import run_ranks
from torch import nn
from torch.distributed import HashStore, TCPStore  # noqa: TID251 (the parts of others)

from uhml import distributed, interruption
from uhml.errors import RankFailed, UserError, known_everywhere
from uhml.interruption import Preempted

WORLDS = [1, 2, 4]


def _gathered_shares(num_rows, dtype):
    rows = (torch.arange(3 * num_rows).reshape(num_rows, 3) * 7 % 5).to(dtype)
    own = rows[list(distributed.share(num_rows))]
    return torch.equal(distributed.all_gather_shares(own, num_rows), rows)


def _all_shares():
    world = distributed.world_size()
    sizes = {0, 1, world - 1, world, world + 1, 7}
    dtypes = [torch.float64, torch.bfloat16, torch.bool, torch.int32, torch.int64]
    wrong = [(n, dtype) for n in sorted(sizes) for dtype in dtypes if not _gathered_shares(n, dtype)]
    owned = distributed.gather_objects(list(distributed.share(7)))
    too_many = len(distributed.share(7)) + 1
    with pytest.raises(ValueError, match="its share of 7 is"):
        distributed.all_gather_shares(torch.zeros(too_many, 2), 7)
    return wrong, sorted(row for rows in owned for row in rows)


@pytest.mark.ddp
@pytest.mark.parametrize("world_size", WORLDS)
def test_shares_are_put_together_in_the_order_of_the_rows(world_size):
    for wrong, owned in run_ranks(_all_shares, world_size):
        assert wrong == []
        assert owned == list(range(7))


def _shares_in_turn(num_rows):
    rows = torch.arange(3 * num_rows, dtype=torch.float64).reshape(num_rows, 3)
    own = rows[list(distributed.share(num_rows))]
    taken = [(part.clone(), list(numbers)) for part, numbers in distributed.shares_in_turn(own, num_rows)]
    assert taken[0][1] == list(distributed.share(num_rows))
    assert all(torch.equal(part, rows[numbers]) for part, numbers in taken)
    return sorted(number for _, numbers in taken for number in numbers)


def _all_shares_in_turn():
    return [_shares_in_turn(n) for n in (0, 1, 3, 7)]


@pytest.mark.ddp
@pytest.mark.parametrize("world_size", WORLDS)
def test_shares_in_turn_bring_every_row_once_to_every_rank(world_size):
    expected = [list(range(n)) for n in (0, 1, 3, 7)]
    assert run_ranks(_all_shares_in_turn, world_size) == [expected] * world_size


def _gathered(values):
    own = len(values) // distributed.world_size()
    return distributed.all_gather(values[distributed.rank() * own :][:own])


@pytest.mark.ddp
@pytest.mark.parametrize("world_size", WORLDS)
def test_batches_are_put_together_in_the_order_of_the_ranks(world_size):
    values = torch.randn(8, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    assert all(torch.equal(gathered, values) for gathered in run_ranks(_gathered, world_size, values))


def _message_of(collective, work):
    try:
        return collective(work)
    except Exception as e:
        return type(e), str(e)


def _fail_on(rank, error):
    def work():
        if distributed.rank() == rank:
            raise error
        return f"rank {distributed.rank()}"

    return work


def _errors():
    last = distributed.world_size() - 1
    return {
        "main returns": distributed.on_main(lambda: f"rank {distributed.rank()}"),
        "main fails": _message_of(distributed.on_main, _fail_on(0, ValueError("bug"))),
        "main's user": _message_of(distributed.on_main, _fail_on(0, UserError("typo"))),
        "main says nothing": _message_of(distributed.on_main, _fail_on(0, KeyError())),
        "all return": distributed.on_every_rank(lambda: f"rank {distributed.rank()}"),
        "last fails": _message_of(distributed.on_every_rank, _fail_on(last, ValueError("bug"))),
        "last's user": _message_of(distributed.on_every_rank, _fail_on(last, UserError("typo"))),
        # After all these errors the ranks are still in step.
        "sum": int(distributed.all_reduce_sum(torch.tensor(1))),
        "objects": distributed.gather_objects({"rank": distributed.rank()}),
        "main": distributed.is_main(),
    }


@pytest.mark.ddp
@pytest.mark.parametrize("world_size", WORLDS)
def test_an_error_on_one_rank_is_raised_on_every_rank_and_users_errors_stay_users(world_size):
    results = run_ranks(_errors, world_size)
    last = world_size - 1
    for rank, got in enumerate(results):
        assert got["main returns"] == ("rank 0" if rank == 0 else None)
        assert got["all return"] == f"rank {rank}"
        assert got["sum"] == world_size
        assert got["objects"] == [{"rank": r} for r in range(world_size)]
        assert got["main"] == (rank == 0)
        failing = {"main fails": 0, "main's user": 0, "last fails": last, "last's user": last}
        for what, where in failing.items():
            kind, words = (UserError, "typo") if "user" in what else (ValueError, "bug")
            if rank == where:
                assert got[what] == (kind, words)
            else:
                elsewhere = UserError if kind is UserError else RankFailed
                assert got[what] == (elsewhere, f"rank {where} failed: {words}")
        assert got["main says nothing"][1] == ("" if rank == 0 else "rank 0 failed: KeyError")


def _broadcasts():
    sent = [
        torch.tensor(2.5),
        torch.zeros(0, 4),
        torch.arange(6, dtype=torch.int32).reshape(2, 3).T,
        torch.tensor([True]),
    ]
    # What the others bring does not matter.
    mine = [value if distributed.is_main() else None for value in sent]
    received = [distributed.broadcast_from_main(value) for value in mine]
    received.append(distributed.broadcast_from_main(torch.full((2,), distributed.rank())))
    return all(
        torch.equal(a, b) and a.dtype == b.dtype for a, b in zip(received, [*sent, torch.zeros(2).long()], strict=True)
    )


@pytest.mark.ddp
@pytest.mark.parametrize("world_size", WORLDS)
def test_broadcast_sends_shape_type_and_values_of_rank_0(world_size):
    assert run_ranks(_broadcasts, world_size) == [True] * world_size


def _parallel_gradient():
    torch.manual_seed(0)
    model = nn.Linear(3, 1).double()
    batch = torch.randn(8, 3, dtype=torch.float64)
    b = 8 // distributed.world_size()
    own = batch[distributed.rank() * b :][:b]
    parallel = distributed.data_parallel(model)  # named, since it takes its hooks along when it goes
    parallel(own).square().mean().backward()
    return model.weight.grad


def _sum_of_unlike_layouts():
    value = torch.arange(6.0).reshape(2, 3)
    return distributed.all_reduce_sum(value if distributed.is_main() else value.T.contiguous().T)


@pytest.mark.ddp
def test_a_sum_is_of_elements_however_each_rank_lays_them_out():
    for found in run_ranks(_sum_of_unlike_layouts, 2):
        assert torch.equal(found, 2 * torch.arange(6.0).reshape(2, 3))


@pytest.mark.ddp
def test_data_parallel_averages_gradients_over_ranks():
    (alone,) = run_ranks(_parallel_gradient, 1)
    for gradient in run_ranks(_parallel_gradient, 2):
        torch.testing.assert_close(gradient, alone)


def test_one_process_without_torchrun_needs_no_group(monkeypatch):
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    threads = torch.get_num_threads()
    try:
        with distributed.process_group("cpu") as device:
            assert device == torch.device("cpu")
            assert (distributed.rank(), distributed.world_size(), distributed.is_main()) == (0, 1, True)
            assert distributed.share(3) == range(3)
            values = torch.ones(2, requires_grad=True)
            assert distributed.all_gather(values) is values
            assert not distributed.all_reduce_sum(values).requires_grad
            model = nn.Linear(1, 1)
            assert distributed.data_parallel(model) is model
    finally:
        torch.set_num_threads(threads)


def test_a_gpu_that_is_not_there_is_the_users_to_mend(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    with (
        pytest.raises(UserError, match=r"train\.device=cuda needs one GPU per process: 1 processes, 0 GPUs"),
        distributed.process_group("cuda"),
    ):
        pass


@pytest.fixture
def gpus(monkeypatch):
    """Makes this a process of two on a machine with GPUs, by its environment; returns what it did."""
    done = []

    def pretend(launcher, num_gpus):
        variables = {
            "torchrun": {"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2"},
            "slurm": {"SLURM_STEP_ID": "0", "SLURM_NTASKS": "2", "SLURM_STEP_TASKS_PER_NODE": "2", "SLURM_NODEID": "0"}
            | {"SLURM_PROCID": "1", "SLURM_LOCALID": "1", "SLURM_JOB_ID": "7", "MASTER_ADDR": "127.0.0.1"},
        }
        for name, value in variables[launcher].items():
            monkeypatch.setenv(name, value)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: num_gpus)
        return done

    monkeypatch.setattr(torch.backends.cudnn, "benchmark", False)
    monkeypatch.setattr(torch.cuda, "set_device", done.append)
    monkeypatch.setattr(distributed.interruption, "when_parent_dies", lambda number: None)
    store = HashStore()
    store.add("uhml/started", 1)  # by rank 0
    monkeypatch.setattr(distributed.dist, "rendezvous", lambda *place, **options: iter([(store, 1, 2)]))
    monkeypatch.setattr(distributed.dist, "init_process_group", lambda backends, **options: done.append(backends))
    monkeypatch.setattr(distributed.dist, "new_group", lambda **options: None)
    monkeypatch.setattr(distributed.dist, "destroy_process_group", lambda: done.append("destroyed"))
    monkeypatch.setattr(distributed.atexit, "register", lambda *what: done.append(what))
    monkeypatch.setattr(torch, "set_num_threads", lambda number: None)
    return pretend


@pytest.mark.parametrize(("launcher", "num_gpus", "own"), [("torchrun", 2, 1), ("slurm", 4, 1), ("slurm", 1, 0)])
def test_each_rank_has_a_gpu_of_its_own_even_where_it_sees_no_other(gpus, launcher, num_gpus, own):
    done = gpus(launcher, num_gpus)
    with distributed.process_group("cuda") as device:
        assert device == torch.device("cuda", own)
    assert done == [torch.device("cuda", own), "cpu:gloo,cuda:nccl", "destroyed"]


def test_fewer_gpus_than_ranks_are_the_users_to_mend(gpus):
    gpus("torchrun", 1)
    with (
        pytest.raises(UserError, match="one GPU per process: 2 processes, 1 GPUs"),
        distributed.process_group("cuda"),
    ):
        pass


@pytest.mark.parametrize(
    ("error", "end"),
    [
        (Preempted(15), "destroyed"),
        (known_everywhere(UserError("said to all")), "destroyed"),
        (UserError("of one rank"), (distributed._end_at_once, 2)),
        (RuntimeError("CUDA out of memory"), (distributed._end_at_once, 1)),
        (RankFailed("another"), (distributed._end_at_once, 1)),
    ],
)
def test_a_rank_that_fails_alone_does_not_wait_for_the_others_on_gpus(gpus, error, end):
    """NCCL would, and they for it."""
    done = gpus("torchrun", 2)
    with pytest.raises(type(error)), distributed.process_group("cuda"):
        raise error
    assert done[-1] == end
    assert ("destroyed" in done) == (end == "destroyed")


def test_the_end_at_once_says_what_there_is_to_say():
    program = "import atexit; from uhml import distributed; print('said'); atexit.register(distributed._end_at_once, 2)"
    ended = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120, check=False)
    assert (ended.returncode, ended.stdout) == (2, "said\n")


def test_a_gpu_that_torch_cannot_use_is_told_of(monkeypatch, tmp_path, caplog):
    monkeypatch.setattr(distributed, "NVIDIA_GPU", tmp_path)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    for device in ("cpu", "auto"):
        assert not caplog.text
        with distributed.process_group(device) as found:
            assert found == torch.device("cpu")
    assert "There is a GPU here that torch cannot use" in caplog.text


def test_threads_are_shared_out_to_the_ranks_of_a_machine(monkeypatch):
    monkeypatch.setattr(distributed.os, "sched_getaffinity", lambda pid: set(range(8)), raising=False)
    monkeypatch.delenv("SLURM_STEP_ID", raising=False)
    # As a batch script has it, whose ranks may use what all tasks were promised.
    monkeypatch.setenv("SLURM_CPUS_PER_TASK", "2")
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "40")
    for ranks, threads in (("1", 8), ("3", 2), ("8", 1), ("20", 1)):
        monkeypatch.setenv("LOCAL_WORLD_SIZE", ranks)
        assert distributed.threads_per_rank() == threads


def test_threads_are_no_more_than_slurm_promised(monkeypatch):
    for name in ("RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    of_srun = {"SLURM_NTASKS": "4", "SLURM_STEP_ID": "0", "SLURM_STEP_TASKS_PER_NODE": "4", "SLURM_NODEID": "0"}
    for name, value in {**of_srun, "SLURM_PROCID": "1", "SLURM_LOCALID": "1", "SLURM_CPUS_PER_TASK": "3"}.items():
        monkeypatch.setenv(name, value)
    # A cluster that lets every task use all cores of the node, one that keeps each to its own, one of hyperthreads.
    for cores, threads in ((64, 3), (3, 3), (2, 2)):
        monkeypatch.setattr(distributed.os, "sched_getaffinity", lambda pid, n=cores: set(range(n)), raising=False)
        assert distributed.threads_per_rank() == threads
    monkeypatch.setattr(distributed.os, "sched_getaffinity", lambda pid: set(range(64)), raising=False)
    monkeypatch.delenv("SLURM_CPUS_PER_TASK")
    assert distributed.threads_per_rank() == 16
    # torchrun is one task with all of its ranks.
    for name, value in {"RANK": "1", "WORLD_SIZE": "4", "LOCAL_WORLD_SIZE": "4", "SLURM_CPUS_PER_TASK": "8"}.items():
        monkeypatch.setenv(name, value)
    assert distributed.threads_per_rank() == 2


def _raise_on_rank_1():
    if distributed.rank() == 1:
        raise ValueError("rank 1 cannot")
    distributed.gather_objects(None)


def _hang():
    if distributed.rank() == 0:
        distributed.gather_objects(None)
    time.sleep(60)


@pytest.mark.ddp
def test_the_helper_of_these_tests_reports_the_failing_rank_and_never_hangs():
    with pytest.raises(pytest.fail.Exception, match=r"(?s)rank 1 of 2 failed first.*ValueError: rank 1 cannot"):
        run_ranks(_raise_on_rank_1, 2)
    with pytest.raises(pytest.fail.Exception, match=r"ranks \[0, 1\] of 2 did not end in time"):
        run_ranks(_hang, 2, timeout=4)


def _patience():
    """How long the ranks wait for rank 0 in :func:`uhml.distributed.on_main`."""
    groups, broadcast = [], distributed.dist.broadcast_object_list

    def noting(*arguments, group=None, **options):
        groups.append(group)
        broadcast(*arguments, group=group, **options)

    distributed.dist.broadcast_object_list = noting
    distributed.on_main(lambda: None)
    (group,) = groups
    return None if group is None else group._get_backend(torch.device("cpu")).options._timeout


@pytest.mark.ddp
def test_the_ranks_wait_for_days_while_rank_0_clusters():
    assert run_ranks(_patience, 2) == [datetime.timedelta(days=7)] * 2


@pytest.fixture
def first_of_two(monkeypatch):
    """This process is rank 0, and nothing has started rank 1."""
    # A port that the system chooses. Not half an hour, for the thread that waits lasts beyond its test.
    environment = {"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(distributed, "COLLECTIVE_TIMEOUT", datetime.timedelta(seconds=60))
    monkeypatch.setattr(distributed, "SECONDS_UNTIL_TOLD", 0.2)
    monkeypatch.setattr(distributed, "SECONDS_TO_MEET", 0.5)


@pytest.mark.parametrize("who", ["rank 0", "rank 1", "rank 0 of torchrun", "rank 1 of torchrun"])
def test_a_signal_ends_the_wait_for_a_rank_that_never_starts(first_of_two, who, monkeypatch, caplog):
    # The store is rank 0's, of the launch that this rank is of, or of torchrun's agent.
    store = None
    if who != "rank 0":
        store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        monkeypatch.setenv("MASTER_PORT", str(store.port))
        monkeypatch.setenv("RANK", who[5])
    if "torchrun" in who:
        monkeypatch.setenv("TORCHELASTIC_USE_AGENT_STORE", "True")
        monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "0")
    monkeypatch.setattr(interruption, "when_parent_dies", lambda number: None)
    with caplog.at_level(logging.INFO, "uhml"), interruption.handled():
        began = time.monotonic()
        asked = threading.Timer(1.0, os.kill, (os.getpid(), signal.SIGTERM))
        asked.start()
        with pytest.raises(Preempted), distributed.process_group("cpu"):
            pytest.fail("the other is there")
    if store is not None:
        # The thread that waits ends without a word on the terminal.
        for prefix in ("", "/worker/attempt_0/"):
            store.set(f"{prefix}uhml/all_started", "")
    # Not at once: all ranks may have been asked, and be about to meet.
    assert time.monotonic() - began > 1.4
    assert caplog.text.count("Waiting for all 2 ranks to start; they meet at 127.0.0.1:") == 1


def test_ranks_that_cannot_meet_are_the_users_to_mend(first_of_two, monkeypatch):
    with socket.socket() as taken:
        taken.bind(("0.0.0.0", 0))
        taken.listen()
        monkeypatch.setenv("MASTER_PORT", port := str(taken.getsockname()[1]))
        with (
            pytest.raises(
                UserError, match=rf"2 ranks did not meet at 127\.0\.0\.1:{port} \(.*address already in use\)"
            ),
            distributed.process_group("cpu"),
        ):
            pytest.fail("the port was free")
