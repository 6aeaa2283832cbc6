import numpy as np
import pytest
from PIL import Image

from uhml.planning import calibration, command


@pytest.fixture(scope="session")
def noise(tmp_path_factory):
    """Six classes of eight pictures, of which half are trained on."""
    root, random = tmp_path_factory.mktemp("noise"), np.random.default_rng(0)
    for label in range(6):
        (root / f"class{label}").mkdir()
        for i in range(8):
            pixels = random.integers(0, 256, (6 + label, 6, 3), dtype=np.uint8)
            Image.fromarray(pixels).resize((48, 48)).save(root / f"class{label}" / f"{i}.png")
    return root


@pytest.fixture
def words(noise, tmp_path):
    """The command line of a tiny run."""
    config = tmp_path / "tiny.yaml"
    config.write_text(
        f"data: {{dataset: folder, root: {noise}, image_size: 32, num_workers: 1}}\n"
        "model: {embedding_dim: 16}\n"
        "hierarchy: {recluster_every: 2, num_neighbors: 5, cuts: [0.5, 0.8]}\n"
        "mining: {pictures_per_cluster: 2}\n"
        "train: {num_steps: 5, global_batch_size: 16, checkpoint_every: 100}\n"
        "eval: {at_reclustering: true, batch_size: 8}\n"
    )
    return [str(config)]


@pytest.fixture(scope="session")
def measured():
    """What was measured before, by what it depends on."""
    return {}


@pytest.fixture
def quick(monkeypatch, measured):
    """A calibration of a few seconds, once for each network, which is as good where no time is looked at."""
    for name, value in {"SECONDS_OF_STEPS": 0.1, "SECONDS_OF_EMBEDDING": 0.1, "POINTS": 400, "SCORED": 100}.items():
        monkeypatch.setattr(calibration, name, value)

    def calibrate(config, *arguments, computes):
        key = (config.model, config.data.image_size, config.hierarchy.mode, computes)
        if key not in measured:
            measured[key] = calibration.calibrate(config, *arguments, computes=computes)
        return measured[key]

    monkeypatch.setattr(command, "calibrate", calibrate)
