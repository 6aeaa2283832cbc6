"""Runs that are harmed, go on, and are the runs they would have been: to the bit, on one rank and on two."""

import json
import os
import shutil
import signal
import time
from pathlib import Path

import pytest
import torch
from injected import (
    STAGES,
    Bug,
    CorruptPictures,
    FailingClustering,
    FullDisk,
    FullDiskInSave,
    JumpingClock,
    KilledWorker,
    KillInSave,
    KillSelf,
    OtherUser,
    Signal,
    SignalIn,
    SlowClustering,
)
from runs import EVERY, NUM_STEPS, Launch, assert_same, checkpoints, logged, run, seed

from uhml.run.checkpoint import newest_checkpoint
from uhml.run.status import read_status

pytestmark = [pytest.mark.slow, pytest.mark.ddp]
KILLS = int(os.environ.get("UHML_FAULT_KILLS", "8"))
RANKS = pytest.mark.parametrize("world_size", [1, 2])


def go_on(run_dir, config, world_size, whole):
    """Start the same command again: it ends well, and as the unbroken run did."""
    codes, said = run(run_dir, config, world_size)
    assert codes == [0] * world_size, said
    assert_same(run_dir, whole[world_size])
    return said


def assert_little_is_lost(run_dir):
    """What is saved is whole, and at most a checkpoint's interval behind what was done."""
    done = logged(run_dir)
    if done:
        newest = newest_checkpoint(run_dir / "checkpoints")
        assert newest is not None
        assert int(newest[0].stem[5:]) >= done - EVERY


@RANKS
@pytest.mark.timeout(60 * max(10, KILLS))
def test_killed_and_preempted_at_random_again_and_again(config, whole, tmp_path, world_size):
    random = seed()
    kills, rounds, launches = 0, 0, 0
    longest = None
    while kills < KILLS // 2:
        rounds += 1
        run_dir = tmp_path / f"run{rounds}"
        while True:
            launches += 1
            assert launches < 20 * KILLS + 20, "no progress"
            started = time.monotonic()
            launch = Launch(run_dir, config, world_size)
            harmed = kills < KILLS // 2 and (rounds > 1 or longest is not None)
            number = random.choice([signal.SIGKILL, signal.SIGKILL, signal.SIGTERM, signal.SIGUSR2, signal.SIGINT])
            if harmed:
                time.sleep(random.uniform(0, longest))
                one, have_met = random.choice([None, *range(world_size)]), "train: 36 pictures" in launch.said
                # The agent of torchrun, or SLURM, kills the rest when one is killed; preemption needs no more than one,
                # once the ranks have met and listen to signals.
                launch.signal(number, one if have_met else None)
            codes = launch.wait()
            # With its result a run is finished, whatever hits the ranks on their way out.
            if codes == [0] * world_size or (run_dir / "result.json").exists():
                longest = longest or time.monotonic() - started
                break
            said = launch.said
            assert harmed, said
            kills += 1
            if number == signal.SIGKILL:
                assert -signal.SIGKILL in codes, said
                assert_little_is_lost(run_dir)
            elif have_met and 0 not in codes and read_status(run_dir) and read_status(run_dir).state == "preempted":
                assert set(codes) == {130 if number == signal.SIGINT else 75}, said
                assert "start the same command again to go on" in said
                # Not a step is lost.
                if "which is saved" in said:
                    assert checkpoints(run_dir)[-1] == logged(run_dir)
        assert_same(run_dir, whole[world_size])
    print(f"{kills} kills, {launches} launches, {rounds} runs of {NUM_STEPS} steps on {world_size} ranks")


# Rank 0 saves; what the others do does not depend on the stage.
@pytest.mark.parametrize(("world_size", "stage"), [*((1, stage) for stage in range(1, STAGES + 1)), (2, 1), (2, 3)])
def test_killed_at_every_stage_of_a_save(config, whole, tmp_path, world_size, stage):
    run_dir = tmp_path / "run"
    save = seed().randint(5, 6)  # there is an older one to remove by then
    codes, said = run(run_dir, config, world_size, fault=KillInSave(stage, save))
    assert codes[0] == -signal.SIGKILL, said
    assert_little_is_lost(run_dir)
    go_on(run_dir, config, world_size, whole)


@pytest.mark.parametrize(
    ("world_size", "number"), [(1, signal.SIGUSR2), (1, signal.SIGINT), (2, signal.SIGTERM), (2, signal.SIGINT)]
)
def test_preempted_in_a_step_with_all_its_workers_nothing_is_lost(config, whole, tmp_path, world_size, number):
    step = seed().randrange(1, NUM_STEPS - 1)
    codes, said = run(tmp_path / "run", config, world_size, fault=Signal(step, number, rank=world_size - 1))
    assert codes == [130 if number == signal.SIGINT else 75] * world_size, said
    assert said.count(f"Stopped by {number.name} after step {step + 1} of 12, which is saved") == 1
    assert "Traceback" not in said
    assert checkpoints(tmp_path / "run")[-1] == step + 1
    assert read_status(tmp_path / "run").state == "preempted"
    go_on(tmp_path / "run", config, world_size, whole)


