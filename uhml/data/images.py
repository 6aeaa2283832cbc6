"""Pictures of any kind, that nothing is known of: what ``--images`` names."""

import os
from pathlib import Path

from uhml import distributed
from uhml.data.fingerprint import refuse_different
from uhml.data.folder import pictures_below
from uhml.data.formats import FORMATS
from uhml.data.listed import read_list
from uhml.data.pictures import Pictures, Splits
from uhml.data.shards import holds_shards_only, pictures_in_shards
from uhml.errors import UserError
from uhml.files import expanded


def list_images(source: Path) -> Pictures:
    """List all pictures below a folder, in sorted order, or those of shards or a list, in theirs. A collective.

    Args:
        source: a folder of pictures, or of tar files as for ``data.dataset=shards``, or a text or CSV file as for
            ``data.dataset=list``, of which only the paths are taken.

    Returns:
        The pictures, by absolute paths.

    Raises:
        UserError: it is neither, it has no picture, one cannot be named in a text file, or ranks see different ones.
    """
    pictures = distributed.on_every_rank(lambda: _listed(source), interruptible=False)
    refuse_different(Splits(train=pictures), f"--images {source}")
    return pictures


def _listed(source: Path) -> Pictures:
    source = Path(os.path.abspath(expanded(source)))
    if source.suffix.lower() in FORMATS and not source.is_dir():
        raise UserError(f"--images {source} is a picture: name a folder, or a text or CSV file that lists pictures.")
    if source.suffix.lower() == ".tar" and source.is_file():
        raise UserError(f"--images {source} is a tar file: name the folder that such files are in.")
    if not source.exists():
        raise UserError(f"--images {source}: there is no such folder or list.")
    if source.is_dir() and holds_shards_only(source):
        paths, _ = pictures_in_shards(source, f"--images {source}")
    elif source.is_dir():
        paths = pictures_below(source, f"--images {source}")
    else:
        paths = read_list(source)["path"]
    for path in paths:
        try:
            path.encode()
        except UnicodeEncodeError as e:
            raise UserError(f"The name of the picture {path!r} is not in UTF-8: rename it.") from e
    return Pictures(paths=paths)
