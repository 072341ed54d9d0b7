"""Promises of `cifar_ft.predictions`: any picture is read right or refused, a model is what it says."""

from __future__ import annotations

import csv
import io
import json
import os
import shutil
import struct
import subprocess
import sys
import zlib
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from PIL import Image, ImageSequence
from safetensors.torch import load_file, save_file

from cifar_ft import CifarFtError, predictions
from cifar_ft.data import CLASSES, load_samples
from cifar_ft.models import build_model, predict_logits
from cifar_ft.predictions import (
    FORMATS,
    SUFFIXES,
    ImageError,
    PredictionError,
    Predictor,
    count_files,
    predict_paths,
    read_image,
    read_picture,
    square,
    squared,
    write_csv,
)
from cifar_ft.recipes import get_recipe
from cifar_ft.results import RunError, energy, fit_calibration
from cifar_ft.transforms import eval_transform
from tools.ship import export_shipped

RECIPE = get_recipe("smoke", "weights=none backbone=resnet18 last_stage=1 image_size=16")


def silent(*_):
    return None


@pytest.fixture(scope="module")
def predictor():
    return Predictor(build_model(RECIPE, silent), RECIPE, "a random model")


@pytest.fixture(scope="module")
def samples():
    return load_samples()


@pytest.fixture
def run_dir(tmp_path):
    """A finished run, as `training.write_run` leaves it."""
    folder = tmp_path / "runs" / "smoke-1"
    folder.mkdir(parents=True)
    model, logits = build_model(RECIPE, silent), torch.eye(10).repeat(4, 1)
    labels = torch.arange(10).repeat(4)
    labels[:4] = 9  # 36 of 40 are right
    save_file({k: v.contiguous() for k, v in model.state_dict().items()}, folder / "model.safetensors")
    np.savez(folder / "test_logits.npz", logits=logits.numpy(), labels=labels.numpy())
    (folder / "history.csv").write_text("epoch,train_loss,train_accuracy\n1,2.3,0.1\n")
    data = {"source": "npm", "digest": "d" * 64, "train": 40, "val": 10, "test": 40}
    config = {"recipe": RECIPE.to_dict(), "weights": {**model.weights_info, "licence": "none"}, "data": data}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "metrics.json").write_text(json.dumps({"recipe": "smoke", "test_accuracy": 0.9}))
    return folder


def file_of(image, kind, **options):
    file = io.BytesIO()
    image.save(file, kind, **options)
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
        "PIL": Image.fromarray(pixels), "path": path, "str": str(path), "np.str_": np.str_(path),
        "bytes": content,
        "bytearray": bytearray(content), "memoryview": memoryview(content), "file at its end": at_end,
        "HWC": pixels, "CHW": pixels.transpose(2, 0, 1), "strided": pixels[:, ::-1][:, ::-1], "tensor": chw,
        "HWC tensor": torch.from_numpy(pixels), "float": pixels / 255, "float16": (pixels / 255).astype("f2"),
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
    assert torch.equal(read_image((chw / 255).bfloat16()), ((chw / 255).bfloat16().float() * 255).round().byte())


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
    assert read_image(np.array([[[0, 0, 0, 0]]], np.uint8)).flatten().tolist() == [255] * 3


def test_cmyk_is_read_as_the_colour_it_shows():
    red = file_of(Image.new("RGB", (16, 16), (255, 0, 0)).convert("CMYK"), "JPEG", quality=95)
    r, g, b = read_image(red).float().mean((1, 2)).tolist()
    assert r > 240
    assert max(g, b) < 15


def test_a_photo_lying_on_its_side_is_turned_upright():
    image, exif = Image.new("RGB", (20, 10), "black"), Image.Exif()
    image.paste("white", (0, 0, 20, 5))  # the white half is up in the file and belongs to the right
    exif[0x0112] = 6
    upright = read_image(file_of(image, "JPEG", exif=exif, quality=95))
    assert upright.shape == (3, 20, 10)
    assert upright[:, :, 6:].min() > 200
    assert upright[:, :, :4].max() < 50


def test_damaged_exif_data_do_not_cost_the_picture():
    content = file_of(Image.new("RGB", (20, 10), "red"), "JPEG", exif=b"Exif\0\0MM\0\x2a\xff\xff\xff\xff")
    assert read_image(content).shape == (3, 10, 20)


@pytest.mark.parametrize("kind", ["GIF", "WEBP", "PNG", "TIFF"])
def test_of_an_animation_the_first_frame_is_read(kind):
    frames = [Image.new("RGB", (8, 8), colour) for colour in ("blue", "red", "red")]
    content = file_of(frames[0], kind, save_all=True, append_images=frames[1:])
    red, _, blue = read_image(content).float().mean((1, 2)).tolist()
    assert blue > 240
    assert red < 15


