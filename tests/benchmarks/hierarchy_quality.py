"""How good the hierarchies of runs are, and what the radius of their embedding tells.

    python tests/benchmarks/hierarchy_quality.py RUN [RUN ...]

For the first and the last re-clustering of each run: adjusted mutual information (AMI) with the training classes, of a
cut into as many clusters, and dendrogram purity; the same of the super-classes, where there are any. For the trained
embedding of the run's test pictures: the radius as a share of the clip radius, from the 5th to the 95th percentile;
the rank correlation (Spearman) of radius and the distance to the 10 nearest pictures, which is small where many
pictures look alike; and in how many of all pictures a blurred copy, which shows less, lies nearer the centre.
"""

import uhml  # noqa: F401 (before torch, which reads then how its threads are to wait)

# isort: split
import argparse
from pathlib import Path

import numpy as np
import torch
from scipy.stats import spearmanr
from torchvision.transforms import v2

from uhml import poincare
from uhml.data.loading import share_loader
from uhml.data.transforms import plain_transform
from uhml.data.verify import list_pictures
from uhml.evaluate import find_neighbors
from uhml.hierarchy import Dendrogram
from uhml.hierarchy.geometry import Geometry
from uhml.hierarchy.quality import agreement, dendrogram_purity
from uhml.trained.network import load_trained


@torch.inference_mode()
def radii(trained, pictures, *before):
    """Embed pictures after the transforms ``before``; return points and their tangent norms."""
    config, model = trained.config, trained.model
    transform = v2.Compose([*before, plain_transform(config.data, model.backbone.mean, model.backbone.std)])
    points = torch.cat([model(images) for images in share_loader(pictures, transform, 128, config.data.num_workers)])
    return points, poincare.tangent_norm(points, config.model.curvature).numpy()


def report(run):
    trained = load_trained(str(run))
    config = trained.config
    splits = list_pictures(config.data)
    trees = sorted((run / "hierarchies").glob("step-*.npz"))
    print(f"## {run}\n\n| step | of | AMI | dendrogram purity |\n|---|---|---|---|")
    for name, labels in (("classes", splits.train.labels), ("super-classes", splits.train.super_labels)):
        if labels is not None:
            for path in (trees[0], trees[-1]):
                tree = Dendrogram.load(path)
                cut = tree.cut(counts=[len(np.unique(labels))])[0]
                ami, purity = agreement(cut, labels).ami, dendrogram_purity(tree, labels)
                print(f"| {int(path.stem.removeprefix('step-'))} | {name} | {100 * ami:.1f} | {100 * purity:.2f} |")
    points, radius = radii(trained, splits.test)
    blurred = radii(trained, splits.test, v2.GaussianBlur(9, 2.0))[1]
    near = find_neighbors(points, None, Geometry("poincare", config.model.curvature), 10).distances.mean(1)
    low, high = np.quantile(radius / config.model.clip_radius, [0.05, 0.95])
    print(
        f"\nRadius {low:.4f} to {high:.4f} of the clip's; rank correlation with the distance to 10 neighbours "
        f"{spearmanr(radius, near).statistic:+.2f}; a blurred copy lies nearer the centre for "
        f"{100 * np.mean(blurred < radius):.0f} % of the pictures.\n"
    )


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(2)
    for run in args.runs:
        report(run)


if __name__ == "__main__":
    main()
