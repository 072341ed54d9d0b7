"""Promises of `predictions.images`: any picture is read right, or refused in one line before it does harm."""

from __future__ import annotations

import copy
import errno
import io
import os
import pickle
import re
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from PIL import Image, ImageSequence, features

from cifar_ft import CifarFtError
from cifar_ft.predictions import images as module
from cifar_ft.predictions.images import (
    FORMATS,
    MESSAGES,
    SUFFIXES,
    ImageError,
    Note,
    read_image,
    read_picture,
    square,
    squared,
)

ORIENTATION = 0x0112


def file_of(image, kind, **options):
    image.save(file := io.BytesIO(), kind, **options)
    return file.getvalue()


def picture(height=6, width=9):
    """Random pixels, the same at each call: uint8 [H, W, 3]."""
    return np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)


def test_every_form_of_one_picture_gives_the_same_pixels(tmp_path):
    pixels = picture()
    content = file_of(Image.fromarray(pixels), "PNG")
    path = tmp_path / "cat.png"
    path.write_bytes(content)
    at_end = io.BytesIO(content)
    at_end.read()
    chw = torch.from_numpy(pixels).permute(2, 0, 1)
    forms = {
        "PIL": Image.fromarray(pixels), "path": path, "str": str(path), "np.str_": np.str_(path), "bytes": content,
        "bytearray": bytearray(content), "memoryview": memoryview(content), "file at its end": at_end,
        "HWC": pixels, "CHW": pixels.transpose(2, 0, 1), "strided": pixels[:, ::-1][:, ::-1], "tensor": chw,
        "HWC tensor": torch.from_numpy(pixels), "negated": torch.complex(chw / 255, chw / -255).conj().imag,
        "float": pixels / 255, "float16": (pixels / 255).astype("f2"),
        "float tensor": (chw / 255.0).requires_grad_(), "uint16": pixels.astype(np.uint16) * 257,
        "big-endian": (pixels.astype(np.uint16) * 257).astype(">u2"),
        "RGBA": np.dstack([pixels, np.full((6, 9), 255, np.uint8)]),
    }  # fmt: skip
    for form, source in forms.items():
        image = read_image(source)
        assert image.dtype == torch.uint8, form
        assert image.is_contiguous(), form
        assert torch.equal(image, chw), form
    with open(path, "rb") as file:
        assert torch.equal(read_image(file), chw)
        assert not file.closed
    for kind in (torch.bfloat16, torch.float8_e4m3fn):
        rounded = (chw / 255).to(kind)
        assert torch.equal(read_image(rounded), (rounded.float() * 255).round().byte())


def test_grey_pictures_get_three_equal_channels():
    grey = picture()[..., 0]
    for source in (grey, grey[..., None], grey[None], torch.from_numpy(grey), Image.fromarray(grey)):
        image = read_image(source)
        assert all(np.array_equal(channel, grey) for channel in image.numpy())


def test_sixteen_bit_files_are_scaled_and_not_clipped():
    values = np.array([[0, 257 * 10], [257 * 200, 65535]], np.uint16)
    for kind in ("PNG", "TIFF"):
        assert read_image(file_of(Image.fromarray(values), kind))[0].tolist() == [[0, 10], [200, 255]]
    assert read_image(Image.fromarray(values.astype(np.int32)))[0].tolist() == [[0, 10], [200, 255]]
    with pytest.raises(ImageError, match="int32"):
        read_image(Image.fromarray(np.full((2, 2), 70_000, np.int32)))


def test_whole_numbers_up_to_255_in_a_picture_of_32_bits_are_brightness_as_they_are():
    grey = Image.new("L", (8, 8), 200).convert("I")
    assert read_image(grey).unique().tolist() == [200]
    assert read_picture(grey).notes == (Note("taken_as_8_bits"),)
    assert read_image(Image.new("I", (8, 8), 200 * 257)).unique().tolist() == [200]
    assert read_image(file_of(Image.new("I;16", (8, 8), 200), "PNG")).unique().tolist() == [1]  # a file says so itself


def test_transparent_parts_are_white_in_every_kind_of_file():
    rgba = Image.new("RGBA", (2, 1), (200, 0, 0, 255))
    rgba.putpixel((1, 0), (0, 0, 0, 0))
    palette = Image.new("P", (2, 1))
    palette.putpalette([200, 0, 0, 0, 0, 0])
    palette.putpixel((1, 0), 1)
    for content in (
        file_of(rgba, "PNG"),
        file_of(rgba, "WEBP", lossless=True),
        file_of(rgba, "TIFF"),
        file_of(palette, "PNG", transparency=1),
        file_of(palette, "GIF", transparency=1),
    ):
        assert read_image(content)[:, 0].T.tolist() == [[200, 0, 0], [255, 255, 255]]
    half = Image.new("LA", (1, 1), (0, 128))
    assert read_image(file_of(half, "PNG")).flatten().tolist() == [127] * 3
    assert read_image(np.array([[[0, 0, 0, 0], [1, 2, 3, 255]]], np.uint8))[:, 0].T.tolist() == [[255] * 3, [1, 2, 3]]


