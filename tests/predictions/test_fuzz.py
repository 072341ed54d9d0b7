"""Whatever file comes: an answer or one clear line; no crash, no long wait, no flood of memory."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import fuzz_pictures
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from cifar_ft.predictions.images import squared

SCRIPT = Path(__file__).with_name("fuzz_pictures.py")


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="memory is measured by the resource module")
def test_hundreds_of_damaged_files_are_read_or_refused():
    done = subprocess.run([sys.executable, str(SCRIPT), "600", "1"], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads(done.stdout)
    assert found["read"] + found["refused"] == found["cases"] == 600
    assert found["read"] > 60, "the whole files among them must be read"
    assert found["refused"] > 100, "damage must be real"
    assert found["slowest"] < 2
    assert found["memory_mb"] < 500


@settings(max_examples=150)
@given(st.sampled_from(fuzz_pictures.MAGIC), st.binary(max_size=600))
def test_noise_after_any_magic_is_refused_in_one_line(magic, noise):
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
    values = {"F": [0.5], "RGBA": [(0, 0, 0, 1), (1, 1, 1, 0)], "LA": [(0, 1), (1, 0)]}.get(mode, [0, 1])
    picture = Image.new(mode, (width, height), data.draw(st.sampled_from(values)))
    assert squared(picture).image.shape == (3, 32, 32)
    assert squared(picture, "pad").image.shape == (3, 32, 32)
