"""Studies keep what they measured, never see the test set, and say only what their seeds can tell."""

from __future__ import annotations

import itertools
import json

import pandas as pd
import pytest
from safetensors.torch import save_file
from tiny_runs import quiet, recipe

from cifar_ft import plots, results
from cifar_ft.models import build_model
from cifar_ft.recipes import get_recipe, parse_overrides
from tools.study import BASE, Log, log_try, redraw, run_ablations, try_recipe

QUESTIONS = {"One?": {"base": "", "other": "lr=0.5"}, "Two?": {"base": "", "third": "flip=false"}}


def test_every_variant_is_a_recipe_that_differs_from_the_base():
    base = get_recipe("quick", BASE)
    assert results.variants()[0] == ""
    for changes in results.variants()[1:]:
        assert get_recipe("quick", parse_overrides(BASE) | parse_overrides(changes)) != base
    for question, each in results.ABLATIONS.items():
        assert "" in each.values(), f"{question} is not compared with the base"


def test_a_study_never_gets_the_test_images(small_data, monkeypatch):
    seen = []
    monkeypatch.setattr(training, "fit", lambda recipe, data, *rest, **more: seen.append(data) or 1 / 0)
    with pytest.raises(ZeroDivisionError):
        try_recipe(recipe(), small_data)
    (data,) = seen
    validation = {image.numpy().tobytes() for image in small_data.val.images}
    assert all(image.numpy().tobytes() in validation for image in data.test.images)
    assert data.train is small_data.train


def test_a_try_is_scored_on_validation_and_logged(small_data, tmp_path):
    file = tmp_path / "search.csv"
    changes = "backbone=resnet18 weights=none last_stage=1 image_size=16 epochs=3 train_images=none val_images=none"
    changes = [*changes.split(), "test_images=none", "precision=fp32"]
    first = log_try("smoke", changes, small_data, file, note="first", echo=quiet)
    log_try("smoke", [*changes, "lr=0.1"], small_data, file, echo=quiet)
    rows = Log(file).rows()
    assert [row["note"] for row in rows] == ["first", ""]
    assert rows[1]["changes"].endswith("lr=0.1")
    assert float(rows[0]["val_accuracy"]) == first["val_accuracy"] == round(first["val_accuracy"] * 40) / 40
    assert first["best_val_accuracy"] >= first["val_accuracy"]
    assert 1 <= first["best_epoch"] <= 3
    assert float(rows[0]["minutes"]) > 0
    with pytest.raises(results.StudyError, match="columns"):
        Log(file).append({"other": 1})
    assert Log(file).rows() == rows


def test_a_try_that_keeps_its_best_epoch_is_logged_with_that_one(small_data):
    found = try_recipe(recipe(select="best", epochs=4, lr=0.5, ema_decay=0.0), small_data, echo=quiet)
    assert found["val_accuracy"] == found["best_val_accuracy"]


def test_ablations_go_on_where_they_were_stopped(small_data, tmp_path, monkeypatch):
    asked = []

    def fake(recipe, data, echo):
        asked.append((recipe.lr, recipe.flip, recipe.seed))
        if len(asked) == 4:
            raise KeyboardInterrupt
        return {"val_accuracy": 0.5, "minutes": 0.1}

    monkeypatch.setattr(studies, "try_recipe", fake)
    monkeypatch.setattr(studies, "variants", lambda: ["", "lr=0.5", "flip=false"])
    file = tmp_path / "ablations.csv"
    with pytest.raises(KeyboardInterrupt):
        run_ablations(small_data, file, (0, 1), echo=quiet)
    assert len(Log(file).rows()) == 3
    run_ablations(small_data, file, (0, 1), echo=quiet)
    assert asked[4:] == [(0.001, True, 1), (0.5, True, 1), (0.001, False, 1)]
    rows = Log(file).rows()
    assert len({(row["changes"], row["seed"]) for row in rows}) == len(rows) == 6


def _rows(**accuracies):
    scores = {"": accuracies["base"], "lr=0.5": accuracies["other"], "flip=false": accuracies["third"]}
    rows = [
        {"changes": changes or None, "seed": seed, "val_accuracy": value, "minutes": 1.0}
        for changes, values in scores.items()
        for seed, value in enumerate(values)
    ]
    return pd.DataFrame(rows)


def test_a_difference_is_told_from_the_spread_of_seeds():
    rows = _rows(base=(0.80, 0.81, 0.82), other=(0.70, 0.71, 0.72), third=(0.80, 0.82, 0.84))
    found = results.summarize(rows, QUESTIONS).set_index("variant")
    other, third = found.loc["other"], found.loc["third"]
    assert (other["mean"], other["std"], other.seeds) == (pytest.approx(0.71), pytest.approx(0.01), 3)
    assert other.difference == pytest.approx(-0.10)
    pooled = ((0.01**2 + 0.01**2 + 0.02**2) / 3) ** 0.5
    assert other.standard_error == pytest.approx((2 * pooled**2 / 3) ** 0.5)  # three seeds may agree by chance
    assert third.standard_error == pytest.approx(((pooled**2 + 0.02**2) / 3) ** 0.5)
    assert other.distinguishable
    assert not third.distinguishable
    assert not found.loc["base"].distinguishable.any()
    axes = plots.ablation_chart(results.summarize(rows, QUESTIONS)).axes
    assert [tick.get_text() for tick in axes[0].get_yticklabels()] == ["base", "other", "base", "third"]


