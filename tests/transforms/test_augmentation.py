"""Augmentation: torchvision's crop and flip, on whole batches, drawn alike; cutout; blur and noise."""

import numpy as np
import pytest
import torch
import torchvision.transforms.functional as tv
from hypothesis import given
from hypothesis import strategies as st
from scipy.ndimage import gaussian_filter

from cifar_ft.recipes import RECIPES, get_recipe
from cifar_ft.transforms import (
    NORMALIZATIONS,
    blur,
    cut_out,
    degrade,
    denormalize,
    draw,
    eval_transform,
    normalize,
    random_crop,
    random_flip,
    train_transform,
)

EVERY_OFFSET = torch.cartesian_prod(torch.arange(9), torch.arange(9))


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def torchvision_crop(image, offset, padding=4):
    top, left = offset.tolist()
    return tv.crop(tv.pad(image, padding), top, left, *image.shape[-2:])


@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32])
def test_a_crop_is_torchvisions_at_each_of_the_81_offsets(samples, dtype):
    images = samples.images[:81].to(dtype)
    cropped = random_crop(images, EVERY_OFFSET, 4)
    assert cropped.dtype == dtype
    for image, offset, found in zip(images, EVERY_OFFSET, cropped, strict=True):
        assert torch.equal(found, torchvision_crop(image, offset)), offset


@given(height=st.integers(1, 9), width=st.integers(1, 9), padding=st.integers(0, 3), seed=st.integers(0, 1000))
def test_a_crop_is_torchvisions_for_any_shape_and_padding(height, width, padding, seed):
    images = torch.randint(0, 256, (5, 2, height, width), dtype=torch.uint8, generator=seeded(seed))
    offsets, *_ = draw(5, padding, seeded(seed))
    expected = [torchvision_crop(image, offset, padding) for image, offset in zip(images, offsets, strict=True)]
    assert torch.equal(random_crop(images, offsets, padding), torch.stack(expected))


def test_a_flip_is_hflip_where_asked_and_nothing_elsewhere(samples):
    images, flips = samples.images[:20], torch.arange(20) % 3 == 0
    for image, flip, found in zip(images, flips, random_flip(images, flips), strict=True):
        assert torch.equal(found, tv.hflip(image) if flip else image)


def chi_square(counts):
    expected = counts.sum() / counts.numel()
    return ((counts - expected) ** 2 / expected).sum().item()


def limit(degrees):
    """Five standard deviations above the mean of a chi-square distribution."""
    return degrees + 5 * (2 * degrees) ** 0.5


def test_draws_are_uniform_and_independent_as_of_randomcrop_and_randomhorizontalflip():
    offsets, flips, *_ = draw(162 * 300, 4, seeded())
    assert offsets.min() == 0
    assert offsets.max() == 8
    cells = (offsets[:, 0] * 9 + offsets[:, 1]) * 2 + flips
    assert chi_square(torch.bincount(cells, minlength=162).double()) < limit(161)


def test_the_train_transform_moves_each_image_as_often_to_each_of_the_81_places_and_mirrors_half():
    # Pixels say where they come from: red the row, green the column; blue counts from the right.
    grid = torch.arange(100, 132, dtype=torch.uint8)
    picture = torch.stack([grid[:, None].expand(32, 32), grid.expand(32, 32), grid.flip(0).expand(32, 32)])
    transform = train_transform(get_recipe("reference_b32"))
    seen = torch.cat([transform(picture.expand(1620, -1, -1, -1), seeded(seed))[:, :, 15:17, 15:17] for seed in (0, 1)])
    pixels = denormalize(seen, "cifar10_published").long() - 100
    row, left, right = pixels[:, 0, 0, 0], pixels[:, 1, 0, 0], pixels[:, 1, 0, 1]
    mirrored = left > right
    rows, columns = row - 11, torch.where(mirrored, right, left) - 11
    assert set(rows.tolist()) == set(columns.tolist()) == set(range(9))
    cells = (rows * 9 + columns) * 2 + mirrored
    assert chi_square(torch.bincount(cells, minlength=162).double()) < limit(161)


