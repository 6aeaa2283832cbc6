"""What a head fitted to few pictures makes of others: with the axes on which they differ alone, and with all.

    python tests/benchmarks/few_pictures.py configs/folder.yaml data.dataset=cars196 data.root=cars196 \\
        data.image_size=96 data.score_on=validation

Frozen features; the head is fitted to the first n training pictures of whole classes, drawn at random, and scored by
R@1, in per cent, on the pictures of the other part: with ``data.score_on=validation``, of training classes.
Prints a table, which begins with the frozen backbone's cosine.
"""

import argparse

import numpy as np
import torch

from uhml.config import load_config
from uhml.data.verify import load_pictures
from uhml.embedding import embed_share
from uhml.hierarchy.geometry import Geometry
from uhml.hierarchy.knn import nearest_neighbors
from uhml.model import FeatureMoments, HyperbolicHead, build_embedder


def recall_at_1(rows, labels, geometry):
    """Return the share of rows whose nearest other one has their label, in per cent."""
    points, ids = geometry.points(rows), torch.arange(len(rows))
    nearest, _ = nearest_neighbors(points, ids, points, ids, 1, geometry)
    return 100 * float(np.mean(labels[nearest[:, 0].numpy()] == labels))


def first_of_classes(labels, n):
    """Return the first n pictures where classes follow each other in an order that is drawn."""
    classes = np.random.default_rng(0).permutation(labels.max() + 1)
    return np.concatenate([np.flatnonzero(labels == label) for label in classes])[:n]


@torch.inference_mode()
def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", help="a config file")
    parser.add_argument("overrides", nargs="*", help="keys of it")
    parser.add_argument("--pictures", default="30,60,120,250,400", help="to fit to (default: %(default)s)")
    args = parser.parse_intermixed_args()
    config = load_config(args.config, args.overrides)
    options = config.model
    splits = load_pictures(config.data)
    network = build_embedder(options, config.data.image_size).eval()
    features = {name: embed_share(network, part, config, name, features=True) for name, part in splits.parts.items()}
    ball, others = Geometry("poincare", options.curvature), np.asarray(splits.test.labels)
    print("| n | axes that differ alone | all axes |\n|---|---|---|")
    print(f"| frozen, cosine | {recall_at_1(features['test'], others, Geometry('cosine')):.1f} | |")
    for n in map(int, args.pictures.split(",")):
        few = features["train"][first_of_classes(np.asarray(splits.train.labels), n)]
        head = HyperbolicHead(few.shape[1], options.embedding_dim, options.curvature, options.clip_radius)
        head.fit("whitened_pca", FeatureMoments.over_ranks(few), options.start_norm, options.whitening)
        with_all = recall_at_1(head(features["test"]), others, ball)
        # Along the others the pictures that the head is fitted to are all at its mean.
        tangent = head.tangent(few).abs().amax(0)
        head.linear.weight[tangent < 1e-4 * tangent.max()] = 0
        print(f"| {n} | {recall_at_1(head(features['test']), others, ball):.1f} | {with_all:.1f} |", flush=True)


if __name__ == "__main__":
    main()
