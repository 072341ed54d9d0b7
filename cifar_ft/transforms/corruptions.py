"""Corruptions to test a model with: CIFAR-10-C's, made here, and darkness.

CIFAR-10-C (Hendrycks and Dietterich, ICLR 2019, arXiv:1903.12261) corrupts the test set in fifteen ways and four extra
ones, each at five severities. Eleven of the fifteen are made here, and two of the four: Gaussian blur and saturation.
The functions and their constants are those of the published code (github.com/hendrycks/robustness, make_cifar_c.py);
where one differs, it says how. The random draws are our own, and values are rounded where the published code cuts their
fractions off, so that an accuracy on them is none on CIFAR-10-C. Left out are glass blur (a loop over pixels), snow,
elastic transform and spatter (made with OpenCV or ImageMagick), frost (photographs), and speckle noise, since three
kinds of noise are enough.
"""

from __future__ import annotations

import io
import math
from collections.abc import Callable

import numpy as np
import torch
import torch.nn.functional as F
from matplotlib.colors import hsv_to_rgb, rgb_to_hsv
from PIL import Image
from torch import Tensor

from cifar_ft import CifarFtError
from cifar_ft.files import unknown
from cifar_ft.transforms.augmentation import blur


def corrupt(images: Tensor, name: str, severity: int) -> Tensor:
    """Corrupt uint8 images [N, 3, S, S] in one of the ways of `CORRUPTIONS`; severity from 1 (mild) to 5.

    The constants are meant for S = 32. What is drawn at random is the same each time.

    Raises
    ------
    CifarFtError
        When there is no such corruption or severity.
    """
    if name not in CORRUPTIONS:
        raise CifarFtError(unknown("corruption", name, CORRUPTIONS))
    if severity not in range(1, 6):
        raise CifarFtError(f"severity={severity} is out of range; it is a whole number from 1 to 5")
    function, levels = CORRUPTIONS[name]
    level = levels[severity - 1]
    corrupted = function(images.float(), *(level if isinstance(level, tuple) else (level,)))
    return corrupted.float().round().clamp(0, 255).to(torch.uint8)


def brightness(images: Tensor, factor: float) -> Tensor:
    """All values of uint8 images times `factor`, rounded (torchvision's adjust_brightness would cut fractions off)."""
    return (images * factor).round().clamp(0, 255).to(torch.uint8)


# The others take float images [N, 3, S, S] of 0 to 255 and give such, which `corrupt` rounds and clips.


def _gaussian_noise(images: Tensor, std: float) -> Tensor:
    return images + 255 * std * torch.randn(images.shape, generator=_seeded())


def _shot_noise(images: Tensor, photons: float) -> Tensor:
    """Each value a count of photons, `photons` of them for white."""
    return torch.poisson(images / 255 * photons, _seeded()) / photons * 255


def _impulse_noise(images: Tensor, share: float) -> Tensor:
    """A share of the values, colours apart, is set to 0 or 255."""
    chance, salt = torch.rand(2, *images.shape, generator=_seeded())
    return torch.where(chance < share, 255.0 * (salt < 0.5), images)


def _defocus_blur(images: Tensor, radius: float, softness: float) -> Tensor:
    """The mean over a disk whose rim is softened, edges mirrored."""
    taps, bell = torch.arange(-2.0, 3.0), torch.exp(-((torch.arange(-1.0, 2.0) / softness) ** 2) / 2)
    disk = (taps[:, None] ** 2 + taps**2 <= radius**2).float()
    kernel = F.conv2d(disk[None, None], torch.outer(bell, bell)[None, None], padding=1)
    padded = F.pad(images, (2, 2, 2, 2), mode="reflect").flatten(0, 1)[:, None]
    return F.conv2d(padded, kernel / kernel.sum()).view_as(images)


def _motion_blur(images: Tensor, radius: int, sigma: float) -> Tensor:
    """Half a bell of `2 * radius + 1` pixels along a line, up to 45 degrees off the horizontal, edges continued.

    ImageMagick's motion blur, by its formula: pixels on the line are the nearest ones, in 8 bits there and exact here.
    """
    side, taps = images.shape[-1], torch.arange(2 * radius + 1)
    weights = torch.exp(-((taps / sigma) ** 2) / 2)
    angles = (torch.rand(len(images), 1, generator=_seeded()) - 0.5) * math.pi / 2
    down, right = ((taps * step).round().long() for step in (angles.sin(), angles.cos()))
    blurred = torch.zeros_like(images)
    for i, weight in enumerate(weights / weights.sum()):
        rows, columns = ((torch.arange(side) + step[:, i, None]).clamp(0, side - 1) for step in (down, right))
        shifted = images.gather(2, rows[:, None, :, None].expand_as(images))
        blurred += weight * shifted.gather(3, columns[:, None, None, :].expand_as(images))
    return blurred


def _zoom_blur(images: Tensor, largest: float) -> Tensor:
    """The mean of the images and their middle enlarged by 1.00, 1.01, ... up to before `largest`."""
    side, total, zooms = images.shape[-1], images.clone(), np.arange(1, largest, 0.01)
    for zoom in zooms:
        part = math.ceil(side / zoom)
        first, size = (side - part) // 2, round(part * zoom)
        middle = images[..., first : first + part, first : first + part]
        middle = F.interpolate(middle, (size, size), mode="bilinear", align_corners=True)  # as scipy.ndimage.zoom
        trim = (size - side) // 2
        total += middle[..., trim : trim + side, trim : trim + side]
    return total / (len(zooms) + 1)


