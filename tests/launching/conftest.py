from pathlib import Path

import pytest
from launched import write_config


@pytest.fixture(scope="session")
def config(tmp_path_factory: pytest.TempPathFactory, glyphs_root: Path) -> Path:
    """A config file of a run of seconds."""
    return write_config(tmp_path_factory.mktemp("config"), glyphs_root)


@pytest.fixture
def sbatch_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine with SLURM's programs, which do nothing: enough to see what would be submitted."""
    programs = tmp_path / "programs"
    programs.mkdir()
    for name in ("srun", "sbatch"):
        (programs / name).write_text("#!/bin/sh\nexit 1\n")
        (programs / name).chmod(0o755)
    monkeypatch.setenv("PATH", str(programs), prepend=":")
    monkeypatch.delenv("PYTHONPATH", raising=False)
