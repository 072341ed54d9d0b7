"""Corruptions do what their names say, and accuracy is counted on the images that are meant."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from cifar_ft import plots, results, transforms


def test_blur_keeps_flat_pictures_and_spreads_a_dot():
    flat = torch.full((2, 3, 32, 32), 77, dtype=torch.uint8)
    assert torch.equal(transforms.blur(flat, 1.5), flat)
    dot = torch.zeros(1, 3, 32, 32, dtype=torch.uint8)
    dot[0, :, 16, 16] = 255
    spread = transforms.blur(dot, 1.0)[0, 0].float()
    assert spread.argmax() == 16 * 32 + 16
    assert spread.sum() == pytest.approx(255, abs=12)  # rounding
    assert spread[16, 16] == pytest.approx(255 / (2 * np.pi), abs=2)  # the density of a Gaussian at its centre
    assert torch.equal(spread, spread.T)


def test_noise_has_the_deviation_asked_for_and_repeats():
    grey = torch.full((50, 3, 32, 32), 128, dtype=torch.uint8)
    noisy = transforms.noise(grey, 12)
    assert noisy.float().std().item() == pytest.approx(12, rel=0.01)
    assert noisy.float().mean().item() == pytest.approx(128, abs=0.1)
    assert torch.equal(noisy, transforms.noise(grey, 12))
    dark = torch.zeros(1, 3, 32, 32, dtype=torch.uint8)
    assert transforms.noise(dark, 50).max() < 255  # cut off at 0, not wrapped around


def test_jpeg_harms_more_at_lower_quality(samples):
    images = samples.images[:20]
    harm = [(transforms.jpeg(images, q).float() - images.float()).abs().mean().item() for q in (95, 50, 10)]
    assert 0 < harm[0] < harm[1] < harm[2]
    assert transforms.jpeg(images, 95).shape == images.shape
    assert harm[0] < 5  # colours and places are kept


def test_brightness_multiplies_and_cuts_off():
    images = torch.tensor([0, 100, 200], dtype=torch.uint8).view(1, 3, 1, 1)
    assert transforms.brightness(images, 1.5).flatten().tolist() == [0, 150, 255]
    assert transforms.brightness(images, 0.5).flatten().tolist() == [0, 50, 100]


def test_every_corruption_gets_worse_and_is_scored(samples):
    def bright_enough(images):  # a stand-in for a model: right where the picture is near the clean one
        near = (images.float() - samples.images.float()).abs().mean((1, 2, 3)) < 20
        wrong = (samples.labels + 1) % 10
        return torch.nn.functional.one_hot(torch.where(near, samples.labels, wrong), 10).float()

    found = results.corrupted_accuracy(bright_enough, samples.images, samples.labels)
    assert len(found) == sum(len(levels) for _, levels, _ in transforms.CORRUPTIONS.values())
    for _, part in found.groupby("corruption", sort=False):
        assert part.accuracy.is_monotonic_decreasing
    assert ((found.low <= found.accuracy) & (found.accuracy <= found.high)).all()
    axes = plots.corruption_chart(found, 0.97).axes
    assert [ax.get_title() for ax in axes] == list(transforms.CORRUPTIONS)


def test_accuracy_without_doubtful_images_leaves_out_just_those():
    issues = results.test_issues()
    twins = set(issues.test_index[issues.issue == "twin in train"])
    doubtful = set(issues.test_index) - twins
    correct = np.zeros(10_000, bool)
    correct[sorted(twins)] = True
    found = results.accuracy_without(issues, correct)
    assert found["all"]["accuracy"] == len(twins) / 10_000
    assert (found["without twins"]["images"], found["without twins"]["accuracy"]) == (10_000 - len(twins), 0)
    assert found["without twins"]["ci95"] == pytest.approx((0, 4e-4), abs=1e-5)
    both = 10_000 - len(set(issues.test_index))
    assert found["without both"]["images"] == both
    assert len(doubtful) > 40
    some = np.array(sorted(twins)[:5] + sorted(doubtful)[:5] + [0])  # a run may have scored a subset
    part = results.accuracy_without(issues, np.arange(11) < 5, some)
    assert {name: row["images"] for name, row in part.items()} == {
        "all": 11, "without twins": 6, "without unconfirmed labels": 6, "without both": 1
    }  # fmt: skip
    assert part["without unconfirmed labels"]["accuracy"] == 5 / 6


def test_temperature_undoes_a_known_one():
    generator = torch.Generator().manual_seed(1)
    true = 2 * torch.randn(20_000, 10, generator=generator)
    labels = torch.multinomial(true.softmax(1), 1, generator=generator).squeeze(1)
    for temperature in (0.5, 1.0, 3.0):
        assert results.fit_temperature(temperature * true, labels) == pytest.approx(temperature, rel=0.03)
    with pytest.raises(results.ResultError):
        results.fit_temperature(true[:5] * float("nan"), labels[:5])


def test_temperature_of_a_perfect_model_stays_finite():
    labels = torch.arange(10).repeat(5)
    assert results.fit_temperature(5 * torch.eye(10)[labels], labels) >= 0.05


def test_the_surest_are_answered_first():
    probabilities = np.array([[0.9, 0.1], [0.4, 0.6], [0.2, 0.8], [0.55, 0.45]])
    found = results.selective_accuracy(np.array([0, 0, 1, 0]), probabilities)
    assert found.coverage.tolist() == [0.25, 0.5, 0.75, 1.0]
    assert found.threshold.tolist() == pytest.approx([0.9, 0.8, 0.6, 0.55])
    assert found.accuracy.tolist() == pytest.approx([1, 1, 2 / 3, 3 / 4])
    plots.coverage_chart(found)