def test_of_an_open_animation_the_frame_it_is_at_is_read_and_it_stays_there():
    frames = [Image.new("RGB", (8, 8), colour) for colour in ("blue", "red", "lime")]
    with Image.open(io.BytesIO(file_of(frames[0], "GIF", save_all=True, append_images=frames[1:]))) as animation:
        seen = [read_image(frame)[:, 4, 4].tolist() for frame in ImageSequence.Iterator(animation)]
        assert [max(range(3), key=pixel.__getitem__) for pixel in seen] == [2, 0, 1]
        animation.seek(1)
        assert read_picture(animation).notes == ("frame 2 of several",)
        assert animation.tell() == 1


@pytest.mark.parametrize(("orientation", "turned"), [(0, False), (1, False), (6, True), (8, True), (9, False)])
@pytest.mark.parametrize("kind", ["JPEG", "TIFF", "PNG", "WEBP"])
def test_a_picture_is_said_to_be_turned_if_and_only_if_it_is(kind, orientation, turned):
    image, exif = Image.new("RGB", (20, 10), "red"), Image.Exif()
    exif[0x0112] = orientation
    picture = read_picture(file_of(image, kind, exif=exif))
    assert picture.image.shape == ((3, 20, 10) if turned else (3, 10, 20))
    assert picture.size == ((10, 20) if turned else (20, 10))
    assert ("turned upright as its EXIF data say" in picture.notes) is turned


def test_whole_numbers_up_to_255_in_a_picture_of_32_bits_are_brightness_as_they_are():
    grey = Image.new("L", (8, 8), 200).convert("I")
    assert read_image(grey).unique().tolist() == [200]
    assert read_picture(grey).notes == ("brightness taken as 8 bits",)
    assert read_image(Image.new("I", (8, 8), 200 * 257)).unique().tolist() == [200]
    assert read_image(file_of(Image.new("I;16", (8, 8), 200), "PNG")).unique().tolist() == [1]  # a file says so itself


def test_of_a_very_large_picture_the_size_as_given_is_told():
    picture = squared(Image.new("RGB", (5000, 3000), "red"))
    assert picture.size == (5000, 3000)
    assert picture.notes[-1] == "the middle 3000 x 3000 of 5000 x 3000 pixels"


def test_an_icon_file_is_refused_before_what_is_inside_is_decoded():
    with pytest.raises(ImageError, match="not a picture that can be read here"):
        read_image(file_of(Image.new("RGBA", (16, 16)), "ICO"))


def test_every_ending_looked_for_belongs_to_a_kind_that_is_read():
    Image.init()
    kinds = Image.registered_extensions()
    assert {kinds[suffix] for suffix in SUFFIXES if suffix in kinds} <= set(FORMATS)
    assert set(SUFFIXES) >= {suffix for suffix, kind in kinds.items() if kind in ("JPEG", "PNG", "TIFF", "WEBP")}


def png_header(width, height):
    """A PNG of a few bytes that claims to be large."""

    def chunk(name, data):
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    head = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(b"\0")) + chunk(b"IEND", b"")


@pytest.mark.parametrize(("width", "height"), [(7_100, 7_100), (12_000, 12_000), (60_000, 60_000), (2**31 - 1, 1)])
def test_a_decompression_bomb_is_refused_before_it_is_decoded(width, height, monkeypatch):
    decoded = []
    monkeypatch.setattr(Image.Image, "load", lambda self: decoded.append(self))
    with pytest.raises(ImageError, match=r"too large.*50,000,000"):
        read_image(png_header(width, height))
    assert not decoded


def test_a_small_tiff_with_a_huge_tile_is_refused_before_it_is_decoded():
    tags = ((256, 16), (257, 16), (258, 8), (259, 8), (262, 1), (277, 1), (322, 32_000), (323, 32_000))
    tags = (*tags, (324, 8), (325, 10))  # the tile, which nobody may open
    entries = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in tags)
    data = b"II*\0" + struct.pack("<I", 18) + b"\0" * 10 + struct.pack("<H", len(tags)) + entries + b"\0" * 4
    with pytest.raises(ImageError, match="a tile of 32,000 x 32,000 pixels is too large"):
        read_image(data)


def test_a_jpeg_that_repeats_its_scans_is_refused_and_a_progressive_one_is_read():
    data = file_of(Image.fromarray(picture(64, 64)), "JPEG", progressive=True)
    assert 1 < data.count(b"\xff\xda") < 20
    assert read_image(data).shape == (3, 64, 64)
    last = data.rindex(b"\xff\xda")
    with pytest.raises(ImageError, match=r"scans would take too long; at most 100"):
        read_image(data[:last] + 200 * data[last:-2] + data[-2:])


def test_pictures_of_kinds_that_are_mostly_not_read_are_told_of_in_a_folder(tmp_path, predictor):
    (tmp_path / "phone.HEIC").write_bytes(b"\0\0\0\x18ftypheic")
    (tmp_path / "really_a_png.heic").write_bytes(file_of(Image.fromarray(picture()), "PNG"))
    (tmp_path / "notes.txt").write_text("no picture")
    first, second = predict_paths([tmp_path], predictor)
    assert "not a picture that can be read here" in first["error"]
    assert (second["error"], second["label"] in CLASSES) == ("", True)


