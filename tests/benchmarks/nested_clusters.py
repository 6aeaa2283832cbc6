"""Draw nested clusters of a finished run: ``python tests/benchmarks/nested_clusters.py RUN_DIR OUT.png``.

Bands are clusters of the coarse cut, rows in them clusters of the fine cut, from the largest down.
"""

import argparse
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np

from uhml.config import load_config
from uhml.data.decode import load_rgb
from uhml.data.verify import load_pictures
from uhml.hierarchy import Dendrogram

BANDS, ROWS, COLUMNS = 6, 3, 14


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("run_dir", type=Path)
    parser.add_argument("out", type=Path)
    args = parser.parse_args()
    config = load_config(args.run_dir / "config.yaml")
    pictures = load_pictures(config.data).train
    tree = Dendrogram.load(max((args.run_dir / "hierarchies").iterdir()))
    fine, coarse = tree.cut(**{config.hierarchy.cut_by: config.hierarchy.cuts}).numpy()[[0, -1]]

    figure, axes = plt.subplots(BANDS * ROWS // 2, 2 * COLUMNS + 1, figsize=(2 * COLUMNS * 0.42, BANDS * ROWS * 0.21))
    for axis in axes.flat:
        axis.axis("off")
    # Bands of more than a few rows' worth, spread over the sizes.
    bands = [c for c in largest_first(coarse, np.arange(len(coarse))) if len(np.unique(fine[coarse == c])) >= ROWS]
    bands = [bands[i] for i in np.linspace(0, len(bands) - 1, BANDS).astype(int)]
    for b, band in enumerate(bands):
        members = np.flatnonzero(coarse == band)
        for r, row in enumerate(largest_first(fine, members)[:ROWS]):
            for c, picture in enumerate(members[fine[members] == row][:COLUMNS]):
                line, column = (b % (BANDS // 2)) * ROWS + r, (b // (BANDS // 2)) * (COLUMNS + 1) + c
                axes[line, column].imshow(load_rgb(pictures.paths[picture]))
    figure.subplots_adjust(0, 0, 1, 1, 0.05, 0.05)
    # A line under each band.
    for b in range(1, BANDS // 2):
        y = 1 - b / (BANDS // 2)
        figure.add_artist(plt.Line2D([0, 1], [y, y], color="#9ca3af", linewidth=1))
    figure.savefig(args.out, dpi=100, facecolor="white")


def largest_first(clusters: np.ndarray, members: np.ndarray) -> list[int]:
    ids, sizes = np.unique(clusters[members], return_counts=True)
    return ids[np.argsort(-sizes, kind="stable")].tolist()


if __name__ == "__main__":
    main()