def png(width, bits, kind, row, *chunks, height=1):
    """A PNG file, most of one row; `chunks` are (name, data) and stand before the pixels."""

    def chunk(name, data):
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    parts = (b"IHDR", struct.pack(">IIBBBBB", width, height, bits, kind, 0, 0, 0)), *chunks
    parts = (*parts, (b"IDAT", zlib.compress(b"\0" + row)), (b"IEND", b""))
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunk(*part) for part in parts)


@pytest.mark.parametrize(
    ("source", "shown"),
    [
        (png(4, 1, 0, b"\x50", (b"tRNS", b"\0\1")), [0, 255, 0, 255]),
        (png(4, 2, 0, b"\x1b", (b"tRNS", b"\0\1")), [0, 255, 170, 255]),
        (png(4, 4, 0, b"\x01\x2f", (b"tRNS", b"\0\2")), [0, 17, 255, 255]),
        (png(2, 8, 0, b"\x05\x06", (b"tRNS", b"\0\5")), [255, 6]),
        (png(2, 16, 0, b"\x03\xe8\x75\x75", (b"tRNS", b"\x03\xe8")), [255, 117]),
        (png(2, 8, 2, b"\1\1\1\2\2\2", (b"tRNS", b"\0\1\0\1\0\1")), [255, 2]),
        (png(2, 16, 2, b"\1\x23" * 3 + b"\2\x34" * 3, (b"tRNS", b"\1\x23" * 3)), [255, 2]),
        (png(2, 8, 3, b"\0\1", (b"PLTE", bytes(6)), (b"tRNS", b"\0\xff")), [255, 0]),
        (png(2, 16, 4, b"\7\7\xff\xff\7\7\0\0"), [7, 255]),
        (png(2, 16, 6, b"\7\7" * 3 + b"\xff\xff" + bytes(8)), [7, 255]),
        (Image.fromarray(np.array([[[7, 255], [7, 0]]], np.uint8), "LA").convert("La"), [7, 255]),
        (Image.fromarray(np.array([[[7, 7, 7, 255], [0] * 4]], np.uint8)).quantize(2), [7, 255]),
    ],
)
def test_transparency_is_found_wherever_a_format_keeps_it(source, shown):
    found = read_picture(source)
    assert found.image[0, 0].tolist() == shown
    assert Note("transparent_on_white") in found.notes


def test_a_part_of_a_picture_that_still_says_which_colour_was_transparent_is_read():
    whole = Image.open(io.BytesIO(png(2, 8, 2, b"\1\1\1\2\2\2", (b"tRNS", b"\0\1\0\1\0\1"))))
    for part in (whole.getchannel("R"), whole.quantize(2)):
        assert read_image(part)[0, 0].tolist() == [1, 2]
        assert part.info["transparency"] == (1, 1, 1)


def bmp_with_alpha(pixels):
    """A BMP file of 32 bits that declares an alpha channel; pixels are uint8 [H, W, 4]."""
    height, width = pixels.shape[:2]
    data = pixels[::-1, :, [2, 1, 0, 3]].tobytes()
    header = struct.pack("<IiiHHIIiiII4I", 56, width, height, 1, 32, 3, len(data), *[0] * 4,
                         0xFF0000, 0xFF00, 0xFF, 0xFF000000)  # fmt: skip
    return struct.pack("<2sIHHI", b"BM", 70 + len(data), 0, 0, 70) + header + data


def test_a_picture_that_is_transparent_all_over_shows_its_colours_or_is_refused():
    clear = np.full((8, 8, 4), (200, 30, 60, 0), np.uint8)
    image = Image.fromarray(clear)
    sources = [bmp_with_alpha(clear), clear, torch.from_numpy(clear), image, image.quantize(2)]
    sources += [file_of(image, "WEBP", lossless=True, exact=True), *(file_of(image, kind) for kind in ("PNG", "TIFF"))]
    sources += [file_of(image.convert("RGB"), "PNG", transparency=(200, 30, 60))]
    for source in sources:
        found = read_picture(source)
        assert found.image[:, 4, 4].tolist() == [200, 30, 60]
        assert found.notes == (Note("transparency_ignored"),)
    for empty in (0 * clear, file_of(Image.new("LA", (8, 8), (0, 0)), "PNG"), image.convert("RGBa")):
        with pytest.raises(ImageError, match="wholly transparent, and black below"):
            read_image(empty)