def test_a_folder_is_predicted_in_one_call(tmp_path, predictor, samples):
    for i in range(3):
        Image.fromarray(samples.images[i].permute(1, 2, 0).numpy()).save(tmp_path / f"{i}.png")
    answers = predictor.predict(tmp_path)
    assert [a.index for a in answers] == [a.index for a in predictor.predict(samples.images[:3])]
    (tmp_path / "empty").mkdir()
    with pytest.raises(ImageError, match="no pictures in this folder"):
        predictor.predict(tmp_path / "empty")


def test_an_unknown_fit_is_refused_whatever_the_pictures_are(predictor, samples):
    for images in (samples.images[:2], []):
        with pytest.raises(ImageError, match="choose crop or pad"):
            predictor.predict(images, fit="stretch")


@pytest.mark.parametrize("damage", [{"temperature": 0.0}, {"temperature": float("nan")}, {"lowest_energy": None}])
def test_a_damaged_calibration_is_refused(predictor, damage):
    good = {"temperature": 1.0, "lowest_energy": 2.0, "false_alarms": 0.02}
    Predictor(predictor.model, predictor.recipe, "a model", calibration=good)
    with pytest.raises(PredictionError, match="calibration of a model is damaged"):
        Predictor(predictor.model, predictor.recipe, "a model", calibration=good | damage)


def test_the_shipped_model_can_be_asked_for_by_name(run_dir, monkeypatch):
    monkeypatch.setenv("CIFAR_FT_RUNS", str(run_dir.parent))
    assert "the run" in Predictor.newest_or_shipped(echo=silent).source
    assert "the shipped model" in Predictor.newest_or_shipped("shipped", echo=silent).source


def test_refusals_name_the_picture_what_is_wrong_and_what_is_allowed(tmp_path):
    (tmp_path / "empty.png").touch()
    (tmp_path / "notes.png").write_text("not a picture")
    script = tmp_path / "script.eps"
    script.write_text("%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n%%EndComments\nshowpage\n")
    ok = picture()
    refused = {
        "there is no file .*nope.png": tmp_path / "nope.png", "is a folder; give a picture": tmp_path,
        "empty.png is empty: 0 bytes": tmp_path / "empty.png",
        "notes.png: not a picture": str(tmp_path / "notes.png"),
        "script.eps: not a picture": script, "is an address; download": "https://example.org/cat.png",
        "there is no file ''": "", "no file .*~nosuchuser9": "~nosuchuser9/cat.png",
         "no file .*a.b": "a\0b", "the picture is empty: 0 bytes": b"",
        "the picture: not a picture that can be read here; use PNG": b"hello", "cannot read NoneType": None,
        "cannot read int": 3, "cannot read dict": {}, "cannot read tuple": (ok, 1),
        "opened as text; open it with": io.StringIO("text"),
        r"shape \[0, 5, 3\] has no pixels": ok[:0, :5], r"shape \[5, 5, 2\] is no picture": ok[:5, :5, :2],
        r"shape \[4\] is no picture": np.zeros(4),
        r"shape \[2, 3, 4, 4\] is no picture": torch.zeros(2, 3, 4, 4),
        "type int64; use uint8": ok.astype(int), "type bool": ok > 9, "type object": ok.astype(object),
        "type complex": ok * 1j, "NaN or infinite": np.full((4, 4), np.nan),
        "or infinite": torch.full((3, 4, 4), torch.inf),
        "from 0 to 1; these run from 0 to 255, divide by 255": np.linspace(0, 255, 16).reshape(4, 4),
        "denormalize": torch.linspace(-2, 2, 16).view(4, 4),
    }  # fmt: skip
    for message, source in refused.items():
        with pytest.raises(ImageError, match=message) as caught:
            read_image(source)
        assert "\n" not in str(caught.value)
    assert issubclass(ImageError, CifarFtError)


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="there are no named pipes here")
def test_a_pipe_is_refused_instead_of_waited_for(tmp_path):
    os.mkfifo(tmp_path / "pipe.png")
    with pytest.raises(ImageError, match="no regular file"):
        read_image(tmp_path / "pipe.png")


@settings(max_examples=150, deadline=None)
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


def encoded(kind):
    options = {"JPEG": {"quality": 80}, "TIFF": {"compression": "tiff_lzw"}, "GIF": {}, "WEBP": {}, "PNG": {}}
    options |= {"BMP": {}, "JPEG2000": {}}
    return file_of(Image.fromarray(picture(24, 31)), kind, **options[kind])


KINDS = ["PNG", "JPEG", "GIF", "WEBP", "TIFF", "BMP"]


