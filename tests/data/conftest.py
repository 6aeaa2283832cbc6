"""Small pictures for fixtures of the data sets."""

from pathlib import Path

import pytest
from PIL import Image


@pytest.fixture
def draw():
    """Write small different pictures at paths below a folder, making folders as needed."""

    def _draw(folder: Path, *paths: str) -> None:
        for i, path in enumerate(paths):
            (folder / path).parent.mkdir(parents=True, exist_ok=True)
            Image.new("RGB", (8, 6), (i * 40 % 256, 100, 200)).save(folder / path)

    return _draw