def tiff(values, *more, photometric=1, bits=16, kind=1, order="<", packed=False):
    """A grey TIFF file; `more` are tags of whole numbers as (number, value)."""
    (height, width), data = values.shape, zlib.compress(values.tobytes()) if packed else values.tobytes()
    method = 8 if packed else 1
    tags = [(256, width), (257, height), (258, bits), (259, method), (262, photometric), (277, 1), (278, height)]
    tags = sorted([*tags, (279, len(data)), (339, kind), *more, (273, 26 + 12 * (len(tags) + len(more) + 3))])
    entries = b"".join(struct.pack(f"{order}HHII", number, 4, 1, value) for number, value in tags)
    head = b"II" if order == "<" else b"MM"
    return head + struct.pack(f"{order}HIH", 42, 8, len(tags)) + entries + bytes(16) + data


FOUR, TWELVE = np.full((2, 2), 6425, "<u2"), np.full((2, 2), 4000, "<u2")
RANGES = [
    (tiff(FOUR), 25),
    (tiff(FOUR, photometric=0), 230),
    (tiff(TWELVE), 16),
    (tiff(np.frombuffer(bytes.fromhex("fa0fa0" * 2), np.uint8).reshape(2, 3)[:, :2], bits=12) + b"\xfa\0", 249),
    (tiff(TWELVE, (281, 4095)), 249),
    (tiff(TWELVE, (281, 4000)), 16),  # the brightest value there is, and not a number of bits
    (tiff(TWELVE, (281, 1023)), 16),  # cannot be
    (tiff(np.full((2, 2), 20_000, "<i2"), kind=2), 156),  # of 32,767
    (tiff(np.array([[100]], "i1"), bits=8, kind=2), 201),  # of 127
    (tiff(np.full((2, 2), 0.25, "<f4"), bits=32, kind=3), 64),
    (tiff(np.full((2, 2), 0.25, "<f4"), bits=32, kind=3, photometric=0), 191),
    (tiff(np.full((2, 2), 200, "<f4"), (341, 255), bits=32, kind=3), 200),
    (tiff(np.full((2, 2), 200, "<i4"), bits=32, kind=2), 200),
    (tiff(np.full((2, 2), 200, "<i4"), (281, 65_535), bits=32, kind=2), 1),
    (tiff(np.full((2, 2), 2**23, "<i4"), (281, 2**24 - 1), bits=32, kind=2), 128),
    (tiff(np.full((2, 2), 0.25, ">f4"), bits=32, kind=3, order=">", packed=True), 64),
    (tiff(np.full((2, 2), 200, ">i4"), bits=32, kind=2, order=">", packed=True), 200),
    (tiff(np.full((2, 2), 20_000, ">i2"), kind=2, order=">", packed=True), 156),
    (png(1, 16, 0, b"\x0f\xa0"), 16),
    (png(1, 16, 0, b"\x0f\xa0", (b"sBIT", b"\x0c")), 249),
    (png(2, 16, 0, b"\x0f\xa0\xff\xff", (b"sBIT", b"\x0c")), 16),  # scaled already, as the others show
    (png(1, 16, 2, b"\x0f\xa0" * 3, (b"sBIT", b"\x0c" * 3)), 255),  # of whose 16 bits Pillow leaves 8
    (png(1, 8, 2, b"\x0f\x0f\x0f", (b"sBIT", b"\x08" * 3)), 15),
    (b"P5 1 1 4095\n\x0f\xa0", 249),
]


@pytest.mark.parametrize(("content", "value"), RANGES)
def test_values_are_scaled_from_the_range_that_the_file_tells(content, value):
    assert read_image(content)[:, 0, 0].tolist() == [value] * 3


def test_a_file_that_is_turned_or_very_large_keeps_its_range():
    for more in ((), ((281, 4095),)):
        plain = read_image(tiff(TWELVE, *more))
        assert torch.equal(read_image(tiff(TWELVE, *more, (274, 6))), plain)
        large = read_picture(tiff(np.full((4001, 3001), 4000, "<u2"), *more))
        assert large.notes[0] == Note("halved")
        assert large.image[0, 0, 0] == plain[0, 0, 0]


