"""``uhml embed``: any pictures to vectors, in a file."""

import argparse
import logging
from pathlib import Path

from uhml import distributed
from uhml.commands.options import add_network_arguments, opened
from uhml.data.images import list_images
from uhml.errors import UserError
from uhml.files import check_out
from uhml.trained.embed_to_file import embed_to_file
from uhml.trained.vectors import SUFFIXES, names_of, require_parquet, unfinished_folder

logger = logging.getLogger(__name__)

EXAMPLES = """\
  uhml embed runs/mine --images my/pictures --out vectors.npy
  uhml embed runs/mine --images list.csv --out vectors.parquet --skip-corrupt
  torchrun --nproc-per-node 8 -m uhml embed runs/mine eval.batch_size=512 --images my/pictures --out vectors.npy
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of ``uhml embed``."""
    add_network_arguments(parser, EXAMPLES)
    parser.add_argument(
        "--images",
        type=Path,
        required=True,
        metavar="FOLDER_OR_LIST",
        help="a folder, of which all pictures are taken, or a text or CSV file that lists pictures",
    )
    parser.add_argument(
        "--out",
        type=Path,
        required=True,
        metavar="VECTORS",
        help="file to write: .npy, with the pictures' paths in a .csv of the same name, or .parquet, with both",
    )
    parser.add_argument(
        "--features", action="store_true", help="write the backbone's features instead of points of the ball"
    )
    parser.add_argument(
        "--skip-corrupt",
        action="store_true",
        help="leave out pictures that cannot be read, as after a run with data.skip_corrupt=true",
    )
    parser.add_argument(
        "--overwrite", action="store_true", help="replace VECTORS, and unfinished work of another command at it"
    )


def run(args: argparse.Namespace) -> None:
    """Embed the pictures; where the same command was ended before, go on.

    Raises:
        Preempted: a signal asked for it; the same command goes on.
        UserError: an option, or a picture, is not usable.
    """
    out: Path = args.out
    with opened(args.run_folder, args.overrides) as trained:

        def check() -> None:
            check_out(out, "--out", SUFFIXES, args.overwrite)
            require_parquet(out)
            if out.suffix.lower() != ".npy":
                return
            names = names_of(out)
            if names.resolve() == args.images.resolve():
                raise UserError(f"--out {out} would have {names} name its rows, the list itself: name another file.")
            if names.exists() and not (args.overwrite or unfinished_folder(out).exists()):
                raise UserError(f"{names}, for the names of the pictures, is there already: add --overwrite.")

        distributed.on_main(check)
        pictures = list_images(args.images)
        num_rows = embed_to_file(
            trained,
            pictures,
            out,
            features=args.features,
            skip_corrupt=args.skip_corrupt or trained.config.data.skip_corrupt,
            overwrite=args.overwrite,
        )
        if distributed.is_main():
            logger.info("%s: vectors of %s pictures.", out, f"{num_rows:,}")
