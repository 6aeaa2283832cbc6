import json
import os
import signal
import statistics
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from launched import uhml
from PIL import Image

from uhml import cli
from uhml.run.status import read_status

TINY = [
    "data.image_size=32",
    "data.num_workers=0",
    "model.backbone=test_efficientnet.r160_in1k",
    "model.weights=random",
    "model.embedding_dim=8",
    "model.inference_precision=float32",
    "hierarchy.num_neighbors=3",
    "hierarchy.cuts=[0.5,0.9]",
    "mining.pictures_per_cluster=2",
    "train.global_batch_size=8",
    "train.num_steps=2",
    "train.device=cpu",
]


@pytest.fixture(autouse=True)
def at_the_top(monkeypatch):
    monkeypatch.chdir(Path(__file__).parents[2])


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """CUB's layout below a folder: two classes to train on and two to test on, of 6 pictures each."""
    root = tmp_path_factory.mktemp("data")
    home, random = root / "CUB_200_2011", np.random.default_rng(0)
    images, labels = [], []
    for number in (1, 2, 101, 102):
        folder = home / "images" / f"{number:03d}.bird"
        folder.mkdir(parents=True)
        for i in range(6):
            Image.fromarray(random.integers(0, 255, (32, 32, 3), np.uint8)).save(folder / f"{i}.png")
            images.append(f"{len(images) + 1} {folder.name}/{i}.png\n")
            labels.append(f"{len(labels) + 1} {number}\n")
    (home / "images.txt").write_text("".join(images))
    (home / "image_class_labels.txt").write_text("".join(labels))
    return root


@pytest.fixture(scope="module")
def reproduced(data, tmp_path_factory):
    """Two seeds of one setting, as the command leaves them, and what it printed. Not to be written to."""
    out = tmp_path_factory.mktemp("out")
    said = uhml("reproduce", data, "--out", out, "--settings", "ours", "--seeds", "0,1", *TINY)
    return out, said


def again(data, out, *words, seeds="0,1"):
    return cli.main(["reproduce", str(data), "--out", str(out), "--settings", "ours", "--seeds", seeds, *TINY, *words])


def test_the_table_has_the_mean_of_what_the_runs_scored(reproduced):
    out, said = reproduced
    results = [json.loads((out / f"cub200/ours/seed-{s}/result.json").read_text()) for s in (0, 1)]
    lines = (out / "table.md").read_text().splitlines()
    heading = next(line for line in lines if "| R@1 |" in line)
    assert [cell.strip() for cell in heading.split("|")[2:]] == [
        *("seeds", "R@1", "R@2", "R@4", "R@8", "MAP@R", "NMI", "seconds", "")
    ]
    rows = {line.split("|")[1].strip(): line for line in lines if line.startswith("| ") and line != heading}
    frozen, untrained, ours = rows.values()
    assert list(rows)[2] == "**ours**"
    for kind, row in (("frozen", frozen), ("start", untrained), ("trained", ours)):
        for score in ("map_at_r", "nmi"):
            values = [100 * result[kind][score] for result in results]
            assert f"| {statistics.fmean(values):.1f} ± {np.std(values, ddof=1):.1f} |" in row
    assert f"| 2 | {100 * statistics.fmean(r['trained']['recall_at_k']['1'] for r in results):.1f} ±" in ours
    assert any("train.seed=S --run-dir" in line and "configs/cub200.yaml" in line for line in lines)
    assert "cub200: 12 train pictures instead of 5,864" in said
    assert "MAP@R" in said


def test_what_is_done_is_not_done_again(reproduced, data, capsys):
    out, _ = reproduced
    before = {path: path.stat().st_mtime_ns for path in out.rglob("result.json")}
    log = (out / "cub200/ours/seed-0.log").read_bytes()
    assert again(data, out) == 0
    assert {path: path.stat().st_mtime_ns for path in out.rglob("result.json")} == before
    assert (out / "cub200/ours/seed-0.log").read_bytes() == log
    assert "Run 1" not in capsys.readouterr().err
    # Scores of another config do not belong in the table.
    assert again(data, out, "train.num_steps=3") == 2
    assert "train.num_steps: 2 -> 3" in capsys.readouterr().err


@pytest.mark.ddp
def test_two_ranks_score_what_one_does(reproduced, data, tmp_path):
    out, _ = reproduced
    assert again(data, tmp_path, "--nproc-per-node", "2", seeds="0") == 0
    run = "cub200/ours/seed-0"
    assert read_status(tmp_path / run).world_size == 2
    one, two = (json.loads((folder / run / "result.json").read_text())["trained"] for folder in (out, tmp_path))
    assert two["recall_at_k"] == one["recall_at_k"]
    assert two["map_at_r"] == pytest.approx(one["map_at_r"])


