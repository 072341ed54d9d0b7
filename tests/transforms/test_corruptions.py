"""Corruptions are the published functions, where these can be had, and harm each picture of a batch by its level."""

import colorsys

import numpy as np
import pytest
import torch
from scipy.ndimage import zoom

from cifar_ft import CifarFtError
from cifar_ft.transforms import CORRUPTIONS, OURS, brightness, corrupt


def grey(n, value):
    return torch.full((n, 3, 32, 32), value, dtype=torch.uint8)


@pytest.mark.parametrize("name", CORRUPTIONS)
def test_pictures_stay_pictures_are_harmed_at_each_severity_and_the_same_each_time(samples, name):
    images = samples.images[:20]
    before, harm = images.clone(), []
    for severity in range(1, 6):
        corrupted = corrupt(images, name, severity)
        assert (corrupted.dtype, corrupted.shape) == (torch.uint8, images.shape)
        assert torch.equal(corrupted, corrupt(images, name, severity))
        harm.append((corrupted.float() - images.float()).abs().mean().item())
    assert harm[0] > 0.2
    if name != "saturate":  # whose first two levels take colour away and whose others add some
        assert harm == sorted(harm)
    assert harm[-1] == max(harm)
    assert torch.equal(images, before)


def test_all_but_one_are_cifar_10_cs():
    assert list(CORRUPTIONS)[-1] == OURS
    assert len(CORRUPTIONS) == 14
    assert all(len(levels) == 5 for _, levels in CORRUPTIONS.values())


@pytest.mark.parametrize(
    ("name", "severity", "says"),
    [("motion blurr", 1, "did you mean 'motion blur'"), ("fog", 0, "from 1 to 5"), ("fog", 6, "from 1 to 5")],
)
def test_what_there_is_not_is_told(samples, name, severity, says):
    with pytest.raises(CifarFtError, match=says):
        corrupt(samples.images[:1], name, severity)


@pytest.mark.parametrize(("severity", "std"), [(1, 0.04), (5, 0.1)])
def test_gaussian_noise_has_its_deviation(severity, std):
    noise = corrupt(grey(50, 128), "gaussian noise", severity).float() - 128
    assert noise.std().item() == pytest.approx(255 * std, rel=0.01)
    assert noise.mean().item() == pytest.approx(0, abs=0.2)
    assert corrupt(grey(1, 0), "gaussian noise", 5).max() < 255  # cut off at 0, not wrapped around


def test_shot_noise_is_stronger_where_it_is_brighter():
    for value in (20, 128):
        photons = 50 * value / 255  # at severity 5
        noisy = corrupt(grey(50, value), "shot noise", 5).float()
        assert noisy.mean().item() == pytest.approx(value, rel=0.02)
        assert noisy.std().item() == pytest.approx(value / photons**0.5, rel=0.03)


def test_impulse_noise_sets_its_share_of_values_to_black_or_white():
    noisy = corrupt(grey(50, 100), "impulse noise", 5)
    for value in (0, 255):
        assert (noisy == value).float().mean().item() == pytest.approx(0.035, abs=0.002)
    assert (noisy == 100).float().mean().item() == pytest.approx(0.93, abs=0.002)


BLURS = [name for name in CORRUPTIONS if "blur" in name]


@pytest.mark.parametrize("name", BLURS)
def test_a_blur_keeps_flat_pictures_and_spreads_a_dot_without_loss(name):
    assert torch.equal(corrupt(grey(2, 77), name, 5), grey(2, 77))
    dot = torch.zeros(4, 3, 32, 32, dtype=torch.uint8)
    dot[..., 15:17, 15:17] = 255
    spread = corrupt(dot, name, 4).float()
    assert spread[..., 15:17, 15:17].sum() < 0.8 * dot.float().sum()
    if name != "zoom blur":  # which enlarges the dot
        assert spread.sum().item() == pytest.approx(dot.sum().item(), rel=0.03)  # rounding


def test_defocus_is_a_disk_and_motion_a_line():
    dot = torch.zeros(40, 3, 32, 32, dtype=torch.uint8)
    dot[..., 16, 16] = 255
    disk = corrupt(dot[:1], "defocus blur", 5)[0, 0]
    assert torch.equal(disk[15:18, 15:18], torch.full((3, 3), 28, dtype=torch.uint8))  # 255 / 9
    assert disk[15:18, 15:18].float().sum() == disk.float().sum()  # a softness of 0.1 pixels is none
    lines = corrupt(dot, "motion blur", 5)[:, 0] > 0
    rows, columns = (lines.any(axis).sum(1) for axis in (2, 1))
    assert (columns >= rows).all()  # at most 45 degrees
    assert len(set(rows.tolist())) > 3  # another angle each
    assert not lines[..., 17:].any()  # all to one side


