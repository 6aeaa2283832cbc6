"""Ranks that see different pictures, and strips of pictures that would fill the memory."""

import shutil

import numpy as np
import pytest
import torch
from PIL import Image
from ranks import run_ranks

from uhml import distributed
from uhml.config import DataConfig
from uhml.data.images import list_images
from uhml.data.transforms import LONGEST_STRIP, plain_transform
from uhml.data.verify import list_pictures
from uhml.errors import UserError


def _seen(root, of_images):
    own = root / str(distributed.rank())
    try:
        if of_images:
            return len(list_images(own))
        return len(list_pictures(DataConfig(dataset="folder", root=str(own), num_workers=0)).train)
    except UserError as e:
        return str(e)


@pytest.mark.ddp
@pytest.mark.parametrize("of_images", [False, True])
def test_ranks_must_see_the_same_pictures_wherever_they_lie(tmp_path, draw, of_images):
    draw(tmp_path / "0", "a/1.png", "b/1.png")
    shutil.copytree(tmp_path / "0", tmp_path / "1")
    assert run_ranks(_seen, 2, tmp_path, of_images) == ([2, 2] if of_images else [1, 1])
    (tmp_path / "1" / "b" / "1.png").rename(tmp_path / "1" / "b" / "2.png")
    number = "2" if of_images else "1 + 1"
    for said in run_ranks(_seen, 2, tmp_path, of_images):
        assert f"is not the same everywhere: rank 0 sees {number} pictures, and rank 1 {number}, or others" in said


@pytest.mark.parametrize("size", [(4, 40_000), (40_000, 4)])
def test_a_strip_is_seen_by_its_middle(size):
    random = np.random.default_rng(0)
    strip = Image.fromarray(random.integers(0, 256, (size[1], size[0], 3), np.uint8))
    middle = [(side - min(side, LONGEST_STRIP * 4)) // 2 for side in size]
    cut = strip.crop((*middle, *(side - start for side, start in zip(size, middle, strict=True))))
    look = plain_transform(DataConfig(image_size=224), (0.0,) * 3, (1.0,) * 3)
    assert look(strip).shape == (3, 224, 224)
    assert torch.equal(look(strip), look(cut))