def test_a_failed_run_is_told_and_the_others_go_on(reproduced, data, tmp_path, capsys):
    out, _ = reproduced
    copy = tmp_path / "out"
    (copy / "cub200/ours").mkdir(parents=True)
    (copy / "cub200/ours/seed-1").symlink_to(out / "cub200/ours/seed-1")
    (copy / "cub200/ours/seed-0").mkdir()
    (copy / "cub200/ours/seed-0/mine.txt").write_text("not of a run")
    assert again(data, copy) == 1
    err = capsys.readouterr().err
    assert "cub200, ours, seed 0 failed" in err
    assert "seed-0.log" in err
    table = (copy / "table.md").read_text()
    assert "**cub200, ours, seed 0 failed**" in table
    assert "| **ours** | 1 of 2 |" in table


def test_ctrl_c_ends_the_run_too_and_says_how_to_go_on(data, tmp_path):
    words = [
        "reproduce",
        data,
        "--out",
        tmp_path,
        "--settings",
        "ours",
        "--seeds",
        "0",
        *TINY,
        "train.num_steps=100000",
    ]
    command = [sys.executable, "-m", "uhml", *map(str, words)]
    run = tmp_path / "cub200/ours/seed-0"
    child = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    try:
        deadline = time.monotonic() + 150
        while (status := read_status(run)) is None or status.step < 1:
            assert time.monotonic() < deadline, status
            assert child.poll() is None, child.stderr.read()
            time.sleep(0.1)
        child.send_signal(signal.SIGINT)
        _, err = child.communicate(timeout=100)
    finally:
        child.kill()
    assert child.returncode == 130, err
    assert "start the same command again to go on" in err
    assert read_status(run).state == "preempted"
    with pytest.raises(ProcessLookupError):
        os.kill(read_status(run).pid, 0)


def test_dry_run(data, tmp_path, capsys):
    out = tmp_path / "out"
    words = ["reproduce", str(data), "--out", str(out), "--dry-run", "--nproc-per-node", "2", "train.num_steps=7"]
    assert cli.main(words) == 0
    said = capsys.readouterr().out.splitlines()
    commands = [line for line in said if not line.startswith("#")]
    assert len(commands) == 9
    assert all(line.startswith("torchrun ") and "--nproc-per-node=2 -m uhml train" in line for line in commands)
    assert sum("configs/paper/cub200.yaml train.num_steps=7" in line for line in commands) == 3
    assert sum("configs/cub200.yaml train.num_steps=7 model.curvature=0" in line for line in commands) == 3
    assert not out.exists()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--settings", "papr"], "Did you mean 'paper'?"),
        (["--seeds", "0,x"], "must be whole numbers"),
        (["--seeds", "0,0"], "names one twice"),
        (["train.seed=3"], "--seeds says it"),
        (["train.num_step=3"], "num_steps"),
        (["--nproc-per-node", "5"], "must be a multiple of the 5 ranks"),
    ],
)
def test_what_is_refused(data, tmp_path, capsys, words, message):
    assert cli.main(["reproduce", str(data), "--out", str(tmp_path / "out"), *words]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_no_data(tmp_path, capsys):
    assert cli.main(["reproduce", str(tmp_path), "--out", str(tmp_path / "out")]) == 2
    err = capsys.readouterr().err
    assert "holds none of CUB_200_2011 (cub200), cars196 (cars196), Stanford_Online_Products (sop)" in err
    assert "uhml prepare" in err


def test_data_that_training_would_refuse(data, tmp_path, capsys):
    (tmp_path / "CUB_200_2011").mkdir()
    for name in ("images.txt", "image_class_labels.txt"):
        (tmp_path / "CUB_200_2011" / name).write_text((data / "CUB_200_2011" / name).read_text())
    (tmp_path / "CUB_200_2011" / "images").symlink_to(data / "CUB_200_2011" / "images")
    with (tmp_path / "CUB_200_2011" / "images.txt").open("a") as file:
        file.write("25 001.bird/absent.png\n")
    with (tmp_path / "CUB_200_2011" / "image_class_labels.txt").open("a") as file:
        file.write("25 1\n")
    assert again(tmp_path, tmp_path / "out") == 2
    assert "1 missing pictures" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
    assert again(tmp_path, tmp_path / "out", "--dry-run") == 0
    said = capsys.readouterr().err
    assert "cub200: of the pictures that it lists 1 are missing" in said
    assert "absent.png" in said