def profile(red, green, blue, gamma=None):
    """An ICC profile of a screen: the XYZ values (D50) of its colours, and sRGB's curve or a power."""

    def numbers(*values):
        return struct.pack(f">{len(values)}i", *(round(65_536 * value) for value in values))

    srgb = numbers(2.4, 1 / 1.055, 0.055 / 1.055, 1 / 12.92, 0.04045)
    curve = b"para\0\0\0\0\0" + (b"\3\0\0" + srgb if gamma is None else b"\0\0\0" + numbers(gamma))
    white, text = (0.9642, 1, 0.8249), b"desc\0\0\0\0\0\0\0\2x\0" + bytes(78)
    tags = {b"desc": text, b"cprt": b"text\0\0\0\0x\0\0\0", b"rTRC": curve, b"gTRC": curve, b"bTRC": curve}
    tags |= {
        name: b"XYZ \0\0\0\0" + numbers(*xyz)
        for name, xyz in zip((b"wtpt", b"rXYZ", b"gXYZ", b"bXYZ"), (white, red, green, blue), strict=True)
    }
    place, table, data = 132 + 12 * len(tags), b"", b""
    for name, content in tags.items():
        table += name + struct.pack(">II", place + len(data), len(content))
        data += content + bytes(-len(content) % 4)
    head = struct.pack(">I4sI4s4s4s12x4s28x", place + len(data), b"", 0x02400000, b"mntr", b"RGB ", b"XYZ ", b"acsp")
    return head + numbers(*white) + bytes(48) + struct.pack(">I", len(tags)) + table + data


SRGB = profile((0.43607, 0.22249, 0.01392), (0.38515, 0.71687, 0.09708), (0.14307, 0.06061, 0.7141))
P3 = profile((0.51512, 0.2412, -0.00105), (0.29198, 0.69225, 0.04189), (0.1571, 0.06657, 0.78407))
COLOUR = Image.new("RGB", (8, 8), (200, 60, 60))


@pytest.mark.parametrize(
    ("kind", "options"),
    [("PNG", {}), ("JPEG", {"quality": 100}), ("TIFF", {}), ("WEBP", {"lossless": True}), ("MPO", {"quality": 100})],
)
def test_colours_are_converted_from_their_profile_to_those_of_the_web(kind, options):
    found = read_picture(file_of(COLOUR, kind, icc_profile=P3, **options))
    expected = (217, 42, 52)  # by the matrices of CSS Color 4
    assert np.abs(found.image[:, 4, 4].numpy().astype(int) - expected).max() <= 2
    assert found.notes == (Note("profile_converted"),)
    plain, told = (read_picture(file_of(COLOUR, kind, **options, **more)) for more in ({}, {"icc_profile": SRGB}))
    assert told.notes == plain.notes == ()
    assert torch.equal(told.image, plain.image)  # bit for bit


def test_profiles_reach_every_mode_and_pictures_opened_by_others():
    expected = read_image(file_of(COLOUR, "PNG", icc_profile=P3))
    opened = Image.open(io.BytesIO(file_of(COLOUR, "PNG", icc_profile=P3)))
    for image in (opened, opened.convert("RGBA"), COLOUR.quantize(2)):
        image.info["icc_profile"] = P3
        assert torch.equal(read_image(image), expected)
    linear = profile((0.43607, 0.22249, 0.01392), (0.38515, 0.71687, 0.09708), (0.14307, 0.06061, 0.7141), gamma=1.0)
    for grey in (Image.new("L", (4, 4), 20), Image.new("I;16", (4, 4), 20 * 257), Image.new("LA", (4, 4), (20, 255))):
        assert abs(int(read_image(file_of(grey, "PNG", icc_profile=linear))[0, 0, 0]) - 79) <= 1


@pytest.mark.parametrize(
    "content",
    [
        file_of(COLOUR, "PNG", icc_profile=b"x" * 300),
        file_of(COLOUR, "JPEG", quality=100, subsampling=0, icc_profile=P3[:200]),
        file_of(COLOUR, "PNG", icc_profile=P3[:16] + b"GRAY" + P3[20:]),
        png(1, 8, 2, bytes(COLOUR.getpixel((0, 0))), (b"iCCP", b"x\0\0" + zlib.compress(bytes(20_000_000)))),
        png(1, 8, 2, bytes(COLOUR.getpixel((0, 0))), (b"gAMA", struct.pack(">I", 100_000))),
        png(1, 8, 2, bytes(COLOUR.getpixel((0, 0))), (b"cICP", bytes([12, 13, 0, 1]))),
    ],
)
def test_colours_that_cannot_be_converted_are_shown_as_they_are_and_that_is_said(content):
    found = read_picture(content)
    assert np.abs(found.image[:, 0, 0].numpy().astype(int) - (200, 60, 60)).max() <= 1
    assert found.notes == (Note("profile_ignored"),)