def test_zoom_blur_is_the_mean_of_scipys_enlargements(samples):
    image = samples.images[0].double().numpy()
    views = [image]
    for factor in np.arange(1, 1.06, 0.01):
        part = int(np.ceil(32 / factor))
        first = (32 - part) // 2
        larger = zoom(image[:, first : first + part, first : first + part], (1, factor, factor), order=1)
        trim = (larger.shape[1] - 32) // 2
        views.append(larger[:, trim : trim + 32, trim : trim + 32])
    found = corrupt(samples.images[:1], "zoom blur", 1)[0].numpy()
    assert np.abs(found - np.mean(views, axis=0)).max() < 0.51


def test_fog_lies_unevenly_and_leaves_the_brightest_value(samples):
    images = samples.images[:8]
    for severity in (1, 5):
        peaks = corrupt(images, "fog", severity).amax((1, 2, 3)).int() - images.amax((1, 2, 3)).int()
        assert peaks.max() <= 0
    fog = corrupt(grey(8, 100), "fog", 3).float()
    assert (fog.amax((2, 3)) == 100).all()  # where it is thickest: (x + c) x / (x + c)
    assert fog.amin().item() == pytest.approx(100 * 100 / (100 + 0.75 * 255), abs=0.6)  # where there is none
    assert torch.equal(fog[:, 0], fog[:, 2])
    smooth, rough = ((corrupt(grey(8, 100), "fog", s).float() - 100).diff(dim=3).abs().mean() for s in (1, 5))
    assert rough > smooth
    assert not torch.equal(fog[0], fog[1])


@pytest.mark.parametrize(
    ("name", "severity", "change"),
    [
        ("brightness", 3, lambda h, s, v: (h, s, min(v + 0.15, 1))),
        ("saturate", 2, lambda h, s, v: (h, 0.1 * s, v)),
        ("saturate", 5, lambda h, s, v: (h, min(2.5 * s + 0.2, 1), v)),
    ],
)
def test_brightness_and_saturation_change_one_of_hue_saturation_and_value(samples, name, severity, change):
    image = samples.images[3]
    found = corrupt(image[None], name, severity)[0]
    for row, column in [(0, 0), (5, 20), (31, 31)]:
        rgb = (image[:, row, column] / 255).tolist()
        expected = [255 * value for value in colorsys.hsv_to_rgb(*change(*colorsys.rgb_to_hsv(*rgb)))]
        assert found[:, row, column].tolist() == pytest.approx(expected, abs=0.51)


def test_contrast_goes_to_the_mean_of_each_colour(samples):
    images = samples.images[:3].float()
    expected = images.mean((2, 3), keepdim=True) * 0.85 + images * 0.15
    assert (corrupt(samples.images[:3], "contrast", 5) - expected).abs().max() < 0.51


def test_pixelate_leaves_20_of_32_pixels_a_row(samples):
    rows = corrupt(samples.images[:1], "pixelate", 5)[0, 0]
    assert rows.unique(dim=0).shape[0] <= 20
    assert corrupt(samples.images[:1], "pixelate", 1)[0, 0].unique(dim=0).shape[0] > 20


def test_jpeg_leaves_colours_and_places():
    red = torch.zeros(2, 3, 32, 32, dtype=torch.uint8)
    red[:, 0, :16] = 200
    assert (corrupt(red, "jpeg", 1).float() - red.float()).abs().mean() < 5
    assert torch.equal(corrupt(red.flip(3), "jpeg", 5), corrupt(red.flip(3).contiguous(), "jpeg", 5))


def test_our_brightness_multiplies_and_cuts_off():
    images = torch.tensor([0, 100, 200], dtype=torch.uint8).view(1, 1, 1, 3).expand(1, 3, 1, 3)
    assert brightness(images, 1.5)[0, 0, 0].tolist() == [0, 150, 255]
    assert brightness(images, 0.5)[0, 0, 0].tolist() == [0, 50, 100]
    assert brightness(images, 0.299)[0, 0, 0].tolist() == [0, 30, 60]  # rounded
    assert corrupt(grey(1, 200), OURS, 5).unique().tolist() == [40]
