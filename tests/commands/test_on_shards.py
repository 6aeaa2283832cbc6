"""Every command on shards, against the same pictures in folders."""

import io
import json
import tarfile

import numpy as np
import pytest
import torch
from launched import CONFIG
from PIL import Image, ImageDraw

from uhml import cli
from uhml.run.checkpoint import read_file
from uhml.trained.vectors import read_vectors

CLASSES = [f"corners{corners:02d}" for corners in range(3, 11)]


@pytest.fixture(scope="module")
def both(tmp_path_factory):
    """The same pictures in class folders and, in the same order, in three shards with their classes."""
    root = tmp_path_factory.mktemp("both")
    random = np.random.default_rng(0)
    files = []
    for corners, name in enumerate(CLASSES, start=3):
        (root / "folder" / name).mkdir(parents=True)
        for i in range(5):
            image = Image.new("RGB", (48, 40), tuple(random.integers(150, 255, 3).tolist()))
            circle = (*random.uniform(18, 30, 2).tolist(), random.uniform(8, 16))
            ImageDraw.Draw(image).regular_polygon(circle, corners, random.uniform(0, 360), (0, 0, 90))
            image.save(root / "folder" / name / f"{i}.png")
            files.append(root / "folder" / name / f"{i}.png")
    (root / "shards").mkdir()
    for shard, start in enumerate(range(0, len(files), 17)):
        with tarfile.open(root / "shards" / f"{shard:04d}.tar", "w") as tar:
            for number, path in enumerate(files[start : start + 17]):
                for extension, content in (("png", path.read_bytes()), ("cls", path.parent.name.encode())):
                    info = tarfile.TarInfo(f"{number:06d}.{extension}")
                    info.size = len(content)
                    tar.addfile(info, io.BytesIO(content))
    (root / "tiny.yaml").write_text(
        CONFIG.replace("num_classes: 12, ", "").replace("[30, 6, 3]", "[12, 6, 3]").replace("every: 5", "every: 2")
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(root / "user"))
        for kind in ("folder", "shards"):
            data = [f"data.dataset={kind}", f"data.root={root / kind}", f"data.num_workers={int(kind == 'shards')}"]
            run = ["--run-dir", str(root / "runs" / kind)]
            assert cli.main(["train", str(root / "tiny.yaml"), *data, "train.num_steps=3", *run]) == 0
        yield root


def test_training_is_the_same_to_the_bit(both):
    runs = [both / "runs" / kind for kind in ("folder", "shards")]
    theirs, ours = ((run / "metrics.jsonl").read_text() for run in runs)
    assert ours == theirs
    assert ours.count('"loss"') == 3
    models = [read_file(run / "checkpoints" / "step-00000003.pt")["model"] for run in runs]
    torch.testing.assert_close(*models, rtol=0, atol=0)


def test_the_commands_answer_the_same(both, capsys, tmp_path):
    answers = []
    for kind, picture in (("folder", "corners03/2.png"), ("shards", "0000.tar/000002.png")):
        run, out = str(both / "runs" / kind), str(tmp_path / f"{kind}.npy")
        assert cli.main(["embed", run, "--images", str(both / kind), "--out", out]) == 0
        assert cli.main(["evaluate", run, "--out", str(tmp_path / kind)]) == 0
        capsys.readouterr()
        sheet = str(tmp_path / f"{kind}.png")
        assert cli.main(["search", run, "--query", str(both / kind / picture), "--json", "--sheet", sheet]) == 0
        found = json.loads(capsys.readouterr().out)["queries"][0]["neighbors"]
        scores = json.loads((tmp_path / kind / "scores.json").read_text())
        answers.append(
            (
                read_vectors(tmp_path / f"{kind}.npy").rows.tolist(),
                [(answer["distance"], answer["label"]) for answer in found],
                scores["ball"],
            )
        )
        names = read_vectors(tmp_path / f"{kind}.npy").paths
        assert len(names) == 40
    assert answers[0] == answers[1]
    assert names[39] == str(both / "shards" / "0002.tar" / "000005.png")


def test_check_data_and_explore(both, capsys, tmp_path):
    assert cli.main(["check-data", "shards", "--root", str(both / "shards"), "--json", "data.image_size=32"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["pictures"] == {"train": 20, "test": 20}
    assert found["classes"] == {"train": 4, "test": 4}
    page = tmp_path / "page.html"
    assert cli.main(["explore", str(both / "runs" / "shards"), "--out", str(page)]) == 0
    assert "0000.tar/000002.png" in page.read_text()
