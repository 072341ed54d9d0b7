"""Numbers in the README come from recorded runs, and the shipped model is the recorded one."""

import json
import re
from pathlib import Path

import pytest
from PIL import Image

from cifar_ft import results
from cifar_ft.predictions import SHIPPED, Predictor
from tools.facts import MARK
from tools.report import recorded_runs, results_table

ROOT = Path(__file__).resolve().parents[1]
FILES = ("config.json", "history.csv", "metrics.json", "test_logits.npz")


def test_the_readmes_table_is_the_one_that_results_give():
    assert results_table(recorded_runs(ROOT)) in (ROOT / "README.md").read_text("utf-8")


def test_a_changed_result_would_change_the_readme():
    run = recorded_runs(ROOT)[0]
    run.metrics["test_accuracy"] += 0.01
    assert results_table([run]) not in (ROOT / "README.md").read_text("utf-8")


def test_recorded_figures_agree_with_the_recorded_logits():
    for run in recorded_runs(ROOT):
        n = len(run.labels)
        assert n == run.metrics["test_images"] == 10_000
        assert run.metrics["test_accuracy"] == pytest.approx(run.correct / n)
        assert run.metrics["test_accuracy_ci95"] == pytest.approx(results.wilson_interval(run.correct, n))
        assert run.metrics["epochs"] == len(run.history)


def test_quick_reaches_ninety_per_cent():
    quick = results.load_run(ROOT / "results" / "quick")
    assert quick.recipe.name == "quick"
    assert quick.accuracy >= 0.9


def test_the_shipped_run_is_the_recorded_one():
    recorded = ROOT / "results" / results.load_run(results.SHIPPED_RUN).recipe.name
    for name in FILES:
        assert (results.SHIPPED_RUN / name).read_bytes() == (recorded / name).read_bytes()


def test_the_shipped_model_says_the_recorded_accuracy_and_is_small():
    run = results.load_run(results.SHIPPED_RUN)
    assert results.accuracy_text(run.correct, len(run.labels)) in Predictor.shipped().source
    assert SHIPPED.stat().st_size < 10_000_000


@pytest.mark.data
def test_the_shipped_model_gives_the_recorded_answers():
    import numpy as np

    from cifar_ft.data import load_cifar10

    test, run = load_cifar10(echo=lambda line: None).test, results.load_run(results.SHIPPED_RUN)
    chosen = test.subset(1000, seed=1).indices.numpy()
    said = Predictor.shipped().predict_proba(test.images[chosen]).argmax(1)
    assert np.mean(said == run.predictions[chosen]) > 0.985  # 16-bit weights move few answers
    assert abs(np.mean(said == run.labels[chosen]) - np.mean(run.predictions[chosen] == run.labels[chosen])) < 0.01


def test_every_picture_of_the_readme_exists_and_can_be_opened():
    named = re.findall(r'src="(images/[^"]+)"', (ROOT / "README.md").read_text("utf-8"))
    assert named
    for name in named:
        Image.open(ROOT / name).verify()


def test_every_image_of_the_readme_has_an_alternative_text():
    for tag in re.findall(r"<img[^>]*>", (ROOT / "README.md").read_text("utf-8")):
        assert re.search(r'alt="[^"]{10,}"', tag), tag


def test_no_recorded_file_names_a_place_on_a_machine():
    for path in (ROOT / "results").rglob("*.json"):
        text = json.dumps(json.loads(path.read_text("utf-8")))
        assert not re.search(r"/(root|home|work|tmp|Users)/", text), path


def test_the_quick_start_states_the_recorded_accuracy_and_minutes():
    quick = results.load_run(ROOT / "results" / "quick")
    course = json.loads((ROOT / "results" / "quick" / "course.json").read_text("utf-8"))
    readme = MARK.sub(r"\2", (ROOT / "README.md").read_text("utf-8"))
    assert results.accuracy_text(quick.correct, len(quick.labels)) in readme
    assert f"about {course['total_seconds'] / 60:.0f} minutes for the six notebooks" in readme
    assert f"{quick.metrics['train_seconds'] / 60:.0f} of them training" in readme


def test_the_notebooks_show_the_recorded_runs():
    for name, folder in (("04_training", ROOT / "results" / "quick"), ("05_results", results.SHIPPED_RUN)):
        run = results.load_run(folder)
        said = "test accuracy: " + results.accuracy_text(run.correct, len(run.labels))
        assert said in (ROOT / "notebooks" / f"{name}.ipynb").read_text("utf-8")
