"""A SLURM to test on: the one that is there, or one that slurm/local-cluster starts."""

import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

LOCAL_CLUSTER = Path(__file__).parent.parent.parent / "slurm" / "local-cluster"


@pytest.fixture(scope="session")
def slurm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """A cluster with two nodes that answers."""
    if _answers():
        yield
        return
    if shutil.which("slurmctld") is None or os.getuid() != 0:
        pytest.skip("there is no SLURM: slurm/local-cluster/up --install, as root, starts one on a Debian machine")
    folder = tmp_path_factory.mktemp("slurm")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("UHML_SLURM_DIR", str(folder))
        patch.setenv("SLURM_CONF", str(folder / "slurm.conf"))
        try:
            # To a file: the daemons would keep a pipe open.
            with (folder / "up.log").open("w") as log:
                up = subprocess.run([LOCAL_CLUSTER / "up"], stdout=log, stderr=log, timeout=200, check=False)
            if up.returncode:
                pytest.skip(f"slurm/local-cluster/up does not start here: {(folder / 'up.log').read_text()}")
            yield
        finally:
            subprocess.run([LOCAL_CLUSTER / "down"], timeout=100, check=True)


def _answers() -> bool:
    if shutil.which("sinfo") is None:
        return False
    return subprocess.run(["sinfo"], capture_output=True, timeout=60, check=False).returncode == 0
