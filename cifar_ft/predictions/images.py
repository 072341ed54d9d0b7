"""Pictures of any kind (notebook 06): read, turned upright, cut square, made 32 pixels wide.

Nothing here knows a model; whatever is no picture is refused with one clear line.
"""

from __future__ import annotations

import io
import os
import warnings
from collections.abc import Iterator
from contextlib import suppress
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from PIL import ExifTags, Image, ImageOps, UnidentifiedImageError
from torch import Tensor

from cifar_ft import CifarFtError
from cifar_ft.files import one_line, show_path

SIZE = 32  # pixels: the width of the pictures that the models were trained on
MAX_PIXELS = 50_000_000
MAX_PIXELS_JPEG2000 = 12_000_000  # its decoder takes 12 bytes a pixel
LARGE = 12_000_000  # pixels; larger pictures are halved right after decoding
# Named one by one: Pillow would hand other kinds to outside programs (EPS to Ghostscript).
# ICO is not among them: Pillow decodes what is inside before its size can be checked.
FORMATS = ("PNG", "JPEG", "MPO", "GIF", "WEBP", "BMP", "TIFF", "PPM", "AVIF", "JPEG2000")
# The usual endings of their names.
SUFFIXES = (
    ".png", ".apng", ".jpg", ".jpeg", ".jpe", ".jfif", ".mpo", ".gif", ".webp", ".bmp", ".tif", ".tiff", ".ppm", ".pgm",
    ".pbm", ".pnm", ".avif", ".jp2", ".j2k", ".jpx",
)  # fmt: skip


# Endings of pictures that are mostly of other kinds: in a folder they are tried, and told of, not passed over.
OTHER_SUFFIXES = (
    ".heic", ".heif", ".ico", ".tga", ".psd", ".svg", ".jxl", ".eps", ".dng", ".cr2", ".cr3", ".nef", ".arw", ".raw",
)  # fmt: skip


MOST_SCANS = 100  # of a JPEG file; a progressive one has some ten, and each costs the time of a whole picture


class ImageError(CifarFtError, ValueError):
    """Something that is no picture, or not one that can be predicted."""


class Picture(NamedTuple):
    """A picture, uint8 [3, H, W], and in words what was done to get it, such as "the first of several frames".

    `size` is its width and height as given, upright: more than those of `image` where it was very large.
    """

    image: Tensor
    notes: tuple[str, ...] = ()
    size: tuple[int, int] = (0, 0)


def read_image(source) -> Tensor:
    """The picture alone, uint8 [3, H, W], of what `read_picture` reads, with the same errors."""
    return read_picture(source).image


def read_picture(source) -> Picture:
    """Read one picture, whatever it comes as, and tell what was done to it.

    Parameters
    ----------
    source : path, bytes, file object, PIL image, array or Tensor
        Files are PNG, JPEG, GIF, WebP, BMP, TIFF and the like: turned upright as their EXIF data say, the
        first frame of an animated file (of a PIL image, the frame that it is at), transparent parts on white, 16
        bits scaled to 8. Arrays are [H, W] or [H, W, C], tensors [H, W] or [C, H, W] with C = 1, 3 or 4 (the other
        order is accepted where only that fits); uint8, uint16 (0 to 65,535) or floats, which must be from 0 to 1.

    Returns
    -------
    Picture

    Raises
    ------
    ImageError
        With one line that names the picture and says what is wrong with it. A picture of more than 50 million
        pixels is refused before it is decoded.
    """
    ready = isinstance(source, Image.Image) or (
        hasattr(source, "__array__") and not isinstance(source, (str, bytes))  # NumPy's strings are both
    )
    name, source = ("the picture", source) if ready else _locate(source)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # what Pillow warns of is checked here, or does not matter
            if ready:
                return _decode(source if isinstance(source, Image.Image) else _array_image(source))
            Image.init()
            with Image.open(source, formats=[kind for kind in FORMATS if kind in Image.OPEN]) as image:
                image.seek(0)
                return _decode(image)
    except ImageError as error:
        problem = str(error)
    except UnidentifiedImageError:
        problem = "not a picture that can be read here; use PNG, JPEG, GIF, WebP, BMP or TIFF"
    except Image.DecompressionBombError:
        problem = f"too large; at most {MAX_PIXELS:,} pixels are allowed, make it smaller"
    except Exception as error:  # a damaged file can cause any
        problem = f"damaged, incomplete or of an unknown kind ({error or type(error).__name__}); get it again"
    raise ImageError(one_line(f"{name}: {problem}"))


