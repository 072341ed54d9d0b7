"""From uint8 images to a model's input and back: normalise and resize, the same way each time."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache, partial

import torch
import torch.nn.functional as F
from torch import Tensor

from cifar_ft.recipes import Recipe

# Channel means and standard deviations of pixels scaled to [0, 1].
NORMALIZATIONS: dict[str, tuple[tuple[float, float, float], tuple[float, float, float]]] = {
    "imagenet": ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
    "cifar10": ((0.49139968, 0.48215841, 0.44653091), (0.24703223, 0.24348513, 0.26158784)),
    # What the published code uses: its std is the mean of the images' own standard deviations, not that of all pixels.
    "cifar10_published": ((0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010)),
}


def resize(images: Tensor, size: int) -> Tensor:
    """Resize float images [B, C, H, W] to `size` pixels square: bilinear, with anti-aliasing when they get smaller."""
    if tuple(images.shape[-2:]) == (size, size):
        return images
    smaller = size < min(images.shape[-2:])
    return F.interpolate(images, (size, size), mode="bilinear", align_corners=False, antialias=smaller)


def normalize(images: Tensor, normalization: str = "imagenet") -> Tensor:
    """uint8 images (or floats in [0, 255]) [B, 3, H, W] to float32 with the named channel mean and std taken out."""
    mean, std = (channels(values, images.device) for values in NORMALIZATIONS[normalization])
    return (images.float() - 255 * mean) / (255 * std)


def denormalize(images: Tensor, normalization: str = "imagenet") -> Tensor:
    """The inverse of `normalize`: uint8 images to look at, so that colours are true and not clipped."""
    mean, std = (channels(values, images.device) for values in NORMALIZATIONS[normalization])
    return (images * 255 * std + 255 * mean).round().clamp(0, 255).to(torch.uint8)


def eval_transform(recipe: Recipe) -> Callable[[Tensor], Tensor]:
    """The recipe's transform without augmentation, uint8 [B, 3, H, W] to float32 [B, 3, S, S]."""
    return partial(to_input, size=recipe.image_size, normalization=recipe.normalization)


def to_input(images: Tensor, size: int, normalization: str) -> Tensor:
    """Normalise and resize, in the memory format that convolutions like."""
    # Normalising first is the same (both steps are linear and the resize weights sum to 1) and touches fewer pixels.
    return resize(normalize(images, normalization), size).contiguous(memory_format=torch.channels_last)


@cache
def channels(values: tuple[float, ...], device: torch.device) -> Tensor:
    """One value a channel, to be combined with images [B, 3, H, W]; made once, since a GPU has to be waited for."""
    with torch.inference_mode(False):
        return torch.tensor(values, device=device).view(1, 3, 1, 1)
