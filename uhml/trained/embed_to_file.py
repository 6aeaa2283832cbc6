"""Embed any pictures by a trained network, into a file."""

import contextlib
import functools
import hashlib
import logging
from pathlib import Path
from typing import cast

from uhml import distributed
from uhml.data.decode import UnreadablePicture
from uhml.data.pictures import Pictures
from uhml.embedding import embed_rounds, pictures_per_round
from uhml.errors import UserError, known_everywhere
from uhml.trained import Trained
from uhml.trained.vectors import Unfinished, unfinished

logger = logging.getLogger(__name__)


def embed_to_file(
    trained: Trained,
    pictures: Pictures,
    out: Path,
    *,
    features: bool = False,
    skip_corrupt: bool = False,
    overwrite: bool = False,
) -> int:
    """Embed pictures into a file; go on where an earlier call with the same arguments stopped. A collective.

    Memory does not grow with the pictures, but for their names.

    Args:
        trained: the network.
        pictures: the n pictures.
        out: the file, see :mod:`uhml.trained.vectors`. Where it is there already, it is replaced in the end.
        features: write the backbone's features instead of points of the ball.
        skip_corrupt: leave out pictures that cannot be read.
        overwrite: begin anew where an earlier call with other arguments has not ended.

    Returns:
        The number of rows; the log names the pictures that were left out.

    Raises:
        Preempted: a signal asked for it. All is kept to go on, as it is after an error.
        UserError: a picture cannot be read, or other work at this file is in the way.
    """
    config, a_round = trained.config, pictures_per_round(trained.config)
    width = trained.model.backbone.num_features if features else config.model.embedding_dim
    with contextlib.ExitStack() as stack:

        def begin() -> Unfinished:
            key = what_rows_depend_on(trained, pictures) | {"features": str(features)}
            return stack.enter_context(unfinished(out, width, key, pictures.paths, overwrite))

        opened = distributed.on_main(begin)
        file = cast(Unfinished, opened)  # None but on rank 0, and there alone it is used
        # Rounds begin where they would have: the last digits of a row may depend on the rows it is embedded with.
        done = distributed.from_main(lambda: file.go_back(a_round))
        if done:
            logger.info("Going on after %s of %s pictures.", f"{done:,}", f"{len(pictures):,}")
        rounds = embed_rounds(
            trained.model,
            pictures.select(range(done, len(pictures))),
            config,
            f"embed {len(pictures):,} pictures",
            features=features,
            skip_corrupt=True,
            rounds_before=done // a_round,
        )
        stack.callback(rounds.close)
        for own, refused in rounds:
            start, done = done, min(done + a_round, len(pictures))
            rows = distributed.all_gather_shares(own, done - start).cpu().numpy()
            said = distributed.gather_objects(refused)
            reasons = [said[i % len(said)][i // len(said)] for i in range(done - start)]
            if any(reasons) and not skip_corrupt:
                reason = next(filter(None, reasons))
                remedy = "Mend it, or add --skip-corrupt to leave such pictures out; the same command then goes on."
                raise known_everywhere(UnreadablePicture(f"{reason} {remedy}"))
            distributed.on_main(functools.partial(Unfinished.append, file, rows, reasons), interruptible=False)
        distributed.on_main(lambda: file.finish(out), interruptible=False)
    left_out = distributed.from_main(lambda: [reason for _, reason in file.left_out])
    if left_out:
        logger.warning("Left out %d pictures that cannot be read, the first: %s", len(left_out), left_out[0])
        for reason in left_out[1:]:
            logger.info("left out: %s", reason)
    return len(pictures) - len(left_out)


def what_rows_depend_on(trained: Trained, pictures: Pictures) -> dict[str, str]:
    """Return what tells rows of one network and of some pictures from those of others.

    Raises:
        UserError: the run, which goes on, has removed the checkpoint meanwhile.
    """
    data = trained.config.data
    try:
        with trained.checkpoint.open("rb") as file:
            checkpoint = hashlib.file_digest(file, "sha256").hexdigest()
    except FileNotFoundError as e:
        raise UserError(f"{trained.checkpoint} is gone: its run has newer ones; start the same command again.") from e
    return {
        "checkpoint": checkpoint,
        "pictures": hashlib.sha256("\0".join(pictures.paths).encode(errors="surrogateescape")).hexdigest(),
        "size": f"{data.reduce_to} {data.image_size} {data.fit} {data.center_crop} "
        f"{trained.config.model.inference_precision}",
    }
