"""Whatever file comes: an answer or one clear line; no crash, no long wait, no flood of memory."""

from __future__ import annotations

import io
import json
import subprocess
import sys
from pathlib import Path

import fuzz_pictures
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from cifar_ft.predictions import ImageError, read_picture, squared

SCRIPT = Path(__file__).with_name("fuzz_pictures.py")


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="memory is measured by the resource module")
@pytest.mark.parametrize("seed", [1, 2])
def test_hundreds_of_damaged_files_are_read_or_refused(seed):
    done = subprocess.run([sys.executable, str(SCRIPT), "600", str(seed)], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads(done.stdout)
    assert found["read"] + found["refused"] == found["cases"] == 600
    assert found["read"] > 60, "the whole files among them must be read"
    assert found["refused"] > 100, "damage must be real"
    assert found["slowest"] < 2
    assert found["memory_mb"] < 500


@settings(max_examples=150)
@given(st.sampled_from(fuzz_pictures.MAGIC), st.binary(max_size=600))
def test_noise_behind_any_magic_is_refused_in_one_line(magic, noise):
    message = fuzz_pictures.refusal(magic + noise)
    assert message is None or len(message.splitlines()) == 1


@settings(max_examples=100)
@given(
    st.integers(1, 40),
    st.integers(1, 40),
    st.sampled_from(["1", "L", "LA", "P", "RGB", "RGBA", "CMYK", "I;16", "F"]),
    st.data(),
)
def test_every_mode_and_size_becomes_a_square_of_32_pixels(width, height, mode, data):
    picture = Image.new(mode, (width, height), data.draw(st.sampled_from([0, 1])) if mode != "F" else 0.5)
    assert squared(picture).image.shape == (3, 32, 32)
    assert squared(picture, "pad").image.shape == (3, 32, 32)


def _file(picture, kind, **options):
    picture.save(file := io.BytesIO(), kind, **options)
    return file.getvalue()


def test_notes_say_what_was_done():
    red, blue = Image.new("RGB", (40, 20), "red"), Image.new("RGB", (40, 20), "blue")
    moving = _file(red, "GIF", save_all=True, append_images=[blue])
    assert squared(moving).notes == ("the first of several frames", "the middle 20 x 20 of 40 x 20 pixels")
    assert squared(moving).image[0].min() > 200  # the red one
    assert squared(moving, "pad").notes[1] == "all of 40 x 20 pixels, with black bars"
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was held upright
    turned = read_picture(_file(red, "JPEG", exif=exif))
    assert turned.image.shape == (3, 40, 20)
    assert turned.notes == ("turned upright as its EXIF data say",)
    clear = Image.new("RGBA", (8, 8), (255, 0, 0, 0))
    assert read_picture(_file(clear, "PNG")).notes == ("transparent parts shown on white",)
    assert read_picture(_file(Image.new("RGBA", (8, 8), "red"), "PNG")).notes == ()
    assert read_picture(_file(red.convert("CMYK"), "JPEG")).notes == ("printing colours (CMYK) converted",)
    deep = np.full((8, 8), 40_000, np.uint16)
    assert read_picture(_file(Image.fromarray(deep), "PNG")).notes == ("brightness scaled to 8 bits",)
    assert read_picture(Image.new("RGB", (32, 32))).notes == ()


def test_a_very_large_picture_is_halved_and_looks_the_same():
    ramp = np.linspace(0, 255, 5000).astype(np.uint8)
    picture = Image.fromarray(np.broadcast_to(ramp, (5000, 5000)).copy())
    large = squared(_file(picture, "PNG", compress_level=1))
    small = squared(picture.resize((500, 500), Image.Resampling.BOX))
    assert large.notes == ("every second pixel left out, as it is very large",)
    assert (large.image.float() - small.image.float()).abs().max() <= 2


def test_a_jpeg_2000_that_would_take_too_much_memory_is_refused():
    if not fuzz_pictures.features.check("jpg_2000"):
        pytest.skip("this Pillow does not write JPEG 2000")
    data = _file(Image.new("L", (4000, 3100)), "JPEG2000")
    with pytest.raises(ImageError, match="too large for JPEG 2000: 4,000 x 3,100"):
        read_picture(data)
