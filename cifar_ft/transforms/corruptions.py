"""TODO transforms.corruptions"""

from __future__ import annotations

import io
from collections.abc import Callable

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor


def blur(images: Tensor, sigma: float) -> Tensor:
    """Gaussian blur of uint8 images [N, 3, H, W]; `sigma` in pixels, edges continued."""
    if sigma == 0:
        return images
    reach = max(1, round(3 * sigma))
    kernel = torch.exp(-0.5 * (torch.arange(-reach, reach + 1) / sigma) ** 2)
    kernel = (kernel / kernel.sum()).repeat(3, 1)
    padded = F.pad(images.float(), (reach,) * 4, mode="replicate")
    rows = F.conv2d(padded, kernel[:, None, :, None], groups=3)
    return _to_uint8(F.conv2d(rows, kernel[:, None, None, :], groups=3))


def noise(images: Tensor, std: float) -> Tensor:
    """Independent Gaussian noise on every value of uint8 images; `std` in grey levels, the same draw each time."""
    generator = torch.Generator().manual_seed(0)
    return _to_uint8(images.float() + std * torch.randn(images.shape, generator=generator))


def jpeg(images: Tensor, quality: float) -> Tensor:
    """Each image [N, 3, H, W] compressed as JPEG of this quality (1 to 95) and decoded again."""

    def through(image: np.ndarray) -> np.ndarray:
        file = io.BytesIO()
        Image.fromarray(image).save(file, "JPEG", quality=int(quality))
        return np.asarray(Image.open(file))

    pictures = images.permute(0, 2, 3, 1).contiguous().numpy()
    return torch.from_numpy(np.stack([through(each) for each in pictures])).permute(0, 3, 1, 2).contiguous()


def brightness(images: Tensor, factor: float) -> Tensor:
    """All values of uint8 images times `factor`, cut off at 255."""
    return _to_uint8(images.float() * factor)


# Name: the function, its levels from mild to severe, and what a level means.
CORRUPTIONS: dict[str, tuple[Callable[[Tensor, float], Tensor], tuple[float, ...], str]] = {
    "blur": (blur, (0.4, 0.6, 0.8, 1.0, 1.5), "sigma in pixels"),
    "noise": (noise, (4, 8, 12, 16, 24), "deviation in grey levels"),
    "jpeg": (jpeg, (90, 70, 50, 30, 15), "JPEG quality"),
    "darker": (brightness, (0.8, 0.6, 0.4, 0.3, 0.2), "brightness factor"),
    "brighter": (brightness, (1.25, 1.5, 2.0, 2.5, 3.0), "brightness factor"),
}


def _to_uint8(images: Tensor) -> Tensor:
    return images.round().clamp(0, 255).to(torch.uint8)
