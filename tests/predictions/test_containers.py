"""Promises of `predictions.containers`: of a PNG or JPEG file only what decides the pixels reaches the decoder."""

from __future__ import annotations

import io
import os
import struct
import zlib

import numpy as np
import pytest
import torch
from PIL import Image

from cifar_ft.predictions import ImageError, read_image, read_picture
from cifar_ft.predictions.containers import for_decoder, parts

PIXELS = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)


def file_of(kind, **options):
    Image.fromarray(PIXELS).save(file := io.BytesIO(), kind, **options)
    return file.getvalue()


PNG, JPEG, PROGRESSIVE = file_of("PNG"), file_of("JPEG"), file_of("JPEG", progressive=True)
LAST = PROGRESSIVE.rindex(b"\xff\xda")
BOMB = PROGRESSIVE[:LAST] + 200 * PROGRESSIVE[LAST:-2]  # its last scan again and again
FILM = np.random.default_rng(0).integers(0, 256, 7 * 2**20, dtype=np.uint8).tobytes()


def chunk(name, data, crc=None):
    crc = zlib.crc32(name + data) if crc is None else crc
    return struct.pack(">I", len(data)) + name + data + struct.pack(">I", crc)


def with_chunk(*args):
    """PNG with one more chunk, before the pixels."""
    return PNG[:33] + chunk(*args) + PNG[33:]


def with_segments(marker, data, times=1):
    """JPEG with more segments, before all others."""
    return JPEG[:2] + times * (bytes([0xFF, marker]) + struct.pack(">H", len(data) + 2) + data) + JPEG[2:]


LONG = zlib.compress(bytes(2_000_000))


@pytest.mark.parametrize(
    "content",
    [
        with_chunk(b"zTXt", b"Comment\0\0" + LONG),
        with_chunk(b"iTXt", b"Comment\0\1\0\0\0" + LONG),
        with_chunk(b"iTXt", b"XML:com.adobe.xmp\0\1\0\0\0" + LONG),
        with_chunk(b"zTXt", b"Raw profile type exif\0\0" + LONG),
        with_chunk(b"tEXt", b"Comment\0" + bytes(70_000_000)),
        with_chunk(b"tEXt", b"Comment\0of a damaged chunk", 0),
        with_chunk(b"eXIf", b"", 0),
        with_chunk(b"gAMA", b"\0"),
        with_chunk(b"cHRM", b"\0"),
        with_chunk(b"pHYs", b""),
        PNG + FILM,
    ],
)
def test_what_a_png_file_carries_along_does_not_decide(content):
    assert torch.equal(read_image(content), read_image(PNG))
    assert read_picture(content).notes == ()


@pytest.mark.parametrize(
    "content",
    [
        JPEG + FILM,  # a motion photo
        JPEG + BOMB,
        with_segments(0xE1, b"Exif\0\0II*\0\x08\0\0\0" + bytes(6) + file_of("JPEG")[:60_000]),  # a preview
        with_segments(0xE1, b"\xff\xda" * 200),
        with_segments(0xFE, bytes(60_000), times=400),
        with_segments(0xE0, b"JFIF"),
        with_segments(0xE2, b"ICC_PROFILE\0"),
        with_segments(0xE2, b"MPF\0damaged"),
        with_segments(0xED, b"Photoshop 3.0\0008BIM"),
        with_segments(0xEE, b"Adobe"),
        JPEG[:2] + 2**20 * b"\xff" + JPEG[2:],  # in no time
        with_segments(0xFE, b"comment").replace(b"\xff\xfe", 2**20 * b"\xff" + b"\xfe"),
    ],
)
def test_what_a_jpeg_file_carries_along_does_not_decide(content):
    assert torch.equal(read_image(content), read_image(JPEG))
    assert read_picture(content).notes == ()


