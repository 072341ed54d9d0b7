"""Augmentation and normalisation on whole uint8 batches: per-image random crop, flip and cutout, resize, normalise.

The random draws are equal in distribution to torchvision's RandomCrop and RandomHorizontalFlip, one draw per image, but
a batch is cropped by one gather instead of image by image.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from cifar_ft.recipes import Recipe
from cifar_ft.transforms.normalization import NORMALIZATIONS, channels, to_input


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


def draw(n: int, padding: int, generator: torch.Generator | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """Draw the augmentation of `n` images: offsets, flips and centres, on the CPU, so that every device augments alike.

    They are the offsets of the crop, int64 [n, 2], uniform over 0 to 2 * padding; flips, bool [n], true for half;
    and the centres of the squares that `cut_out` covers, float [n, 2], uniform over 0 to 1.
    """
    offsets = torch.randint(0, 2 * padding + 1, (n, 2), generator=generator)
    return offsets, torch.rand(n, generator=generator) < 0.5, torch.rand(n, 2, generator=generator)


@dataclass(frozen=True)
class TrainTransform:
    """Crop, flip, cut out, normalise and resize whole batches as the recipe says."""

    recipe: Recipe

    def __call__(
        self,
        images: Tensor,
        generator: torch.Generator | None = None,
        size: int | None = None,
        draws: tuple[Tensor, Tensor, Tensor] | None = None,
    ) -> Tensor:
        """uint8 [B, 3, H, W] to float32 [B, 3, S, S], augmented by `draws` or else by fresh ones from `generator`."""
        recipe = self.recipe
        offsets, flips, centres = (
            each.to(images.device) for each in draws or draw(len(images), recipe.crop_padding, generator)
        )
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
