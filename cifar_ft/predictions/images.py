"""Pictures of any kind (notebook 06): read, turned upright, cut square, made 32 pixels wide.

Nothing here knows a model; whatever is not a picture is refused in one clear line.
"""

from __future__ import annotations

import errno
import io
import json
import os
import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext, suppress
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from PIL import ExifTags, Image, ImageChops, ImageCms, UnidentifiedImageError
from torch import Tensor

from cifar_ft import CifarFtError
from cifar_ft.files import ASSETS, one_line, show_path
from cifar_ft.predictions.containers import Parts, for_decoder, parts

# By what EXIF data say. Not `ImageOps.exif_transpose`, which fails where it cannot write the other EXIF data anew.
TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
# What compressed TIFF files hold where Pillow turns the bytes around once more, though its library has done so.
TURNED_TWICE = {"F;32BF": "f4", "I;32BS": "i4", "I;16BS": "i2"}
MAX_SAMPLE_VALUES = (ExifTags.Base.MaxSampleValue, ExifTags.Base.SMaxSampleValue)
# They may also hold the brightest value that occurs, which says nothing: only a whole number of bits counts.
WHOLE_BITS = [2**bits - 1 for bits in range(8, 33)]
SRGB = {b"gAMA": [45455], b"cHRM": [31270, 32900, 64000, 33000, 30000, 60000, 15000, 6000]}  # as PNG files say it
# Profiles that Pillow does not hand out: in JPEG 2000, AVIF (there other primaries, by number), GIF and BMP files.
OTHER_PROFILES = re.compile(rb"colr[\2\3]|colrnclx\0[^\1\2]|ICCRGBG1012|^BM.{12}\x7c\0\0\0.{52}(DEBM|KNIL)", re.DOTALL)
SIZE = 32  # pixels: the width of the pictures that the models were trained on
MAX_PIXELS = 50_000_000
MAX_PIXELS_JPEG2000 = 12_000_000  # its decoder takes 12 bytes a pixel
MAX_SCANS = 100  # of a JPEG file; a progressive one has some ten, and each costs the time of a whole picture
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

# Everything said about pictures, by its code; `widget.texts` has the same sentences in other languages.
MESSAGES = json.loads((ASSETS / "texts_en.json").read_text(encoding="utf-8"))["pictures"]


class Note:
    """What was done to a picture: a `code` of MESSAGES and the `values` of its sentence, which is its text."""

    def __init__(self, code: str, /, **values):
        self.code, self.values = code, values

    def __str__(self) -> str:
        return MESSAGES[self.code].format(**self.values)

    def __repr__(self) -> str:
        return f"Note({str(self)!r})"

    def __eq__(self, other) -> bool:
        return isinstance(other, Note) and (self.code, self.values) == (other.code, other.values)


class ImageError(CifarFtError, ValueError):
    """Something that is not a picture, or not one that can be predicted.

    Its text is the sentence of its `code` in MESSAGES with its `values`, after the name of the picture (`about`) where
    it has one.
    """

    def __init__(self, code: str, /, about: str = "", **values):
        super().__init__(code)  # so that it can be copied and pickled
        self.code, self.about, self.values = code, about, values

    def __str__(self) -> str:
        sentence = MESSAGES[self.code].format(**self.values)
        return one_line(f"{self.about}: {sentence}" if self.about else sentence)


