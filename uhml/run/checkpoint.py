"""Checkpoints: one file of tensors and plain values, never half written, never unpickled beyond those.

The files are torch's, which are zip archives with a checksum (CRC-32) of every record. torch does not look at those
when it loads; we do.
"""

import logging
import shutil
import zipfile
from pathlib import Path
from typing import Any

import safetensors
import torch
from torch import nn

from uhml.errors import UserError
from uhml.files import expanded, opened_aside, regular_file

logger = logging.getLogger(__name__)

EXPORTED = "model.safetensors"
"""What ``uhml export`` calls the file that is as good as a checkpoint for all but going on with the run."""

EXPORTED_ONNX = "model.onnx"
"""What it calls the other one, which no uhml reads."""


class DamagedFile(Exception):
    """A file that is not, to the last bit, what was written."""


def save_checkpoint(folder: Path, step: int, state: dict[str, Any], keep: int) -> Path:
    """Write ``state`` as the checkpoint of ``step``; then remove all but the ``keep`` newest up to this one.

    Raises:
        UserError: the file cannot be written; what was there before is untouched.
    """
    path = folder / f"step-{step:08d}.pt"
    write_file(path, state)
    for older in [p for p in _newest_first(folder) if p.name < path.name][keep - 1 :]:
        older.unlink()
    return path


def write_file(path: Path, state: dict[str, Any]) -> None:
    """Write tensors and plain values: aside first, forced to the disk, then renamed.

    Raises:
        UserError: the file cannot be written; what was there before is untouched.
    """
    try:
        with opened_aside(path) as file:
            torch.save(state, file)
    except (OSError, RuntimeError) as e:
        # torch tells of a full disk by an error of its own while it handles the system's.
        reason = e.__context__ if isinstance(e.__context__, OSError) else e
        raise UserError(
            f"{path} cannot be written ({reason}). Earlier checkpoints are untouched: make room, and start the same "
            "command again to go on from the last one."
        ) from e


def keep_best(folder: Path, step: int) -> None:
    """Make the checkpoint of ``step`` the best one, ``best.pt``, which stays when that of the step goes.

    Raises:
        OSError: the file cannot be written; the best before is untouched.
    """
    with (folder / f"step-{step:08d}.pt").open("rb") as newest, opened_aside(folder / "best.pt") as best:
        shutil.copyfileobj(newest, best)


def read_file(path: Path) -> dict[str, Any]:
    """Read, onto the CPU, what :func:`write_file` wrote. Nothing in the file is executed.

    Raises:
        DamagedFile: the file is not as it was written, or holds anything but tensors and plain values.
    """
    try:
        with open(path, "rb", opener=regular_file) as file:
            with zipfile.ZipFile(file) as archive:
                damaged = archive.testzip()
            if damaged is not None:
                raise DamagedFile(f"{path}: the checksum of {damaged} is wrong")
            file.seek(0)
            state = torch.load(file, map_location="cpu", weights_only=True)
        if not isinstance(state, dict):
            raise DamagedFile(f"{path}: it holds no names")
        return state
    except DamagedFile:
        raise
    except Exception as e:  # what a damaged file raises depends on where it is damaged
        raise DamagedFile(f"{path}: {' '.join(str(e).split())[:200]}") from e


def read_exported(path: Path) -> dict[str, Any]:
    """Read what :func:`uhml.trained.export.write_safetensors` wrote: ``model``, ``config``, ``step``, as in a run.

    Of another program's file, which says nothing of a run, it returns ``model`` alone.

    Raises:
        DamagedFile: the file is not in the format.
    """
    try:
        with safetensors.safe_open(path, "pt") as file:
            state: dict[str, Any] = {"model": {name: file.get_tensor(name) for name in file.keys()}}  # noqa: SIM118
            said = file.metadata() or {}
        if "uhml" in said:
            state |= {"config": said["config"], "step": int(said["step"])}
    except (safetensors.SafetensorError, KeyError, ValueError) as e:
        raise DamagedFile(f"{path}: {e}") from e
    return state


def newest_checkpoint(folder: Path) -> tuple[Path, dict[str, Any]] | None:
    """Return the newest checkpoint that is whole, and what it holds; None where there is no checkpoint at all.

    Raises:
        UserError: there are checkpoints, and all are damaged.
    """
    paths = _newest_first(folder)
    for path in paths:
        try:
            return path, read_file(path)
        except DamagedFile as e:
            if path not in _newest_first(folder):
                # The run goes on meanwhile, and has newer ones.
                return newest_checkpoint(folder)
            logger.warning("%s is damaged, and passed over (%s).", path, e)
    if paths:
        raise UserError(f"All {len(paths)} checkpoints in {folder} are damaged.")
    return None


def _newest_first(folder: Path) -> list[Path]:
    # Not a user's copy, step-00000100_old.pt.
    return sorted((p for p in folder.glob("step-*.pt") if p.stem.removeprefix("step-").isdecimal()), reverse=True)


def find_checkpoint(source: str, name: str) -> tuple[Path, dict[str, Any]]:
    """Read the checkpoint that a user names.

    Args:
        source: a checkpoint file, or a run's folder, whose newest checkpoint is meant; or a file or folder that
            ``uhml export --format safetensors`` wrote.
        name: what the messages call ``source``, such as "model.init_from=".

    Returns:
        Its path and what it holds.

    Raises:
        UserError: no checkpoint there.
    """
    path = expanded(source)
    if path.is_dir() and (path / EXPORTED).is_file():
        path = path / EXPORTED
    if path.is_dir():
        newest = newest_checkpoint(path / "checkpoints")
        if newest is None and (path / EXPORTED_ONNX).is_file():
            raise UserError(f"{name}{source} is an export to ONNX: uhml reads those of --format safetensors.")
        if newest is None:
            raise UserError(f"{name}{source}: the folder holds no checkpoints/step-*.pt.")
        path, state = newest
    elif path.is_file():
        try:
            state = read_exported(path) if path.suffix == ".safetensors" else read_file(path)
        except DamagedFile as e:
            raise UserError(f"{name}{path} is damaged or no checkpoint of uhml.") from e
    else:
        raise UserError(f"{name}{source}: no such checkpoint.")
    if not isinstance(state, dict) or "model" not in state:
        raise UserError(f"{name}{path} is damaged or no checkpoint of uhml.")
    return path, state


def load_weights(model: nn.Module, source: str) -> None:
    """Take the weights of another run's network, and nothing else, for ``model.init_from``.

    Args:
        model: gets the weights; every tensor must be there and fit.
        source: as for :func:`find_checkpoint`.

    Raises:
        UserError: no checkpoint there, or not of this network.
    """
    path, state = find_checkpoint(source, "model.init_from=")
    try:
        model.load_state_dict(state["model"])
    except (RuntimeError, TypeError) as e:
        reason = " ".join(str(e).split())[:300]
        raise UserError(
            f"model.init_from={path} is of another network than model.backbone, model.embedding_dim and "
            f"model.projector: {reason}"
        ) from e
