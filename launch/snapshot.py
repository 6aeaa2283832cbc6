"""A copy of the code, so that what is edited after the submission does not reach a run that waits or is requeued."""

import os
import shutil
from pathlib import Path

import launch
import uhml

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


def is_in_use(folder: Path) -> bool:
    """Whether this process took its code from the snapshot in ``folder``."""
    return all(Path(package.__path__[0]).resolve().parent == folder.resolve() for package in PACKAGES)