def _locate(source) -> tuple[str, object]:
    """A name for messages and what Pillow can open."""
    if isinstance(source, (bytes, bytearray, memoryview)):
        if content := bytes(source):
            return "the picture", io.BytesIO(content)
        raise ImageError("the picture is empty: 0 bytes; choose a picture file")
    if isinstance(source, io.TextIOBase):
        raise ImageError('the picture is opened as text; open it with mode "rb"')
    if hasattr(source, "read"):
        return "the picture", source
    if not isinstance(source, (str, os.PathLike)):
        kinds = "a path, bytes, a file object, a PIL image, an array or a tensor"
        raise ImageError(f"cannot read {type(source).__name__} as a picture; give {kinds}")
    path = os.path.expanduser(os.fsdecode(source))
    shown = one_line(show_path(os.path.abspath(path))) if path else "''"
    if "://" in path:
        raise ImageError(f"{one_line(path)} is an address; download the picture and give its path")
    if os.path.isdir(path):
        raise ImageError(f"{shown} is a folder; give a picture, or the folder to predict_paths")
    if not os.path.isfile(path):
        raise ImageError(f"{shown} is no regular file" if os.path.exists(path) else f"there is no file {shown}")
    if not os.path.getsize(path):
        raise ImageError(f"{shown} is empty: 0 bytes; choose another file")
    return shown, path


