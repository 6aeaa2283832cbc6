"""Fixtures that several folders of tests share."""

import uhml  # noqa: F401 (before torch, which reads then how its threads are to wait)

# isort: split
import os
import signal
import tarfile
from pathlib import Path

import pytest
import torch

from uhml.data.glyphs import glyphs

# What helpers assert is told as what tests assert is.
pytest.register_assert_rewrite("launched", "pages", "reference", "runs")

# A shell without job control has its background jobs ignore Ctrl-C, and what the tests start would inherit that.
signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture
def one_thread():
    """torch sums in the same order whatever the machine."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def _unpacked(archive: str, folder: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    where = Path(os.environ.get("UHML_REAL_DATA") or Path(__file__).parent.parent / ".." / "shared" / "data")
    if not (where / archive).exists():
        pytest.skip(f"UHML_REAL_DATA: {where / archive} is not there")
    target = tmp_path_factory.mktemp("real")
    with tarfile.open(where / archive) as tar:
        tar.extractall(target, filter="data")
    return target / folder


@pytest.fixture(scope="session")
def cars196_root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """8,144 real pictures of all 196 classes of Cars196, in its own layout. Not to be written to."""
    return _unpacked("cars196-half.tar.gz", "cars196", tmp_path_factory)


@pytest.fixture(scope="session")
def omniglot_root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Omniglot, 32,460 real pictures of 1,623 characters, in the layout of SOP. Not to be written to."""
    return _unpacked("omniglot-sop-layout.tar.xz", "Stanford_Online_Products", tmp_path_factory)


@pytest.fixture(scope="session")
def glyphs_root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """``data.root`` with the glyphs drawn in it. Not to be written to."""
    root = tmp_path_factory.mktemp("glyphs")
    glyphs(root)
    return root
