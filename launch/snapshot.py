"""A copy of the code, so that what is edited after the submission does not reach a run that waits or is requeued."""

import os
import shutil
from pathlib import Path

import launch
import uhml
from uhml.errors import UserError

PACKAGES = (uhml, launch)


def take_snapshot(folder: Path) -> None:
    """Put the packages as they are now into ``folder``, in the place of an earlier snapshot there.

    A job takes its code from there by :func:`environment`.
    """
    aside = folder.with_name(f"{folder.name}.partial")
    shutil.rmtree(aside, ignore_errors=True)
    for package in PACKAGES:
        (source,) = package.__path__
        shutil.copytree(source, aside / package.__name__, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.rmtree(folder, ignore_errors=True)
    aside.rename(folder)


def environment(folder: Path) -> dict[str, str]:
    """Return the variables by which Python takes the packages from the snapshot in ``folder``."""
    # Without PYTHONSAFEPATH, `python -m` looks into the current folder first: the checkout, as likely as not.
    users = os.environ.get("PYTHONPATH")
    return {"PYTHONPATH": f"{folder}:{users}" if users else str(folder), "PYTHONSAFEPATH": "1"}


def refuse_name(folder: Path) -> None:
    """Check that a job can take its code from the snapshot in ``folder``, and SLURM write beside it.

    Raises:
        UserError: a letter of the folder's name means something else to Python or SLURM.
    """
    for letter in (":", "%", "\\", "\n"):
        if letter in str(folder):
            raise UserError(
                f"{folder} has {letter!r} in its name, which Python's path or SLURM's file names take for something "
                "else: name another folder by --run-dir."
            )


def is_in_use(folder: Path) -> bool:
    """Whether this process took its code from the snapshot in ``folder``."""
    return all(Path(package.__path__[0]).resolve().parent == folder.resolve() for package in PACKAGES)
