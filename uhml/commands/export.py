"""``uhml export``: a trained network as one file with a model card, for use elsewhere."""

import argparse
import json
import logging
from pathlib import Path

from uhml.errors import UserError
from uhml.files import write_whole
from uhml.reporting.runs import Result, read_result
from uhml.run.checkpoint import EXPORTED, EXPORTED_ONNX
from uhml.run.lock import LOCK
from uhml.trained import Trained, load_trained
from uhml.trained.card import model_card
from uhml.trained.export import write_onnx, write_safetensors

logger = logging.getLogger(__name__)

FORMATS = {"safetensors": EXPORTED, "onnx": EXPORTED_ONNX}
"""The formats, and what their file is called."""

EXAMPLES = """\
  uhml export runs/mine --format safetensors --out exported
  uhml export runs/mine/checkpoints/step-00001000.pt --format onnx --out exported-onnx
  uhml embed exported --images more/pictures --out vectors.npy
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of ``uhml export``."""
    parser.epilog = "examples:\n" + EXAMPLES
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument(
        "source", metavar="RUN", help="folder of a run, whose newest checkpoint is taken, or a checkpoint"
    )
    parser.add_argument(
        "--format",
        choices=FORMATS,
        required=True,
        help="safetensors: for uhml, as good as a run; onnx: a graph for any program (pip install 'uhml[onnx]')",
    )
    parser.add_argument("--out", type=Path, required=True, metavar="FOLDER", help="where to write model and README.md")
    parser.add_argument("--overwrite", action="store_true", help="replace files that are there already")
    parser.add_argument("--json", action="store_true", help="print what was written as JSON")


def run(args: argparse.Namespace) -> None:
    """Write the network of ``args.source`` and its card into ``args.out``.

    Raises:
        UserError: there is no such network, it cannot be written in this format, or files are in the way.
    """
    path, card = args.out / FORMATS[args.format], args.out / "README.md"
    if args.out.exists() and not args.out.is_dir():
        raise UserError(f"--out {args.out} is a file: name a folder for the model and its card.")
    if (args.out / LOCK).exists():
        raise UserError(f"--out {args.out} is the folder of a run, which takes no other files: name another folder.")
    for file in (path, card):
        if file.exists() and not args.overwrite:
            raise UserError(f"{file} is there already: name another folder, or add --overwrite.")
    trained = load_trained(args.source)
    args.out.mkdir(parents=True, exist_ok=True)
    difference = None
    if args.format == "onnx":
        difference = write_onnx(trained, path)
        if difference is None:
            logger.warning("onnxruntime is not installed, so nothing was compared: pip install 'uhml[onnx]'.")
        else:
            logger.info("onnxruntime's points are within %.1e of the network's own", difference)
    else:
        write_safetensors(trained, path)
    write_whole(card, model_card(trained, path.name, _result(trained), difference))
    logger.info("wrote %s (%.1f MiB) and %s, step %d", path, path.stat().st_size / 2**20, card, trained.step)
    if args.json:
        written = {"model": str(path), "card": str(card), "step": trained.step, "bytes": path.stat().st_size}
        print(json.dumps({**written, "format": args.format, "max_difference": difference}))


def _result(trained: Trained) -> Result | None:
    """Return what ``result.json`` beside the checkpoint holds, if it is of the checkpoint's step."""
    result = read_result(trained.folder)
    return result if result is not None and result.steps == trained.step else None
