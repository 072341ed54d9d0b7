"""Normalising that can be undone, and torchvision's resizing."""

import pytest
import torch
import torchvision.transforms.functional as tv

from cifar_ft.recipes import RECIPES
from cifar_ft.transforms import NORMALIZATIONS, denormalize, eval_transform, normalize, resize


def test_evaluation_always_gives_the_same_input(samples):
    transform = eval_transform(RECIPES["quick"])
    assert torch.equal(transform(samples.images), transform(samples.images))
    assert torch.equal(transform(samples.images[3:4]), transform(samples.images)[3:4])  # whatever else is in the batch


@pytest.mark.parametrize("name", NORMALIZATIONS)
def test_denormalize_undoes_normalize_for_every_colour(name):
    images = torch.arange(256, dtype=torch.uint8).view(1, 1, 16, 16).expand(2, 3, 16, 16)
    assert torch.equal(denormalize(normalize(images, name), name), images)


@pytest.mark.parametrize("name", NORMALIZATIONS)
def test_normalize_is_torchvisions(samples, name):
    expected = tv.normalize(samples.images.float() / 255, *NORMALIZATIONS[name])
    torch.testing.assert_close(normalize(samples.images, name), expected, rtol=1e-5, atol=1e-5)


def test_the_published_constants_differ_from_the_true_ones_in_the_std_only():
    published, true = NORMALIZATIONS["cifar10_published"], NORMALIZATIONS["cifar10"]
    assert published == ((0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010))
    assert published[0] == pytest.approx(true[0], abs=1e-4)
    assert min(b - a for a, b in zip(published[1], true[1], strict=True)) > 0.04


@pytest.mark.parametrize("size", [16, 24, 32, 33, 64, 96])
def test_normalising_and_resizing_can_be_swapped(samples, size):
    first = resize(normalize(samples.images[:20]), size)
    torch.testing.assert_close(first, normalize(resize(samples.images[:20].float(), size)), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("size", [16, 24, 48, 64])
def test_resize_is_torchvisions_bilinear_with_antialiasing(samples, size):
    images = samples.images[:8].float()
    torch.testing.assert_close(
        resize(images, size), tv.resize(images, [size, size], antialias=True), rtol=1e-4, atol=1e-3
    )