@pytest.mark.parametrize("kind", KINDS)
def test_a_truncated_file_is_refused_or_whole_and_never_half_grey(kind, tmp_path):
    content = encoded(kind)
    whole = read_image(content)
    for length in range(1, len(content), max(1, len(content) // 60)):
        try:
            assert torch.equal(read_image(content[:length]), whole)  # what was cut off held no pixels
        except ImageError:
            assert length < len(content)
    (tmp_path / f"half.{kind.lower()}").write_bytes(content[: len(content) // 2])
    with pytest.raises(ImageError, match=f"half.{kind.lower()}: "):
        read_image(tmp_path / f"half.{kind.lower()}")


@settings(max_examples=250, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    st.sampled_from(KINDS),
    st.lists(st.tuples(st.floats(0, 0.999), st.binary(min_size=1, max_size=4)), max_size=4),
)
def test_a_damaged_file_is_a_picture_or_an_image_error(kind, changes):
    content = bytearray(encoded(kind))
    for place, data in changes:
        start = int(place * len(content))
        content[start : start + len(data)] = data
    try:
        image = read_image(bytes(content))
    except ImageError:
        pass
    else:
        assert image.dtype == torch.uint8
        assert image.ndim == 3
        assert image.shape[0] == 3


@settings(max_examples=150, deadline=None)
@given(
    st.one_of(
        st.binary(max_size=200),
        st.text(max_size=30),
        st.none(),
        st.integers(),
        st.dictionaries(st.text(), st.text()),
    )
)
def test_nonsense_is_an_image_error(source):
    with pytest.raises(ImageError):
        read_image(source)


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


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 300), st.integers(1, 300), st.sampled_from(["crop", "pad"]))
def test_every_size_becomes_a_square_of_32_pixels(height, width, fit):
    image = torch.full((3, height, width), 77, dtype=torch.uint8)
    result = square(image, fit)
    assert result.shape == (3, 32, 32)
    assert (result == 77).any()


def test_a_very_long_picture_takes_no_more_memory_than_it_has_pixels():
    assert square(torch.zeros(3, 1, 2_000_000, dtype=torch.uint8), "pad").shape == (3, 32, 32)


def test_probabilities_are_those_of_the_model_on_the_evaluation_transform(predictor, samples):
    logits = predict_logits(predictor.model, samples, eval_transform(RECIPE))
    np.testing.assert_allclose(predictor.predict_proba(samples), logits.softmax(1), atol=1e-5)


def test_one_prediction_for_each_picture_in_order_whatever_the_batch_comes_as(predictor, samples):
    images = samples.images[:130]
    expected = predictor.predict_proba(images)
    assert expected.shape == (130, 10)
    assert len(np.unique(expected.round(5), axis=0)) > 100  # an exchange would be seen
    hwc = images.permute(0, 2, 3, 1).numpy()
    batches = (hwc, list(images), (Image.fromarray(image) for image in hwc), images.float() / 255, iter(hwc))
    for batch in batches:
        np.testing.assert_allclose(predictor.predict_proba(batch), expected, atol=1e-5)
    answers = predictor.predict(samples)
    assert len(answers) == 200
    for answer, row in zip(answers, expected, strict=False):
        assert answer.index == row.argmax()
        assert answer.label == CLASSES[answer.index]
        assert answer.probability == pytest.approx(row.max(), abs=1e-5)
        assert list(answer.probabilities) == list(CLASSES)
        assert list(answer.probabilities.values()) == pytest.approx(row.tolist(), abs=1e-5)


def test_a_single_picture_gives_a_list_of_one_and_none_gives_none(predictor, samples, tmp_path):
    path = tmp_path / "one.png"
    Image.fromarray(samples.images[5].permute(1, 2, 0).numpy()).save(path)
    expected = predictor.predict_proba(samples.images[5:6])
    for one in (
        samples.images[5],
        path,
        str(path),
        path.read_bytes(),
        io.BytesIO(path.read_bytes()),
        Image.open(path),
    ):
        np.testing.assert_allclose(predictor.predict_proba(one), expected, atol=1e-5)
    for none in ([], torch.zeros(0, 3, 32, 32, dtype=torch.uint8), iter(())):
        assert predictor.predict(none) == []
        assert predictor.predict_proba(none).shape == (0, 10)


def test_a_generator_is_read_a_batch_at_a_time(predictor, samples, monkeypatch):
    read, seen = [], []
    plain = Predictor._batch_logits
    monkeypatch.setattr(Predictor, "_batch_logits", lambda self, x: seen.append((len(x), len(read))) or plain(self, x))
    predictor.predict(read.append(i) or samples.images[i] for i in range(150))
    assert seen == [(32, 32), (32, 64), (32, 96), (32, 128), (22, 150)]


def test_top_k_keeps_the_best_classes_best_first(predictor, samples):
    whole, short = predictor.predict(samples.images[:1])[0], predictor.predict(samples.images[:1], top_k=3)[0]
    assert list(short.probabilities.items()) == whole.top(3) == short.top(10)
    assert [p for _, p in whole.top(10)] == sorted(whole.probabilities.values(), reverse=True)
    assert whole.top(1) == [(whole.label, whole.probability)]
    for k in (0, 11, -1, 2.5, "3", True):
        with pytest.raises(PredictionError, match="choose 1 to 10"):
            predictor.predict([], top_k=k)
        with pytest.raises(PredictionError, match="choose 1 to 10"):
            whole.top(k)


def test_a_bad_picture_in_a_batch_is_named_by_its_position(predictor, samples):
    with pytest.raises(ImageError, match=r"image 2 of the batch .*nope.png"):
        predictor.predict([samples.images[0], samples.images[1], "nope.png"])
    with pytest.raises(ImageError, match="cannot read int"):
        predictor.predict(3)
    with pytest.raises(ImageError, match="unknown fit"):
        predictor.predict(samples.images[0], fit="squeeze")


def test_values_that_are_not_finite_are_never_an_answer(samples):
    model = build_model(RECIPE, silent)
    model.fc.bias.data[0] = torch.nan
    with pytest.raises(PredictionError, match="not finite"):
        Predictor(model, RECIPE, "a broken model").predict(samples.images[0])


def test_a_run_is_rebuilt_to_the_same_answers_without_a_network(run_dir, samples, monkeypatch):

    def no_network(*_):
        raise AssertionError("weights were fetched")

    monkeypatch.setattr(surgery, "fetch_weights", no_network)
    monkeypatch.setattr(surgery, "resolve_backbone", no_network)
    config = json.loads((run_dir / "config.json").read_text())
    config["recipe"] |= {"weights": "imagenet", "backbone": "auto", "last_stage": 1}
    (run_dir / "config.json").write_text(json.dumps(config))
    predictor = Predictor.from_run(run_dir)
    model = build_model(RECIPE, silent)
    model.load_state_dict(load_file(run_dir / "model.safetensors"))
    expected = predict_logits(model, samples, eval_transform(RECIPE)).softmax(1)
    np.testing.assert_allclose(predictor.predict_proba(samples), expected, atol=1e-5)
    assert "smoke-1 (90.0 % [76.9, 96.0] on 40 test images)" in predictor.source
    assert not predictor.model.training


def test_without_a_path_the_newest_run_is_taken(run_dir, monkeypatch):
    monkeypatch.setenv("CIFAR_FT_RUNS", str(run_dir.parent))
    assert "smoke-1" in Predictor.from_run().source
    monkeypatch.setenv("CIFAR_FT_RUNS", str(run_dir.parent / "none"))
    with pytest.raises(PredictionError, match=r"no finished run in .*; train one with"):
        Predictor.from_run()


def damaged(run_dir, how):
    file = run_dir / "model.safetensors"
    content, state = file.read_bytes(), load_file(file)
    if how == "truncated":
        file.write_bytes(content[: len(content) // 2])
    elif how == "header":
        file.write_bytes(b"\xff" * 100 + content[100:])
    elif how == "empty":
        file.write_bytes(b"")
    elif how == "missing":
        file.unlink()
    elif how == "one tensor short":
        state.pop("conv1.weight")
        save_file(state, file)
    elif how == "another shape":
        save_file({**state, "fc.weight": torch.zeros(7, 64)}, file)
    elif how == "not finite":
        save_file({**state, "fc.bias": torch.full((10,), torch.nan)}, file)
    elif how == "not described":
        config = json.loads((run_dir / "config.json").read_text())
        (run_dir / "config.json").write_text(json.dumps({**config, "weights": {}}))
    elif how == "unknown key":
        config = json.loads((run_dir / "config.json").read_text())
        config["recipe"]["colour"] = "red"
        (run_dir / "config.json").write_text(json.dumps(config))


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ("truncated", "model.safetensors is damaged or incomplete .*train this run again"),
        ("header", "model.safetensors is damaged or incomplete"),
        ("empty", "model.safetensors is damaged or incomplete"),
        ("missing", "model.safetensors is missing; restore it"),
        ("one tensor short", "not those of its recipe.*conv1.weight"),
        ("another shape", "not those of its recipe.*fc.weight"),
        ("not finite", "fc.bias holds values that are not finite"),
        ("not described", "config.json does not say which model"),
        ("unknown key", "config.json does not say which model.*colour"),
    ],
)
def test_a_damaged_run_is_refused_in_one_line(run_dir, how, message):
    damaged(run_dir, how)
    with pytest.raises(PredictionError, match=message) as caught:
        Predictor.from_run(run_dir)
    assert "\n" not in str(caught.value)


def test_an_unfinished_run_is_refused(run_dir):
    (run_dir / "metrics.json").unlink()
    with pytest.raises(RunError, match="has not finished"):
        Predictor.from_run(run_dir)


def test_the_shipped_model_predicts_as_its_run_and_says_what_made_it(run_dir, samples, tmp_path, monkeypatch):
    from safetensors import safe_open

    target = tmp_path / "shipped.safetensors"
    assert export_shipped(run_dir, target) == target
    assert {file.name for file in tmp_path.iterdir()} == {"runs", target.name}
    state = load_file(target)
    assert {t.dtype for t in state.values()} == {torch.float16, torch.int64}
    assert state["bn1.num_batches_tracked"].dtype == torch.int64
    with safe_open(target, "pt") as file:
        metadata = file.metadata()
    assert json.loads(metadata["recipe"]) == RECIPE.to_dict()
    assert json.loads(metadata["metrics"])["test_accuracy"] == 0.9
    assert json.loads(metadata["metrics"])["test_accuracy_ci95"] == pytest.approx([0.7695, 0.9604], abs=1e-3)
    assert json.loads(metadata["data"])["digest"] == "d" * 64
    assert json.loads(metadata["classes"]) == list(CLASSES)
    assert set(json.loads(metadata["weights"])) == {"weights", "source", "sha256", "licence"}
    assert metadata["backbone"] == "resnet18"
    monkeypatch.setattr(predictions, "SHIPPED", target)
    shipped = Predictor.shipped()
    assert "recipe smoke, resnet18, 90.0 % [76.9, 96.0] on 40 test images" in shipped.source
    assert next(shipped.model.parameters()).dtype == torch.float32
    whole = Predictor.from_run(run_dir).predict_proba(samples)
    np.testing.assert_allclose(shipped.predict_proba(samples), whole, atol=2e-3)


def test_the_shipped_model_holds_no_path_of_the_machine_it_was_made_on(run_dir, tmp_path):
    config = json.loads((run_dir / "config.json").read_text())
    config["recipe"]["weights"] = "/home/somebody/secret/r18.pth"
    config["weights"]["source"] = "the file /home/somebody/secret/r18.pth"
    (run_dir / "config.json").write_text(json.dumps(config))
    content = export_shipped(run_dir, tmp_path / "m.safetensors").read_bytes()
    assert b"r18.pth" in content
    assert b"somebody" not in content
    assert str(tmp_path).encode() not in content


def test_a_model_that_is_too_large_or_out_of_range_is_not_shipped(run_dir, tmp_path, monkeypatch):
    target = tmp_path / "m.safetensors"
    target.write_bytes(b"the one before")
    monkeypatch.setattr(shipping, "SHIPPED_BYTES", 100_000)
    with pytest.raises(PredictionError, match=r"takes 0\.3 MB and may take 0; ship a run with backbone="):
        export_shipped(run_dir, target)
    state = load_file(run_dir / "model.safetensors")
    save_file({**state, "fc.bias": torch.full((10,), 1e6)}, run_dir / "model.safetensors")
    with pytest.raises(PredictionError, match=r"fc.bias has values too large for half precision"):
        export_shipped(run_dir, target)
    assert target.read_bytes() == b"the one before"


def test_newest_run_first_then_the_shipped_model_then_a_clear_error(run_dir, tmp_path, monkeypatch):
    said = []
    monkeypatch.setenv("CIFAR_FT_RUNS", str(run_dir.parent))
    assert Predictor.newest_or_shipped(echo=said.append).source in said.pop()
    monkeypatch.setenv("CIFAR_FT_RUNS", str(tmp_path / "none"))
    assert "smoke-1" in Predictor.newest_or_shipped(str(run_dir), echo=said.append).source
    monkeypatch.setattr(predictions, "SHIPPED", tmp_path / "absent.safetensors")
    with pytest.raises(PredictionError, match="no shipped model; train one with"):
        Predictor.newest_or_shipped(echo=said.append)
    export_shipped(run_dir)
    assert "the shipped model" in Predictor.newest_or_shipped(echo=said.append).source
    predictions.SHIPPED.write_bytes(predictions.SHIPPED.read_bytes()[:-10])
    with pytest.raises(PredictionError, match=r"damaged.*install the package again"):
        Predictor.shipped()


@pytest.fixture
def folder(tmp_path, samples):
    folder = tmp_path / "pictures"
    (folder / "more").mkdir(parents=True)
    (folder / ".hidden").mkdir()
    for name in ("b.png", "a.JPG", "more/c.gif", ".hidden/x.png"):
        Image.fromarray(samples.images[len(name)].permute(1, 2, 0).numpy()).save(folder / name)
    (folder / 'broken, "1".png').write_bytes((folder / "b.png").read_bytes()[:60])
    (folder / "._a.JPG").write_bytes(b"a mac was here")
    (folder / "notes.txt").write_text("no picture")
    return folder


def test_a_folder_gives_one_row_a_picture_sorted_and_goes_on_after_a_bad_one(folder, predictor):
    rows = list(predict_paths(folder, predictor))
    names = [os.path.relpath(row["path"], folder).replace(os.sep, "/") for row in rows]
    assert names == ["a.JPG", "b.png", 'broken, "1".png', "more/c.gif"]
    assert [bool(row["error"]) for row in rows] == [False, False, True, False]
    for row in rows:
        assert list(row) == ["path", "label", "probability", "error"]
        if row["error"]:
            assert (row["label"], row["probability"]) == ("", None)
        else:
            (answer,) = predictor.predict(row["path"])
            assert row["label"] == answer.label
            assert row["probability"] == pytest.approx(answer.probability, abs=1e-5)


def test_linked_folders_are_read_and_a_link_back_ends(folder, predictor, tmp_path):
    (tmp_path / "elsewhere").mkdir()
    shutil.copy(folder / "b.png", tmp_path / "elsewhere" / "photo.jfif")
    try:
        (folder / "linked").symlink_to(tmp_path / "elsewhere", target_is_directory=True)
        (folder / "more" / "back").symlink_to(folder, target_is_directory=True)
    except OSError:
        pytest.skip("links cannot be made here")
    rows = list(predict_paths(folder, predictor))
    assert [os.path.basename(row["path"]) for row in rows if f"{os.sep}linked{os.sep}" in row["path"]] == ["photo.jfif"]
    assert len(rows) == 5


def test_a_name_that_a_spreadsheet_would_run_is_made_a_path(predictor, tmp_path, monkeypatch, samples):
    monkeypatch.chdir(tmp_path)
    Image.fromarray(samples.images[0].permute(1, 2, 0).numpy()).save("=1+1.png")
    stream = io.StringIO()
    assert write_csv(predict_paths(["=1+1.png"], predictor), stream) == (1, 0)
    assert stream.getvalue().splitlines()[1].startswith("./=1+1.png,")


def test_every_input_has_its_row_in_its_place_whatever_it_is(folder, predictor, tmp_path):
    (tmp_path / "empty").mkdir()
    good = str(folder / "b.png")
    inputs = [good, "nope.png", tmp_path / "empty", None, good, str(folder / "notes.txt"), "a\0b.png", good]
    rows = list(predict_paths(inputs, predictor))
    errors = [row["error"] for row in rows]
    assert [bool(error) for error in errors] == [False, True, True, True, False, True, True, False]
    assert "no pictures in this folder" in errors[2]
    assert rows[0]["probability"] == pytest.approx(rows[7]["probability"], abs=1e-5)
    assert list(predict_paths([], predictor)) == []


def test_many_files_are_read_a_batch_at_a_time(folder, predictor):
    taken = []
    rows = predict_paths((taken.append(i) or folder / "b.png" for i in range(150)), predictor)
    next(rows)
    assert len(taken) == 32
    assert len(list(rows)) == 149


def test_the_csv_has_a_row_for_each_input_and_reads_back(folder, predictor, tmp_path):
    file = tmp_path / "answers.csv"
    rows = list(predict_paths([folder, "é.png"], predictor))
    assert write_csv(rows, file) == (5, 2)
    with open(file, encoding="utf-8", newline="") as stream:
        read = list(csv.DictReader(stream))
    assert [row["path"] for row in read] == [row["path"] for row in rows]
    assert [row["error"] for row in read] == [row["error"] for row in rows]
    assert [float(row["probability"] or -1) for row in read] == [row["probability"] or -1 for row in rows]
    stream = io.StringIO()
    write_csv(rows, stream)
    assert stream.getvalue() == file.read_text(encoding="utf-8")


def test_a_csv_that_fails_half_way_keeps_the_earlier_file_and_the_rows_so_far(tmp_path):
    def rows():
        yield {"path": "a", "label": "cat", "probability": 0.5, "error": ""}
        raise KeyboardInterrupt

    file = tmp_path / "answers.csv"
    file.write_text("before")
    with pytest.raises(KeyboardInterrupt):
        write_csv(rows(), file)
    assert file.read_text() == "before"
    assert (tmp_path / "answers.csv.partial").read_text().splitlines()[1:] == ["a,cat,0.5,"]
    assert len(list(tmp_path.iterdir())) == 2
    with pytest.raises(PredictionError, match=r"cannot write .*; choose another file"):
        write_csv([], tmp_path / "no" / "answers.csv")
    with pytest.raises(PredictionError, match="it is a folder"):
        write_csv([], tmp_path)


def test_every_row_is_there_before_the_next_picture_is_read(tmp_path):
    row = {"path": "a", "label": "cat", "probability": 0.5, "error": ""}
    read = []

    def rows(file):
        yield row
        read.append(file.read_text())
        yield row

    target = tmp_path / "answers.csv"
    with target.open("w") as stream:
        write_csv(rows(target), stream)
    assert read == ["path,label,probability,error\na,cat,0.5,\n"]


@pytest.mark.skipif(os.name == "nt", reason="links and devices as on Linux")
def test_links_and_devices_stay_what_they_are(tmp_path):
    row = {"path": "a", "label": "cat", "probability": 0.5, "error": ""}
    target, link = tmp_path / "target.csv", tmp_path / "link.csv"
    link.symlink_to(target)
    write_csv([row], link)
    assert link.is_symlink()
    assert "a,cat" in target.read_text()
    assert write_csv([row], os.devnull) == (1, 0)
    assert not os.path.isfile(os.devnull)


def test_names_that_are_not_utf8_do_not_stop_the_csv(tmp_path):
    row = {"path": "caf\udce9.png", "label": "cat", "probability": 0.5, "error": ""}
    write_csv([row], tmp_path / "answers.csv")
    assert "udce9" in (tmp_path / "answers.csv").read_text(encoding="utf-8")


def test_predictions_do_not_need_the_training_floor():
    code = "import sys, cifar_ft.predictions; print({'cifar_ft.training', 'cifar_ft.course'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"


def test_a_prediction_reads_as_a_sentence():
    answer = predictions.Prediction("truck", 9, 0.9312, {"truck": 0.9312})
    assert str(answer) == "truck (93.1 %)"
    assert repr(Predictor(SimpleNamespace(eval=lambda: None), RECIPE, "the run x")) == "Predictor(the run x)"


def _calibrated(predictor, **calibration):
    values = {"temperature": 1.0, "lowest_energy": -1e9, "false_alarms": 0.02, **calibration}
    return Predictor(predictor.model, RECIPE, "calibrated", calibration=values)


def test_probabilities_are_divided_by_the_temperature(predictor, samples):
    logits = predict_logits(predictor.model, samples, eval_transform(RECIPE))
    mild = _calibrated(predictor, temperature=4.0).predict_proba(samples)
    assert np.allclose(mild, (logits / 4).softmax(1).numpy(), atol=1e-6)
    assert not np.allclose(mild, predictor.predict_proba(samples), atol=1e-4)


def test_pictures_of_low_energy_are_called_unknown(predictor, samples):
    assert predictor.predict(samples.images[0])[0].unknown is None  # nobody knows without a calibration
    familiar = energy(predict_logits(predictor.model, samples, eval_transform(RECIPE)))
    middle = float(np.median(familiar))
    answers = _calibrated(predictor, lowest_energy=middle).predict(samples)
    assert [a.unknown for a in answers] == (familiar < middle).tolist()
    assert sum(a.unknown for a in answers) == 100


def test_a_calibration_comes_with_its_run_and_with_the_shipped_model(run_dir, tmp_path, monkeypatch):
    calibration = {"temperature": 1.5, "lowest_energy": 0.25, "false_alarms": 0.02}
    metrics = json.loads((run_dir / "metrics.json").read_text())
    assert Predictor.from_run(run_dir).calibration is None
    (run_dir / "metrics.json").write_text(json.dumps({**metrics, "calibration": calibration}))
    assert Predictor.from_run(run_dir).calibration == calibration
    monkeypatch.setattr(predictions, "SHIPPED", export_shipped(run_dir, tmp_path / "shipped.safetensors"))
    assert Predictor.shipped().calibration == calibration


def test_energy_threshold_leaves_the_stated_share_of_validation_below():
    logits = 3 * torch.randn(5000, 10, generator=torch.Generator().manual_seed(0))
    found = fit_calibration(logits, logits.argmax(1), false_alarms=0.03)
    assert (energy(logits) < found["lowest_energy"]).mean() == pytest.approx(0.03, abs=1e-3)
    assert found["temperature"] < 1  # always right, and never sure enough


def test_a_batch_of_the_right_size_goes_through_in_one_piece(predictor, samples, monkeypatch):
    seen, plain = [], Predictor._batch_logits
    monkeypatch.setattr(Predictor, "_batch_logits", lambda self, x: seen.append(len(x)) or plain(self, x))
    assert len(predictor.predict(samples.images)) == 200
    assert seen == [200]  # what `evaluation` does with it, and nothing else
    one_by_one = predictor.predict(list(samples.images[:5]))
    assert one_by_one == predictor.predict(samples.images[:5])


def test_an_answer_tells_what_was_done_to_the_picture(predictor, tmp_path):
    wide = Image.fromarray(picture(10, 20))
    assert predictor.predict(wide)[0].notes == ("the middle 10 x 10 of 20 x 10 pixels",)
    assert predictor.predict(wide, fit="pad")[0].notes == ("all of 20 x 10 pixels, with black bars",)
    wide.save(tmp_path / "wide.png")
    (row,) = predict_paths(tmp_path / "wide.png", predictor, details=True)
    assert row["notes"] == "the middle 10 x 10 of 20 x 10 pixels"
    stream = io.StringIO()
    write_csv([row], stream, details=True)
    assert stream.getvalue().splitlines()[0] == "path,label,probability,error,unknown,notes"
    write_csv([row], stream := io.StringIO())
    assert stream.getvalue().splitlines()[0] == "path,label,probability,error"


def test_files_are_counted_before_they_are_read(folder, predictor):
    assert count_files([folder, "missing.png"]) == len(list(predict_paths([folder, "missing.png"], predictor)))
    assert count_files(folder) == 4
