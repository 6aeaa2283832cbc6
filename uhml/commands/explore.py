"""``uhml explore``: one page to walk through the pictures, their tree and the Poincaré disk."""

import argparse
import logging
from pathlib import Path

from uhml import distributed
from uhml.commands.options import add_network_arguments, opened
from uhml.embedding import embed_share
from uhml.errors import UserError, known_everywhere
from uhml.explorer.page import write_page
from uhml.explorer.serve import serve, server
from uhml.explorer.sources import FEWEST, find_source
from uhml.files import check_out

logger = logging.getLogger(__name__)

EXAMPLES = """\
  uhml explore runs/mine --out page.html
  uhml explore runs/mine --part test --out test.html --serve
  uhml explore runs/mine --images more/pictures --out more.html --max-pictures 20000
"""

MAX_PICTURES = 60_000
PORT = 8000


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of ``uhml explore``."""
    add_network_arguments(parser, EXAMPLES)
    parser.add_argument(
        "--out", type=Path, required=True, metavar="PAGE.html", help="the page: one file, to open or to mail"
    )
    which = parser.add_mutually_exclusive_group()
    which.add_argument(
        "--part", choices=("train", "test"), default="train", help="of the run's pictures (default: train)"
    )
    which.add_argument(
        "--images", type=Path, metavar="FOLDER_OR_LIST", help="other pictures: a folder, or a file that lists them"
    )
    parser.add_argument(
        "--max-pictures",
        type=int,
        default=MAX_PICTURES,
        metavar="N",
        help="of more, show so many, evenly from all clusters (default: %(default)s)",
    )
    parser.add_argument(
        "--serve",
        type=int,
        nargs="?",
        const=PORT,
        metavar="PORT",
        help=f"then show the page at http://127.0.0.1:PORT/ until Ctrl-C (default: {PORT})",
    )
    parser.add_argument("--overwrite", action="store_true", help="replace PAGE.html")


def run(args: argparse.Namespace) -> None:
    """Embed the pictures, cluster them if the run has not, and write the page.

    Raises:
        Preempted: a signal asked for it.
        UserError: an option, or a picture, is not usable.
    """
    out: Path = args.out
    with opened(args.run_folder, args.overrides) as trained:

        def check() -> None:
            check_out(out, "--out", (".html", ".htm"), args.overwrite)
            if args.max_pictures < FEWEST:
                raise UserError(f"--max-pictures {args.max_pictures} is too few to explore: {FEWEST} at least.")
            if args.serve is not None:
                # A port that is taken is told now.
                server(out, args.serve).server_close()

        distributed.on_main(check)
        source = find_source(trained, args.part, args.images)
        pictures = source.pictures
        try:
            own = embed_share(trained.model, pictures, trained.config, f"embed {len(pictures):,} pictures")
        except UserError as e:  # of a picture that cannot be read, on this rank or on another
            remedy = "Mend or remove it, or add data.skip_corrupt=true to go on without such pictures."
            raise known_everywhere(UserError(f"{e} {remedy}")) from e
        embeddings = distributed.all_gather_shares(own, len(pictures))
        distributed.on_main(lambda: write_page(trained, source, embeddings, out, args.max_pictures))
        is_main = distributed.is_main()
    if is_main:
        logger.info("%s: %.1f MB. Open it in a browser; it needs nothing else.", out, out.stat().st_size / 1e6)
        if args.serve is not None:
            serve(out, args.serve)
