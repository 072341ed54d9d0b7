"""Promise: studies keep what they measured, never see the test set, and can be stopped and shared."""

from __future__ import annotations

import itertools
import json
import threading

import pandas as pd
import pytest
from safetensors.torch import save_file
from tiny_runs import recipe
from typer.testing import CliRunner

from cifar_ft import results, training
from cifar_ft.models import build_model
from cifar_ft.recipes import get_recipe, parse_overrides
from cifar_ft.results import StudyError
from tools import study
from tools.study import BASE, append_row, read_rows, redraw, run_ablations, try_recipe


@pytest.fixture(autouse=True)
def quick(one_thread):
    """Small tensors are quicker on one thread."""


def test_every_variant_is_a_recipe_and_those_of_a_question_differ():
    assert results.variants()[0] == ""
    for question, each in results.ABLATIONS.items():
        recipes = [get_recipe("quick", parse_overrides(BASE) | parse_overrides(changes)) for changes in each.values()]
        assert len({recipe.model_dump_json() for recipe in recipes}) == len(each) > 1, question


def test_a_study_never_gets_the_test_images(small_data, monkeypatch):
    seen = []
    monkeypatch.setattr(training, "fit", lambda recipe, data, *rest, **more: seen.append(data) or 1 / 0)
    with pytest.raises(ZeroDivisionError):
        try_recipe(recipe(), small_data)
    (data,) = seen
    validation = {image.numpy().tobytes() for image in small_data.val.images}
    assert all(image.numpy().tobytes() in validation for image in data.test.images)
    assert data.train is small_data.train


def test_a_try_is_scored_on_validation_and_logged(small_data, tmp_path, monkeypatch):
    monkeypatch.setattr(study, "load_cifar10", lambda: small_data)
    file = tmp_path / "search.csv"
    changes = "backbone=resnet18 weights=none last_stage=1 image_size=16 epochs=2 train_images=none val_images=none "
    changes += "test_images=none precision=fp32 select=best lr=0.5"
    for note in ("first", ""):
        options = [word for change in changes.split() for word in ("--set", change)]
        done = CliRunner().invoke(study.app, ["try", "--recipe", "smoke", "--note", note, "--out", str(file), *options])
        assert done.exit_code == 0, done.exception
    rows = read_rows(file)
    assert [(row["note"], row["changes"]) for row in rows] == [("first", changes), ("", changes)]
    accuracy = float(rows[0]["val_accuracy"])
    assert accuracy == round(accuracy * 40) / 40
    assert float(rows[0]["best_val_accuracy"]) == accuracy  # the epoch that was selected
    assert 1 <= int(rows[0]["best_epoch"]) <= 2
    assert float(rows[0]["minutes"]) > 0
    with pytest.raises(StudyError, match="columns"):
        append_row(file, {"other": 1})
    assert read_rows(file) == rows
    monkeypatch.setattr(study, "try_recipe", lambda recipe, data: {"val_accuracy": 0.5, "minutes": 0.1})
    monkeypatch.setenv("HOME", str(tmp_path))
    done = CliRunner().invoke(study.app, ["try", "--set", "weights=/home/ada/r50.pth", "--out=~/b.csv"])
    assert [row["changes"] for row in read_rows(tmp_path / "b.csv")] == ["weights=r50.pth"], done.exception


def test_ablations_resume_where_they_were_stopped(small_data, tmp_path, monkeypatch):
    asked = []

    def fake(recipe, data):
        asked.append((recipe.lr, recipe.flip, recipe.seed))
        if len(asked) == 4:
            raise KeyboardInterrupt
        return {"val_accuracy": 0.5, "minutes": 0.1}

    monkeypatch.setattr(study, "try_recipe", fake)
    monkeypatch.setattr(results, "variants", lambda: ["", "lr=0.5", "flip=false"])
    file = tmp_path / "ablations.csv"
    with pytest.raises(KeyboardInterrupt):
        run_ablations(small_data, file, (0, 1))
    assert len(read_rows(file)) == 3
    run_ablations(small_data, file, (0, 1))
    assert asked[4:] == [(0.001, True, 1), (0.5, True, 1), (0.001, False, 1)]
    rows = read_rows(file)
    assert len({(row["changes"], row["seed"]) for row in rows}) == len(rows) == 6


@pytest.mark.parametrize("name", ["smoke", "quick", "cpu", "modern"])
def test_every_recipe_with_validation_can_be_tried(small_data, monkeypatch, name):
    """Whatever part of the test set a recipe asks for: it is not handed out."""
    tiny = "backbone=resnet18 weights=none last_stage=1 image_size=16 epochs=1 train_sizes= freeze=none train_images=40"
    tiny += " val_images=none precision=fp32 ema_decay=0"
    found = try_recipe(get_recipe(name, tiny), small_data)
    assert 0 <= found["val_accuracy"] <= 1


@pytest.mark.parametrize("name", ["speedrun", "reference_b32"])
def test_a_recipe_without_validation_cannot_be_tried_and_is_told_how(monkeypatch, tmp_path, name):
    monkeypatch.setattr(study, "load_cifar10", lambda: 1 / 0)
    done = CliRunner().invoke(study.app, ["try", "--recipe", name, "--out", str(tmp_path / "search.csv")])
    assert done.exit_code == 2
    assert "--set validation=true" in " ".join(done.output.replace("│", " ").split())
    assert list(tmp_path.iterdir()) == []