def test_profiles_that_the_decoder_does_not_hand_out_are_told_of():
    gif = file_of(COLOUR.quantize(2), "GIF")
    start = 13 + 3 * 2 ** (1 + (gif[10] & 7))
    bmp = file_of(COLOUR, "BMP")
    contents = [
        gif[:start] + b"\x21\xff\x0bICCRGBG1012\x01x\0" + gif[start:],
        bmp[:10] + struct.pack("<II", 138, 124) + bmp[18:54] + bytes(16) + b"DEBM" + bytes(64) + bmp[54:],
    ]
    if features.check("avif"):
        contents.append(file_of(COLOUR, "AVIF", quality=100).replace(b"colrnclx\0\1", b"colrnclx\0\x0c"))
    for content in contents:
        assert read_picture(content).notes == (Note("profile_ignored"),)


def test_a_failing_library_is_not_called_damage(monkeypatch):
    def fail(self):
        raise MemoryError

    monkeypatch.setattr(Image.Image, "load", fail)
    with pytest.raises(ImageError, match="too large for the memory there is; make it smaller"):
        read_image(COLOUR)


@pytest.mark.parametrize("number", [errno.EACCES, errno.EIO, errno.EMFILE])
def test_what_the_system_refuses_is_not_called_damage(number):
    class Refused(io.BytesIO):
        def read(self, size=-1):
            raise OSError(number, os.strerror(number))

    with pytest.raises(ImageError, match=f"the picture: cannot be read .{os.strerror(number)}.; copy it to where"):
        read_image(Refused(b"content"))


def test_cmyk_is_read_as_the_colour_it_shows():
    red = file_of(Image.new("RGB", (16, 16), (255, 0, 0)).convert("CMYK"), "JPEG", quality=95)
    r, g, b = read_image(red).float().mean((1, 2)).tolist()
    assert r > 240
    assert max(g, b) < 15


def test_a_photo_lying_on_its_side_is_turned_upright():
    image, exif = Image.new("RGB", (20, 10), "black"), Image.Exif()
    image.paste("white", (0, 0, 20, 5))  # the white half is up in the file and belongs to the right
    exif[ORIENTATION] = 6
    upright = read_image(file_of(image, "JPEG", exif=exif, quality=95))
    assert upright.shape == (3, 20, 10)
    assert upright[:, :, 6:].min() > 200
    assert upright[:, :, :4].max() < 50


@pytest.mark.parametrize(("orientation", "turned"), [(0, False), (1, False), (6, True), (8, True), (9, False)])
@pytest.mark.parametrize("kind", ["JPEG", "TIFF", "PNG", "WEBP"])
def test_a_picture_is_said_to_be_turned_if_and_only_if_it_is(kind, orientation, turned):
    image, exif = Image.new("RGB", (20, 10), "red"), Image.Exif()
    exif[ORIENTATION] = orientation
    found = read_picture(file_of(image, kind, exif=exif))
    assert found.image.shape == ((3, 20, 10) if turned else (3, 10, 20))
    assert found.size == ((10, 20) if turned else (20, 10))
    assert found.notes == ((Note("turned_upright"),) if turned else ())


def test_damaged_exif_data_do_not_cost_the_picture():
    content = file_of(Image.new("RGB", (20, 10), "red"), "JPEG", exif=b"Exif\0\0MM\0\x2a\xff\xff\xff\xff")
    assert read_image(content).shape == (3, 10, 20)


@pytest.mark.parametrize(("tag", "kind"), [(0x0100, 2), (0x010E, 5), (0x011A, 7)])  # a width that is a text, and so on
def test_exif_data_that_cannot_be_written_anew_do_not_keep_a_picture_from_being_turned(tag, kind):
    entries = sorted([(ORIENTATION, 3, 1, 6), (tag, kind, 1, 7)])
    exif = b"Exif\0\0II*\0\x08\0\0\0\2\0" + b"".join(struct.pack("<HHII", *entry) for entry in entries) + bytes(4)
    content = file_of(Image.fromarray(picture(10, 20)), "JPEG", exif=exif)
    found = read_picture(content)
    assert found.notes == (Note("turned_upright"),)
    with Image.open(io.BytesIO(content)) as image:
        assert torch.equal(found.image, read_image(np.rot90(np.asarray(image), -1)))


@pytest.mark.parametrize("kind", ["GIF", "WEBP", "PNG", "TIFF"])
def test_of_an_animation_the_first_frame_is_read(kind):
    frames = [Image.new("RGB", (8, 8), colour) for colour in ("blue", "red", "red")]
    red, _, blue = read_image(file_of(frames[0], kind, save_all=True, append_images=frames[1:])).float().mean((1, 2))
    assert blue > 240
    assert red < 15