def test_the_train_transform_is_torchvisions_pipeline_at_the_same_draws(samples):
    draws = draw(200, 4, seeded())
    mean, std = NORMALIZATIONS["cifar10_published"]
    found = train_transform(RECIPES["reference_b32"])(samples.images, draws=draws)
    for image, offset, flip, result in zip(samples.images, *draws[:2], found, strict=True):
        image = torchvision_crop(image, offset)
        image = tv.hflip(image) if flip else image
        torch.testing.assert_close(result, tv.normalize(image.float() / 255, mean, std), rtol=1e-5, atol=1e-5)


def test_augmentation_is_decided_by_the_generator_alone(samples):
    transform = train_transform(RECIPES["quick"])
    before = torch.get_rng_state()
    first = transform(samples.images, seeded(1))
    assert torch.equal(torch.get_rng_state(), before)  # the global generator is left alone
    assert torch.equal(transform(samples.images, seeded(1)), first)
    assert not torch.equal(transform(samples.images, seeded(2)), first)


def test_images_of_one_batch_get_different_draws(samples):
    outputs = train_transform(RECIPES["reference_b32"])(samples.images[:1].expand(64, -1, -1, -1), seeded())
    assert len(outputs.flatten(1).unique(dim=0)) > 45  # 162 equally likely outcomes: about 53 of 64 differ


@pytest.mark.parametrize(("setting", "different"), [("flip=false crop_padding=0", False), ("flip=false", True)])
def test_a_recipe_can_switch_augmentation_off(samples, setting, different):
    recipe = get_recipe("smoke", setting)
    plain = eval_transform(recipe)(samples.images)
    assert torch.equal(train_transform(recipe)(samples.images, seeded()), plain) is not different


@pytest.mark.parametrize("size", [16, 32, 64])
def test_uint8_goes_in_and_channels_last_float32_of_the_recipes_size_comes_out(samples, size):
    recipe, images = get_recipe("smoke", {"image_size": size}), samples.images[:6]
    before = images.clone()
    for transform in (train_transform(recipe), eval_transform(recipe)):
        output = transform(images)
        assert output.shape == (6, 3, size, size)
        assert output.dtype == torch.float32
        assert output.is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(images, before)  # the dataset in memory is not touched
    assert train_transform(recipe)(images, size=40).shape == (6, 3, 40, 40)  # progressive resizing


def test_a_cutout_covers_its_square_and_nothing_else():
    images = torch.full((3, 3, 32, 32), 200, dtype=torch.uint8)
    centres = torch.tensor([[0.5, 0.25], [0.0, 0.0], [0.999, 0.5]])
    cut = cut_out(images, centres, 12)
    assert cut.dtype == torch.uint8
    for image, rows, columns in zip(cut, [(10, 22), (0, 6), (25, 32)], [(2, 14), (0, 6), (10, 22)], strict=True):
        covered = torch.zeros(32, 32, dtype=torch.bool)
        covered[slice(*rows), slice(*columns)] = True
        assert normalize(image[None])[0][:, covered].abs().max() < 0.01  # the mean colour
        assert (image[:, ~covered] == 200).all()
    assert (images == 200).all()


def test_cutouts_fall_everywhere_alike_and_only_where_the_recipe_asks(samples):
    transform = train_transform(get_recipe("quick", "cutout=12 image_size=32 flip=false crop_padding=0"))
    white = torch.full((6000, 3, 32, 32), 255, dtype=torch.uint8)
    covered = (transform(white, seeded()).abs().amax(1) < 0.01).float().mean(0)
    assert covered[8:24, 8:24].sub((12 / 32) ** 2).abs().max() < 0.03
    assert covered[0, 0] == pytest.approx((6 / 32) ** 2, abs=0.01)  # squares hang over the edges
    plain = train_transform(get_recipe("quick"))
    draws = draw(len(samples), 4, seeded())
    elsewhere = (*draws[:2], 1 - draws[2], draws[3])
    assert torch.equal(plain(samples.images, draws=draws), plain(samples.images, draws=elsewhere))


