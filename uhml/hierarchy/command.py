"""``uhml cluster``: cluster the rows of a file, and say how good the clusters are."""

import argparse
import logging
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from rich.table import Table
from torch import Tensor

from uhml.console import console
from uhml.errors import UserError
from uhml.files import NO_ARRAY, PLOT_SUFFIXES, check_out, csv_writer, opened_aside
from uhml.hierarchy import quality
from uhml.hierarchy.geometry import GEOMETRIES, Geometry
from uhml.hierarchy.linkage import EXACT_SEARCH_UP_TO, MIN_RECALL, MODES, average_linkage
from uhml.hierarchy.plot import draw_top

logger = logging.getLogger(__name__)

EXAMPLES = """\
examples:
  uhml cluster embeddings.npy --out tree.npz
  uhml cluster vectors.parquet --out tree.npz --counts 100 --levels clusters.csv
  uhml cluster embeddings.npy --geometry cosine --out tree.npz --counts 1000,100,10 --levels levels.npy --plot tree.png
  uhml cluster embeddings.npy --mode exact --out tree.npz --labels labels.npy
"""

MODE = (
    "what is averaged: the distances of near pairs, all others counting as far (graph), those of all pairs (dense), or "
    "of all pairs what can be summed: squares, in the ball cosh, of cosine the distances (exact); default: %(default)s"
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of ``uhml cluster``."""
    parser.epilog = EXAMPLES
    parser.add_argument(
        "embeddings",
        type=Path,
        metavar="EMBEDDINGS",
        help="matrix of floats, one row a point, as .npy; or the .npy or .parquet of uhml embed",
    )
    parser.add_argument("--out", type=Path, required=True, metavar="TREE.npz", help="where to write the tree")
    parser.add_argument("--mode", choices=MODES, default="graph", help=MODE)
    parser.add_argument("--geometry", choices=GEOMETRIES, default="poincare", help="default: %(default)s")
    parser.add_argument("--curvature", type=float, default=0.1, help="c of the Poincaré ball (default: %(default)s)")
    parser.add_argument(
        "--num-neighbors", type=int, default=20, metavar="K", help="of the graph, in mode graph (default: %(default)s)"
    )
    parser.add_argument(
        "--exact-search-up-to",
        type=int,
        default=EXACT_SEARCH_UP_TO,
        metavar="N",
        help="points up to which neighbours are found exactly, in mode graph (default: %(default)s)",
    )
    parser.add_argument(
        "--min-recall",
        type=float,
        default=MIN_RECALL,
        metavar="SHARE",
        help="share of the neighbours to find at least when there are more points (default: %(default)s)",
    )
    parser.add_argument("--device", help="cpu or cuda (default: cuda where there is a GPU)")
    parser.add_argument(
        "--counts",
        type=_counts,
        default=[1000, 100, 10],
        metavar="N,N,...",
        help="numbers of clusters of the cuts to report (default: 1000,100,10)",
    )
    parser.add_argument("--labels", type=Path, metavar="LABELS.npy", help="true labels, to score the clusters against")
    parser.add_argument(
        "--levels",
        type=Path,
        metavar="LEVELS",
        help="where to write the cuts: as .npy, int32 [K, n], or as .csv, a line for each row, with its picture where "
        "EMBEDDINGS is of uhml embed",
    )
    parser.add_argument("--plot", type=Path, metavar="TREE.png", help="where to draw the top of the tree")
    parser.add_argument("--overwrite", action="store_true", help="replace files that are there already")


def run(args: argparse.Namespace) -> None:
    """Cluster the rows of ``args.embeddings``, write what is asked for, and print a summary of the cuts.

    Raises:
        UserError: a file or an option is not usable.
    """
    # What can be wrong is looked at before the long work.
    lists_pictures = args.levels is not None and args.levels.suffix.lower() == ".csv"
    embeddings, names, beside = _embeddings(args.embeddings, lists_pictures)
    if embeddings.dtype.kind != "f" or embeddings.dtype.itemsize > 8:
        raise UserError(f"{args.embeddings} holds {embeddings.dtype}; embeddings are floats of at most 64 bits.")
    embeddings = embeddings.astype(embeddings.dtype.newbyteorder("="), copy=False)
    labels = _load(args.labels) if args.labels else None
    if labels is not None and (labels.ndim != 1 or embeddings.ndim != 2 or len(labels) != len(embeddings)):
        raise UserError(
            f"--labels {args.labels} has shape {labels.shape}, and {args.embeddings} {embeddings.shape}: there must be "
            "one label for each row."
        )
    files = [args.embeddings, beside, args.labels, args.out, args.levels, args.plot]
    used = [path.resolve() for path in files if path]
    if len(set(used)) < len(used):
        raise UserError(
            "Two of EMBEDDINGS, the .csv beside it, --labels, --out, --levels and --plot are one file: name another."
        )
    check_out(args.out, "--out", (".npz",), args.overwrite)
    if args.levels:
        check_out(args.levels, "--levels", (".npy", ".csv"), args.overwrite)
    if args.plot:
        check_out(args.plot, "--plot", PLOT_SUFFIXES, args.overwrite)
    device = _device(args.device)

    start = time.monotonic()
    rows = torch.from_numpy(embeddings)
    tree = average_linkage(
        rows,
        mode=args.mode,
        geometry=args.geometry,
        curvature=args.curvature,
        num_neighbors=args.num_neighbors,
        exact_search_up_to=args.exact_search_up_to,
        min_recall=args.min_recall,
        device=device,
    )
    logger.info("clustered %s points in %.1f s", f"{tree.num_points:,}", time.monotonic() - start)
    tree.save(args.out)
    levels = tree.cut(counts=args.counts)
    if args.levels:
        _write_levels(args.levels, levels.numpy(), sorted(args.counts, reverse=True), names)
    if args.plot:
        title = f"{args.mode}, {args.geometry}, {tree.num_points:,} points"
        draw_top(tree, title, [int(clusters.max()) + 1 for clusters in levels]).savefig(args.plot)
    geometry = Geometry(args.geometry, args.curvature)
    console().print(summary(levels, geometry.points(rows.to(device)), geometry, labels))


def summary(levels: Tensor, points: Tensor, geometry: Geometry, labels: np.ndarray | None) -> Table:
    """Return a table of what the cuts are like.

    Args:
        levels: ``[K, n]`` clusters.
        points: ``[n, d]`` points.
        geometry: the geometry they are points of.
        labels: ``[n]`` true labels, if there are any.
    """
    table = Table(title=f"{levels.shape[1]:,} points", caption=f"silhouette: of {geometry.measure}")
    scores = ("NMI", "AMI", "purity") if labels is not None else ()
    for heading in ("clusters", "single", "median", "largest", "silhouette", *scores):
        table.add_column(heading, justify="right")
    for clusters in levels:
        size = quality.sizes(clusters)
        row = [f"{size.num_clusters:,}", f"{size.num_singletons:,}", f"{size.median:g}", f"{size.largest:,}"]
        row.append(f"{quality.silhouette(points, clusters, geometry):.3f}")
        if labels is not None:
            row += [f"{score:.3f}" for score in quality.agreement(clusters, labels)]
        table.add_row(*row)
    return table


def _embeddings(path: Path, lists_pictures: bool) -> tuple[np.ndarray, Sequence[str] | None, Path | None]:
    """Return the rows of a file and, if asked for and known, their pictures and the file beside it with their names."""
    suffix = path.suffix.lower()
    if suffix != ".parquet" and not (lists_pictures and suffix == ".npy"):
        return _load(path), None, None
    # Here alone: with it come networks, which take seconds to import.
    from uhml.trained.vectors import names_of, read_vectors

    if suffix == ".parquet":
        vectors = read_vectors(path)
        return np.array(vectors.rows), vectors.paths, None
    beside = names_of(path)
    return (_load(path), read_vectors(path).paths, beside) if beside.is_file() else (_load(path), None, None)


def _write_levels(out: Path, levels: np.ndarray, counts: Sequence[int], names: Sequence[str] | None) -> None:
    with opened_aside(out) as file:
        if out.suffix.lower() == ".npy":
            np.save(file, levels)
            return
        text = csv_writer(file, names or ())
        text.writerow(["row" if names is None else "path", *(f"clusters_{count}" for count in counts)])
        text.writerows(
            [name, *row] for name, row in zip(names or range(levels.shape[1]), levels.T.tolist(), strict=True)
        )


def _load(path: Path) -> np.ndarray:
    if not path.is_file():
        raise UserError(f"There is no file {path}.")
    try:
        # Copy on write: read as it is needed, never written.
        array = np.load(path, mmap_mode="c", allow_pickle=False)
    except NO_ARRAY:
        raise UserError(f"{path} is not a .npy file of numbers.") from None
    if not isinstance(array, np.ndarray):
        raise UserError(f"{path} is an archive of arrays: give one of them as a .npy file.")
    return array


def _device(name: str | None) -> torch.device:
    try:
        device = torch.device(name or ("cuda" if torch.cuda.is_available() else "cpu"))
    except RuntimeError:
        raise UserError(f"--device {name} is no device: say cpu or cuda.") from None
    if device.type not in ("cpu", "cuda"):
        raise UserError(f"--device {name} is not for this: say cpu or cuda.")
    if device.type == "cuda" and not torch.cuda.is_available():
        raise UserError("--device cuda needs a GPU, and torch sees none here: use --device cpu.")
    return device


def _counts(text: str) -> list[int]:
    words = text.split(",")
    if not all(word.strip().isdecimal() and int(word) > 0 for word in words):
        raise argparse.ArgumentTypeError(f"{text!r} is no list of numbers of clusters, such as 1000,100,10")
    return [int(word) for word in words]
