"""The folder of a run: made once, by rank 0, and never over a run that is there already."""

import contextlib
import shutil
from collections.abc import Iterator
from fnmatch import fnmatch
from pathlib import Path

from uhml import distributed, logs
from uhml.config import Config, dump_config
from uhml.errors import UserError

CONTENTS = ("config.yaml", "metrics.jsonl", "result.json", "checkpoints", "hierarchy.npz", "tensorboard", "logs")

# Files that a killed run was about to rename.
UNFINISHED = ("result.json.partial", "hierarchy.npz*.part")


@contextlib.contextmanager
def open_run_dir(run_dir: Path, config: Config, overwrite: bool) -> Iterator[None]:
    """Make the folder of a run with its config, and keep every rank's log in ``logs/rank<r>.log``. A collective.

    Args:
        run_dir: the folder.
        config: written to ``config.yaml``, with everything resolved.
        overwrite: remove the run that is there, and nothing but what a run leaves.

    Raises:
        UserError: the folder holds a run or something else, or cannot be written.
    """

    def make() -> None:
        present = sorted(p.name for p in run_dir.iterdir()) if run_dir.is_dir() else []
        strange = [
            name for name in present if name not in CONTENTS and not any(fnmatch(name, part) for part in UNFINISHED)
        ]
        if strange:
            raise UserError(f"{run_dir} holds {strange[0]!r}, which no run leaves: name another folder by --run-dir.")
        if present and not overwrite and not _ended_before_it_began(run_dir):
            raise UserError(f"{run_dir} holds a run already: name another folder by --run-dir, or add --overwrite.")
        for name in present:
            path = run_dir / name
            shutil.rmtree(path) if path.is_dir() else path.unlink()
        for name in ("checkpoints", "logs"):
            (run_dir / name).mkdir(parents=True)
        (run_dir / "config.yaml").write_text(dump_config(config))

    def make_or_explain() -> None:
        try:
            make()
        except OSError as e:
            raise UserError(f"The run's folder {run_dir} cannot be written: {e}") from e

    distributed.on_main(make_or_explain)
    with logs.to_file(run_dir / "logs" / f"rank{distributed.rank()}.log"):
        yield


def _ended_before_it_began(run_dir: Path) -> bool:
    """Whether a run left nothing here worth keeping: a mistyped data.root, mended, needs no other folder."""
    if any((run_dir / "checkpoints").glob("*")) or not (run_dir / "logs" / "rank0.log").exists():
        return False
    return not any((run_dir / name).exists() for name in ("hierarchy.npz", "result.json"))
