"""Sweeps: one run for each combination of values."""

import itertools
import re
from collections.abc import Sequence

from uhml.errors import UserError


def combinations(sweeps: Sequence[str]) -> list[dict[str, str]]:
    """Return the values of the swept keys in each run: all combinations, the last key changing fastest.

    Args:
        sweeps: as typed: ``["train.seed=0,1,2", "hierarchy.cuts=[0.9,0.99],[0.8]"]``.

    Raises:
        UserError: a sweep without values, or with a key or a value twice.
    """
    values: dict[str, list[str]] = {}
    for sweep in sweeps:
        key, _, listed = sweep.partition("=")
        # Commas, but not those within brackets or braces, which belong to a value.
        found = [value.strip() for value in re.split(r",(?![^\[{]*[\]}])", listed)]
        if not key or not all(found):
            raise UserError(f"--sweep {sweep}: write section.key=value,value,..., as in train.seed=0,1,2.")
        if key in values:
            raise UserError(f"--sweep {key} is given twice: list all of its values in one.")
        if len(set(found)) < len(found):
            raise UserError(f"--sweep {sweep}: a value is there twice.")
        values[key] = found
    return [dict(zip(values, chosen, strict=True)) for chosen in itertools.product(*values.values())]


def folder_name(values: dict[str, str]) -> str:
    """Return the name of the folder of the run with these values: ``train.seed=0,optim.learning_rate=1e-4``."""
    return ",".join(f"{key}={value}" for key, value in values.items()).replace("/", "_").replace(" ", "")