class Picture(NamedTuple):
    """A picture, uint8 [3, H, W], and notes of what was done to get it, such as "the first of several frames".

    `size` is its width and height as given, upright: more than those of `image` where it was very large.
    """

    image: Tensor
    notes: tuple[Note, ...] = ()
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
        first frame of an animated file (of a PIL image, the frame that it is at), colours converted to sRGB as an
        embedded profile says, transparent parts on white (a picture that is transparent all over is shown without
        its transparency), 16 bits scaled to 8, from the range that the file tells. Arrays are [H, W] or [H, W, C],
        tensors [H, W] or [C, H, W] with C = 1, 3 or 4 (the other order is accepted where only that fits); uint8,
        uint16 (0 to 65,535) or floats, which must be from 0 to 1.

    Returns
    -------
    Picture

    Raises
    ------
    ImageError
        With one line that names the picture and says what is wrong with it. A picture of more than 50 million
        pixels is refused before it is decoded.
    """
    about, source = _located(source)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # what Pillow warns of is checked here, or does not matter
            with _opened(source) as (image, found):
                return _decoded(image, found)
    except ImageError as error:
        error.about = about
        raise
    except UnidentifiedImageError:
        raise ImageError("not_a_picture", about) from None
    except Image.DecompressionBombError:
        raise ImageError("far_too_large", about, allowed=MAX_PIXELS) from None
    except MemoryError:
        raise ImageError("no_memory", about) from None
    except Exception as error:  # a damaged file can cause any
        if isinstance(error, OSError) and error.errno not in (None, errno.EINVAL):  # such as a place before its start
            raise ImageError("unreadable", about, reason=error.strerror) from error
        raise ImageError("damaged", about, reason=str(error) or type(error).__name__) from error


def _located(source) -> tuple[str, object]:
    """A name for messages, and what can be opened."""
    if isinstance(source, (bytes, bytearray, memoryview)):
        if not (content := bytes(source)):
            raise ImageError("empty", "the picture")
        return "the picture", io.BytesIO(content)
    if isinstance(source, (str, os.PathLike)):
        return _located_file(str(os.path.expanduser(os.fsdecode(source))))  # NumPy's strings would pass for arrays
    if isinstance(source, io.TextIOBase):
        raise ImageError("opened_as_text")
    if not isinstance(source, Image.Image) and not hasattr(source, "__array__") and not hasattr(source, "read"):
        raise ImageError("wrong_type", kind=type(source).__name__)
    return "the picture", source


def _located_file(path: str) -> tuple[str, str]:
    if "://" in path:
        raise ImageError("address", path=path)
    shown = show_path(path) if path else "''"
    if os.path.isdir(path):
        raise ImageError("folder", path=shown)
    if not os.path.isfile(path):
        raise ImageError("not_a_file" if os.path.exists(path) else "missing", path=shown)
    if not os.path.getsize(path):
        raise ImageError("empty", shown)
    return shown, path


@contextmanager
def _opened(source) -> Iterator[tuple[Image.Image, Parts]]:
    """A PIL image, not decoded yet, and what its file is made of; what was given stays open."""
    if isinstance(source, Image.Image):
        clear = source.info.get("transparency")
        if source.format is None and clear is not None and np.size(clear) != len(source.getbands()):
            source = source.copy()  # one channel of a picture, say, which keeps saying what colour was transparent
            del source.info["transparency"]
        file = getattr(source, "fp", None) if source.format in ("PNG", "JPEG", "MPO") else None
        start = getattr(source, "offset", 0)  # of a picture in an MPO file
        yield source, parts(file, MAX_SCANS, start) if file and not getattr(file, "closed", False) else Parts()
        return
    if hasattr(source, "__array__"):
        yield _array_image(source), Parts()
        return
    Image.init()
    kinds = [kind for kind in FORMATS if kind in Image.OPEN]
    with open(source, "rb") if isinstance(source, str) else nullcontext(_movable(source)) as file:
        found = parts(file, MAX_SCANS)
        seen = for_decoder(file, found) if found.kept else source if isinstance(source, str) else file
        with Image.open(seen, formats=kinds) as image:
            if b"iCCP" in found.told:
                image.info["icc_profile"] = found.told[b"iCCP"]
            yield image, found


def _movable(file):
    """The file, or what a stream holds that cannot be moved about in."""
    try:
        file.seek(0)
    except (AttributeError, OSError):
        return io.BytesIO(file.read())
    return file


def _decoded(image: Image.Image, found: Parts) -> Picture:
    """Every step from an open file to its pixels; each adds to the notes what it did."""
    _check_cost(image, found)
    notes, said = _frame_notes(image), _said(image, found)
    try:
        image.load()
    except ValueError:  # of a text after the pixels, for example; no tile is left once all are decoded
        if image.format != "PNG" or image.tile:
            raise
    image = _upright(image, said.turned, notes)
    size = image.size
    image = _reduced(image, notes)
    mask = _mask(image, said.clear)
    image, alpha = _separated(_eight_bits(image, said, notes))
    image = _srgb(image, said.profile, notes)
    return Picture(_on_white(image, mask or alpha, notes), tuple(notes), size)


def _check_cost(image: Image.Image, found: Parts) -> None:
    """Raise ImageError for a file that would take too much memory or time, before it is decoded."""
    width, height = image.size
    sides = {"width": width, "height": height}
    if not width or not height:
        raise ImageError("no_pixels", **sides)
    if width * height > MAX_PIXELS:
        raise ImageError("too_large", **sides, allowed=MAX_PIXELS)
    if image.format == "JPEG2000" and width * height > MAX_PIXELS_JPEG2000:
        raise ImageError("too_large_jpeg2000", **sides, allowed=MAX_PIXELS_JPEG2000)
    if image.format == "TIFF":
        rows = image.tag_v2.get(ExifTags.Base.RowsPerStrip, 1)
        if 2**31 <= rows < 2**32 - 1:  # the largest number stands for all rows; others are more than Pillow takes
            raise ImageError("tile_too_large", width=width, height=rows, allowed=MAX_PIXELS)
        width, height = (image.tag_v2.get(tag, 1) for tag in (ExifTags.Base.TileWidth, ExifTags.Base.TileLength))
        if width * height > MAX_PIXELS:
            raise ImageError("tile_too_large", width=width, height=height, allowed=MAX_PIXELS)
    if found.scans > MAX_SCANS:
        raise ImageError("too_many_scans", scans=found.scans, allowed=MAX_SCANS)


def _frame_notes(image: Image.Image) -> list[Note]:
    with suppress(Exception):  # of damaged later frames; counting them all could take long
        if image.format != "MPO" and getattr(image, "is_animated", False):  # an MPO is one photograph with a preview
            return [Note("one_frame", frame=image.tell() + 1) if image.tell() else Note("first_frame")]
    return []


def _turn(image: Image.Image) -> Image.Transpose | None:
    """What must be done to a picture that is stored turned or mirrored, as its EXIF data say."""
    with suppress(Exception):  # of damaged EXIF data; the pixels may be good
        return TURNS.get(image.getexif().get(ExifTags.Base.Orientation))
    return None


def _upright(image: Image.Image, turned: bool, notes: list[Note]) -> Image.Image:
    turn = _turn(image)
    if turned or turn is not None:
        notes.append(Note("turned_upright"))
    return image if turn is None else image.transpose(turn)


def _reduced(image: Image.Image, notes: list[Note]) -> Image.Image:
    """A very large picture halved: whoever looks at 32 pixels does not miss it, and memory is spared."""
    width, height = image.size
    if width * height <= LARGE:
        return image
    notes.append(Note("halved"))
    return image.resize((max(1, width // 2), max(1, height // 2)), Image.Resampling.NEAREST)


class Said(NamedTuple):
    """What an open file says of its pixels; Pillow forgets most of it in decoding."""

    turned: bool  # turned or mirrored by the decoder; of TIFF files only
    brightest: tuple[int, ...]  # what may stand for full brightness; the first holds that no value exceeds
    white_is_0: bool
    misread: str | None  # the type of values that the decoder takes for another, or the bytes of which it turns around
    clear: int | tuple[int, ...] | None  # the one grey or colour that is transparent, as it is after decoding
    profile: bytes | None  # b"" where the colours are not those of the web, and no profile says which


def _said(image: Image.Image, found: Parts) -> Said:
    tiles = getattr(image, "tile", None)
    raw = tiles[0][3] if tiles else ""  # how the values stand in the file, as Pillow calls it
    raw = raw if isinstance(raw, str) else str(raw[0]) if raw else ""
    clear = image.info.get("transparency") if image.mode in ("1", "L", "RGB") or image.mode[0] == "I" else None
    if raw in ("L;2", "L;4") and clear is not None:
        clear *= {"L;2": 85, "L;4": 17}[raw]
    elif raw == "RGB;16B" and clear is not None:
        clear = tuple(level >> 8 for level in clear)
    misread = TURNED_TWICE.get(raw) if tiles and tiles[0][0] == "libtiff" else None
    if image.format == "TIFF" and image.mode == "L" and image.tag_v2.get(ExifTags.Base.SampleFormat) == (2,):
        misread = "i1"
    brightest, white_is_0 = (65_535,), False
    if image.mode[0] in "IF" or ";16" in raw or misread:
        brightest, white_is_0 = _value_range(image, found)
    profile = image.info.get("icc_profile") or None
    if profile is None and ("icc_profile" in image.info or _has_odd_colours(image, found)):
        profile = b""
    # Asked for its EXIF data a PNG file is decoded, and `_turn` would swallow what goes wrong.
    turned = image.format == "TIFF" and _turn(image) is not None
    return Said(turned, brightest, white_is_0, misread, clear, profile)


def _value_range(image: Image.Image, found: Parts) -> tuple[tuple[int, ...], bool]:
    """`brightest` and `white_is_0` for values of 16 bits and more.

    Where nothing is said, whole numbers have 16 bits, or 8 if they are stored in 32 and no value needs more, and
    floats run from 0 to 1.
    """
    full = 1 if image.mode == "F" else 65_535
    if image.format is None and image.mode == "I":
        return (255, full), False
    if image.format == "PNG":
        bits = found.told.get(b"sBIT", b"")[:1]
        return (*((1 << bit) - 1 for bit in bits if 8 <= bit < 16), full), False
    if image.format != "TIFF":
        return (full,), False
    tags = image.tag_v2
    bits, kind = (tags.get(tag, (1,))[0] for tag in (ExifTags.Base.BitsPerSample, ExifTags.Base.SampleFormat))
    if image.mode != "F" and bits <= 16:
        full = (1 << bits - (kind == 2)) - 1  # 2: one bit is the sign
    told = [value for tag in MAX_SAMPLE_VALUES for value in np.ravel(tags.get(tag, ()))]
    told = sorted(int(value) for value in told if value in WHOLE_BITS and (bits > 16 or value < full))
    if image.mode != "F" and bits > 16:
        told = told or [255]
    return (*told, full), tags.get(ExifTags.Base.PhotometricInterpretation) == 0


def _mask(image: Image.Image, clear) -> Image.Image | None:
    """Opacity (mode L) where one grey or colour is transparent."""
    if clear is None:
        return None
    opaque = np.asarray(image.convert("L") if image.mode == "1" else image) != np.asarray(clear)
    return Image.fromarray(255 * (opaque.any(-1) if opaque.ndim == 3 else opaque).astype(np.uint8))


def _eight_bits(image: Image.Image, said: Said, notes: list[Note]) -> Image.Image:
    """Values of 16 bits and more as 8; of 16-bit colours Pillow has already dropped the lower 8."""
    if image.mode[0] not in "IF" and not said.misread:
        highest = np.max(image.getextrema()) if said.brightest[0] < 65_535 else 255
        brightest = next(value >> 8 for value in (*said.brightest, 65_535) if highest <= value >> 8)
        if brightest in (0, 255):
            return image
        notes.append(Note("scaled_to_8_bits"))
        return image.point([min(255, round(255 * value / brightest)) for value in range(256)] * len(image.getbands()))
    values = np.asarray(image)
    if said.misread:
        values = values.astype(said.misread).byteswap()
    brightest = next((value for value in said.brightest if values.max() <= value), None)
    if image.mode == "F":
        values = values / (brightest or 1)
        eight = _scaled(1 - values if said.white_is_0 else values)
    elif brightest is None or values.min() < 0:
        raise ImageError("wrong_dtype", dtype=values.dtype)
    else:
        eight = ((values.astype(np.uint64) * 255 + brightest // 2) // brightest).astype(np.uint8)
        eight = 255 - eight if said.white_is_0 else eight
    notes.append(Note("taken_as_8_bits" if brightest == 255 else "scaled_to_8_bits"))
    return Image.fromarray(eight)


def _separated(image: Image.Image) -> tuple[Image.Image, Image.Image | None]:
    """A picture without its transparency, and its opacity (mode L) where it has any of its own."""
    if image.mode in ("La", "RGBa"):
        image = image.convert({"La": "LA", "RGBa": "RGBA"}[image.mode])
    elif image.mode in ("P", "PA"):
        image = image.convert("RGBA")  # a palette can hold transparent colours
    if image.mode not in ("LA", "RGBA"):
        return image, None
    return image.convert(image.mode[:-1]), image.getchannel("A")


def _srgb(image: Image.Image, profile: bytes | None, notes: list[Note]) -> Image.Image:
    """A picture in the colours of the web, mode RGB: as its colour profile tells, if there is a good one."""
    if profile is not None and image.mode != "LAB":  # which needs none
        try:
            return _by_profile(image, profile, notes)
        except Exception:  # a damaged profile can cause any, and the pixels are good
            notes.append(Note("profile_ignored"))
    if image.mode == "CMYK":
        notes.append(Note("cmyk_converted"))
    return image if image.mode == "RGB" else image.convert("RGB")


def _by_profile(image: Image.Image, profile: bytes, notes: list[Note]) -> Image.Image:
    source = ImageCms.ImageCmsProfile(io.BytesIO(profile))
    mode = {"RGB": "RGB", "GRAY": "L", "CMYK": "CMYK"}[source.profile.xcolor_space.strip()]
    if mode == "RGB" and image.mode != "CMYK":
        image = image.convert("RGB")
    elif image.mode == "1":
        image = image.convert("L")
    if image.mode != mode:
        raise ValueError(f"a profile for {mode}")
    transform = ImageCms.buildTransform(source, ImageCms.createProfile("sRGB"), mode, "RGB")
    if mode != "CMYK":
        # A profile of sRGB, of which there are many, must not move a value: it is tried on some colours.
        levels = np.mgrid[:256:15, :256:15, :256:15].reshape(3, 1, -1).transpose(1, 2, 0).astype(np.uint8)
        colours = Image.fromarray(levels.copy()).convert(mode)
        moved = ImageChops.difference(ImageCms.applyTransform(colours, transform), colours.convert("RGB"))
        if max(high for _, high in moved.getextrema()) <= 2:
            return image.convert("RGB")
    converted = ImageCms.applyTransform(image, transform)
    notes.append(Note("profile_converted"))
    return converted


def _has_odd_colours(image: Image.Image, found: Parts) -> bool:
    """Whether a file without a profile says in another way that its colours are not those of the web (sRGB)."""
    told = found.told
    if told.get(b"cICP"):
        return told[b"cICP"][:2] != b"\x01\x0d"
    for name, usual in {} if b"sRGB" in told else SRGB.items():
        data = told.get(name, b"")
        if len(data) == 4 * len(usual) and not np.allclose(np.frombuffer(data, ">u4"), usual, rtol=0.05):
            return True
    if image.format in ("AVIF", "BMP", "GIF", "JPEG2000") and getattr(image, "fp", None):
        place = image.fp.tell()
        image.fp.seek(0)
        head = image.fp.read(2**16)
        image.fp.seek(place)
        if OTHER_PROFILES.search(head):
            return True
    if image.format in ("JPEG", "MPO"):
        with suppress(Exception):  # of damaged EXIF data; the pixels may be good
            return image.getexif().get_ifd(ExifTags.IFD.Interop).get(1) == "R03"  # cameras' word for Adobe RGB
    return False


def _on_white(image: Image.Image, alpha: Image.Image | None, notes: list[Note]) -> Tensor:
    """Red, green and blue, uint8 [3, H, W]; where nothing at all is opaque, opacity was never filled in."""
    lowest, highest = alpha.getextrema() if alpha else (255, 255)
    if highest == 0:
        if not any(high for _, high in image.getextrema()):
            raise ImageError("invisible")
        notes.append(Note("transparency_ignored"))
    elif lowest < 255:
        notes.append(Note("transparent_on_white"))
        white = Image.new("RGBA", image.size, "white")
        white.alpha_composite(Image.merge("RGBA", (*image.split(), alpha)))
        image = white.convert("RGB")
    return torch.from_numpy(np.asarray(image)).permute(2, 0, 1).clone(memory_format=torch.contiguous_format)


def _array_image(source) -> Image.Image:
    """An array or tensor as a PIL image of mode L, RGB or RGBA."""
    axes, wanted = (2, 0), "[H, W] or [H, W, 3]"
    if isinstance(source, Tensor):
        axes, wanted = (0, 2), "[H, W] or [3, H, W]"
        source = (source.float() if source.is_floating_point() else source).numpy(force=True)
    array = np.asarray(source)
    axis = next((axis for axis in axes if array.ndim == 3 and array.shape[axis] in (1, 3, 4)), None)
    if axis is None and array.ndim != 2:
        raise ImageError("wrong_shape", shape=list(array.shape), wanted=wanted)
    if not array.size:
        raise ImageError("empty_shape", shape=list(array.shape))
    array = array if axis is None else np.moveaxis(array, axis, 2)
    kind = f"{array.dtype.kind}{array.dtype.itemsize}"
    if kind == "u2":
        array = ((array.astype(np.uint32) + 128) // 257).astype(np.uint8)
    elif kind[0] == "f":
        array = _scaled(array)
    elif kind != "u1":
        raise ImageError("wrong_dtype", dtype=array.dtype)
    return Image.fromarray(np.ascontiguousarray(array[..., 0] if array.shape[2:] == (1,) else array))


def _scaled(array: np.ndarray) -> np.ndarray:
    """Floats from 0 to 1 as uint8."""
    if not np.isfinite(array).all():
        raise ImageError("not_finite")
    low, high = float(array.min()), float(array.max())
    if low < -1e-3 or high > 1 + 1e-3:  # leaves room for rounding in an earlier resize
        raise ImageError("below_0" if low < 0 else "above_1", low=low, high=high)
    return (array.clip(0, 1).astype(np.float32) * 255).round().astype(np.uint8)


def find_pictures(path) -> Iterator[tuple[object, ImageError | None]]:
    """Every picture in a folder and below, sorted, without hidden ones, with what is wrong with it, if anything yet.

    Links are followed. What is no folder is given back as it is; a folder that cannot be read or has no pictures is
    given back with the reason.
    """
    folder = os.path.expanduser(path) if isinstance(path, (str, os.PathLike)) else ""
    if not os.path.isdir(folder):
        yield path, None
        return
    found, failures, seen = False, [], set()
    for root, folders, names in os.walk(folder, onerror=failures.append, followlinks=True):
        if (real := os.path.realpath(root)) in seen:  # a link to a folder further up, for example
            folders.clear()
            continue
        seen.add(real)
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        for name in sorted(names):
            if name.lower().endswith((*SUFFIXES, *OTHER_SUFFIXES)) and not name.startswith("."):
                found = True
                yield os.path.join(root, name), None
    for failure in failures:
        yield failure.filename, ImageError("unreadable", reason=failure.strerror)
    if not found and not failures:
        yield path, ImageError("no_pictures", endings=" ".join(SUFFIXES))


def middle(height: int, width: int) -> tuple[int, int, int]:
    """Side, top and left of the largest square in the middle of a picture."""
    side = min(height, width)
    return side, (height - side) // 2, (width - side) // 2


def squared(source, fit: str = "crop") -> Picture:
    """Read a picture and make it what the network sees, uint8 [3, 32, 32], with all that was done to it."""
    image, notes, (width, height) = read_picture(source)
    if width != height:
        sides = {"width": width, "height": height}
        note = Note("padded", **sides) if fit == "pad" else Note("cropped", side=min(width, height), **sides)
        notes = (*notes, note)
    return Picture(square(image, fit), notes, (width, height))


def checked_fit(fit: str) -> str:
    """One of "crop" and "pad", else ImageError."""
    if fit not in ("crop", "pad"):
        raise ImageError("unknown_fit", fit=fit)
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
