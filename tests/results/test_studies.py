"""Recorded studies say only what their seeds can tell, and stand beside the published log fairly."""

import json

import pandas as pd
import pytest

from cifar_ft import results
from cifar_ft.results import StudyError

QUESTIONS = {"One?": {"base": "", "other": "lr=0.5"}, "Two?": {"third": "flip=false", "base": ""}}


def rows(**accuracies):
    changes = {"base": None, "other": "lr=0.5", "third": "flip=false"}
    found = [
        {"changes": changes[name], "seed": seed, "val_accuracy": value, "train_accuracy": 1.1 * value, "minutes": 1.0}
        for name, values in accuracies.items()
        for seed, value in enumerate(values)
        if value
    ]
    return pd.DataFrame(found[::-1])  # in any order


def test_differences_are_paired_by_seed_with_an_interval_of_students_t():
    runs = rows(base=(0.70, 0.80, 0.90), other=(0.68, 0.79, 0.87), third=(0.80, 0.82, 0.84))
    found = results.summarize(runs, QUESTIONS)
    assert found[["question", "variant"]].to_numpy().tolist() == [
        ["One?", "base"], ["One?", "other"], ["Two?", "third"], ["Two?", "base"]
    ]  # fmt: skip
    other = found.iloc[1]
    assert (other["mean"], other["std"], other.seeds) == (pytest.approx(0.78), pytest.approx(0.0953939), 3)
    assert other.train == pytest.approx(1.1 * 0.78)
    # The differences -0.02, -0.01, -0.03 have a standard error of 0.01 / sqrt(3); t with 2 degrees of freedom: 4.3027.
    assert other.difference == pytest.approx(-0.02)
    assert (other.low, other.high) == (pytest.approx(-0.044841, abs=1e-5), pytest.approx(0.004841, abs=1e-5))
    assert found.iloc[3].difference == pytest.approx(-0.02)  # to its own question's first
    assert found.loc[[0, 2], ["difference", "low", "high"]].to_numpy().tolist() == [[0, 0, 0]] * 2


def test_only_seeds_that_both_have_are_compared():
    runs = rows(base=(0.70, 0.80, 0.90), other=(0, 0.79, 0.88), third=(0.80,))
    base, other = results.summarize(runs, QUESTIONS).to_dict("records")  # the second question has one seed
    assert (base["seeds"], other["seeds"]) == (3, 2)
    assert (other["mean"], other["difference"]) == (pytest.approx(0.835), pytest.approx(-0.015))


def test_a_summary_needs_two_seeds():
    with pytest.raises(StudyError, match="no variant has two seeds"):
        results.summarize(rows(base=(0.80,), other=(0.70,)), QUESTIONS)


def test_the_variants_are_those_of_all_questions_each_once_and_the_base_first():
    assert results.variants(QUESTIONS) == ["", "lr=0.5", "flip=false"]


def test_redrawn_runs_stand_beside_the_published_log_after_as_many_epochs(tmp_path):
    curves = {"reference_b64": [0.6, 0.8], "reference_b32": [0.5, 0.7], "something_else": [0.1, 0.1]}
    for name, curve in curves.items():
        (tmp_path / name).mkdir()
        frame = pd.DataFrame(
            {"epoch": [1, 2], "test_accuracy": curve, "test_loss": 0.5, "train_accuracy": 0.75, "lr": [0.01, 0.005]}
        )
        frame.to_csv(tmp_path / name / "history.csv", index=False)
        metrics = {"epochs": 2, "test_accuracy": curve[-1], "test_accuracy_ci95": [0.7, 0.9]}
        (tmp_path / name / "metrics.json").write_text(json.dumps(metrics))
    table = results.redrawn_table(results.recorded_redrawn(tmp_path)).set_index("run")
    first, second, published = table.to_dict("records")
    assert table.index[0] == results.REDRAWN["reference_b32"][2]  # the published settings come first
    assert (first["first_epoch"], first["test_accuracy"]) == (0.5, 0.7)
    assert (second["test_accuracy"], second["low"], second["train_accuracy"]) == (0.8, 0.7, 0.75)
    assert (second["last_lr"], pd.isna(published["last_lr"])) == (0.005, True)
    assert (published["epochs"], published["first_epoch"], published["test_accuracy"]) == (2, 0.696, 0.782)
    assert published["low"] < 0.782 < published["high"]


def test_what_was_recorded_is_whole():
    assert next(iter(results.recorded_redrawn())) == "reference_b32"  # what the others are compared with
    assert set(pd.read_csv(results.RECORDED / "ablations.csv").changes.fillna("")) <= set(results.variants())
    robustness = results.recorded_robustness()
    assert robustness["accuracy"] == pytest.approx(results.load_run(results.SHIPPED_RUN).accuracy, abs=0.001)
    assert {"corruptions", "without"} <= set(robustness)
    assert robustness["corruptions"][0]["corruption"] == "none"


@pytest.mark.parametrize("name", ["cpu", "quick"])
def test_recorded_runs_are_read(name):
    run = results.load_run(results.RECORDED / name)
    assert run.recipe.name == name
    assert run.metrics["test_accuracy"] == pytest.approx(run.accuracy)
