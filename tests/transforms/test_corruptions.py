"""Corruptions do what their names say, to each picture of a batch."""

import numpy as np
import pytest
import torch

from cifar_ft.transforms.corruptions import CORRUPTIONS, blur, brightness, jpeg, noise


@pytest.mark.parametrize("name", CORRUPTIONS)
def test_pictures_stay_pictures_and_are_harmed_more_at_each_level(samples, name):
    function, levels, _ = CORRUPTIONS[name]
    images = samples.images[:20]
    before, harm = images.clone(), []
    for level in levels:
        corrupted = function(images, level)
        assert (corrupted.dtype, corrupted.shape) == (torch.uint8, images.shape)
        harm.append((corrupted.float() - images.float()).abs().mean().item())
    assert harm[0] > 0
    assert harm == sorted(harm)
    assert torch.equal(images, before)


def test_blur_keeps_flat_pictures_and_spreads_a_dot():
    flat = torch.full((2, 3, 32, 32), 77, dtype=torch.uint8)
    assert torch.equal(blur(flat, 1.5), flat)
    assert blur(flat, 0) is flat
    dot = torch.zeros(1, 3, 32, 32, dtype=torch.uint8)
    dot[0, :, 16, 16] = 255
    spread = blur(dot, 1.0)[0, 0].float()
    assert spread.argmax() == 16 * 32 + 16
    assert spread.sum() == pytest.approx(255, abs=12)  # rounding
    assert spread[16, 16] == pytest.approx(255 / (2 * np.pi), abs=2)  # the density of a Gaussian at its centre
    assert torch.equal(spread, spread.T)


def test_blur_continues_the_edges():
    halves = torch.zeros(1, 3, 8, 8, dtype=torch.uint8)
    halves[..., :4, :] = 200
    assert torch.equal(blur(halves, 1.0), blur(halves, 1.0)[..., :1].expand(-1, -1, -1, 8))
    assert blur(halves, 1.0)[0, 0, 0, 0] == 200


def test_noise_has_the_deviation_asked_for_and_repeats():
    grey = torch.full((50, 3, 32, 32), 128, dtype=torch.uint8)
    noisy = noise(grey, 12)
    assert noisy.float().std().item() == pytest.approx(12, rel=0.01)
    assert noisy.float().mean().item() == pytest.approx(128, abs=0.1)
    assert torch.equal(noisy, noise(grey, 12))
    dark = torch.zeros(1, 3, 32, 32, dtype=torch.uint8)
    assert noise(dark, 50).max() < 255  # cut off at 0, not wrapped around


def test_jpeg_leaves_colours_and_places():
    red = torch.zeros(2, 3, 32, 32, dtype=torch.uint8)
    red[:, 0, :16] = 200
    assert (jpeg(red, 95).float() - red.float()).abs().mean() < 5
    assert torch.equal(jpeg(red.flip(3), 50), jpeg(red.flip(3).contiguous(), 50))


def test_brightness_multiplies_and_cuts_off():
    images = torch.tensor([0, 100, 200], dtype=torch.uint8).view(1, 1, 1, 3).expand(1, 3, 1, 3)
    assert brightness(images, 1.5)[0, 0, 0].tolist() == [0, 150, 255]
    assert brightness(images, 0.5)[0, 0, 0].tolist() == [0, 50, 100]
    assert brightness(images, 0.299)[0, 0, 0].tolist() == [0, 30, 60]  # rounded
