"""``uhml prepare``: an official data set, downloaded and verified."""

import argparse
import json
import logging
from pathlib import Path

from uhml.data.official import OFFICIAL
from uhml.data.prepare import prepare
from uhml.files import expanded

logger = logging.getLogger(__name__)

EXAMPLES = """\
  uhml prepare cub200 --root data
  uhml prepare sop --root data --url https://mirror.example/Stanford_Online_Products.zip
  uhml prepare cars196 --root data --archive car_ims.tgz --archive cars_annos.mat
  uhml prepare inshop --root data --archive img.zip --archive list_eval_partition.txt
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of ``uhml prepare``."""
    parser.epilog = "examples:\n" + EXAMPLES
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("dataset", metavar="DATASET", help=f"one of {', '.join(OFFICIAL)}")
    parser.add_argument("--root", type=Path, required=True, metavar="DIR", help="where to put the data set's folder")
    parser.add_argument(
        "--url",
        action="append",
        default=[],
        help="download from here instead; once for each file of the data set. A download that was cut goes on",
    )
    parser.add_argument(
        "--archive",
        action="append",
        default=[],
        type=Path,
        metavar="FILE",
        help="take this file instead, which stays as it is; once for each file of the data set",
    )
    parser.add_argument("--json", action="store_true", help="print what is there as JSON")


def run(args: argparse.Namespace) -> None:
    """Download, unpack and verify ``args.dataset`` below ``args.root``, unless it is there.

    Raises:
        UserError: as :func:`uhml.data.prepare.prepare`.
    """
    prepared = prepare(args.dataset, expanded(args.root), args.url, args.archive)
    official = OFFICIAL[args.dataset]
    counts = ", ".join(f"{count:,} {part}" for part, count in official.pictures.items())
    logger.info("%s is complete, %s pictures: data.root=%s", args.dataset, counts, prepared.folder)
    if args.json:
        found = {"dataset": args.dataset, "root": str(prepared.folder), "pictures": official.pictures}
        print(json.dumps({**found, "sha256": prepared.sha256}))