def test_two_at_once_share_the_ablations(small_data, tmp_path, monkeypatch):
    """Neither trains what the other has trained or is at."""
    asked, both = [], threading.Barrier(2, timeout=60)

    def fake(recipe, data):
        asked.append((recipe.lr, recipe.seed))
        if len(asked) <= 2:
            both.wait()  # each has begun one
        return {"val_accuracy": 0.5, "minutes": 0.1}

    monkeypatch.setattr(study, "try_recipe", fake)
    monkeypatch.setattr(results, "variants", lambda: ["", "lr=0.5", "lr=0.1"])
    file = tmp_path / "ablations.csv"
    workers = [threading.Thread(target=run_ablations, args=(small_data, file, (0, 1))) for _ in "ab"]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(60)
    assert len(asked) == len(set(asked)) == len(read_rows(file)) == 6


def test_several_may_append_to_a_table_at_once(tmp_path):
    file = tmp_path / "log.csv"
    workers = [
        threading.Thread(target=lambda who=who: [append_row(file, {"who": who, "i": i}) for i in range(20)])
        for who in "ab"
    ]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(60)
    assert {(row["who"], int(row["i"])) for row in read_rows(file)} == set(itertools.product("ab", range(20)))


def test_the_published_recipe_is_redrawn_without_weights_or_paths(small_data, tmp_path, monkeypatch):
    monkeypatch.setenv("CIFAR_FT_RUNS", str(tmp_path / "runs"))
    monkeypatch.setitem(study.REDRAWN, "one", ("reference_b32_cosine", "image_size=16", "small"))
    source = tmp_path / "private" / "weights.safetensors"
    source.parent.mkdir()
    model = build_model(get_recipe("reference_b32", "weights=none last_stage=1"))
    save_file({k: v.contiguous() for k, v in model.state_dict().items() if not k.startswith(("fc", "conv1"))}, source)
    out = tmp_path / "results" / "one"
    settings = f"weights={source} last_stage=1 precision=fp32 batch_size=60"
    run = redraw("one", small_data, out, 2, settings)
    assert sorted(path.name for path in out.iterdir()) == ["config.json", "history.csv", "metrics.json"]
    assert str(tmp_path) not in (out / "config.json").read_text() + (out / "metrics.json").read_text()
    assert json.loads((out / "config.json").read_text())["weights"]["source"] == "the file weights.safetensors"
    rows = pd.read_csv(out / "history.csv")
    assert rows.test_accuracy.notna().all()  # logged each epoch, as the publication did
    assert rows.lr.tolist() == [0.01, 0.005]  # a cosine over the run, one stair an epoch
    again = redraw("one", small_data, out, 2, settings)
    assert again.metrics == run.metrics  # a finished run is not repeated
    assert results.newest_run() is None  # nor do predictions take it for the user's newest model


def test_what_is_redrawn_differs_in_what_it_says():
    recipes = {name: get_recipe(base, changes) for name, (base, changes, _) in results.REDRAWN.items()}
    base = recipes["reference_b32"]
    assert recipes["reference_b32_random"] == base.replace(weights="none")
    assert recipes["reference_b64"].batch_size == 2 * base.batch_size
    assert recipes["reference_b32_cosine"].schedule == "cosine"
    assert recipes["untouched_one_cycle"].stem == "pretrained"
    assert all(recipe.track_test for recipe in recipes.values())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--name", "nonsense"], "choose from reference_b32"),
        (["--set", "epochz=3"], "did you mean 'epochs'"),
    ],
)
def test_redrawn_refuses_what_it_cannot_do_before_it_begins(arguments, message, tmp_path, monkeypatch):
    monkeypatch.setattr(study, "load_cifar10", lambda: 1 / 0)
    done = CliRunner().invoke(study.app, ["redrawn", *arguments, "--out", str(tmp_path / "out")])
    assert done.exit_code != 0
    assert message in " ".join((done.output + str(done.exception)).replace("│", " ").split())
    assert list(tmp_path.iterdir()) == []


def test_runs_are_compared_with_the_first_on_validation_clean_and_corrupted(small_data, tmp_path, monkeypatch):
    monkeypatch.setattr(study, "load_cifar10", lambda: study.without_test(small_data))
    for share in (0, 0.5):
        training.fit(recipe(epochs=1, degrade=share), small_data, tmp_path / f"run{share}")
    options = [word for share in (0, 0.5) for word in ("--run", str(tmp_path / f"run{share}"))]
    done = CliRunner().invoke(study.app, ["robustness", *options, "--out", str(tmp_path / "defence.json")])
    assert done.exit_code == 0, done.exception
    found = json.loads((tmp_path / "defence.json").read_text())
    first, second = found["runs"]
    assert found["images"] == first["corrupted_images"] == len(small_data.val)
    assert ("degrade" in first["changes"], second["changes"]["degrade"]) == (False, 0.5)
    assert (first["difference"], first["mean_difference"]) == ([0, 0, 0], [0, 0, 0])
    for run in (first, second):
        clean = run["corruptions"][0]
        assert (clean["corruption"], clean["accuracy"]) == ("none", run["accuracy"])
        means = [row["accuracy"] for row in run["corruptions"] if row["corruption"] == results.MEAN]
        assert run["mean"] == pytest.approx(sum(means) / 5)
        for name, value in (("difference", run["accuracy"]), ("mean_difference", run["mean"])):
            difference, low, high = run[name]
            assert difference == pytest.approx(value - first["accuracy" if name == "difference" else "mean"])
            assert low <= difference <= high
