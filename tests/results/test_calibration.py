"""Calibration: a percentage means what the records say it does, and the surest are answered first."""

import json
import math

import numpy as np
import pytest
import torch

from cifar_ft import results
from cifar_ft.results import ResultError


def drawn(n=20_000):
    """Logits and labels drawn from their softmax: a perfectly calibrated model."""
    generator = torch.Generator().manual_seed(1)
    logits = 2 * torch.randn(n, 10, generator=generator)
    return logits, torch.multinomial(logits.softmax(1), 1, generator=generator).squeeze(1)


@pytest.mark.parametrize("temperature", [0.05, 0.7, 1.0, 20.0])
def test_with_power_1_probabilities_are_those_of_temperature_scaling(temperature):
    logits, _ = drawn(100)
    found = results.probabilities(logits, temperature)
    torch.testing.assert_close(found, (logits / temperature).softmax(1))


def test_a_power_moves_close_decisions_to_the_middle_and_clear_ones_to_the_top_and_keeps_the_order():
    logits = torch.tensor([[1.0, 0.5, -5], [5.0, 0.0, -5]])
    plain, found = results.probabilities(logits), results.probabilities(logits, power=2.0)
    torch.testing.assert_close(found[0, :2], torch.tensor([0.0, -0.25]).softmax(0))  # e ** -36 is nothing
    assert 0.5 < found[0, 0] < plain[0, 0] < plain[1, 0] < found[1, 0]
    many, _ = drawn(1000)
    assert results.probabilities(many.double(), 1.3, 1.8).argsort(1).equal(many.argsort(1))


@pytest.mark.parametrize(("temperature", "power"), [(0.5, 1.0), (3.0, 1.0), (1.0, 2.0), (2.0, 0.7)])
def test_a_known_temperature_and_power_are_found(temperature, power):
    true, labels = drawn()
    gap = true.amax(1, keepdim=True) - true
    logits = -temperature * gap ** (1 / power)
    assert results.fit_scaling(logits, labels) == pytest.approx((temperature, power), rel=0.04)


def test_the_fit_of_a_perfect_model_stays_finite_and_numbers_that_are_none_are_refused():
    labels = torch.arange(10).repeat(5)
    temperature, power = results.fit_scaling(5 * torch.eye(10)[labels], labels)
    assert temperature >= 0.05 - 1e-9
    assert 0.25 <= power <= 4 + 1e-9
    with pytest.raises(ResultError, match="finite"):
        results.fit_scaling(torch.full((5, 10), math.nan), labels[:5])


@pytest.fixture
def scored():
    logits, labels = drawn(500)
    return labels.numpy(), (1.5 * logits).softmax(1).numpy()


@pytest.mark.parametrize("bins", [1, 10, 15])
def test_calibration_error_is_that_of_torchmetrics_and_of_the_formula(scored, bins):
    from torchmetrics.functional.classification import multiclass_calibration_error

    labels, probabilities = scored
    frame, ece = results.reliability(labels, probabilities, bins)
    scores, targets = torch.from_numpy(probabilities), torch.from_numpy(labels)
    expected = multiclass_calibration_error(scores, targets, num_classes=10, n_bins=bins)
    assert ece == pytest.approx(expected.item(), abs=1e-6)
    gaps = (frame["accuracy"] - frame["confidence"]).abs().fillna(0)
    assert (gaps * frame["count"]).sum() / len(labels) == pytest.approx(ece, abs=1e-9)
    full = frame[frame["count"] > 0]
    assert full["confidence"].between(full["low_edge"], full["high_edge"]).all()
    assert [*zip(full.low, full.high, strict=True)] == [
        results.wilson_interval(*pair) for pair in zip(full.right, full["count"], strict=True)
    ]
    assert (frame["count"].sum(), frame["right"].sum()) == (500, (probabilities.argmax(1) == labels).sum())


def test_bins_can_be_given_by_their_edges_and_certain_predictions_fall_into_the_last():
    probabilities = np.array([[1.0, 0.0], [0.5, 0.5], [0.05, 0.95], [0.25, 0.75]])
    frame, ece = results.reliability([0, 1, 1, 0], probabilities, (0, 0.5, 0.9, 1))
    assert frame["count"].tolist() == [0, 2, 2]
    assert frame["right"].tolist() == [0, 0, 2]
    assert frame.loc[0, ["confidence", "accuracy", "low", "high"]].isna().all()
    assert ece == pytest.approx((1.25 + 0.05) / 4)


@pytest.mark.parametrize("bins", [0, -1, (0.2, 1), (0, 0.5), (0, 0.5, 0.5, 1), (0,)])
def test_bins_that_do_not_cover_all_are_refused(scored, bins):
    with pytest.raises(ResultError, match="rise from 0 to 1"):
        results.reliability(*scored, bins)


def test_stated_is_how_often_each_percentage_was_right_without_bins_of_a_few_images():
    logits = torch.tensor([[4.0, 0]] * 50 + [[2.0, 0]] * 30 + [[0.1, 0]] * 19)  # 98, 88 and 52 per cent
    labels = [0] * 49 + [1] + [0] * 24 + [1] * 6 + [0] * 19
    assert results.stated(logits, labels, 1.0, 1.0) == [[0.8, 0.9, 30, 24], [0.9, 0.99, 50, 49]]


@pytest.mark.parametrize("name", ["cpu", "quick"])
def test_the_recorded_calibration_is_that_of_the_recorded_logits(name):
    run = results.load_run(results.RECORDED / name)
    with np.load(run.path / "val_logits.npz") as val:
        found = results.fit_calibration(val["logits"], val["labels"], tested=(run.logits, run.labels))
    stated = found.pop("stated")
    recorded = dict(run.metrics["calibration"])
    assert recorded.pop("stated") == json.loads(json.dumps(stated))
    assert recorded == pytest.approx(found, rel=1e-4)


def test_the_surest_are_answered_first():
    found = results.selective_accuracy(np.array([True, False, True, True]), np.array([0.9, 0.6, 0.8, 0.55]))
    assert found.coverage.tolist() == [0.25, 0.5, 0.75, 1.0]
    assert found.threshold.tolist() == pytest.approx([0.9, 0.8, 0.6, 0.55])
    assert found.accuracy.tolist() == pytest.approx([1, 1, 2 / 3, 3 / 4])


def test_the_band_of_a_curve_is_that_of_a_share_and_holds_it():
    draw = np.random.default_rng(0)
    correct = draw.random(1000) < 0.9
    found = results.selective_accuracy(correct, draw.random(1000), resamples=400)
    low, high = results.wilson_interval(int(correct.sum()), 1000)
    assert found[["low", "high"]].iloc[-1].tolist() == pytest.approx([low, high], abs=0.005)
    one, other = (results.selective_accuracy(correct, found.threshold, 2, seed).low for seed in (3, 4))
    assert not one.equals(other)


@pytest.mark.parametrize(
    ("correct", "sureness"), [([1, 0], [0.5, 0.4]), ([True], [0.5, 0.4]), ([], []), ([[True]], [[0.5]])]
)
def test_answers_without_their_sureness_are_refused(correct, sureness):
    with pytest.raises(ResultError, match="one number an image"):
        results.selective_accuracy(correct, sureness)
