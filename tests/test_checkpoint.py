import hashlib
import os
import pickle

import numpy as np
import pytest
import torch
from torch import nn

from uhml.config import OptimConfig
from uhml.data.fingerprint import fingerprint
from uhml.data.pictures import Pictures, Splits
from uhml.errors import UserError
from uhml.model import Embedder, HyperbolicHead
from uhml.optim import build_optimizer, build_schedule
from uhml.run import checkpoint
from uhml.run.checkpoint import DamagedFile, keep_best, load_weights, newest_checkpoint, read_file, save_checkpoint


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
    path = save_checkpoint(tmp_path, 12, {"step": 12, "model": source.state_dict(), "config": "train: {}\n"}, 3)
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
        save_checkpoint(folder, step, {"model": model.state_dict()}, 3)
    load_weights(target, str(tmp_path))
    assert (target[0].weight == 1000).all()


@pytest.mark.parametrize("error", [OSError("disk full"), RuntimeError("disk full")])
def test_a_failing_save_leaves_the_old_file_and_nothing_else(tmp_path, monkeypatch, error):
    path = save_checkpoint(tmp_path, 1, {"model": {"a": torch.ones(2)}}, 3)
    old = path.read_bytes()

    def fail(state, file):
        file.write(b"half of it")
        raise error

    monkeypatch.setattr(checkpoint.torch, "save", fail)
    with pytest.raises(UserError, match=r"cannot be written \(disk full\)"):
        save_checkpoint(tmp_path, 1, {}, 3)
    assert [p.name for p in tmp_path.iterdir()] == [path.name]
    assert path.read_bytes() == old


@pytest.mark.parametrize("error", [pickle.PicklingError("no"), KeyboardInterrupt()])
def test_nor_does_an_interrupted_one(tmp_path, monkeypatch, error):
    def fail(state, file):
        file.write(b"half of it")
        raise error

    monkeypatch.setattr(checkpoint.torch, "save", fail)
    with pytest.raises(type(error)):
        save_checkpoint(tmp_path, 1, {}, 3)
    assert list(tmp_path.iterdir()) == []


def steps(folder):
    return sorted(int(path.stem[5:]) for path in folder.iterdir())


def test_the_newest_are_kept_and_none_goes_before_the_new_one_is_safe(tmp_path, monkeypatch):
    for step in (2, 4, 6):
        save_checkpoint(tmp_path, step, {"step": step}, 2)
    assert steps(tmp_path) == [4, 6]

    def fail(state, file):
        raise OSError("disk full")

    with monkeypatch.context() as patched:
        patched.setattr(checkpoint.torch, "save", fail)
        with pytest.raises(UserError, match="disk full"):
            save_checkpoint(tmp_path, 8, {}, 1)
    assert steps(tmp_path) == [4, 6]
    # One that a run went back behind does not push out those it goes on with.
    save_checkpoint(tmp_path, 5, {"step": 5}, 2)
    assert steps(tmp_path) == [4, 5, 6]
    save_checkpoint(tmp_path, 6, {"step": 6}, 1)
    assert steps(tmp_path) == [6]


def test_the_best_one_is_a_copy_that_stays(tmp_path, monkeypatch):
    for step in (2, 4):
        save_checkpoint(tmp_path, step, {"step": step}, 1)
        keep_best(tmp_path, step)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["best.pt", "step-00000004.pt"]
    save_checkpoint(tmp_path, 6, {"step": 6}, 1)
    assert read_file(tmp_path / "best.pt") == {"step": 4}

    def fail(source, target):
        target.write(b"half of it")
        raise OSError("disk full")

    monkeypatch.setattr(checkpoint.shutil, "copyfileobj", fail)
    with pytest.raises(OSError, match="disk full"):
        keep_best(tmp_path, 6)
    assert read_file(tmp_path / "best.pt") == {"step": 4}
    assert not list(tmp_path.glob("*.partial"))


def same(a, b):
    return a.keys() == b.keys() and all(
        torch.equal(a[k], b[k]) if isinstance(a[k], torch.Tensor) else a[k] == b[k] for k in a
    )


def test_a_single_flipped_bit_is_noticed_wherever_it_is(tmp_path):
    state = {"step": 3, "a": torch.arange(5.0), "b": torch.ones(2, 3)}
    path = save_checkpoint(tmp_path, 3, state, 3)
    whole, random = path.read_bytes(), np.random.default_rng(0)
    assert same(read_file(path), state)
    noticed = 0
    for place in random.permutation(len(whole))[:600]:
        flipped = bytearray(whole)
        flipped[place] ^= 1 << int(random.integers(8))
        path.write_bytes(flipped)
        try:
            # In what the archive merely repeats, or pads with, a bit makes no difference.
            assert same(read_file(path), state)
        except DamagedFile:
            noticed += 1
    assert noticed > 100


