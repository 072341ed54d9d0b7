"""Robustness: accuracy is counted on the images that are meant."""

import numpy as np
import pytest
import torch

from cifar_ft import results
from cifar_ft.transforms import CORRUPTIONS, corrupt


def test_every_corruption_is_scored_at_every_severity_and_the_mean_is_of_cifar_10_cs(samples):
    seen = []

    def near(images):  # a stand-in for a model: right where the picture is near the clean one
        seen.append(images)
        right = (images.float() - samples.images.float()).abs().mean((1, 2, 3)) < 15
        wrong = (samples.labels + 1) % 10
        return torch.nn.functional.one_hot(torch.where(right, samples.labels, wrong), 10).float()

    frame, shares = results.corrupted_accuracy(near, samples.images, samples.labels)
    assert frame.iloc[0].tolist()[:3] == ["none", 0, 1.0]
    assert list(frame.corruption.unique()) == ["none", *CORRUPTIONS, results.MEAN]
    assert torch.equal(seen[0], samples.images)
    assert torch.equal(seen[3], corrupt(samples.images, "gaussian noise", 3))
    assert ((frame.low <= frame.accuracy) & (frame.accuracy <= frame.high)).all()
    table = frame.pivot_table(index="corruption", columns="severity", values="accuracy")
    for severity in range(1, 6):
        assert table.loc[results.MEAN, severity] == pytest.approx(table.loc[[*CORRUPTIONS][:13], severity].mean())
    assert table.loc["contrast", 1] > table.loc["contrast", 5]
    assert shares.shape == (200,)
    assert shares.mean() == pytest.approx(table.loc[results.MEAN].mean())
    # Each image is right under its own corruptions: 65 scores of 200 images are no 13,000 images.
    low, high = results.mean_interval(shares)
    assert 1.96 * shares.std() / 200**0.5 == pytest.approx((high - low) / 2, rel=0.01)
    assert low < shares.mean() < high


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
