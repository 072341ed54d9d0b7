"""What a run leaves: what was measured, in full, and what it was made with."""

import csv
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from tiny_runs import history, recipe, weights

from cifar_ft import models, transforms
from cifar_ft.files import PACKAGE
from cifar_ft.results import load_run, wilson_interval
from cifar_ft.training import TrainingError, fit, lr_factor, new_run_dir, run_files

pytestmark = pytest.mark.usefixtures("one_thread")


def test_a_run_directory_holds_what_was_measured(small_data, tmp_path):
    mine = recipe(track_test=True, flip_tta=True, checkpoint_steps=0, schedule="cosine", select="last")
    run = fit(mine, small_data, tmp_path / "run")
    with open(run.path / "history.csv", newline="") as file:
        header, *rows = csv.reader(file)
    columns = "epoch train_loss train_accuracy val_loss val_accuracy test_loss test_accuracy lr seconds"
    assert header == columns.split()
    assert [row[0] for row in rows] == ["1", "2"]
    last = run.history.iloc[-1]
    assert list(run.history.lr) == pytest.approx([0.05, 0.025])
    metrics = run.metrics
    assert set(metrics) >= {
        "recipe", "backbone", "weights", "epochs", "seed", "train_images", "val_accuracy", "test_accuracy",
        "test_accuracy_ci95", "test_loss", "train_seconds", "images_per_second", "peak_memory_mb", "hardware",
        "versions",
    }  # fmt: skip
    assert (metrics["recipe"], metrics["backbone"], metrics["weights"]) == ("smoke", "resnet18", "none")
    assert (metrics["epochs"], metrics["seed"], metrics["train_images"]) == (2, 0, 120)
    logits, labels = torch.from_numpy(run.logits), torch.from_numpy(run.labels)
    assert torch.equal(labels, small_data.test.labels)
    correct = int((logits.argmax(1) == labels).sum())
    assert metrics["test_accuracy"] == correct / 40 == last.test_accuracy
    assert metrics["test_accuracy_ci95"] == list(wilson_interval(correct, 40))
    assert metrics["test_loss"] == pytest.approx(F.cross_entropy(logits, labels).item())
    assert metrics["test_loss"] == pytest.approx(last.test_loss)
    assert metrics["val_accuracy"] == last.val_accuracy
    assert 0 <= metrics["test_accuracy_flip_tta"] <= 1
    assert metrics["train_seconds"] == pytest.approx(run.history.seconds.sum(), abs=1e-3)
    assert run.recipe == mine
    assert run.config["data"] == {"source": "samples", "digest": "0" * 64, "train": 120, "val": 40, "test": 40}
    assert run.config["weights"]["backbone"] == "resnet18"


def test_the_loss_of_each_step_is_kept_with_its_place_and_its_cost(small_data, tmp_path):
    # Batches of 50, 50 and 20 images, two micro-batches each.
    mine = recipe(train_sizes=(16, 24), image_size=24, batch_size=50, accumulation=2, lr=0.01)
    run = fit(mine, small_data, tmp_path / "run")
    steps = run.steps
    assert list(steps) == ["step", "epoch", "lr", "loss", "images", "image_size"]
    assert list(steps.step) == [1, 2, 3, 4, 5, 6]
    assert list(steps.epoch) == pytest.approx([1 / 3, 2 / 3, 1, 4 / 3, 5 / 3, 2], rel=1e-5)
    assert list(steps.lr) == pytest.approx([0.01 * lr_factor(mine, step, 3) for step in range(6)], rel=1e-5)
    assert list(steps.images) == [50, 100, 120, 170, 220, 240]
    assert list(steps.image_size) == [16, 16, 16, 24, 24, 24]
    means = [np.average(losses, weights=[50, 50, 20]) for losses in steps.loss.to_numpy().reshape(2, 3)]
    assert means == pytest.approx(list(run.history.train_loss), rel=1e-5)
    assert steps.loss.nunique() == 6


def test_a_row_of_a_long_run_is_the_mean_of_several_steps(whole, small_data, tmp_path, monkeypatch):
    monkeypatch.setattr(run_files, "STEP_ROWS", 4)
    few, each = fit(recipe(), small_data, tmp_path / "run").steps, load_run(whole).steps
    assert list(few.step) == [3, 5, 8, 10]  # no row spans two epochs
    columns = ["step", "epoch", "lr", "images", "image_size"]
    assert few[columns].equals(each[columns].iloc[[2, 4, 7, 9]].reset_index(drop=True))
    parts = np.split(each.loss, [3, 5, 8])  # batches of 24 images all
    assert list(few.loss) == pytest.approx([part.mean() for part in parts], rel=1e-5)


