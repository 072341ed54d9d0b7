"""Comparing models: known values of each test, and seeds that do not pass for images."""

import json
import math

import numpy as np
import pytest
from scipy.stats import norm
from tiny_runs import write_run

from cifar_ft import results
from cifar_ft.recipes import get_recipe
from cifar_ft.results import ResultError


def test_difference_of_the_published_figures():
    far = results.difference_test(0.9312, 0.8834, 10_000)  # headline against the last line of the log
    assert far.z == pytest.approx(11.7, abs=0.05)
    assert far.p < 1e-20
    near = results.difference_test(0.9345, 0.9312, 10_000)  # batch 64 against batch 32
    assert near.difference == pytest.approx(0.0033)
    assert near.p > 0.3
    assert results.difference_test(0.5, 0.5, 10).p == 1
    assert results.difference_test(1, 1, 10).p == 1
    half = 1.959964 * math.sqrt(0.5 / 1000) / 2
    assert results.difference_test(0.5 + half, 0.5 - half, 1000).p == pytest.approx(0.05, abs=1e-4)
    with pytest.raises(ResultError, match=r"93\.12"):
        results.difference_test(93.12, 88.34, 10_000)  # per cent instead of fractions


def rights(only_a, only_b, both=0, neither=0):
    """Bool arrays of two models that are right on so many images."""
    kinds = np.repeat([[True, False], [False, True], [True, True], [False, False]], [only_a, only_b, both, neither], 0)
    return kinds[:, 0], kinds[:, 1]


@pytest.mark.parametrize(
    ("only_a", "only_b", "p"), [(5, 0, 2 / 2**5), (1, 9, 2 * 11 / 2**10), (3, 3, 1.0), (0, 0, 1.0)]
)
def test_mcnemar_is_a_coin_tossed_for_the_images_that_one_model_alone_gets_right(only_a, only_b, p):
    found = results.paired_test(*rights(only_a, only_b, both=80, neither=10))
    assert (found.only_a, found.only_b) == (only_a, only_b)
    assert found.p == pytest.approx(p)
    assert found.difference == pytest.approx((only_a - only_b) / (90 + only_a + only_b))


def test_paired_interval_is_that_of_a_bootstrap_over_images():
    right = rights(60, 30, both=350, neither=60)
    found = results.paired_test(*right)
    images = np.random.default_rng(1).integers(0, 500, (4000, 500))  # the same, image by image
    differences = (right[0].astype(int) - right[1])[images].mean(1)
    assert (found.low, found.high) == pytest.approx(np.quantile(differences, [0.025, 0.975]), abs=0.003)
    each = right[0].astype(int) - right[1]
    assert found.standard_error == pytest.approx(each.std() / math.sqrt(500), rel=0.03)
    assert found == results.paired_test(*right)  # the seed is fixed
    swapped = results.paired_test(*right[::-1])
    assert (swapped.difference, swapped.p) == (-found.difference, found.p)


def test_of_the_recorded_runs_the_paired_error_is_a_quarter_smaller():
    cpu, quick = (results.load_run(results.RECORDED / name) for name in ("cpu", "quick"))
    found = results.paired_test(cpu.predictions == cpu.labels, quick.predictions == quick.labels)
    assert found.difference == pytest.approx(cpu.accuracy - quick.accuracy)
    assert found.standard_error < 0.8 * results.difference_test(cpu.accuracy, quick.accuracy, 10_000).standard_error


def test_of_differences_of_2_8_errors_eight_in_ten_are_found():
    # what notebook 05 says of power: (z of 97.5 % + z of 80 %) standard errors
    discordant, n, rng = 0.06, 10_000, np.random.default_rng(0)
    difference = (norm.ppf(0.975) + norm.ppf(0.8)) * math.sqrt(discordant / n)
    shares = (discordant + difference) / 2, (discordant - difference) / 2, 1 - discordant
    pairs = rng.multinomial(n, shares, 400)[:, :2]
    found = [results.paired_test(*rights(a, b), resamples=1).p < 0.05 for a, b in pairs]
    assert np.mean(found) == pytest.approx(0.8, abs=0.06)


@pytest.mark.parametrize(
    ("right_a", "right_b"), [([True], [True, False]), ([1], [0]), ([[True]], [[False]]), ([], []), ([0.9], [0.8])]
)
def test_answers_that_cannot_be_paired_are_refused(right_a, right_b):
    with pytest.raises(ResultError, match=r"bool arrays|no images"):
        results.paired_test(right_a, right_b)


def test_comparison_averages_seeds_and_names_changed_settings(tmp_path):
    paths = [write_run(tmp_path / f"seed{seed}", seed=seed, seconds=60.0 * (seed + 1)) for seed in range(3)]
    paths.append(write_run(tmp_path / "changed", recipe=get_recipe("quick", "batch_size=77"), shift=1.0))
    frame = results.compare_runs(paths)
    assert list(frame.columns[:5]) == ["recipe", "backbone", "epochs", "seeds", "test_accuracy"]
    assert frame["seeds"].tolist() == [3, 1]
    assert "batch_size=77" in frame["recipe"][1]
    scores = [results.load_run(path).accuracy for path in paths]
    assert frame["test_accuracy"][0] == pytest.approx(np.mean(scores[:3]))
    assert frame["std"][0] == pytest.approx(np.std(scores[:3], ddof=1))
    assert frame["minutes"][0] == pytest.approx(2)
    # the seeds share their test images: three of them do not make the interval narrower than one would be
    assert (frame["low"][0], frame["high"][0]) == results.wilson_interval(round(np.mean(scores[:3]) * 200), 200)
    alone = results.compare_runs([results.load_run(paths[0])])
    assert alone["recipe"][0] == "quick"
    assert results.compare_runs([]).empty


def test_a_run_from_before_a_setting_existed_is_one_of_its_default(tmp_path):
    paths = [write_run(tmp_path / name, seed=seed) for seed, name in enumerate(("earlier", "later"))]
    config = json.loads((paths[0] / "config.json").read_text())
    del config["recipe"]["cutout"]
    (paths[0] / "config.json").write_text(json.dumps(config))
    assert results.compare_runs(paths)["seeds"].tolist() == [2]