def test_of_an_open_animation_the_frame_it_is_at_is_read_and_it_stays_there():
    frames = [Image.new("RGB", (8, 8), colour) for colour in ("blue", "red", "lime")]
    with Image.open(io.BytesIO(file_of(frames[0], "GIF", save_all=True, append_images=frames[1:]))) as animation:
        seen = [read_image(frame)[:, 4, 4].tolist() for frame in ImageSequence.Iterator(animation)]
        assert [max(range(3), key=pixel.__getitem__) for pixel in seen] == [2, 0, 1]
        animation.seek(1)
        assert read_picture(animation).notes == (Note("one_frame", frame=2),)
        assert animation.tell() == 1


def test_notes_say_what_was_done():
    red, blue = Image.new("RGB", (40, 20), "red"), Image.new("RGB", (40, 20), "blue")
    moving = file_of(red, "GIF", save_all=True, append_images=[blue])
    said = ["the first of several frames", "the middle 20 x 20 of 40 x 20 pixels"]
    assert [str(note) for note in squared(moving).notes] == said
    assert squared(moving).image[0].min() > 200  # the red one
    assert str(squared(moving, "pad").notes[1]) == "all of 40 x 20 pixels, with black bars"
    clear = Image.new("RGBA", (8, 8), (255, 0, 0, 99))
    deep = np.full((8, 8), 40_000, np.uint16)
    for content, codes in (
        (file_of(clear, "PNG"), ["transparent_on_white"]),
        (file_of(Image.new("RGBA", (8, 8), "red"), "PNG"), []),
        (file_of(red.convert("CMYK"), "JPEG"), ["cmyk_converted"]),
        (file_of(Image.fromarray(deep), "PNG"), ["scaled_to_8_bits"]),
        (Image.new("RGB", (32, 32)), []),
    ):
        assert [note.code for note in read_picture(content).notes] == codes


def test_a_very_large_picture_is_halved_and_looks_the_same():
    ramp = np.linspace(0, 255, 5000).astype(np.uint8)
    image = Image.fromarray(np.broadcast_to(ramp, (3000, 5000)).copy())
    large = squared(image)
    small = squared(image.resize((500, 300), Image.Resampling.BOX))
    assert large.notes == (Note("halved"), Note("cropped", side=3000, width=5000, height=3000))
    assert large.size == (5000, 3000)  # as given
    assert (large.image.float() - small.image.float()).abs().max() <= 2


def test_every_code_has_its_sentence_and_every_sentence_is_used():
    code = Path(module.__file__).read_text("utf-8").split("class Note")[1]
    assert [name for name in MESSAGES if f'"{name}"' not in code] == []
    assert set(re.findall(r'(?:Note|ImageError)\("(\w+)"', code)) <= set(MESSAGES)


def test_an_error_keeps_its_code_and_values_when_it_travels_to_another_process():
    error = ImageError("too_large", "cat.png", width=9_000, height=8_000, allowed=50_000_000)
    assert str(error) == "cat.png: too large: 9,000 x 8,000 pixels; at most 50,000,000 are allowed"
    for other in (copy.copy(error), pickle.loads(pickle.dumps(error))):
        assert (other.code, other.about, other.values, str(other)) == (*vars(error).values(), str(error))


def tiff_with_a_huge_tile():
    tags = ((256, 16), (257, 16), (258, 8), (259, 8), (262, 1), (277, 1), (322, 32_000), (323, 32_000))
    tags = (*tags, (324, 8), (325, 10))  # the tile, which nobody may open
    entries = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in tags)
    return b"II*\0" + struct.pack("<I", 18) + b"\0" * 10 + struct.pack("<H", len(tags)) + entries + b"\0" * 4


def jpeg_of_many_scans():
    data = file_of(Image.fromarray(picture(64, 64)), "JPEG", progressive=True)
    last = data.rindex(b"\xff\xda")
    return data[:last] + 200 * data[last:-2] + data[-2:]


def large_jpeg_2000():
    if not features.check("jpg_2000"):
        pytest.skip("this Pillow does not write JPEG 2000")
    return file_of(Image.new("L", (4000, 3100)), "JPEG2000")


@pytest.mark.parametrize(
    ("make", "message"),
    [
        *((lambda size=size: png(size[0], 8, 2, b"", height=size[1]), "too large.*50,000,000")
          for size in ((7_100, 7_100), (12_000, 12_000), (60_000, 60_000), (2**31 - 1, 1))),
        (tiff_with_a_huge_tile, "a tile of 32,000 x 32,000 pixels is too large"),
        (jpeg_of_many_scans, "scans would take too long; at most 100"),
        (large_jpeg_2000, "too large for JPEG 2000: 4,000 x 3,100"),
        (lambda: file_of(Image.new("RGBA", (16, 16)), "ICO"), "not a picture that can be read here"),
    ],
)  # fmt: skip
def test_what_would_take_too_much_is_refused_before_it_is_decoded(make, message, monkeypatch):
    content, decoded = make(), []
    monkeypatch.setattr(Image.Image, "load", lambda self: decoded.append(self))
    with pytest.raises(ImageError, match=message):
        read_image(content)
    assert not decoded


