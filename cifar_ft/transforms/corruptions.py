"""Corruptions to test a model with: blur, noise, JPEG and brightness, on uint8 images [N, 3, H, W] of any size."""

from __future__ import annotations

import io
from collections.abc import Callable

import torch
import torchvision.transforms.v2.functional as F
from PIL import Image
from torch import Tensor


def blur(images: Tensor, sigma: float) -> Tensor:
    """Gaussian blur; `sigma` in pixels, edges continued."""
    if sigma == 0:
        return images
    reach = max(1, round(3 * sigma))
    padded = F.pad(images, [reach] * 4, padding_mode="edge")  # alone, gaussian_blur would mirror the picture there
    return F.gaussian_blur(padded, 2 * reach + 1, sigma)[..., reach:-reach, reach:-reach]


def noise(images: Tensor, std: float) -> Tensor:
    """Independent Gaussian noise on every value; `std` in grey levels, the same draw each time."""
    return _to_uint8(images + std * torch.randn(images.shape, generator=torch.Generator().manual_seed(0)))


def jpeg(images: Tensor, quality: float) -> Tensor:
    """Each image compressed as JPEG of this quality (1 to 100) and decoded again."""

    def through(image: Tensor) -> Tensor:  # with Pillow: torchvision's own coding of JPEG is on its way out
        F.to_pil_image(image).save(file := io.BytesIO(), "JPEG", quality=int(quality))
        return F.pil_to_tensor(Image.open(file))

    return torch.stack([through(image) for image in images])


def brightness(images: Tensor, factor: float) -> Tensor:
    """All values times `factor`, rounded (torchvision's adjust_brightness would cut fractions off)."""
    return _to_uint8(images * factor)


def _to_uint8(images: Tensor) -> Tensor:
    return images.round().clamp(0, 255).to(torch.uint8)


# Name: the function, its levels from mild to severe, and what a level means.
CORRUPTIONS: dict[str, tuple[Callable[[Tensor, float], Tensor], tuple[float, ...], str]] = {
    "blur": (blur, (0.4, 0.6, 0.8, 1.0, 1.5), "sigma in pixels"),
    "noise": (noise, (4, 8, 12, 16, 24), "standard deviation in grey levels"),
    "jpeg": (jpeg, (90, 70, 50, 30, 15), "JPEG quality"),
    "darker": (brightness, (0.8, 0.6, 0.4, 0.3, 0.2), "brightness factor"),
    "brighter": (brightness, (1.25, 1.5, 2.0, 2.5, 3.0), "brightness factor"),
}