def test_of_several_pictures_in_one_file_the_first_is_read_even_if_others_are_cut_off():
    content = file_of("MPO", save_all=True, append_images=[Image.new("RGB", (64, 64))] * 30)
    for length in (len(content), len(content) - 100, len(content) // 2):
        assert torch.equal(read_image(content[:length]), read_image(file_of("JPEG")))


@pytest.mark.parametrize("content", [BOMB + b"\xff\xd9", BOMB, BOMB + FILM, BOMB.replace(b"\xff\xda", b"\xff\xff\xda")])
def test_too_many_scans_are_refused_however_they_are_written(content, tmp_path):
    (tmp_path / "bomb.jpg").write_bytes(content)
    for source in (content, tmp_path / "bomb.jpg", Image.open(io.BytesIO(content))):
        with pytest.raises(ImageError, match="101 or more scans would take too long; at most 100"):
            read_image(source)


def test_picture_data_hold_no_scans():
    content = file_of("JPEG", quality=100, restart_marker_blocks=1)
    assert content.count(b"\xff\xd0") > 1
    assert parts(io.BytesIO(content), 100).scans == 1
    assert 1 < parts(io.BytesIO(PROGRESSIVE), 100).scans < 20


@pytest.mark.parametrize("content", [JPEG, PNG, PNG[:33] + struct.pack(">I4s", 2**31 - 100, b"tEXt")])
def test_a_file_of_gigabytes_is_not_read_whole(content, tmp_path):
    class Counted(io.FileIO):
        count = 0

        def read(self, size=-1):
            assert 0 <= size <= 2**20
            self.count += size
            return super().read(size)

    (tmp_path / "large").write_bytes(content)
    with open(tmp_path / "large", "r+b") as file:
        file.truncate(2**31 - 55)
        if content[-4:] == b"tEXt":
            file.seek(0, io.SEEK_END)
            file.write(PNG[33:])
    with Counted(tmp_path / "large") as file:
        assert read_image(file).shape == (3, 64, 64)
        assert file.count < 2**22


def test_a_file_is_seen_in_spans_without_losing_its_place():
    file = io.BytesIO(with_segments(0xFE, b"comment"))
    file.seek(7)
    found = parts(file, 100)
    assert file.tell() == 7
    seen = for_decoder(file, found)
    assert seen.read() == JPEG
    assert seen.seek(-2, io.SEEK_END) == len(JPEG) - 2
    assert seen.read(5) == b"\xff\xd9"
    assert parts(io.BytesIO(b"GIF89a"), 100).kept == []


def test_a_long_text_after_the_pixels_does_not_decide_in_a_file_that_others_opened():
    content = PNG[:-12] + chunk(b"zTXt", b"Comment\0\0" + LONG) + PNG[-12:]
    for more in (b"", chunk(b"eXIf", b"II*\0\x08\0\0\0" + bytes(6))):
        assert torch.equal(read_image(Image.open(io.BytesIO(content[:33] + more + content[33:]))), read_image(PNG))


def test_a_stream_that_cannot_be_moved_about_in_is_read():
    class Stream:
        def __init__(self, content):
            self.read = io.BytesIO(content).read

    for content in (PNG, JPEG, file_of("GIF")):
        assert torch.equal(read_image(Stream(content)), read_image(content))
    end, start = os.pipe()
    with open(end, "rb", buffering=0) as pipe, open(start, "wb") as file:
        file.write(PNG)
        file.close()
        assert torch.equal(read_image(pipe), read_image(PNG))


def test_later_pictures_of_an_open_file_are_looked_at_too():
    with Image.open(io.BytesIO(file_of("MPO", save_all=True, append_images=[Image.new("RGB", (8, 8))]))) as image:
        image.seek(1)
        first, second = (parts(image.fp, 100, start).kept for start in (0, image.offset))
        assert second[0][0] == image.offset >= first[-1][1]
        assert read_image(image).shape == (3, 8, 8)


def test_texts_may_still_say_which_way_up_a_picture_is():
    xmp = b'XML:com.adobe.xmp\0\0\0\0\0<rdf:Description tiff:Orientation="6"/>'
    assert read_picture(with_chunk(b"iTXt", xmp)).notes[0].code == "turned_upright"
