"""What pictures are known by, wherever they lie, and whether all ranks see the same."""

import hashlib
import os

from uhml import distributed
from uhml.data.names import absolute, common_folder
from uhml.data.pictures import Splits
from uhml.errors import UserError, known_everywhere

Fingerprint = list[tuple[int, str]]
"""Number and digest of the names of each part's pictures."""


def fingerprint(splits: Splits) -> Fingerprint:
    """Return number and digest of the names of each part's pictures, wherever they lie."""
    parts = [list(absolute(part.paths)) for part in splits.parts.values()]
    # The first and the last by name share a folder only if all between them do.
    root = common_folder(end(paths) for paths in parts for end in (min, max) if paths)
    return [
        (len(paths), hashlib.sha256(os.fsencode("\n".join(path[len(root) :] for path in paths))).hexdigest())
        for paths in parts
    ]


def numbers(found: Fingerprint) -> str:
    """Return how many pictures each part has, for people."""
    return " + ".join(str(number) for number, _ in found)


def refuse_different(splits: Splits, said: str) -> None:
    """Refuse to go on where ranks see different pictures, of which each would take its share. A collective.

    Args:
        splits: what this rank sees.
        said: how the user named it, such as "data.root=pictures".

    Raises:
        UserError: they do, as on machines with copies of their own, one of which is not complete.
    """
    if distributed.world_size() == 1:
        return
    seen = distributed.gather_objects(fingerprint(splits))
    for rank, found in enumerate(seen):
        if found != seen[0]:
            raise known_everywhere(
                UserError(
                    f"{said} is not the same everywhere: rank 0 sees {numbers(seen[0])} pictures, and rank {rank} "
                    f"{numbers(found)}, or others. Let all machines have the same."
                )
            )
