"""The network: pictures to points of the Poincaré ball."""

from uhml.model.backbone import Backbone, build_backbone
from uhml.model.embedder import Embedder, build_embedder
from uhml.model.head import FeatureMoments, HyperbolicHead
from uhml.model.projector import projected_dim

__all__ = [
    "Backbone",
    "Embedder",
    "FeatureMoments",
    "HyperbolicHead",
    "build_backbone",
    "build_embedder",
    "projected_dim",
]
