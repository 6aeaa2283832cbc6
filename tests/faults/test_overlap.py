"""Runs harmed while a clustering is going on in the background, with a bank of features: the same to the bit."""

import signal

import numpy as np
import pytest
import torch
from injected import ClusteringInPlace, KilledBackground, KillSelf, Signal, SignalIn
from runs import assert_same, checkpoints, recorded, run

from uhml.run.status import read_status

pytestmark = [pytest.mark.slow, pytest.mark.ddp]
# Clusterings of steps 4 and 8 bring their levels at 7 and 11. Saved at every second step.
OVERRIDES = ("hierarchy.overlap_steps=3", "hierarchy.features=bank", "data.num_workers=0")


@pytest.fixture(scope="module")
def overlapped(config, tmp_path_factory):
    """Folders of unbroken runs, by number of ranks."""
    runs = {}
    for world_size in (1, 2):
        runs[world_size] = tmp_path_factory.mktemp("overlapped") / f"ranks{world_size}"
        codes, said = run(runs[world_size], config, world_size, OVERRIDES, fault=ClusteringInPlace())
        assert codes == [0] * world_size, said
    return runs


@pytest.mark.parametrize("world_size", [1, 2])
def test_interrupted_while_a_clustering_is_pending(config, overlapped, tmp_path, world_size):
    run_dir = tmp_path / "run"
    # With the real process: which is no more when the run has ended, or the launch would say so.
    stopped = Signal(4, signal.SIGTERM, rank=world_size - 1)
    codes, said = run(run_dir, config, world_size, OVERRIDES, fault=stopped)
    assert codes == [75] * world_size, said
    saved = torch.load(run_dir / "checkpoints" / "step-00000005.pt", weights_only=True)
    assert saved["pending"]["step"] == 4
    assert len(saved["pending"]["rows"]) == len(saved["bank"]) == 36
    # Within the next window, without a word; the last checkpoint is of the window, too.
    codes, said = run(run_dir, config, world_size, OVERRIDES, fault=ClusteringInPlace(KillSelf(10)))
    assert -signal.SIGKILL in codes, said
    assert checkpoints(run_dir)[-1] == 10
    # While the swap waits for the clustering.
    stopped = ClusteringInPlace(SignalIn("swap_hierarchy", signal.SIGUSR2, times=1))
    codes, said = run(run_dir, config, world_size, OVERRIDES, fault=stopped)
    assert codes == [75] * world_size, said
    assert "after step 11 of 12, which is saved" in said
    codes, said = run(run_dir, config, world_size, OVERRIDES, fault=ClusteringInPlace())
    assert codes == [0] * world_size, said
    assert_same(run_dir, overlapped[world_size])


@pytest.mark.parametrize("world_size", [1, 2])
def test_killed_in_the_first_clustering(config, overlapped, tmp_path, world_size):
    # The checkpoint before it has the bank that it is of, which is rounded.
    run_dir = tmp_path / "run"
    killed = ClusteringInPlace(SignalIn("average_linkage_over_ranks", signal.SIGKILL))
    codes, said = run(run_dir, config, world_size, OVERRIDES, fault=killed)
    assert codes[0] == -signal.SIGKILL, said
    saved = torch.load(run_dir / "checkpoints" / "step-00000000.pt", weights_only=True)
    assert saved["levels"] is None
    assert saved["bank"].dtype == torch.float16
    embedded = SignalIn("fit_head", signal.SIGKILL)
    codes, said = run(run_dir, config, world_size, OVERRIDES, fault=ClusteringInPlace(embedded))
    assert codes[0] == -signal.SIGKILL, said
    codes, said = run(run_dir, config, world_size, OVERRIDES, fault=ClusteringInPlace())
    assert codes == [0] * world_size, said
    assert_same(run_dir, overlapped[world_size])
    trees = [np.load(path / "hierarchies" / "step-00000000.npz") for path in (run_dir, overlapped[world_size])]
    assert set(trees[0]) == set(trees[1])
    for name in trees[0]:
        np.testing.assert_array_equal(trees[0][name], trees[1][name])


def test_a_bank_filled_by_micro_batches_of_two_ranks_is_that_of_whole_batches_of_one(config, tmp_path):
    # Without dropout, whose random numbers are each rank's own.
    overrides = [*OVERRIDES, "model.backbone=test_efficientnet.r160_in1k", "optim.learning_rate=0.0001"]
    for world_size, micro_batch_size in ((1, "null"), (2, "3")):
        command = [*overrides, f"train.micro_batch_size={micro_batch_size}"]
        codes, said = run(tmp_path / str(world_size), config, world_size, command, fault=ClusteringInPlace())
        assert codes == [0] * world_size, said
    one, two = ([line for line in recorded(tmp_path / name) if line["kind"] == "train"] for name in "12")
    assert [line["loss"] for line in two] == pytest.approx([line["loss"] for line in one], rel=1e-3)
    saved = [tmp_path / name / "checkpoints" / "step-00000010.pt" for name in "12"]
    one, two = (torch.load(path, weights_only=True)["bank"] for path in saved)
    torch.testing.assert_close(two, one, rtol=2e-2, atol=2e-2)
    one, two = ([line for line in recorded(tmp_path / name) if line["kind"] == "hierarchy"] for name in "12")
    assert two == one


@pytest.mark.parametrize("world_size", [1, 2])
def test_a_failure_in_the_background_ends_all_ranks_with_one_sentence(config, tmp_path, world_size):
    codes, said = run(tmp_path / "run", config, world_size, OVERRIDES, fault=KilledBackground())
    assert codes == [2] * world_size, said
    assert said.count("The process that clusters in the background ended with status -9") == 1
    assert "Traceback" not in said
    assert "ended with status -9" in read_status(tmp_path / "run").error
    assert checkpoints(tmp_path / "run")[-1] == 6
