import pickle

import pytest
import torch
from torch import nn

from uhml import checkpoint
from uhml.checkpoint import load_weights, save_checkpoint
from uhml.config import OptimConfig
from uhml.errors import UserError
from uhml.model import Embedder, HyperbolicHead
from uhml.optim import build_optimizer, build_schedule


def network(num_features=3):
    return nn.Sequential(nn.Linear(num_features, 2), nn.BatchNorm1d(2))


def refusal(model, source):
    """The message, which must be one sentence on one line that names the option."""
    with pytest.raises(UserError) as caught:
        load_weights(model, str(source))
    message = str(caught.value)
    assert message.startswith("model.init_from=")
    assert "\n" not in message
    return message


def test_what_is_saved_is_loaded(tmp_path):
    source, target = network(), network()
    path = save_checkpoint(tmp_path, 12, {"step": 12, "model": source.state_dict(), "config": "train: {}\n"})
    assert path == tmp_path / "step-00000012.pt"
    assert [p.name for p in tmp_path.iterdir()] == [path.name]
    load_weights(target, str(path))
    for name, value in target.state_dict().items():
        assert torch.equal(value, source.state_dict()[name])


def test_the_newest_checkpoint_of_a_runs_folder_is_taken(tmp_path):
    folder, target = tmp_path / "checkpoints", network()
    folder.mkdir()
    for step in (900, 1000, 20):
        model = network()
        nn.init.constant_(model[0].weight, step)
        save_checkpoint(folder, step, {"model": model.state_dict()})
    load_weights(target, str(tmp_path))
    assert (target[0].weight == 1000).all()


@pytest.mark.parametrize("error", [OSError("disk full"), RuntimeError("disk full")])
def test_a_failing_save_leaves_the_old_file_and_nothing_else(tmp_path, monkeypatch, error):
    path = save_checkpoint(tmp_path, 1, {"model": {"a": torch.ones(2)}})
    old = path.read_bytes()

    def fail(state, file):
        file.write(b"half of it")
        raise error

    monkeypatch.setattr(checkpoint.torch, "save", fail)
    with pytest.raises(UserError, match="cannot be written: disk full"):
        save_checkpoint(tmp_path, 1, {})
    assert [p.name for p in tmp_path.iterdir()] == [path.name]
    assert path.read_bytes() == old


@pytest.mark.parametrize("error", [pickle.PicklingError("no"), KeyboardInterrupt()])
def test_nor_does_an_interrupted_one(tmp_path, monkeypatch, error):
    def fail(state, file):
        file.write(b"half of it")
        raise error

    monkeypatch.setattr(checkpoint.torch, "save", fail)
    with pytest.raises(type(error)):
        save_checkpoint(tmp_path, 1, {})
    assert list(tmp_path.iterdir()) == []


def test_a_new_file_takes_the_place_of_the_old_in_one_step(tmp_path):
    path = save_checkpoint(tmp_path, 1, {"model": {"a": torch.ones(2)}})
    old = path.read_bytes()
    with path.open("rb") as reader:
        save_checkpoint(tmp_path, 1, {"model": {"a": torch.zeros(2)}})
        # Who reads the old one meanwhile reads all of it.
        assert reader.read() == old
    assert path.read_bytes() != old


def test_the_file_is_on_the_disk_before_it_has_its_name(tmp_path, monkeypatch):
    synced = []
    monkeypatch.setattr(checkpoint.os, "fsync", lambda fd: synced.append([p.name for p in tmp_path.iterdir()]))
    save_checkpoint(tmp_path, 1, {})
    assert synced == [["step-00000001.partial"]]


def test_a_folder_that_is_not_there_is_named(tmp_path):
    with pytest.raises(UserError, match=r"nowhere/step-00000001\.pt cannot be written"):
        save_checkpoint(tmp_path / "nowhere", 1, {})


def test_what_is_no_checkpoint_of_this_network_is_refused(tmp_path):
    model = network()
    assert "no such checkpoint" in refusal(model, tmp_path / "nothing.pt")
    assert "the folder holds no checkpoints/step-*.pt" in refusal(model, tmp_path)
    file = tmp_path / "other.pt"
    torch.save({"model": network(4).state_dict()}, file)
    message = refusal(model, file)
    assert "of another network than model.backbone and model.embedding_dim" in message
    assert "size mismatch for 0.weight" in message
    for weights in ({}, 3, torch.ones(3)):
        torch.save({"model": weights}, file)
        assert "of another network" in refusal(model, file)
    for content in ({"weights": 1}, [1, 2]):
        torch.save(content, file)
        assert "is damaged or no checkpoint of uhml" in refusal(model, file)
    for content in (b"", b"not a checkpoint", b"PK\x03\x04cut off"):
        file.write_bytes(content)
        assert "is damaged or no checkpoint of uhml" in refusal(model, file)
    whole = save_checkpoint(tmp_path, 1, {"model": model.state_dict()}).read_bytes()
    file.write_bytes(whole[: len(whole) // 2])
    assert "is damaged or no checkpoint of uhml" in refusal(model, file)


class Malicious:
    def __reduce__(self):
        return (print, ("unpickled!",))


@pytest.mark.parametrize("legacy", [False, True])
def test_a_file_that_would_run_code_is_refused_without_running_it(tmp_path, capsys, legacy):
    file = tmp_path / "bad.pt"
    if legacy:
        file.write_bytes(pickle.dumps({"model": Malicious()}, protocol=2))
    else:
        torch.save({"model": Malicious()}, file)
    assert "is damaged or no checkpoint of uhml" in refusal(network(), file)
    assert capsys.readouterr().out == ""


def test_all_that_the_trainer_saves_is_read_without_unpickling(tmp_path):
    model = Embedder(Features(), HyperbolicHead(4, 2, 0.1, 2.3), "float32", "float32")
    config = OptimConfig(warmup_steps=1)
    optimizer = build_optimizer(model, config)
    schedule = build_schedule(optimizer, config, 3)
    model(torch.randn(2, 4)).sum().backward()
    optimizer.step()
    schedule.step()
    state = {
        "step": 1,
        "model": model.state_dict(),
        "optimizer": optimizer.state_dict(),
        "schedule": schedule.state_dict(),
        "levels": torch.zeros(3, 9, dtype=torch.int32),
        "config": "train: {}\n",
    }
    read = torch.load(save_checkpoint(tmp_path, 1, state), weights_only=True)
    assert read["schedule"] == schedule.state_dict()
    assert read["optimizer"]["param_groups"] == optimizer.state_dict()["param_groups"]


class Features(nn.Linear):
    """A backbone, as far as an optimizer sees it."""

    def __init__(self):
        super().__init__(4, 4)
