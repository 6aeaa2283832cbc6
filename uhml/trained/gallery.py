"""Pictures made ready to be searched: embedded once, kept beside the run, and embedded anew when something changed."""

import contextlib
import json
import logging
from pathlib import Path

from uhml import distributed
from uhml.data.pictures import Pictures
from uhml.files import write_whole
from uhml.plain import Damaged, read_json
from uhml.trained import Trained
from uhml.trained.embed_to_file import embed_to_file, what_rows_depend_on
from uhml.trained.vectors import Vectors, digest_of_files, read_vectors

logger = logging.getLogger(__name__)


def embedded_gallery(trained: Trained, pictures: Pictures, folder: Path, *, skip_corrupt: bool = False) -> Vectors:
    """Return the points of pictures, from the folder if they are there. A collective.

    They are embedded anew when the checkpoint, the list of the pictures, or the size or time of a picture's file is no
    longer what it was.

    Args:
        trained: the network.
        pictures: the n pictures.
        folder: the gallery's own, such as ``RUN/search/train``; made where it is not there.
        skip_corrupt: leave out pictures that cannot be read.

    Returns:
        On every rank: the points, and the pictures that could be read.

    Raises:
        Preempted: a signal asked for it; the next call goes on.
        UserError: a picture cannot be read.
    """

    key: dict[str, str] = {}

    def is_stale() -> bool:
        files = digest_of_files(pictures.paths).hexdigest()
        key.update(what_rows_depend_on(trained, pictures), files=files, skip_corrupt=str(skip_corrupt))
        folder.mkdir(parents=True, exist_ok=True)
        kept = folder / "key.json"
        with contextlib.suppress(Damaged):
            if read_json(kept, dict[str, str]) == key and file.exists():
                return False
        # Gone before the vectors are, so that it never stands beside others.
        kept.unlink(missing_ok=True)
        return True

    file = folder / "vectors.npy"
    if distributed.from_main(is_stale):
        if distributed.is_main():
            logger.info("Embedding %s pictures, to be kept in %s.", f"{len(pictures):,}", folder)
        embed_to_file(trained, pictures, file, skip_corrupt=skip_corrupt, overwrite=True)
        distributed.on_main(lambda: write_whole(folder / "key.json", json.dumps(key)))
    return distributed.on_every_rank(lambda: read_vectors(file))