def _decode(image: Image.Image) -> Picture:
    width, height = image.size
    notes = []
    with suppress(Exception):  # of damaged later frames; counting them all could take long
        if image.format != "MPO" and getattr(image, "is_animated", False):  # an MPO is one photograph with a preview
            frame = image.tell()
            notes.append(f"frame {frame + 1} of several" if frame else "the first of several frames")
    if not width or not height:
        raise ImageError(f"{width} x {height} pixels is no picture; each side must have at least 1")
    if width * height > MAX_PIXELS:
        raise ImageError(f"too large: {width:,} x {height:,} pixels; at most {MAX_PIXELS:,} are allowed")
    if image.format == "JPEG2000" and width * height > MAX_PIXELS_JPEG2000:
        limit = f"at most {MAX_PIXELS_JPEG2000:,} are allowed, save it as PNG"
        raise ImageError(f"too large for JPEG 2000: {width:,} x {height:,} pixels; {limit}")
    _refuse_costly(image)
    turned = _turned(image)
    image.load()
    if turned or _turned(image):
        notes.append("turned upright as its EXIF data say")
        image = ImageOps.exif_transpose(image)  # nothing is left to do in a TIFF file, which Pillow turns itself
    size = width, height = image.size
    if width * height > LARGE:  # whoever looks at 32 pixels does not miss half of 5,000, and memory is spared
        image = image.resize((max(1, image.width // 2), max(1, image.height // 2)), Image.Resampling.NEAREST)
        notes.append("every second pixel left out, as it is very large")
    if image.mode[0] in "IF":  # 16 bits and more, in one channel
        values = np.asarray(image)
        if image.mode == "I" and image.format is None and values.min() >= 0 and values.max() <= 255:
            values = values.astype(np.uint8)  # made of 8 bits by somebody's program; no file has so few
        elif image.mode == "I" and not (values >> 16).any():
            values = values.astype(np.uint16)
        image = _array_image(values)
        notes.append("brightness taken as 8 bits" if values.dtype == np.uint8 else "brightness scaled to 8 bits")
    if "transparency" in image.info or image.mode in ("RGBA", "LA", "PA", "RGBa", "La"):
        layers = image.convert("RGBA")
        image = Image.new("RGBA", image.size, "white")
        image.alpha_composite(layers)
        if layers.getextrema()[3][0] < 255:
            notes.append("transparent parts shown on white")
    if image.mode == "CMYK":
        notes.append("printing colours (CMYK) converted")
    pixels = np.asarray(image if image.mode == "RGB" else image.convert("RGB"))
    image = torch.from_numpy(pixels).permute(2, 0, 1).clone(memory_format=torch.contiguous_format)
    return Picture(image, tuple(notes), size)


def _refuse_costly(image: Image.Image) -> None:
    """Raise ImageError for a file that would take far more memory or time than its size in pixels says."""
    if image.format == "TIFF":
        width, height = (image.tag_v2.get(tag, 1) for tag in (ExifTags.Base.TileWidth, ExifTags.Base.TileLength))
        if width * height > MAX_PIXELS:
            limit = f"at most {MAX_PIXELS:,} are allowed"
            raise ImageError(f"a tile of {width:,} x {height:,} pixels is too large; {limit}")
    if image.format in ("JPEG", "MPO") and getattr(image, "fp", None) is not None:
        place = image.fp.tell()
        image.fp.seek(0)
        scans = image.fp.read().count(b"\xff\xda")  # the mark that a scan begins; image data cannot hold it
        image.fp.seek(place)
        if scans > MOST_SCANS:
            raise ImageError(f"{scans:,} scans would take too long; at most {MOST_SCANS} are allowed, save it anew")


def _turned(image: Image.Image) -> bool:
    """Whether EXIF data say that the picture is stored turned or mirrored."""
    with suppress(Exception):  # of damaged EXIF data; the pixels may be good
        return image.getexif().get(ExifTags.Base.Orientation, 1) in range(2, 9)
    return False


def _array_image(source) -> Image.Image:
    """An array or tensor as a PIL image of mode L, RGB or RGBA."""
    axes, wanted = (2, 0), "[H, W] or [H, W, 3]"
    if isinstance(source, Tensor):
        axes, wanted = (0, 2), "[H, W] or [3, H, W]"
        source = source.detach().cpu()
        source = (source.float() if source.dtype == torch.bfloat16 else source).numpy()
    array = np.asarray(source)
    axis = next((axis for axis in axes if array.ndim == 3 and array.shape[axis] in (1, 3, 4)), None)
    if axis is None and array.ndim != 2:
        raise ImageError(f"shape {list(array.shape)} is no picture; give {wanted}, with 1, 3 or 4 channels")
    if not array.size:
        raise ImageError(f"shape {list(array.shape)} has no pixels; each side must have at least 1")
    array = _uint8(array if axis is None else np.moveaxis(array, axis, 2))
    return Image.fromarray(np.ascontiguousarray(array[..., 0] if array.shape[2:] == (1,) else array))


def _uint8(array: np.ndarray) -> np.ndarray:
    kind = f"{array.dtype.kind}{array.dtype.itemsize}"
    if kind == "u1":
        return array
    if kind == "u2":
        return ((array.astype(np.uint32) + 128) // 257).astype(np.uint8)
    if kind[0] != "f":
        allowed = "uint8 (0 to 255), uint16 (0 to 65,535) or floats from 0 to 1"
        raise ImageError(f"pixels of type {array.dtype}; use {allowed}")
    if not np.isfinite(array).all():
        raise ImageError("some pixels are NaN or infinite; use finite values from 0 to 1")
    low, high = array.min(), array.max()
    if low < -1e-3 or high > 1 + 1e-3:  # leaves room for rounding in an earlier resize
        hint = "undo a normalisation with transforms.denormalize" if low < 0 else "divide by 255 or give uint8"
        raise ImageError(f"float pixels must be from 0 to 1; these run from {low:.4g} to {high:.4g}, {hint}")
    return (array.clip(0, 1).astype(np.float32) * 255).round().astype(np.uint8)


def find_pictures(path) -> Iterator[tuple[object, str]]:
    """Every picture in a folder and below, sorted, without hidden ones, with what is wrong with it ("" if nothing yet).

    Links are followed. What is no folder is given back as it is; a folder that cannot be read or has no pictures is
    given back with the reason.
    """
    folder = os.path.expanduser(path) if isinstance(path, (str, os.PathLike)) else ""
    if not os.path.isdir(folder):
        yield path, ""
        return
    found, failures, seen = False, [], set()
    for root, folders, names in os.walk(folder, onerror=failures.append, followlinks=True):
        if (real := os.path.realpath(root)) in seen:  # a link to a folder further up, for example
            folders.clear()
            continue
        seen.add(real)
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        for name in sorted(names):
            ending = os.path.splitext(name)[1].lower()
            if ending in (*SUFFIXES, *OTHER_SUFFIXES) and not name.startswith("."):
                found = True
                yield os.path.join(root, name), ""
    for failure in failures:
        yield failure.filename, f"this folder cannot be read: {failure.strerror}"
    if not found and not failures:
        yield path, f"there are no pictures in this folder; looked for {' '.join(SUFFIXES)}"


def middle(height: int, width: int) -> tuple[int, int, int]:
    """Side, top and left of the largest square in the middle of a picture."""
    side = min(height, width)
    return side, (height - side) // 2, (width - side) // 2


def fit_note(width: int, height: int, fit: str) -> str:
    """In words, what `square` takes of a picture of this size in pixels; empty where it is square already."""
    if height == width:
        return ""
    if fit == "pad":
        return f"all of {width} x {height} pixels, with black bars"
    side = middle(height, width)[0]
    return f"the middle {side} x {side} of {width} x {height} pixels"


def squared(source, fit: str = "crop") -> Picture:
    """Read a picture and make it what the network sees, uint8 [3, 32, 32], with all that was done to it."""
    picture = read_picture(source)
    note = fit_note(*picture.size, fit)
    return Picture(square(picture.image, fit), (*picture.notes, *([note] if note else [])), picture.size)


def checked_fit(fit: str) -> str:
    """One of "crop" and "pad", else ImageError."""
    if fit not in ("crop", "pad"):
        raise ImageError(f"unknown fit {fit!r}; choose crop or pad")
    return fit


def square(image: Tensor, fit: str = "crop") -> Tensor:
    """Make a picture square and 32 pixels wide, as the network is used to.

    The networks were trained on 32-pixel pictures, enlarged to the recipe's `image_size`. A sharp photograph
    of `image_size` would show them details they have never seen, so every picture first loses these in an
    anti-aliased resize to 32 pixels; `transforms.eval_transform` then enlarges it as in training.

    Parameters
    ----------
    image : uint8 Tensor [3, H, W]
    fit : {"crop", "pad"}
        Keep the square in the middle, or the whole picture between black borders.

    Returns
    -------
    uint8 Tensor [3, 32, 32]
    """
    checked_fit(fit)
    height, width = image.shape[1:]
    size = (SIZE, SIZE)
    if fit == "crop":
        side, top, left = middle(height, width)
        image = image[:, top : top + side, left : left + side]
    else:
        size = tuple(max(1, round(SIZE * length / max(height, width))) for length in (height, width))
    if image.shape[1:] != size:
        image = F.interpolate(image[None], size, mode="bilinear", align_corners=False, antialias=True)[0]
    down, right = SIZE - size[0], SIZE - size[1]
    return F.pad(image, (right // 2, right - right // 2, down // 2, down - down // 2))
