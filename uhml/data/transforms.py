"""Picture to tensor: the random crop of training and the plain one of everything else."""

import torch
from PIL import Image
from torch import nn
from torchvision.transforms import InterpolationMode, v2

from uhml.config import DataConfig

BICUBIC = InterpolationMode.BICUBIC
LONGEST_STRIP = 32


def training_transform(config: DataConfig, mean: tuple[float, ...], std: tuple[float, ...]) -> nn.Module:
    """Return the augmentation: random crop, flip and colours, to a float tensor ``[3, image_size, image_size]``.

    Args:
        config: sizes and strengths.
        mean: of each colour channel, as the backbone expects it, of values in 0..1.
        std: likewise.
    """
    steps: list[nn.Module] = [Reduce(config.reduce_to), RandomCrop(config)]
    if config.augment_flip:
        steps.append(v2.RandomHorizontalFlip())
    if config.augment_color:
        strength = config.augment_color
        steps.append(v2.RandomApply([v2.ColorJitter(strength, strength, strength, min(strength / 4, 0.5))], p=0.8))
    if config.augment_gray:
        steps.append(v2.RandomGrayscale(config.augment_gray))
    return v2.Compose([*steps, *_to_tensor(mean, std)])


def reduced(image: Image.Image, side: int | None) -> Image.Image:
    """Return a picture reduced to ``side`` pixels along its shorter side; as it is if it has no more, or for None."""
    if side is None or min(image.size) <= side:
        return image
    return v2.functional.resize(image, [side], BICUBIC)


class Reduce(nn.Module):
    """Reduces larger pictures; those from a cache have been through it."""

    def __init__(self, side: int | None) -> None:
        super().__init__()
        self.side = side

    def forward(self, image: Image.Image) -> Image.Image:
        """Reduce."""
        return reduced(image, self.side)


class RandomCrop(nn.Module):
    """A random part of a picture, resized to the square that the network sees.

    With ``data.fit=squash`` the shape of the part is that of a part of the squashed picture: a wide car is as much
    narrowed here as where nothing is random. Otherwise the network would learn proportions that it never meets again.
    """

    def __init__(self, config: DataConfig) -> None:
        super().__init__()
        self.config = config

    def forward(self, image: Image.Image) -> Image.Image:
        """Crop and resize."""
        aspect = image.width / image.height if self.config.fit == "squash" else 1.0
        least, greatest = self.config.augment_ratio
        crop = v2.RandomResizedCrop(
            self.config.image_size,
            scale=self.config.augment_scale,
            ratio=(least * aspect, greatest * aspect),
            interpolation=BICUBIC,
        )
        return crop(image)


class Shortened(nn.Module):
    """Leave of a strip its middle: with the shorter side as large as the network's it would fill the memory."""

    def forward(self, image: Image.Image) -> Image.Image:
        """Crop what is longer than ``LONGEST_STRIP`` times its width; far beyond what a crop of the middle keeps."""
        most = LONGEST_STRIP * min(image.size)
        if max(image.size) <= most:
            return image
        width, height = min(image.width, most), min(image.height, most)
        left, top = (image.width - width) // 2, (image.height - height) // 2
        return image.crop((left, top, left + width, top + height))


def plain_transform(config: DataConfig, mean: tuple[float, ...], std: tuple[float, ...]) -> nn.Module:
    """Return what brings a picture to the network where nothing is random: clustering and evaluation."""
    side = config.image_size
    if config.fit == "squash":
        steps: list[nn.Module] = [v2.Resize((side, side), interpolation=BICUBIC)]
    else:
        resize = v2.Resize(round(side / config.center_crop), interpolation=BICUBIC)
        steps = [Shortened(), resize, v2.CenterCrop(side)]
    return v2.Compose([Reduce(config.reduce_to), *steps, *_to_tensor(mean, std)])


def _to_tensor(mean: tuple[float, ...], std: tuple[float, ...]) -> list[nn.Module]:
    return [v2.ToImage(), v2.ToDtype(torch.float32, scale=True), v2.Normalize(mean, std)]
