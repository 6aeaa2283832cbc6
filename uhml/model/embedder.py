"""Backbone and hyperbolic head together."""

import torch
from torch import Tensor, nn

from uhml.config import ModelConfig
from uhml.errors import UserError
from uhml.model.backbone import Backbone, build_backbone
from uhml.model.head import HyperbolicHead
from uhml.model.projector import Projector


class Embedder(nn.Module):
    """Pictures to points of the Poincaré ball.

    Args:
        backbone: pictures to features.
        head: features to points.
        projector: takes the head's place in training mode, if given; the head then gets no gradient.
        precision: of the backbone in training mode, "float32" or "bfloat16".
        inference_precision: of the backbone in evaluation mode.
    """

    def __init__(
        self,
        backbone: Backbone,
        head: HyperbolicHead,
        projector: Projector | None,
        precision: str,
        inference_precision: str,
    ) -> None:
        super().__init__()
        self.backbone, self.head, self.projector = backbone, head, projector
        head.requires_grad_(projector is None)
        self.precision, self.inference_precision = precision, inference_precision

    @property
    def device(self) -> torch.device:
        """Where the network is."""
        return self.head.scale.device

    def features(self, images: Tensor) -> Tensor:
        """Map ``[b, 3, h, w]`` to the backbone's features ``[b, num_features]``, float32."""
        bfloat16 = (self.precision if self.training else self.inference_precision) == "bfloat16"
        with torch.autocast(images.device.type, torch.bfloat16, enabled=bfloat16):
            return self.backbone(images).float()

    def compile_backbone(self, images: Tensor) -> None:
        """Have torch compile the backbone: now for evaluation mode, and at its first use for training.

        Args:
            images: ``[b, 3, h, w]``, any, of a full batch in evaluation mode.

        Raises:
            UserError: torch cannot, for want of a compiler.
        """
        self.backbone.compile_network(len(images))
        try:
            with torch.inference_mode():
                self.eval().features(images)
        except torch._dynamo.exc.TorchDynamoException as e:
            reason = " ".join(str(e).split())[:300]
            raise UserError(
                "train.compile=true: torch cannot compile the backbone here. It needs a C++ compiler such as g++ on a "
                f"CPU, and Triton on a GPU: install that, or leave it out with train.compile=false. ({reason})"
            ) from e

    @property
    def learned_head(self) -> HyperbolicHead | Projector:
        """The projector, or the head where there is none."""
        return self.head if self.projector is None else self.projector

    def forward(self, images: Tensor) -> Tensor:
        """Map ``[b, 3, h, w]`` to points of the ball, float32: ``[b, embedding_dim]``, or the projector's."""
        head = self.learned_head if self.training else self.head
        return head(self.features(images))


def build_embedder(config: ModelConfig, image_size: int) -> Embedder:
    """Make the network that the config describes; its heads still wait for :meth:`HyperbolicHead.fit`."""
    backbone = build_backbone(config, image_size)

    ball = (config.curvature, config.clip_radius)
    head = HyperbolicHead(backbone.num_features, config.embedding_dim, *ball)
    projector = Projector(backbone.num_features, *ball) if config.projector else None
    return Embedder(backbone, head, projector, config.precision, config.inference_precision)
