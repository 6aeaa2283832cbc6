"""A finished run, made once, and pictures to use it on."""

import os
from pathlib import Path

import pytest
from launched import uhml, write_config
from PIL import Image

from uhml.data.folder import folder
from uhml.data.pictures import Pictures


@pytest.fixture(scope="session")
def tiny_config(tmp_path_factory: pytest.TempPathFactory, glyphs_root: Path) -> Path:
    """A config of a run of seconds, on the glyphs."""
    return write_config(tmp_path_factory.mktemp("config"), glyphs_root)


@pytest.fixture(scope="session")
def finished_run(tmp_path_factory: pytest.TempPathFactory, tiny_config: Path) -> Path:
    """The folder of a run of 6 steps. Not to be written to: see :func:`run_copy`."""
    run_dir = tmp_path_factory.mktemp("runs") / "tiny"
    uhml("train", tiny_config, "train.num_steps=6", "--run-dir", run_dir)
    return run_dir


@pytest.fixture
def run_copy(finished_run: Path, tmp_path: Path) -> Path:
    """A finished run to write to: the same files, linked."""
    copy = tmp_path / "run"
    for path in finished_run.rglob("*"):
        if path.is_file():
            target = copy / path.relative_to(finished_run)
            target.parent.mkdir(parents=True, exist_ok=True)
            os.link(path, target)
    return copy


@pytest.fixture(scope="session")
def shapes(tmp_path_factory: pytest.TempPathFactory, glyphs_root: Path) -> Path:
    """A folder of 40 pictures in 4 class folders of 10, with names that need care. Not to be written to."""
    root = tmp_path_factory.mktemp("shapes")
    found: Pictures = folder(glyphs_root).train
    names = ["plain", "with, comma", "[red]ünï $x_{", "<img src=x onerror=alert(1)>"]
    assert found.labels is not None
    for label, name in enumerate(names):
        (root / name).mkdir()
        rows = [path for path, own in zip(found.paths, found.labels, strict=True) if own == 40 * label][:10]
        for i, path in enumerate(rows):
            with Image.open(path) as image:
                image.save(root / name / f"{i} '\"{name}.png")
    assert len(list(root.rglob("*.png"))) >= 30
    return root