def test_a_run_tells_no_folder_of_the_machine_it_was_made_on(small_data, tmp_path, monkeypatch):
    mine = tmp_path / "private" / "r18.pt"
    mine.parent.mkdir()
    torch.save(models.create_backbone("resnet18").state_dict(), mine)
    monkeypatch.chdir(tmp_path)
    run = fit(recipe(weights="private/r18.pt", epochs=1), small_data, "run")
    assert run.path == tmp_path / "run"
    assert (run.config["recipe"]["weights"], run.config["weights"]["source"]) == ("r18.pt", "the file r18.pt")
    for file in filter(Path.is_file, run.path.rglob("*")):
        assert b"private" not in file.read_bytes(), file
        assert str(tmp_path).encode() not in file.read_bytes(), file


def test_the_stored_weights_give_the_stored_logits(whole, small_data):
    model = models.build_model(recipe())
    model.load_state_dict(weights(whole))
    with torch.no_grad():
        logits = model.eval()(transforms.eval_transform(recipe())(small_data.test.images))
    np.testing.assert_allclose(logits.numpy(), load_run(whole).logits, rtol=1e-4, atol=1e-5)


def test_test_columns_stay_empty_unless_the_recipe_tracks_them(whole):
    assert all(row["test_loss"] == row["test_accuracy"] == "" for row in history(whole))
    assert all(row["val_loss"] and row["val_accuracy"] for row in history(whole))


def test_without_validation_all_training_images_are_trained_on(small_data, tmp_path):
    mine = recipe(validation=False, select="last", epochs=1, checkpoint_steps=0)
    run = fit(mine, small_data, tmp_path / "run")
    assert run.metrics["train_images"] == 160
    assert run.metrics["val_accuracy"] is None
    assert history(tmp_path / "run")[0]["val_accuracy"] == ""


def test_smaller_subsets_are_used_when_asked(small_data, tmp_path):
    mine = recipe(train_images=50, val_images=20, test_images=30, epochs=1)
    run = fit(mine, small_data, tmp_path / "run")
    assert (run.metrics["train_images"], len(run.labels)) == (50, 30)
    assert run.config["data"]["val"] == 20


def test_a_run_without_a_folder_gets_a_new_one_of_its_own(small_data, tmp_path, monkeypatch):
    monkeypatch.setenv("CIFAR_FT_RUNS", str(tmp_path))
    one = fit(recipe(epochs=1), small_data).path
    two = new_run_dir(recipe())
    two.mkdir()
    three = new_run_dir(recipe())
    assert len({one, two, three}) == 3
    assert {path.parent for path in (one, two, three)} == {tmp_path}
    assert one.name.startswith("smoke-")


def test_comments_and_empty_lines_do_not_count_as_code(tmp_path, monkeypatch):
    package = shutil.copytree(PACKAGE, tmp_path / "cifar_ft", ignore=shutil.ignore_patterns("assets", "__pycache__"))
    before = run_files.code_digests()
    assert set(before) == set(run_files.DECISIVE)
    monkeypatch.setattr(run_files, "PACKAGE", package)
    assert run_files.code_digests() == before
    file = package / "training" / "loop.py"
    text = file.read_text()
    file.write_text(text.replace("    model.train()\n", "    # more\n\n    model.train()\n"))
    assert run_files.code_digests() == before
    file.write_text(text.replace("optimizer.step()", "optimizer.step(None)"))
    assert {name for name, digest in run_files.code_digests().items() if digest != before[name]} == {"training/loop.py"}


def test_a_damaged_description_cannot_be_resumed(tmp_path):
    (tmp_path / "config.json").write_text('{"recipe": {"name": "smoke", "size": 3}, "weights": {}}')
    with pytest.raises(TrainingError, match=r"config.json cannot be read \(.*size.*start anew in another folder"):
        run_files.stored_recipe(tmp_path)


@pytest.mark.parametrize("text", ['{"architectures": ["ResNet"]}', "[]", '{"recipe": "pancakes", "weights": {}}'])
def test_the_description_of_something_else_is_not_resumed(tmp_path, text):
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(TrainingError, match=r"config.json is no run's, so there is nothing to resume"):
        run_files.stored_recipe(tmp_path)
