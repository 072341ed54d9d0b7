"""Metrics: the known values, honest intervals, and nothing computed from what cannot be right."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from cifar_ft import results
from cifar_ft.results import ResultError


@pytest.mark.parametrize(
    ("correct", "total", "low", "high"),
    [(0, 10, 0.0, 0.27754), (10, 10, 0.72246, 1.0), (81, 263, 0.2553, 0.3662), (15, 148, 0.0624, 0.1605)],
)
def test_wilson_interval_gives_the_known_values(correct, total, low, high):
    # without hits the upper end is z^2 / (n + z^2); 81/263, 15/148: table I of Newcombe, Stat. Med. 17 (1998)
    assert results.wilson_interval(correct, total) == pytest.approx((low, high), abs=5.1e-5)


@given(st.integers(1, 10**6).flatmap(lambda n: st.tuples(st.integers(0, n), st.just(n))), st.floats(0, 10))
def test_wilson_interval_holds_the_fraction_and_stays_a_fraction(counts, z):
    correct, total = counts
    low, high = results.wilson_interval(correct, total, z)
    assert 0 <= low <= correct / total <= high <= 1
    assert results.wilson_interval(total - correct, total, z) == pytest.approx((1 - high, 1 - low), abs=1e-9)


@pytest.mark.parametrize("counts", [(-1, 10), (11, 10), (0, 0), (0.9, 1), (math.nan, 10), ("9", 10)])
def test_impossible_counts_are_refused_and_named(counts):
    with pytest.raises(ResultError, match=f"correct=.*{counts[0]}"):
        results.wilson_interval(*counts)


def test_accuracy_is_printed_with_its_interval():
    assert results.accuracy_text(912, 1000) == "91.2 % [89.3, 92.8]"
    assert results.accuracy_text(9120, 10000) == "91.2 % [90.6, 91.7]"


@pytest.fixture
def scored():
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 10, 500)
    logits = rng.normal(0, 1, (500, 10))
    logits[np.arange(500), labels] += 2
    return labels, torch.from_numpy(logits).softmax(1).numpy()


def test_confusion_counts_each_image_in_the_row_of_its_true_class(scored):
    labels, probabilities = scored
    predictions = probabilities.argmax(1)
    matrix = results.confusion(labels, predictions)
    assert matrix.sum(axis=1).tolist() == np.bincount(labels, minlength=10).tolist()
    assert matrix.sum(axis=0).tolist() == np.bincount(predictions, minlength=10).tolist()
    assert results.confusion([0, 0, 1], [2, 2, 1])[0, 2] == 2


def test_the_pairs_confused_most_count_both_ways():
    matrix = np.array([[50, 3, 1], [4, 40, 0], [5, 0, 60]])
    frame = results.most_confused(matrix, ["cat", "dog", "car"], k=2)
    assert frame.to_dict("list") == {
        "class": ["cat", "cat"], "other": ["dog", "car"], "confusions": [7, 6], "share": [7 / 13, 6 / 13],
    }  # fmt: skip
    assert results.most_confused(np.diag([5, 5]), ["a", "b"])["share"].tolist() == [0]


def test_per_class_accuracy_reads_the_diagonal_and_leaves_absent_classes_open():
    frame = results.per_class_accuracy([0, 0, 1], [0, 1, 1], ["a", "b", "c"])
    assert frame["class"].tolist() == ["a", "b", "c"]
    assert frame["n"].tolist() == [2, 1, 0]
    assert frame["accuracy"].tolist()[:2] == [0.5, 1.0]
    assert frame.loc[2, ["accuracy", "low", "high"]].isna().all()
    assert (frame["low"][0], frame["high"][0]) == results.wilson_interval(1, 2)
    assert results.per_class_accuracy([9], [9])["class"].iloc[-1] == "truck"


def test_mistakes_come_most_confident_first(scored):
    labels, probabilities = scored
    frame = results.most_confident_mistakes(labels, probabilities, k=5)
    wrong = probabilities.argmax(1) != labels
    assert len(frame) == 5
    assert (frame["label"] != frame["prediction"]).all()
    assert frame["probability"].tolist() == pytest.approx(sorted(probabilities.max(1)[wrong])[:-6:-1])
    assert (labels[frame["index"]] == frame["label"]).all()
    assert results.most_confident_mistakes([0], [[0.9, 0.1]]).empty


def test_unusable_scores_are_refused_with_the_reason(scored):
    labels, probabilities = scored
    broken = probabilities.copy()
    broken[7, 3] = np.nan
    for function in (results.reliability, results.most_confident_mistakes):
        with pytest.raises(ResultError, match="image 7 are not finite"):
            function(labels, broken)
        with pytest.raises(ResultError, match="499 labels for 500 images"):
            function(labels[1:], probabilities)
        with pytest.raises(ResultError, match="softmax"):
            function(labels, np.log(probabilities))
    with pytest.raises(ResultError, match="499 predictions for 500 images"):
        results.confusion(labels, labels[1:])
    with pytest.raises(ResultError, match="0 to 9"):
        results.confusion([10], [0])
    with pytest.raises(ResultError, match="float64"):
        results.confusion([0.0], [0])
