"""Augmentation of whole uint8 batches: blur or noise, crop, flip and cutout, drawn for each image; then normalised.

The random draws are equal in distribution to torchvision's RandomCrop and RandomHorizontalFlip, one draw per image, but
a batch is cropped by one gather instead of image by image.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor

from cifar_ft.recipes import Recipe
from cifar_ft.transforms.normalization import NORMALIZATIONS, channels, to_input

MOST_BLUR, MOST_NOISE = 1.0, 25.0  # the strongest that `degrade` gives: sigma in pixels, deviation in grey levels
REACH = 4  # of `blur`, in pixels
FIELD = 256  # side of the noise of which each image gets a window


def random_crop(images: Tensor, offsets: Tensor, padding: int = 4) -> Tensor:
    """Pad each image with black and cut a window of the original size at its own offset.

    Parameters
    ----------
    images : Tensor [B, C, H, W]; the result is alike.
    offsets : int64 Tensor [B, 2], row and column of the window's corner in the padded image, each 0 to 2 * padding.
    padding : pixels added on every side.
    """
    batch, _, height, width = images.shape
    padded = F.pad(images, (padding,) * 4)
    windows = padded.unfold(2, height, 1).unfold(3, width, 1)  # [B, C, rows, columns, H, W]: a view, nothing is copied
    return windows[torch.arange(batch, device=images.device), :, offsets[:, 0], offsets[:, 1]]


def random_flip(images: Tensor, flips: Tensor) -> Tensor:
    """Mirror the images [B, C, H, W] whose entry of `flips` (bool Tensor [B]) is true."""
    return torch.where(flips[:, None, None, None], images.flip(3), images)


def cut_out(images: Tensor, centres: Tensor, side: int, normalization: str = "imagenet") -> Tensor:
    """Cover a square of each uint8 image with the mean colour (DeVries and Taylor, 2017, arXiv:1708.04552).

    Parameters
    ----------
    images : uint8 Tensor [B, 3, H, W]
    centres : Tensor [B, 2], row and column of each square's centre, from 0 to 1 of the image; at an edge the square
        hangs over.
    side : side of the square in pixels.
    normalization : whose mean colour it is: 0 after `normalize`.
    """
    height, width = images.shape[-2:]
    tops, lefts = ((centres[:, i] * length).long() - side // 2 for i, length in enumerate((height, width)))
    rows = torch.arange(height, device=images.device) - tops[:, None]
    columns = torch.arange(width, device=images.device) - lefts[:, None]
    inside = ((rows >= 0) & (rows < side))[:, None, :, None] & ((columns >= 0) & (columns < side))[:, None, None, :]
    colour = (255 * channels(NORMALIZATIONS[normalization][0], images.device)).round().to(images.dtype)
    return torch.where(inside, colour, images)


def blur(images: Tensor, sigma: float | Tensor) -> Tensor:
    """Gaussian blur of uint8 images [B, C, H, W], edges continued.

    `sigma` is in pixels, one for all or float Tensor [B], one for each: from 0, which changes nothing, to about 1.3,
    above which the bell would be cut off visibly, four pixels from its centre.
    """
    return _to_uint8(_blurred(images, sigma))


def _blurred(images: Tensor, sigma: float | Tensor) -> Tensor:
    height, width = images.shape[-2:]
    taps = torch.arange(-REACH, REACH + 1, device=images.device)
    spread = torch.as_tensor(sigma, dtype=torch.float32, device=images.device).clamp(min=0.01).expand(len(images))
    bell = torch.exp(-((taps / spread[:, None]) ** 2) / 2)
    bell = (bell / bell.sum(1, keepdim=True)).T[:, :, None, None, None]
    padded = F.pad(images.float(), (REACH,) * 4, mode="replicate")
    rows = sum(weight * padded[:, :, i : i + height] for i, weight in enumerate(bell))
    return sum(weight * rows[..., i : i + width] for i, weight in enumerate(bell))


def degrade(images: Tensor, chances: Tensor, share: float) -> Tensor:
    """Blur some of the uint8 images [B, 3, H, W] and make as many noisy, so that a network learns to read them.

    Parameters
    ----------
    images : uint8 Tensor [B, 3, H, W], H and W at most 128; the result is alike.
    chances : float Tensor [B, 4], each from 0 to 1: whether an image is degraded and how, how strongly (up to
        `MOST_BLUR` or `MOST_NOISE`), and which window of a field of noise it gets. The field is the same for all, so
        that noise has not to be drawn on the CPU and brought to the GPU for each image.
    share : of the images that are degraded, half of them each way.
    """
    chance, strength, top, left = chances.unbind(1)
    sigma = torch.where(chance < share / 2, MOST_BLUR * strength, 0)
    deviation = torch.where((chance >= share / 2) & (chance < share), MOST_NOISE * strength, 0)
    height, width = images.shape[-2:]
    windows = _noise(images.device).unfold(1, height, 1).unfold(2, width, 1)  # [3, rows, columns, H, W]: a view
    noise = windows[:, (top * windows.shape[1]).long(), (left * windows.shape[2]).long()].transpose(0, 1)
    return _to_uint8(_blurred(images, sigma) + deviation[:, None, None, None] * noise)


@cache
def _noise(device: torch.device) -> Tensor:
    """Normal noise of deviation 1, [3, FIELD, FIELD]; made once, on the CPU, so that it is the same on every device."""
    with torch.inference_mode(False):
        return torch.randn(3, FIELD, FIELD, generator=torch.Generator().manual_seed(0)).to(device)


def _to_uint8(images: Tensor) -> Tensor:
    return images.round().clamp(0, 255).to(torch.uint8)


def draw(n: int, padding: int, generator: torch.Generator | None = None) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Draw the augmentation of `n` images, on the CPU, so that every device augments alike.

    They are the offsets of the crop, int64 [n, 2], uniform over 0 to 2 * padding; flips, bool [n], true for half;
    the centres of the squares that `cut_out` covers, float [n, 2], and the chances that `degrade` takes, float [n, 4],
    both uniform over 0 to 1. What a recipe does not use is drawn all the same, so that a setting changes no other draw.
    """
    offsets = torch.randint(0, 2 * padding + 1, (n, 2), generator=generator)
    flips, centres = torch.rand(n, generator=generator) < 0.5, torch.rand(n, 2, generator=generator)
    return offsets, flips, centres, torch.rand(n, 4, generator=generator)  # last: recorded runs drew the first three


@dataclass(frozen=True)
class TrainTransform:
    """Degrade, crop, flip, cut out, normalise and resize whole batches as the recipe says."""

    recipe: Recipe

    def __call__(
        self,
        images: Tensor,
        generator: torch.Generator | None = None,
        size: int | None = None,
        draws: tuple[Tensor, Tensor, Tensor, Tensor] | None = None,
    ) -> Tensor:
        """uint8 [B, 3, H, W] to float32 [B, 3, S, S], augmented by `draws` or else by fresh ones from `generator`."""
        recipe = self.recipe
        offsets, flips, centres, chances = (
            each.to(images.device) for each in draws or draw(len(images), recipe.crop_padding, generator)
        )
        if recipe.degrade:
            images = degrade(images, chances, recipe.degrade)
        if recipe.crop_padding:
            images = random_crop(images, offsets, recipe.crop_padding)
        if recipe.flip:
            images = random_flip(images, flips)
        if recipe.cutout:
            images = cut_out(images, centres, recipe.cutout, recipe.normalization)
        return to_input(images, size or recipe.image_size, recipe.normalization)


def train_transform(recipe: Recipe) -> TrainTransform:
    """The recipe's transform with augmentation, on whole batches."""
    return TrainTransform(recipe)
