import io

import numpy as np
import pytest
from PIL import Image

from uhml.errors import UserError
from uhml.explorer.sheets import LOOKS, Look, choose_look, sheets


@pytest.fixture
def noisy(tmp_path):
    """Pictures that compress badly."""
    random = np.random.default_rng(0)
    paths = [str(tmp_path / f"{i:03d}.png") for i in range(150)]
    for path in paths:
        Image.fromarray(random.integers(0, 255, (60, 90, 3), np.uint8)).save(path)
    return paths


def test_the_best_look_that_fits_and_it_does_fit(noisy):
    taken = {look: sum(map(len, sheets(noisy, look, 0))) for look in LOOKS}
    assert sorted(taken.values(), reverse=True) == list(taken.values())
    assert choose_look(noisy, 10**9) == LOOKS[0]
    for look, better in zip(LOOKS[1:], LOOKS, strict=False):
        budget = (taken[look] + taken[better]) // 2
        chosen = choose_look(noisy, max(budget, int(1.2 * taken[look])))
        assert taken[chosen] <= max(budget, int(1.2 * taken[look]))
        assert chosen in (look, better)
    with pytest.raises(UserError, match="150 pictures are too many for one page: lower --max-pictures"):
        choose_look(noisy, taken[LOOKS[-1]] // 2)


def test_sheets_do_not_depend_on_workers(noisy):
    look = Look(48, 75)
    drawn = sheets(noisy, look, 2)
    assert drawn == sheets(noisy, look, 0)
    assert [Image.open(io.BytesIO(sheet)).size for sheet in drawn] == [(384, 384), (384, 384), (384, 144)]


def test_a_vanished_picture_is_named(noisy, tmp_path):
    (tmp_path / "101.png").unlink()
    with pytest.raises(UserError, match=r"101.png does not exist"):
        sheets(noisy, Look(48, 75), 2)