def test_a_progressive_jpeg_is_read():
    data = file_of(Image.fromarray(picture(64, 64)), "JPEG", progressive=True)
    assert 1 < data.count(b"\xff\xda") < 20
    assert read_image(data).shape == (3, 64, 64)


def test_every_ending_looked_for_belongs_to_a_kind_that_is_read():
    Image.init()
    kinds = Image.registered_extensions()
    assert {kinds[suffix] for suffix in SUFFIXES if suffix in kinds} <= set(FORMATS)
    assert set(SUFFIXES) >= {suffix for suffix, kind in kinds.items() if kind in ("JPEG", "PNG", "TIFF", "WEBP")}


def test_refusals_name_the_picture_what_is_wrong_and_what_is_allowed(tmp_path):
    (tmp_path / "empty.png").touch()
    (tmp_path / "notes.png").write_text("not a picture")
    script = tmp_path / "script.eps"
    script.write_text("%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n%%EndComments\nshowpage\n")
    ok = picture()
    refused = {
        "there is no file .*nope.png": tmp_path / "nope.png", "is a folder; give a picture": tmp_path,
        "empty.png: empty, 0 bytes; choose": tmp_path / "empty.png",
        "notes.png: not a picture": str(tmp_path / "notes.png"), "script.eps: not a picture": script,
        "is an address; download": "https://example.org/cat.png", "there is no file ''": "",
        "no file .*~nosuchuser9": "~nosuchuser9/cat.png", "no file .*a.+b": "a\0b",
        "the picture: empty, 0 bytes": b"", "the picture: not a picture that can be read here; use PNG": b"hello",
        "cannot read NoneType": None, "cannot read int": 3, "cannot read dict": {}, "cannot read tuple": (ok, 1),
        "opened as text; open it with": io.StringIO("text"),
        r"shape \[0, 5, 3\] has no pixels": ok[:0, :5], r"shape \[5, 5, 2\] is not a picture": ok[:5, :5, :2],
        r"shape \[4\] is not a picture": np.zeros(4),
        r"shape \[2, 3, 4, 4\] is not a picture": torch.zeros(2, 3, 4, 4),
        "type int64; use uint8": ok.astype(int), "type bool": ok > 9, "type object": ok.astype(object),
        "type complex": ok * 1j, "NaN or infinite": np.full((4, 4), np.nan),
        "or infinite": torch.full((3, 4, 4), torch.inf),
        "from 0 to 1; these run from 0 to 255, divide by 255": np.linspace(0, 255, 16).reshape(4, 4),
        "denormalize": torch.linspace(-2, 2, 16).view(4, 4), "each side": Image.new("RGB", (0, 5)),
    }  # fmt: skip
    for message, source in refused.items():
        with pytest.raises(ImageError, match=message) as caught:
            read_image(source)
        assert "\n" not in str(caught.value)
    assert issubclass(ImageError, CifarFtError)


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="there are no named pipes here")
def test_a_pipe_is_refused_instead_of_waited_for(tmp_path):
    os.mkfifo(tmp_path / "pipe.png")
    with pytest.raises(ImageError, match="not a regular file"):
        read_image(tmp_path / "pipe.png")


@settings(max_examples=100)
@given(
    hnp.arrays(
        st.sampled_from(["u1", "u2", ">u2", "f2", "f4", "f8", "i1", "i8", "?", "c8", "S2", "M8[s]"]),
        hnp.array_shapes(min_dims=0, max_dims=4, min_side=0, max_side=6),
    )
)
def test_any_array_is_a_picture_or_an_image_error(array):
    forms = [array]
    if array.dtype.kind in "uifb" and array.dtype.byteorder != ">":
        forms.append(torch.from_numpy(np.array(array)))
    for form in forms:
        try:
            image = read_image(form)
        except ImageError:
            continue
        assert image.dtype == torch.uint8
        assert image.shape[0] == 3
        assert np.prod(form.shape) / image[0].numel() in (1, 3, 4)


@settings(max_examples=100)
@given(
    st.one_of(
        st.binary(max_size=200), st.text(max_size=30), st.none(), st.integers(), st.dictionaries(st.text(), st.text())
    )
)
def test_nonsense_is_an_image_error(source):
    with pytest.raises(ImageError):
        read_image(source)


