"""``uhml cluster``: cluster the rows of a file."""

import argparse
from pathlib import Path

import numpy as np

from uhml.errors import UserError
from uhml.hierarchy.geometry import GEOMETRIES
from uhml.hierarchy.linkage import MODES, average_linkage


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of ``uhml cluster``."""
    parser.add_argument("embeddings", type=Path, metavar="EMBEDDINGS.npy", help="matrix of floats, one row a point")
    parser.add_argument("--out", type=Path, required=True, metavar="TREE.npz", help="where to write the tree")
    parser.add_argument("--mode", choices=MODES, default="graph", help="which linkage (default: %(default)s)")
    parser.add_argument("--geometry", choices=GEOMETRIES, default="poincare", help="(default: %(default)s)")
    parser.add_argument("--curvature", type=float, default=0.1, help="c of the ball (default: %(default)s)")
    parser.add_argument(
        "--num-neighbors", type=int, default=20, help="k of the graph, for --mode graph (default: %(default)s)"
    )
    parser.add_argument("--device", help="cpu or cuda (default: cuda where there is a GPU)")


def run(args: argparse.Namespace) -> None:
    """Cluster the rows of ``args.embeddings`` and write the tree to ``args.out``."""
    try:
        embeddings = np.load(args.embeddings, mmap_mode="r", allow_pickle=False)
    except FileNotFoundError:
        raise UserError(f"There is no file {args.embeddings}.") from None
    except (ValueError, EOFError):
        raise UserError(f"{args.embeddings} is not a .npy file of numbers.") from None
    tree = average_linkage(
        embeddings,
        mode=args.mode,
        geometry=args.geometry,
        curvature=args.curvature,
        num_neighbors=args.num_neighbors,
        device=args.device,
    )
    tree.save(args.out)
