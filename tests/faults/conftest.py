import numpy as np
import pytest
from PIL import Image, ImageDraw
from runs import CONFIG, run


@pytest.fixture(scope="session")
def config(tmp_path_factory):
    """A config file of a run of a second, beside eight classes of nine pictures in ``shapes``."""
    folder = tmp_path_factory.mktemp("faults")
    random = np.random.default_rng(0)
    for corners in range(3, 11):
        (folder / "shapes" / f"corners{corners:02d}").mkdir(parents=True)
        for i in range(9):
            image = Image.new("RGB", (48, 40), tuple(random.integers(150, 255, 3).tolist()))
            circle = (*random.uniform(18, 30, 2).tolist(), random.uniform(8, 16))
            fill = tuple(random.integers(0, 120, 3).tolist())
            ImageDraw.Draw(image).regular_polygon(circle, corners, random.uniform(0, 360), fill)
            image.save(folder / "shapes" / f"corners{corners:02d}" / f"{i}.png")
    path = folder / "tiny.yaml"
    path.write_text(CONFIG)
    return path


@pytest.fixture(scope="session")
def whole(config, tmp_path_factory):
    """Folders of unbroken runs, by number of ranks."""
    runs = {}
    for world_size in (1, 2):
        runs[world_size] = tmp_path_factory.mktemp("whole") / f"ranks{world_size}"
        codes, said = run(runs[world_size], config, world_size)
        assert codes == [0] * world_size, said
    return runs