@pytest.mark.parametrize(
    ("world_size", "function", "times", "step"),
    [
        (2, "embed_share", 1, None),  # of the frozen features, before there is anything to keep
        (1, "embed_share", 2, 4),  # the first clustering takes the frozen features: this is the second one's
        (2, "embed_share", 2, 4),
        (2, "average_linkage_over_ranks", 2, 4),
        (2, "score_unseen", 1, 0),
        (1, "score_unseen", 2, 12),
        (2, "save", 4, 4),
    ],
)
def test_preempted_in_the_middle_of_longer_work(config, whole, tmp_path, world_size, function, times, step):
    run_dir = tmp_path / "run"
    fault = SignalIn(function, signal.SIGTERM, rank=0, times=times)
    codes, said = run(run_dir, config, world_size, fault=fault)
    assert codes == [75] * world_size, said
    assert "Traceback" not in said
    if step is None:
        assert "before the first step" in said
    else:
        assert f"after step {step} of 12, which is saved" in said
    go_on(run_dir, config, world_size, whole)


@RANKS
def test_rank_0_stops_clustering_at_once(config, whole, tmp_path, world_size):
    sign = tmp_path / "clustering"
    launch = Launch(tmp_path / "run", config, world_size, fault=SlowClustering(str(sign)))
    while not sign.exists():
        time.sleep(0.05)
        assert launch.ranks[0].is_alive(), launch.said
    launch.signal(signal.SIGUSR2)
    # The clustering would take an hour.
    assert launch.wait() == [75] * world_size, launch.said
    go_on(tmp_path / "run", config, world_size, whole)


@RANKS
def test_a_rank_killed(config, whole, tmp_path, world_size):
    last, step = world_size - 1, seed().randrange(1, NUM_STEPS - 1)
    # The others would wait for half an hour.
    codes, said = run(tmp_path / "run", config, world_size, fault=KillSelf(step, last))
    assert codes[last] == -signal.SIGKILL
    if world_size == 2:
        assert codes[0] == 1
        assert said.count("Another rank ended without a word") == 1
        assert read_status(tmp_path / "run").state == "failed"
        assert "Another rank ended" in (tmp_path / "run/logs/rank0.log").read_text()
    assert "Traceback" not in said
    assert_little_is_lost(tmp_path / "run")
    go_on(tmp_path / "run", config, world_size, whole)


@pytest.mark.parametrize("rank", [0, 1])
def test_a_rank_raising(config, whole, tmp_path, rank):
    codes, said = run(tmp_path / "run", config, 2, fault=Bug(7, rank))
    assert codes == [1, 1]
    assert said.count("Traceback") == 1
    assert said.count(f"ZeroDivisionError: a bug on rank {rank}") == 1
    logs = [(tmp_path / f"run/logs/rank{r}.log").read_text() for r in range(2)]
    assert f"ZeroDivisionError: a bug on rank {rank}" in logs[rank]
    assert "Another rank ended without a word" in logs[1 - rank]
    assert checkpoints(tmp_path / "run")[-1] == 6
    go_on(tmp_path / "run", config, 2, whole)


@RANKS
def test_clustering_that_fails(config, whole, tmp_path, world_size):
    codes, said = run(tmp_path / "run", config, world_size, fault=FailingClustering())
    assert codes == [1] * world_size
    assert said.count("MemoryError: no memory for the graph") == 1
    assert "MemoryError" in (tmp_path / "run/logs/rank0.log").read_text()
    assert read_status(tmp_path / "run").error == "no memory for the graph"
    assert checkpoints(tmp_path / "run")[-1] == 4
    go_on(tmp_path / "run", config, world_size, whole)


@RANKS
def test_workers_killed(config, whole, tmp_path, world_size):
    codes, said = run(tmp_path / "run", config, world_size, fault=KilledWorker(4, world_size - 1))
    # All that was fetched before they died may still be used: the run may even end well.
    assert codes in ([0] * world_size, [2] * world_size), said
    if codes[0] == 2:
        assert said.count("A process that reads pictures was killed") == 1
        assert "Traceback" not in said
        assert_little_is_lost(tmp_path / "run")
        go_on(tmp_path / "run", config, world_size, whole)
    else:
        assert_same(tmp_path / "run", whole[world_size])


@RANKS
def test_pictures_that_become_rubbish(config, whole, tmp_path, world_size):
    mine = tmp_path / "mine"
    shutil.copytree(config.parent, mine)
    codes, said = run(tmp_path / "run", mine / "tiny.yaml", world_size, fault=CorruptPictures(5, str(mine / "shapes")))
    assert codes == [2] * world_size, said
    assert said.count("is in none of the formats") == 1
    assert "Traceback" not in said
    assert_little_is_lost(tmp_path / "run")
    # Mended, elsewhere: where the pictures lie is no part of a run.
    codes, said = run(tmp_path / "run", config, world_size)
    assert codes == [0] * world_size, said
    assert_same(tmp_path / "run", whole[world_size])


