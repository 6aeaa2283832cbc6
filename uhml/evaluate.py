"""Score a network on the classes it never saw."""

import torch

from uhml import distributed
from uhml.config import Config
from uhml.data.pictures import Pictures, Splits
from uhml.embedding import embed_share
from uhml.hierarchy.geometry import Geometry
from uhml.metrics import Embedded, Scores, score
from uhml.model import Embedder


def score_unseen(model: Embedder, splits: Splits, config: Config) -> dict[str, Scores] | None:
    """Score the network as it is on the test pictures, or on those held out for validation. A collective.

    Returns:
        "backbone": its features, by cosine; "ball": the embedding as it is deployed, by the ball's distance; "cosine":
        the embedding by cosine. None where no classes are known, so that there is nothing to score.
    """
    if splits.test is None:
        return None
    queries = _features(model, splits.test, config, config.data.score_on)
    gallery = None if splits.gallery is None else _features(model, splits.gallery, config, "gallery")
    cosine, ball = Geometry("cosine"), Geometry("poincare", config.model.curvature)
    recall_at, seed = config.eval.recall_at, config.train.seed
    backbone = score(queries, gallery, cosine, recall_at, seed)
    queries, gallery = _points(model, queries), None if gallery is None else _points(model, gallery)
    return {
        "backbone": backbone,
        "ball": score(queries, gallery, ball, recall_at, seed),
        "cosine": score(queries, gallery, cosine, recall_at, seed),
    }


def _features(model: Embedder, pictures: Pictures, config: Config, name: str) -> Embedded:
    assert pictures.labels is not None, "test pictures have labels, or there would be no test part"
    own = embed_share(model, pictures, config, f"embed {name} pictures", features=True)
    return Embedded(distributed.all_gather_shares(own, len(pictures)), pictures.labels)


@torch.inference_mode()
def _points(model: Embedder, features: Embedded) -> Embedded:
    return Embedded(model.head(features.rows), features.labels)
