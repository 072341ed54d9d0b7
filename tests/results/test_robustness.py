"""Robustness: accuracy is counted on the images that are meant."""

import numpy as np
import pytest
import torch

from cifar_ft import results
from cifar_ft.transforms import CORRUPTIONS


def test_every_corruption_gets_worse_and_is_scored(samples):
    def bright_enough(images):  # a stand-in for a model: right where the picture is near the clean one
        near = (images.float() - samples.images.float()).abs().mean((1, 2, 3)) < 20
        wrong = (samples.labels + 1) % 10
        return torch.nn.functional.one_hot(torch.where(near, samples.labels, wrong), 10).float()

    found = results.corrupted_accuracy(bright_enough, samples.images, samples.labels)
    assert len(found) == sum(len(levels) for _, levels, _ in CORRUPTIONS.values())
    for _, part in found.groupby("corruption", sort=False):
        assert part.accuracy.is_monotonic_decreasing
    assert ((found.low <= found.accuracy) & (found.accuracy <= found.high)).all()
    assert list(found.corruption.unique()) == list(CORRUPTIONS)


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