@RANKS
def test_a_full_disk_during_a_save(config, whole, tmp_path, world_size):
    codes, said = run(tmp_path / "run", config, world_size, fault=FullDiskInSave("step-00000008.pt"))
    assert codes == [2] * world_size, said
    assert said.count("step-00000008.pt cannot be written ([Errno 27] File too large)") == 1
    assert "Traceback" not in said
    assert checkpoints(tmp_path / "run")[-1] == 6
    assert not list((tmp_path / "run").rglob("*.partial"))
    assert read_status(tmp_path / "run").state == "failed"
    go_on(tmp_path / "run", config, world_size, whole)


@RANKS
def test_a_full_disk_at_any_time(config, whole, tmp_path, world_size):
    codes, said = run(tmp_path / "run", config, world_size, fault=FullDisk(7))
    assert codes[0] == 2, said
    assert 0 not in codes
    assert said.count("cannot be written") == 1
    # Nor do the threads beside, that write for TensorBoard, tell of it in their way.
    assert "Traceback" not in said
    assert_little_is_lost(tmp_path / "run")
    go_on(tmp_path / "run", config, world_size, whole)


@pytest.mark.parametrize("begun", [False, True])
def test_a_folder_that_may_not_be_written(config, whole, tmp_path, begun):
    # Another user may come in and read, wherever pytest put this.
    for folder in (*tmp_path.parents, tmp_path, *config.parents):
        if folder.stat().st_uid == os.getuid() and folder not in (Path("/"), Path("/tmp")):
            folder.chmod(folder.stat().st_mode | 0o055)
    run_dir = tmp_path / "run"
    if begun:
        codes, said = run(run_dir, config, fault=Signal(5, signal.SIGTERM))
        assert codes == [75], said
        for path in (run_dir, *run_dir.rglob("*")):
            path.chmod(0o555 if path.is_dir() else 0o444)
    else:
        tmp_path.chmod(0o555)
    codes, said = run(tmp_path / "run", config, fault=OtherUser())
    assert codes == [2], said
    assert f"The run's folder {run_dir} cannot be written: [Errno 13] Permission denied" in said
    assert "Traceback" not in said
    tmp_path.chmod(0o755)
    if begun:
        for path in (run_dir, *run_dir.rglob("*")):
            path.chmod(0o755)
        go_on(run_dir, config, 1, whole)


def test_two_launches_on_one_folder(config, whole, tmp_path):
    sign = tmp_path / "clustering"
    first = Launch(tmp_path / "run", config, fault=SlowClustering(str(sign)))
    while not sign.exists():
        time.sleep(0.05)
        assert first.ranks[0].is_alive(), first.said
    (second_dir := tmp_path / "second").mkdir()
    (second_dir / "run").symlink_to(tmp_path / "run")
    codes, said = run(second_dir / "run", config)
    assert codes == [2]
    assert f"is in use by another launch (host {os.uname().nodename}, process {first.ranks[0].pid})" in said
    first.signal(signal.SIGTERM)
    assert first.wait() == [75]
    go_on(tmp_path / "run", config, 1, whole)


def test_a_clock_that_jumps(config, whole, tmp_path):
    codes, said = run(tmp_path / "run", config, fault=JumpingClock())
    assert codes == [0], said
    assert_same(tmp_path / "run", whole[1])
    assert 0 < json.loads((tmp_path / "run/result.json").read_text())["seconds"] < 3000


@pytest.mark.parametrize(("first", "then"), [(1, 2), (2, 1)])
def test_another_number_of_ranks_goes_on_and_says_what_is_no_longer_the_same(config, whole, tmp_path, first, then):
    codes, said = run(tmp_path / "run", config, first, fault=Signal(5, signal.SIGTERM))
    assert codes == [75] * first, said
    codes, said = run(tmp_path / "run", config, then)
    assert codes == [0] * then, said
    assert said.count(f"{then} ranks go on where {first} stopped") == 1
    assert "no longer bit for bit the same" in said
    assert logged(tmp_path / "run") == NUM_STEPS


def test_a_damaged_checkpoint_costs_one_interval(config, whole, tmp_path):
    run_dir = tmp_path / "run"
    codes, _ = run(run_dir, config, fault=KillSelf(7))
    assert codes == [-signal.SIGKILL]
    path = run_dir / "checkpoints/step-00000006.pt"
    damaged = bytearray(path.read_bytes())
    damaged[len(damaged) // 2] ^= 1
    path.write_bytes(damaged)
    said = go_on(run_dir, config, 1, whole)
    assert f"{path} is damaged, and passed over" in said
    assert "Going on after step 4 of 12" in said


def test_the_network_of_these_tests_does_draw_from_torchs_generator(whole):
    states = [
        torch.load(path, weights_only=True)["random_states"] for path in sorted((whole[2] / "checkpoints").glob("*.pt"))
    ]
    assert len(states[0]) == 2
    assert not torch.equal(states[0][0]["torch"], states[0][1]["torch"])
    assert not torch.equal(states[0][0]["torch"], states[1][0]["torch"])