def test_a_damaged_newest_is_named_and_skipped(tmp_path, caplog):
    assert newest_checkpoint(tmp_path) is None
    paths = [save_checkpoint(tmp_path, step, {"step": step, "a": torch.ones(99)}, 3) for step in (1, 2, 3)]
    assert newest_checkpoint(tmp_path)[0] == paths[2]
    flipped = bytearray(paths[2].read_bytes())
    flipped[len(flipped) // 2] ^= 1
    paths[2].write_bytes(flipped)
    paths[1].write_bytes(b"")
    assert newest_checkpoint(tmp_path)[0] == paths[0]
    assert str(paths[2]) in caplog.text
    assert str(paths[1]) in caplog.text
    paths[0].write_bytes(paths[0].read_bytes()[:-1])
    with pytest.raises(UserError, match=r"All 3 checkpoints in .* are damaged"):
        newest_checkpoint(tmp_path)


@pytest.mark.parametrize("to", ["/mnt/unmounted/step-00000003.pt", "step-00000003.pt"])
def test_a_link_to_nowhere_is_passed_over(tmp_path, to, caplog):
    """As to a disk that is not mounted."""
    old = save_checkpoint(tmp_path, 2, {"step": 2}, 3)
    (link := tmp_path / "step-00000003.pt").symlink_to(to)
    assert newest_checkpoint(tmp_path) == (old, {"step": 2})
    assert f"{link} is damaged" in caplog.text
    old.unlink()
    os.mkfifo(old)
    with pytest.raises(UserError, match=r"All 2 checkpoints in .* are damaged"):
        newest_checkpoint(tmp_path)


def test_one_that_is_gone_by_now_is_not_damaged(tmp_path, monkeypatch):
    """As in a run that goes on, and keeps one checkpoint only."""
    old = save_checkpoint(tmp_path, 1, {"step": 1}, 1)
    read = checkpoint.read_file

    def overtaken(path):
        if path == old:
            save_checkpoint(tmp_path, 2, {"step": 2}, 1)
        return read(path)

    monkeypatch.setattr(checkpoint, "read_file", overtaken)
    assert newest_checkpoint(tmp_path) == (tmp_path / "step-00000002.pt", {"step": 2})


def test_a_folder_that_is_not_there_is_named(tmp_path):
    with pytest.raises(UserError, match=r"nowhere/step-00000001\.pt cannot be written"):
        save_checkpoint(tmp_path / "nowhere", 1, {}, 3)


def test_what_is_no_checkpoint_of_this_network_is_refused(tmp_path):
    model = network()
    assert "no such checkpoint" in refusal(model, tmp_path / "nothing.pt")
    assert "the folder holds no checkpoints/step-*.pt" in refusal(model, tmp_path)
    file = tmp_path / "other.pt"
    torch.save({"model": network(4).state_dict()}, file)
    message = refusal(model, file)
    assert "of another network than model.backbone, model.embedding_dim and model.projector" in message
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
    whole = save_checkpoint(tmp_path, 1, {"model": model.state_dict()}, 3).read_bytes()
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
    model = Embedder(Features(), HyperbolicHead(4, 2, 0.1, 2.3), None, "float32", "float32")
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
    read = torch.load(save_checkpoint(tmp_path, 1, state, 3), weights_only=True)
    assert read["schedule"] == schedule.state_dict()
    assert read["optimizer"]["param_groups"] == optimizer.state_dict()["param_groups"]


class Features(nn.Linear):
    """A backbone, as far as an optimizer sees it."""

    def __init__(self):
        super().__init__(4, 4)


def test_fingerprint_is_of_names_below_the_folder_that_holds_all(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    splits = Splits(train=Pictures(paths=("a/1.png", "./b/2.png")), test=Pictures(paths=(f"{tmp_path}/a/c/3.png",)))
    digests = [hashlib.sha256(names).hexdigest() for names in (b"/a/1.png\n/b/2.png", b"/a/c/3.png")]
    assert fingerprint(splits) == [(2, digests[0]), (1, digests[1])]
    beside = Splits(train=Pictures(paths=("a/1.png", "a-/2.png", "a/3.png")))
    assert fingerprint(beside) == [(3, hashlib.sha256(b"/a/1.png\n/a-/2.png\n/a/3.png").hexdigest())]
    gallery = Pictures(paths=("a/4.png",))
    with_gallery = Splits(train=splits.train, test=splits.test, gallery=gallery)
    assert fingerprint(with_gallery) == [*fingerprint(splits), (1, hashlib.sha256(b"/a/4.png").hexdigest())]


def test_fingerprint_is_of_the_order_too():
    ab, ba = (Splits(train=Pictures(paths=paths)) for paths in (("a.png", "b.png"), ("b.png", "a.png")))
    assert fingerprint(ab) != fingerprint(ba)