KINDS = {"PNG": {}, "JPEG": {"quality": 80}, "GIF": {}, "WEBP": {}, "TIFF": {"compression": "tiff_lzw"}, "BMP": {}}
WHOLE = {kind: file_of(Image.fromarray(picture(24, 31)), kind, **options) for kind, options in KINDS.items()}


@pytest.mark.parametrize("kind", KINDS)
def test_a_truncated_file_is_refused_or_whole_and_never_half_grey(kind, tmp_path):
    content, whole = WHOLE[kind], read_image(WHOLE[kind])
    for length in range(1, len(content), max(1, len(content) // 60)):
        try:
            assert torch.equal(read_image(content[:length]), whole)  # what was cut off held no pixels
        except ImageError:
            assert length < len(content)
    (tmp_path / f"half.{kind.lower()}").write_bytes(content[: len(content) // 2])
    with pytest.raises(ImageError, match=f"half.{kind.lower()}: "):
        read_image(tmp_path / f"half.{kind.lower()}")


def test_damaged_pixels_are_not_taken_for_the_picture():
    data = bytearray(zlib.compress(b"".join(b"\0" + row.tobytes() for row in picture(300, 300))))
    data[len(data) // 2 : len(data) // 2 + 40] = 40 * b"\xff"
    content = png(300, 8, 2, b"", height=300).replace(zlib.compress(b"\0"), b"")
    damaged = content[: content.index(b"IDAT") - 4] + struct.pack(">I", len(data)) + b"IDAT" + data + bytes(4)
    for source in (damaged, Image.open(io.BytesIO(damaged))):
        with pytest.raises(ImageError, match="damaged, incomplete"):
            read_image(source)


def test_a_picture_given_stays_as_it_is():
    given = Image.new("RGB", (4, 4), (1, 2, 3))
    given.info |= {"transparency": (1, 2, 4), "icc_profile": P3}
    assert read_picture(given).notes == (Note("profile_converted"),)
    assert (given.mode, given.getpixel((0, 0)), set(given.info)) == ("RGB", (1, 2, 3), {"transparency", "icc_profile"})


@settings(max_examples=150, suppress_health_check=[HealthCheck.too_slow])
@given(
    st.sampled_from(list(KINDS)),
    st.lists(st.tuples(st.floats(0, 0.999), st.binary(min_size=1, max_size=4)), max_size=4),
)
def test_a_damaged_file_is_a_picture_or_an_image_error(kind, changes):
    content = bytearray(WHOLE[kind])
    for place, data in changes:
        start = int(place * len(content))
        content[start : start + len(data)] = data
    try:
        image = read_image(bytes(content))
    except ImageError:
        return
    assert image.dtype == torch.uint8
    assert (image.ndim, image.shape[0]) == (3, 3)


def test_crop_keeps_the_middle_and_pad_keeps_all():
    wide = torch.full((3, 64, 192), 200, dtype=torch.uint8)
    wide[:, :, :64], wide[:, :, 128:] = 100, 50
    for image in (wide, wide.transpose(1, 2)):
        cropped, padded = square(image), square(image, "pad")
        assert cropped.shape == padded.shape == (3, 32, 32)
        assert cropped.min() == 200
        padded = padded if image is wide else padded.transpose(1, 2)
        assert padded[0, 15, [0, 9, 12, 19, 22, 31]].tolist() == [100, 100, 200, 200, 50, 50]
        assert padded[:, 10:21].min() == 50  # 32 / 3 rows, in the middle
        assert padded[:, :10].max() == padded[:, 21:].max() == 0
    with pytest.raises(ImageError, match="'stretch'; choose crop or pad"):
        square(wide, "stretch")


def test_a_picture_of_the_right_size_is_not_touched(samples):
    assert torch.equal(square(samples.images[3]), samples.images[3])
    assert torch.equal(square(samples.images[3], "pad"), samples.images[3])


def test_the_resize_is_anti_aliased():
    noise = torch.randint(0, 2, (3, 1024, 1024), generator=torch.Generator().manual_seed(0), dtype=torch.uint8) * 255
    assert square(noise).float().std() < 10  # a plain resize would keep most of it


@settings(max_examples=60)
@given(st.integers(1, 300), st.integers(1, 300), st.sampled_from(["crop", "pad"]))
def test_every_size_becomes_a_square_of_32_pixels(height, width, fit):
    result = square(torch.full((3, height, width), 77, dtype=torch.uint8), fit)
    assert result.shape == (3, 32, 32)
    assert (result == 77).any()


def test_a_very_long_picture_takes_no_more_memory_than_it_has_pixels():
    assert square(torch.zeros(3, 1, 2_000_000, dtype=torch.uint8), "pad").shape == (3, 32, 32)