def _fog(images: Tensor, amount: float, decay: float) -> Tensor:
    """Light of random clouds, added; then as bright as the image was."""
    peak = images.amax((1, 2, 3), keepdim=True) / 255
    foggy = images + 255 * amount * _clouds(len(images), images.shape[-1], decay)
    return foggy * peak / (peak + amount)


def _clouds(n: int, side: int, decay: float) -> Tensor:
    """Random heights [n, 1, side, side] from 0 to 1 by the diamond-square algorithm, without seams at the edges.

    The midpoint of each square and then of each edge is the mean of its four neighbours and a random part, which
    shrinks by `decay` squared as squares are halved. Midpoints of upright edges are given the corner to their right
    for the one below, as in the published code.
    """
    step, spread, generator = 1 << (side - 1).bit_length(), 1.0, _seeded()
    heights = torch.zeros(n, step, step)

    def midpoints(four: Tensor) -> Tensor:
        return four / 4 + spread * (2 * torch.rand(four.shape, generator=generator) - 1)

    while step >= 2:
        half = step // 2
        corners = heights[:, ::step, ::step]
        pairs = corners + corners.roll(-1, 2)
        centres = midpoints(corners + corners.roll(-1, 1) + (corners + corners.roll(-1, 1)).roll(-1, 2))
        heights[:, half::step, half::step] = centres
        heights[:, ::step, half::step] = midpoints(pairs + centres + centres.roll(1, 1))
        heights[:, half::step, ::step] = midpoints(pairs + centres + centres.roll(1, 2))
        step, spread = half, spread / decay**2
    heights -= heights.amin((1, 2), keepdim=True)
    return (heights / heights.amax((1, 2), keepdim=True))[:, None, :side, :side]


def _contrast(images: Tensor, factor: float) -> Tensor:
    """Nearer to the mean of each image and colour."""
    means = images.mean((2, 3), keepdim=True)
    return means + factor * (images - means)


def _hsv(images: Tensor, channel: int, factor: float, plus: float) -> Tensor:
    """Hue, saturation or value of each pixel, times `factor`, `plus` something."""
    hsv = rgb_to_hsv((images / 255).permute(0, 2, 3, 1).numpy())
    hsv[..., channel] = (hsv[..., channel] * factor + plus).clip(0, 1)
    return 255 * torch.from_numpy(hsv_to_rgb(hsv)).permute(0, 3, 1, 2)


def _brightness(images: Tensor, plus: float) -> Tensor:
    return _hsv(images, 2, 1, plus)


def _saturate(images: Tensor, factor: float, plus: float) -> Tensor:
    return _hsv(images, 1, factor, plus)


def _pixelate(images: Tensor, scale: float) -> Tensor:
    """Made smaller and large again, each pixel the mean of the area it covers."""

    def smaller(image: Image.Image) -> Image.Image:
        size = tuple(int(side * scale) for side in image.size)
        return image.resize(size, Image.Resampling.BOX).resize(image.size, Image.Resampling.BOX)

    return _with_pillow(images, smaller)


def _jpeg(images: Tensor, quality: int) -> Tensor:
    """Compressed as JPEG and decoded again (torchvision's own coding of JPEG is on its way out)."""

    def coded(image: Image.Image) -> Image.Image:
        image.save(file := io.BytesIO(), "JPEG", quality=quality)
        return Image.open(file)

    return _with_pillow(images, coded)


def _with_pillow(images: Tensor, change: Callable[[Image.Image], Image.Image]) -> Tensor:
    pictures = images.byte().permute(0, 2, 3, 1).numpy()
    return torch.from_numpy(np.stack([change(Image.fromarray(picture)) for picture in pictures])).permute(0, 3, 1, 2)


def _seeded() -> torch.Generator:
    return torch.Generator().manual_seed(0)


OURS = "darkness (ours)"
# Name: the function, and its constants from severity 1 to 5. The last is ours, the two before are CIFAR-10-C's extra.
CORRUPTIONS: dict[str, tuple[Callable[..., Tensor], tuple]] = {
    "gaussian noise": (_gaussian_noise, (0.04, 0.06, 0.08, 0.09, 0.10)),  # standard deviation; 1 is white
    "shot noise": (_shot_noise, (500, 250, 100, 75, 50)),
    "impulse noise": (_impulse_noise, (0.01, 0.02, 0.03, 0.05, 0.07)),
    "defocus blur": (_defocus_blur, ((0.3, 0.4), (0.4, 0.5), (0.5, 0.6), (1, 0.2), (1.5, 0.1))),
    "motion blur": (_motion_blur, ((6, 1), (6, 1.5), (6, 2), (8, 2), (9, 2.5))),
    "zoom blur": (_zoom_blur, (1.06, 1.11, 1.16, 1.21, 1.26)),
    "fog": (_fog, ((0.2, 3), (0.5, 3), (0.75, 2.5), (1, 2), (1.5, 1.75))),
    "brightness": (_brightness, (0.05, 0.1, 0.15, 0.2, 0.3)),
    "contrast": (_contrast, (0.75, 0.5, 0.4, 0.3, 0.15)),
    "pixelate": (_pixelate, (0.95, 0.9, 0.85, 0.75, 0.65)),
    "jpeg": (_jpeg, (80, 65, 58, 50, 40)),
    "gaussian blur": (blur, (0.4, 0.6, 0.7, 0.8, 1)),  # standard deviation in pixels
    "saturate": (_saturate, ((0.3, 0), (0.1, 0), (1.5, 0), (2, 0.1), (2.5, 0.2))),
    OURS: (brightness, (0.8, 0.6, 0.4, 0.3, 0.2)),  # factor
}