@pytest.mark.parametrize("sigma", [0.4, 0.7, 1.0])
def test_a_blur_is_scipys_whether_for_all_images_or_for_each(samples, sigma):
    images = samples.images[:6]
    expected = gaussian_filter(images.double().numpy(), (0, 0, sigma, sigma), mode="nearest", truncate=4 / sigma)
    assert np.abs(blur(images, sigma).numpy() - expected).max() < 0.51  # rounded
    each = blur(images, torch.tensor([sigma, 0, sigma, 0, 0, 0]))
    assert torch.equal(each[::2], torch.stack([blur(images, sigma)[0], blur(images, sigma)[2], images[4]]))
    assert torch.equal(each[1::2], images[1::2])
    assert torch.equal(blur(images, 0), images)


def test_as_many_images_as_asked_are_degraded_half_of_them_blurred_half_noisy():
    flat, striped = torch.full((4000, 3, 32, 32), 128, dtype=torch.uint8), torch.zeros(1, 3, 32, 32, dtype=torch.uint8)
    chances = draw(4000, 4, seeded())[3]
    noise = degrade(flat, chances, 0.5).float() - 128
    noisy = noise.flatten(1).any(1)
    assert noisy.float().mean() == pytest.approx(0.25, abs=0.03)
    assert noise.mean().abs() < 0.1
    strength, deviations = chances[noisy, 1], noise[noisy].flatten(1).std(1)
    assert (deviations - 25 * strength).abs().max() < 2  # up to 25 grey levels
    striped[..., ::4] = 200
    changed = (degrade(striped.expand(4000, -1, -1, -1), chances, 0.5) != striped).flatten(1).any(1)
    strong = chances[:, 1] > 0.4  # the weakest blur changes nothing
    assert torch.equal((changed & ~noisy)[strong], (chances[:, 0] < 0.25)[strong])
    assert torch.equal(degrade(flat, chances, 1e-9), flat)


def test_noise_is_white_and_another_one_for_each_image():
    chances = torch.tensor([[0.9, 1.0, 0.1, 0.2], [0.9, 1.0, 0.5, 0.2], [0.9, 1.0, 0.1, 0.9], [0.9, 1.0, 1.0, 1.0]])
    chances[3, 2:] = torch.nextafter(torch.tensor(1.0), torch.tensor(0.0))  # the last window still fits
    noise = degrade(torch.full((4, 3, 32, 32), 128, dtype=torch.uint8), chances, 1.0).flatten(1).double() - 128
    assert torch.corrcoef(noise).fill_diagonal_(0).abs().max() < 0.1
    colours = torch.corrcoef(noise.view(4, 3, -1).transpose(0, 1).flatten(1))
    assert colours.fill_diagonal_(0).abs().max() < 0.1


def test_a_recipe_that_degrades_draws_all_else_as_one_that_does_not(samples):
    first = [each.clone() for each in draw(64, 4, seeded(3))[:3]]
    generator = seeded(3)  # what draw() drew before there was `degrade`, which the weights of recorded runs rest on
    before = torch.randint(0, 9, (64, 2), generator=generator), torch.rand(64, generator=generator) < 0.5
    assert all(map(torch.equal, first, (*before, torch.rand(64, 2, generator=generator))))
    settings = "crop_padding=0 flip=false image_size=32 normalization=cifar10"
    plain, degraded = (train_transform(get_recipe("smoke", f"{settings} degrade={share}")) for share in (0, 0.4))
    draws = draw(200, 4, seeded())
    same = (plain(samples.images, draws=draws) == degraded(samples.images, draws=draws)).flatten(1).all(1)
    chance, strength = draws[3][:, 0], draws[3][:, 1]
    assert same[chance >= 0.4].all()
    assert not same[(chance < 0.4) & (strength > 0.3)].any()  # the weakest change nothing
    assert torch.equal(plain(samples.images, draws=draws), eval_transform(plain.recipe)(samples.images))