def test_a_summary_needs_two_seeds_of_everything():
    rows = _rows(base=(0.80, 0.81), other=(0.70, 0.71), third=(0.80,))
    with pytest.raises(results.StudyError, match="flip=false"):
        results.summarize(rows, QUESTIONS)


def test_processes_may_share_a_log(tmp_path):
    import subprocess
    import sys

    code = "import sys; from cifar_ft.studies import Log\n"
    code += "for i in range(20): Log(sys.argv[1]).append({'who': sys.argv[2], 'i': i})"
    file = tmp_path / "log.csv"
    workers = [subprocess.Popen([sys.executable, "-c", code, str(file), who]) for who in "ab"]
    assert [worker.wait(120) for worker in workers] == [0, 0]
    found = {(row["who"], int(row["i"])) for row in Log(file).rows()}
    assert found == set(itertools.product("ab", range(20)))


def test_the_published_recipe_is_redrawn_without_weights_or_paths(small_data, tmp_path, monkeypatch):
    monkeypatch.setenv("CIFAR_FT_RUNS", str(tmp_path / "runs"))
    monkeypatch.setattr(studies, "REDRAWN", {"one": ("reference_b32_cosine", "image_size=16", "small")})
    source = tmp_path / "private" / "weights.safetensors"
    source.parent.mkdir()
    model = build_model(get_recipe("reference_b32", "weights=none"), quiet)
    save_file({k: v.contiguous() for k, v in model.state_dict().items() if not k.startswith(("fc", "conv1"))}, source)
    out = tmp_path / "results" / "one"
    settings = "last_stage=1 precision=fp32 batch_size=60"
    run = redraw("one", small_data, source, out, 2, settings=settings, echo=quiet)
    assert sorted(path.name for path in out.iterdir()) == ["config.json", "history.csv", "metrics.json"]
    assert str(tmp_path) not in (out / "config.json").read_text()
    assert "weights.safetensors" in (out / "config.json").read_text()
    rows = pd.read_csv(out / "history.csv")
    assert rows.test_accuracy.notna().all()  # logged each epoch, as the publication did
    assert rows.lr.tolist() == [0.01, 0.005]  # decays to zero within the run
    again = redraw("one", small_data, source, out, 2, settings=settings, echo=quiet)
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


def _redrawn(folder, **accuracies):
    for name, curve in accuracies.items():
        run = folder / name
        run.mkdir(parents=True)
        frame = pd.DataFrame({"epoch": range(1, len(curve) + 1), "test_accuracy": curve, "test_loss": 0.5})
        frame.assign(train_accuracy=0.75).to_csv(run / "history.csv", index=False)
        metrics = {"epochs": len(curve), "test_accuracy": curve[-1], "test_accuracy_ci95": [0.7, 0.9]}
        (run / "metrics.json").write_text(json.dumps(metrics | {"train_seconds": 600}))


def test_redrawn_runs_stand_beside_the_published_log_after_as_many_epochs(tmp_path):
    _redrawn(tmp_path, reference_b64=[0.6, 0.8], reference_b32=[0.5, 0.7], something_else=[0.1, 0.1])
    table = results.redrawn_table(results.recorded_redrawn(tmp_path)).set_index("run")
    first, second, published = table.to_dict("records")
    assert table.index[0] == results.REDRAWN["reference_b32"][2]  # the published settings come first
    assert (first["first_epoch"], first["test_accuracy"], first["minutes"]) == (0.5, 0.7, 10)
    assert second["test_accuracy"] == 0.8
    assert (published["epochs"], published["first_epoch"], published["test_accuracy"]) == (2, 0.696, 0.782)
    assert published["low"] < 0.782 < published["high"]


def test_the_chart_of_redrawn_runs_draws_accuracy_and_loss_of_each(tmp_path):
    _redrawn(tmp_path, reference_b32=[0.5, 0.7], reference_b64=[0.6, 0.8])
    runs = {name: history for name, (history, _) in results.recorded_redrawn(tmp_path).items()}
    accuracy, loss = plots.redrawn_chart(runs, results.published_log()).axes
    drawn = {line.get_label(): list(line.get_ydata()) for line in accuracy.lines}
    assert drawn["reference_b64"] == [60.0, 80.0]
    assert drawn["published log (whole ResNet-50)"] == pytest.approx([69.6, 78.2])  # as far as the runs go
    assert [list(line.get_ydata()) for line in loss.lines][1:] == [[0.5, 0.5]] * 2


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--name", "nonsense"], "choose from reference_b32"),
        (["--weights", "no/such/file.pth"], "there is no file"),
        (["--set", "epochz=3"], "did you mean 'epochs'"),
    ],
)
def test_redrawn_refuses_what_it_cannot_do_before_it_begins(arguments, message, tmp_path, monkeypatch):
    from typer.testing import CliRunner

    from cifar_ft.__main__ import app

    monkeypatch.chdir(tmp_path)
    done = CliRunner().invoke(app, ["study", "redrawn", *arguments])
    assert done.exit_code != 0
    assert message in " ".join((done.output + str(done.exception)).replace("│", " ").split())
    assert list(tmp_path.iterdir()) == []
