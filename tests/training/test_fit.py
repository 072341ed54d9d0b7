"""Training: one seed gives one run, whatever interrupts it; the test set is scored once and chooses nothing."""

import copy
import csv
import errno
import itertools
import json
import math
import os
import shutil
import signal
import subprocess
import sys
import textwrap
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from tiny_runs import history, quiet, raise_, recipe, same_run, weights

from cifar_ft import files, models, training, transforms
from cifar_ft.models import evaluating
from cifar_ft.results import load_run, wilson_interval
from cifar_ft.training import (
    RunDirectory,
    TrainingError,
    fit,
    fit_head,
    lr_factor,
    make_optimizer,
    move_average,
    set_lr,
)

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def whole(small_data, tmp_path_factory):
    """An uninterrupted run of `recipe()`."""
    path = tmp_path_factory.mktemp("whole") / "run"
    fit(recipe(), small_data, path, echo=quiet)
    return path


# the same seed


def test_the_same_seed_gives_the_same_run_bit_for_bit(whole, small_data, tmp_path):
    torch.manual_seed(123)
    np.random.seed(5)
    fit(recipe(), small_data, tmp_path / "run", echo=quiet)
    same_run(whole, tmp_path / "run")


def test_another_seed_gives_another_run(whole, small_data, tmp_path):
    fit(recipe(seed=1), small_data, tmp_path / "run", echo=quiet)
    assert history(tmp_path / "run") != history(whole)


def test_several_threads_are_as_repeatable(small_data, tmp_path):
    mine, threads = recipe(epochs=1, checkpoint_steps=0, train_images=60), torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        for name in ("one", "two"):
            fit(mine, small_data, tmp_path / name, echo=quiet)
    finally:
        torch.set_num_threads(threads)
    same_run(tmp_path / "one", tmp_path / "two")


def test_a_pretrained_lite0_is_as_repeatable_and_resumable(small_data, tmp_path, monkeypatch):
    settings = {"backbone": "efficientnet_lite0", "weights": "imagenet", "last_stage": None, "image_size": 32}
    few = {
        "epochs": 1,
        "train_images": 60,
        "val_images": 10,
        "test_images": 10,
        "batch_size": 12,
        "head_fit_images": 30,
    }
    mine = recipe(**settings, **few, freeze="stage2", label_smoothing=0.1, checkpoint_steps=4)
    fit(mine, small_data, tmp_path / "one", echo=quiet)
    with monkeypatch.context() as patch:
        crash_at(patch, 1)
        with pytest.raises(Crash):
            fit(mine, small_data, tmp_path / "two", echo=quiet)
    fit(mine, small_data, tmp_path / "two", resume=True, echo=quiet)
    same_run(tmp_path / "one", tmp_path / "two")


# interrupted and resumed


class Crash(Exception):
    pass


def crash_at(patch, nth):
    """Crash right behind the nth checkpoint."""
    save, count = RunDirectory.save_checkpoint, itertools.count(1)

    def save_and_crash(self, *arguments):
        save(self, *arguments)
        if next(count) == nth:
            raise Crash

    patch.setattr(RunDirectory, "save_checkpoint", save_and_crash)


def interrupted(patch, data, path, nth, **overrides):
    with patch.context() as inner:
        crash_at(inner, nth)
        with pytest.raises(Crash):
            fit(recipe(**overrides), data, path, echo=quiet)
    assert not (path / "metrics.json").exists()


@pytest.mark.parametrize("nth", [1, 5, 6, 9, 12], ids=["step 1", "last step", "epoch 1", "step 3 of epoch 2", "end"])
def test_interrupted_anywhere_and_resumed_is_as_if_never_interrupted(whole, small_data, tmp_path, monkeypatch, nth):
    path, lines = tmp_path / "run", []
    interrupted(monkeypatch, small_data, path, nth)
    run = fit(recipe(), small_data, path, resume=True, echo=lines.append)
    same_run(whole, path)
    assert run.path == path
    epoch, step = divmod(nth, 6)  # each epoch has five checkpoints within and one at its end
    assert any(line == f"Resuming behind epoch {epoch}, step {step}" for line in lines)


def test_interrupted_in_the_middle_of_a_step_is_resumed_too(whole, small_data, tmp_path, monkeypatch):
    update, count = training.move_average, itertools.count(1)

    def fail(*arguments):
        update(*arguments)
        if next(count) in (2, 5):
            raise Crash

    monkeypatch.setattr(training, "move_average", fail)
    for resume in (False, True):
        with pytest.raises(Crash):
            fit(recipe(), small_data, tmp_path / "run", resume=resume, echo=quiet)
    fit(recipe(), small_data, tmp_path / "run", resume=True, echo=quiet)
    same_run(whole, tmp_path / "run")


@pytest.mark.parametrize("name", ["history.csv", "test_logits.npz", "model.safetensors", "metrics.json"])
def test_interrupted_while_the_final_files_are_written_is_resumed_too(whole, small_data, tmp_path, monkeypatch, name):
    with monkeypatch.context() as patch:
        rename = os.replace
        patch.setattr(os, "replace", lambda a, b: raise_(Crash()) if b.name == name else rename(a, b))
        with pytest.raises(Crash):
            fit(recipe(), small_data, tmp_path / "run", echo=quiet)
    fit(recipe(), small_data, tmp_path / "run", resume=True, echo=quiet)
    same_run(whole, tmp_path / "run")


def test_without_checkpoint_steps_the_epoch_is_trained_again_to_the_same_end(whole, small_data, tmp_path, monkeypatch):
    interrupted(monkeypatch, small_data, tmp_path / "run", 1, checkpoint_steps=0)
    fit(recipe(checkpoint_steps=0), small_data, tmp_path / "run", resume=True, echo=quiet)
    for other in ({"checkpoint_steps": 0}, {"flip_tta": False}):  # how often to checkpoint is no part of the result
        assert fit(recipe(**other), small_data, tmp_path / "run", resume=True, echo=quiet)
    same_run(whole, tmp_path / "run")


def test_resume_where_nothing_has_begun_is_a_start(whole, small_data, tmp_path):
    fit(recipe(), small_data, tmp_path / "run", resume=True, echo=quiet)
    same_run(whole, tmp_path / "run")


KILLED = """
    import os, signal, sys, torch
    sys.path.insert(0, {tests!r})
    from conftest import small_data, samples
    from cifar_ft.training import fit
    from tiny_runs import quiet, recipe
    torch.set_num_threads(1)
    sync, count = os.fsync, 0
    def kill_in_the_middle_of_a_write(descriptor):
        global count
        count += 1
        if count == 8:  # config.json, six checkpoints of the first epoch, and this one
            os.kill(os.getpid(), signal.SIGKILL)
        sync(descriptor)
    os.fsync = kill_in_the_middle_of_a_write
    unwrap = lambda fixture: getattr(fixture, "__wrapped__", None) or fixture.__pytest_wrapped__.obj
    fit(recipe(), unwrap(small_data)(unwrap(samples)()), {path!r}, echo=quiet)
"""


@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="this system has no SIGKILL")
def test_killed_while_writing_a_checkpoint_and_resumed_is_as_if_never_killed(whole, small_data, tmp_path):
    path, tests = tmp_path / "run", os.path.dirname(__file__)
    code = textwrap.dedent(KILLED).format(tests=tests, path=str(path))
    command, root = [sys.executable, "-c", code], os.path.dirname(tests)
    child = subprocess.run(command, cwd=root, capture_output=True, timeout=300, check=False)
    assert child.returncode == -signal.SIGKILL, child.stderr.decode()
    assert list(path.rglob("*.part"))  # the torn file is there, under another name
    lines = []
    fit(recipe(), small_data, path, resume=True, echo=lines.append)
    assert "Resuming behind epoch 1, step 0" in lines
    assert not list(path.rglob("*.part"))
    same_run(whole, path)


@pytest.mark.parametrize("damage", ["flip", "cut", "empty"])
def test_a_damaged_newest_checkpoint_falls_back_to_the_same_end(whole, small_data, tmp_path, monkeypatch, damage):
    path, lines = tmp_path / "run", []
    interrupted(monkeypatch, small_data, path, 8)
    newest, before = sorted((path / "checkpoint").glob("*.pt"), reverse=True)
    data = bytearray(newest.read_bytes())
    data[len(data) // 2] ^= 1
    newest.write_bytes({"flip": bytes(data), "cut": bytes(data[:1000]), "empty": b""}[damage])
    fit(recipe(), small_data, path, resume=True, echo=lines.append)
    assert f"Warning: checkpoint {newest.name} is damaged; falling back to the one before" in lines
    assert "Resuming behind epoch 1, step 1" in lines
    assert before.name.startswith("epoch-00001-step-0000001-")
    same_run(whole, path)


def test_with_every_checkpoint_damaged_the_run_starts_again_to_the_same_end(whole, small_data, tmp_path, monkeypatch):
    path, lines = tmp_path / "run", []
    interrupted(monkeypatch, small_data, path, 3)
    for file in (path / "checkpoint").glob("*.pt"):
        file.write_bytes(b"damaged")
    fit(recipe(), small_data, path, resume=True, echo=lines.append)
    assert sum("is damaged" in line for line in lines) == 2
    same_run(whole, path)


# one folder, one run


def test_a_folder_in_use_by_another_process_is_refused(small_data, tmp_path):
    code = f"""
        from cifar_ft.checkpoints import RunDirectory
        directory = RunDirectory({str(tmp_path / "run")!r})
        print("locked", flush=True)
        input()
    """
    root = os.path.dirname(os.path.dirname(__file__))
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True, "cwd": root}
    with subprocess.Popen([sys.executable, "-c", textwrap.dedent(code)], **pipes) as other:
        assert other.stdout.readline() == "locked\n"
        for resume in (False, True):
            with pytest.raises(TrainingError, match="in use by another process; wait for it or choose another"):
                fit(recipe(), small_data, tmp_path / "run", resume=resume, echo=quiet)
        other.communicate("done\n")
    RunDirectory(tmp_path / "run").close()  # free again


def test_a_run_is_never_overwritten_without_resume(whole, small_data, tmp_path):
    before = {file: file.read_bytes() for file in whole.rglob("*") if file.is_file() and file.name != ".lock"}
    with pytest.raises(TrainingError, match=r"already holds a run; .*--resume.* another folder"):
        fit(recipe(), small_data, whole, echo=quiet)
    assert all(file.read_bytes() == content for file, content in before.items())


@pytest.mark.parametrize("finished", [False, True])
@pytest.mark.parametrize(
    ("overrides", "digest", "words"),
    [
        ({"lr": 0.5}, "0" * 64, r"recipe.lr: 0.05 then, 0.5 now"),
        ({"epochs": 3}, "0" * 64, r"recipe.epochs: 2 then, 3 now"),
        ({}, "f" * 64, r"data.digest: '0+' then, 'f+' now"),
    ],
)
def test_resume_of_another_run_is_refused_with_the_difference(
    whole, small_data, tmp_path, overrides, digest, words, finished
):
    path = tmp_path / "run"
    path.mkdir()
    for name in ("config.json", *(["metrics.json"] if finished else [])):
        shutil.copy(whole / name, path)
    with pytest.raises(TrainingError, match=f"cannot resume .*{words}"):
        fit(recipe(**overrides), replace(small_data, digest=digest), path, resume=True, echo=quiet)
    assert not (path / "checkpoint").exists()


@pytest.mark.parametrize(
    ("part", "key", "value", "words"),
    [
        ("code", "training", "0123", r"code.training: '0123' then, '\w{12}' now"),
        ("versions", "torch", "2.0.0", r"versions.torch: '2.0.0' then, '[\w.+]+' now"),
        ("versions", "cifar_ft", "0.0.1", r"versions.cifar_ft: '0.0.1' then"),
        ("weights", "sha256", "abc", r"weights.sha256: 'abc' then, None now"),
    ],
)
def test_resume_with_other_code_is_refused_with_the_difference(whole, small_data, tmp_path, part, key, value, words):
    config = json.loads((whole / "config.json").read_text())
    config[part][key] = value
    path = tmp_path / "run"
    path.mkdir()
    (path / "config.json").write_text(json.dumps(config))
    with pytest.raises(TrainingError, match=f"cannot resume .*{words}.*start anew in another folder"):
        fit(recipe(), small_data, path, resume=True, echo=quiet)
    (path / "metrics.json").write_text((whole / "metrics.json").read_text())
    for name in ("history.csv", "test_logits.npz"):
        shutil.copy(whole / name, path)
    assert fit(recipe(), small_data, path, resume=True, echo=quiet).accuracy  # a finished run is only loaded


def test_comments_and_docstrings_do_not_count_as_code(tmp_path, monkeypatch):
    package = tmp_path / "cifar_ft"
    shutil.copytree(os.path.dirname(training.cifar_ft.__file__), package, ignore=shutil.ignore_patterns("assets"))
    before = training.code_digests()
    assert set(before) == set(training.DECISIVE)
    monkeypatch.setattr(training.cifar_ft, "__file__", str(package / "__init__.py"))
    assert training.code_digests() == before
    file = package / "training.py"
    text = file.read_text()
    file.write_text(text.replace('"""The training loop', '# more\n"""Another loop').replace("    done", "     done"))
    assert training.code_digests() == before
    file.write_text(text.replace("training.sums += sums", "training.sums -= sums"))
    assert {name for name, digest in training.code_digests().items() if digest != before[name]} == {"training"}


def test_resume_of_a_finished_run_only_loads_it(whole, small_data, monkeypatch):
    monkeypatch.setattr(training, "train_epoch", lambda *arguments: raise_(Crash()))
    monkeypatch.setattr(processes, "predict_logits", lambda *arguments, **options: raise_(Crash()))
    lines = []
    run = fit(recipe(), small_data, whole, resume=True, echo=lines.append)
    assert run.accuracy == load_run(whole).accuracy
    assert "finished; nothing to resume" in lines[-1]


def test_a_finished_run_from_before_a_setting_existed_is_loaded_too(whole, small_data, tmp_path):
    path = shutil.copytree(whole, tmp_path / "run")
    config = json.loads((path / "config.json").read_text())
    del config["recipe"]["cutout"]
    (path / "config.json").write_text(json.dumps(config))
    assert fit(recipe(), small_data, path, resume=True, echo=quiet).accuracy == load_run(whole).accuracy
    with pytest.raises(TrainingError, match=r"recipe.cutout: 0 then, 8 now"):
        fit(recipe(cutout=8), small_data, path, resume=True, echo=quiet)


def test_a_run_without_a_folder_gets_a_new_one_of_its_own(small_data, tmp_path, monkeypatch):
    monkeypatch.setenv("CIFAR_FT_RUNS", str(tmp_path))
    one = fit(recipe(epochs=1), small_data, echo=quiet).path
    two = training.new_run_dir(recipe())
    two.mkdir()
    three = training.new_run_dir(recipe())
    assert len({one, two, three}) == 3
    assert {path.parent for path in (one, two, three)} == {tmp_path}
    assert one.name.startswith("smoke-")


# faults


def places(path):
    """Where the checkpoints of a run stand: their names without the digest."""
    return [file.name.rpartition("-")[0] for file in sorted((path / "checkpoint").iterdir())]


@pytest.mark.parametrize("call", ["fsync", "replace"])
def test_a_full_disk_is_a_clear_error_and_earlier_checkpoints_stay_whole(
    whole, small_data, tmp_path, monkeypatch, call
):
    path, real, count = tmp_path / "run", getattr(os, call), itertools.count(1)

    def full(*arguments):
        if next(count) > 4:  # config.json and three checkpoints have been written
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return real(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(os, call, full)
        with pytest.raises(TrainingError, match=r"cannot write .*: No space left on device.*whole.*resume"):
            fit(recipe(), small_data, path, echo=quiet)
    assert not list(path.rglob("*.part"))
    assert places(path) == ["epoch-00000-step-0000002", "epoch-00000-step-0000003"]
    lines = []
    fit(recipe(), small_data, path, resume=True, echo=lines.append)
    assert "Resuming behind epoch 0, step 3" in lines
    same_run(whole, path)


def test_an_impossible_folder_is_refused_before_any_training(small_data, tmp_path, monkeypatch):
    monkeypatch.setattr(surgery, "build_model", lambda *arguments: raise_(Crash()))
    (tmp_path / "file").touch()
    with pytest.raises(TrainingError, match=r"cannot use .* as a run folder: .*choose another"):
        fit(recipe(), small_data, tmp_path / "file" / "run", echo=quiet)


def test_fp16_without_a_gpu_is_refused_with_the_alternatives(small_data, tmp_path):
    if torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    with pytest.raises(TrainingError, match="needs an NVIDIA GPU; use bf16, fp32 or auto"):
        fit(recipe(precision="fp16"), small_data, tmp_path / "run", echo=quiet)


# the test set


def scored(patch):
    """The names of the splits that are scored from now on, in order."""
    names, predict = [], models.predict_logits

    def spy(model, split, *arguments, **options):
        names.append(split.name)
        return predict(model, split, *arguments, **options)

    patch.setattr(processes, "predict_logits", spy)
    return names


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        ({}, ["val", "val", "val", "test"]),
        ({"validation": False, "select": "last"}, ["test"]),
        ({"track_test": True}, ["val", "test", "val", "test", "val", "test"]),
    ],
)
def test_the_test_set_is_scored_once_at_the_end_unless_tracked(small_data, tmp_path, monkeypatch, overrides, expected):
    names = scored(monkeypatch)
    fit(recipe(checkpoint_steps=0, **overrides), small_data, tmp_path / "run", echo=quiet)
    assert names == expected


@pytest.mark.parametrize("track", [False, True])
def test_the_test_labels_choose_nothing(small_data, tmp_path, track):
    shuffled = replace(small_data.test, labels=(small_data.test.labels + 3) % 10)
    for name, data in (("true", small_data), ("false", replace(small_data, test=shuffled))):
        fit(recipe(track_test=track, checkpoint_steps=0), data, tmp_path / name, echo=quiet)
    a, b = weights(tmp_path / "true"), weights(tmp_path / "false")
    assert all(torch.equal(a[name], b[name]) for name in a)
    assert load_run(tmp_path / "true").metrics["test_loss"] != load_run(tmp_path / "false").metrics["test_loss"]


@pytest.mark.parametrize(("select", "kept"), [("best", 1), ("last", 2)])
def test_the_weights_kept_are_those_of_the_best_epoch_on_validation_or_of_the_last(
    small_data, tmp_path, monkeypatch, select, kept
):
    states, accuracies = [], iter([0.3, 0.5, 0.5])  # the first of two equals is kept

    def score(model, *arguments):
        states.append({name: tensor.clone() for name, tensor in model.state_dict().items()})
        return 1.0, next(accuracies)

    monkeypatch.setattr(training, "_score", score)
    run = fit(recipe(epochs=3, select=select, checkpoint_steps=0), small_data, tmp_path / "run", echo=quiet)
    found = weights(tmp_path / "run")
    assert all(torch.equal(found[name], tensor) for name, tensor in states[kept].items())
    assert not torch.equal(states[1]["fc.weight"], states[2]["fc.weight"])
    assert run.metrics["val_accuracy"] == 0.5


# what a run leaves


def test_a_run_directory_holds_what_was_measured(small_data, tmp_path):
    mine = recipe(track_test=True, flip_tta=True, checkpoint_steps=0, schedule="cosine", select="last")
    run = fit(mine, small_data, tmp_path / "run", echo=quiet)
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


def test_the_stored_weights_give_the_stored_logits(whole, small_data):
    model = models.build_model(recipe(), quiet)
    model.load_state_dict(weights(whole))
    with torch.no_grad():
        logits = model.eval()(transforms.eval_transform(recipe())(small_data.test.images))
    np.testing.assert_allclose(logits.numpy(), load_run(whole).logits, rtol=1e-4, atol=1e-5)


def test_test_columns_stay_empty_unless_the_recipe_tracks_them(whole):
    assert all(row["test_loss"] == row["test_accuracy"] == "" for row in history(whole))
    assert all(row["val_loss"] and row["val_accuracy"] for row in history(whole))


def test_without_validation_all_training_images_are_trained_on(small_data, tmp_path):
    mine = recipe(validation=False, select="last", epochs=1, checkpoint_steps=0)
    run = fit(mine, small_data, tmp_path / "run", echo=quiet)
    assert run.metrics["train_images"] == 160
    assert run.metrics["val_accuracy"] is None
    assert history(tmp_path / "run")[0]["val_accuracy"] == ""


def test_only_the_two_newest_checkpoints_are_kept(whole):
    assert places(whole) == ["epoch-00001-step-0000005", "epoch-00002-step-0000000"]


def test_smaller_subsets_are_used_when_asked(small_data, tmp_path):
    mine = recipe(train_images=50, val_images=20, test_images=30, epochs=1)
    run = fit(mine, small_data, tmp_path / "run", echo=quiet)
    assert (run.metrics["train_images"], len(run.labels)) == (50, 30)
    assert run.config["data"]["val"] == 20


# learning rates


def factors(steps_per_epoch=7, **overrides):
    mine = recipe(**overrides)
    return [lr_factor(mine, step, steps_per_epoch) for step in range(mine.epochs * steps_per_epoch)]


def test_a_constant_schedule_stays():
    assert set(factors(schedule="constant", epochs=5)) == {1.0}


def test_the_cosine_schedule_is_torchs_stepped_once_an_epoch():
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1.0)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=60)
    expected = []
    for _ in range(60):
        optimizer.step()
        expected += [schedule.get_last_lr()[0]] * 7
        schedule.step()
    assert factors(schedule="cosine", epochs=60) == pytest.approx(expected, abs=1e-9)


@pytest.mark.parametrize("warmup", [0.0, 0.2, 0.5, 0.9])
@pytest.mark.parametrize("epochs", [1, 2, 10])
def test_one_cycle_rises_to_1_and_falls_to_nearly_0(warmup, epochs):
    values = factors(20, schedule="one_cycle", epochs=epochs, warmup=warmup)
    peak = values.index(max(values))
    assert values[peak] == pytest.approx(1, abs=0.07)
    assert peak == pytest.approx(warmup * (len(values) - 1), abs=1)
    assert values[: peak + 1] == sorted(values[: peak + 1])
    assert values[peak:] == sorted(values[peak:], reverse=True)
    assert values[-1] == pytest.approx(0.01)
    assert min(values) > 0


def test_one_cycle_of_a_single_step_has_a_learning_rate():
    assert 0 < lr_factor(recipe(schedule="one_cycle", epochs=1), 0, 1) <= 1


def test_the_head_gets_its_own_learning_rate_and_frozen_parts_none():
    mine = recipe(lr=0.02, head_lr_factor=10, freeze="stem")
    model = models.build_model(mine, quiet)
    body, head = make_optimizer(model, mine).param_groups
    assert (body["lr"], head["lr"]) == (0.02, 0.2)
    assert {id(p) for p in head["params"]} == {id(p) for p in model.fc.parameters()}
    assert {id(p) for p in body["params"]} == {id(p) for p in model.layer1.parameters()}
    assert all((g["momentum"], g["weight_decay"], g["nesterov"]) == (0.9, 5e-4, True) for g in (body, head))
    set_lr(optimizer := make_optimizer(model, mine), 0.5)
    assert [group["lr"] for group in optimizer.param_groups] == [0.01, 0.1]


def test_adamw_is_adamw():
    mine = recipe(optimizer="adamw", lr=0.001, head_lr_factor=3, weight_decay=0.05)
    optimizer = make_optimizer(models.build_model(mine, quiet), mine)
    assert isinstance(optimizer, torch.optim.AdamW)
    assert [(g["lr"], g["weight_decay"]) for g in optimizer.param_groups] == [(0.001, 0.05), (0.003, 0.05)]


def test_a_run_with_adamw_resumes_to_the_same_weights(small_data, tmp_path):
    mine = recipe(optimizer="adamw", lr=0.001)
    fit(mine, small_data, tmp_path / "whole", echo=quiet)

    def stop(line):
        if line.startswith("Epoch 1"):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fit(mine, small_data, tmp_path / "parts", echo=stop)
    fit(mine, small_data, tmp_path / "parts", resume=True, echo=quiet)
    same_run(tmp_path / "whole", tmp_path / "parts")


def test_with_the_backbone_frozen_only_the_head_is_optimised():
    mine = recipe(freeze="backbone", head_lr_factor=10)
    (group,) = make_optimizer(models.build_model(mine, quiet), mine).param_groups
    assert group["lr"] == pytest.approx(0.5)


# the parts


def test_the_moving_average_is_the_one_computed_by_hand():
    model = torch.nn.BatchNorm1d(3)
    average = copy.deepcopy(model)
    generator, expected = torch.Generator().manual_seed(0), model.weight.detach().double()
    for step in range(41):
        with torch.no_grad():
            model.weight.copy_(torch.randn(3, generator=generator))
            model.running_mean.copy_(model.weight)
            model.num_batches_tracked += 1
        move_average(average, model, 0.7, step)
        if step % 4 == 3:  # every fourth step, so to the fourth power; at first it forgets faster
            decay = min(0.7, (1 + step) / (10 + step)) ** 4
            expected = decay * expected + (1 - decay) * model.weight.detach().double()
            running = expected - left_of_the_start(step)
            torch.testing.assert_close(average.running_mean.double(), running, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(average.weight.double(), expected, atol=1e-5, rtol=1e-5)
    assert average.num_batches_tracked == 40


def left_of_the_start(step):
    """What is left of the start: weights begin at 1 and running means at 0, and see the same values."""
    return math.prod(min(0.7, (1 + each) / (10 + each)) ** 4 for each in range(3, step + 1, 4))


def test_the_average_is_what_is_scored_and_kept(small_data, tmp_path, monkeypatch):
    kept = {}
    finish = training.finish_run

    def spy(state, *arguments):
        kept["ema"], kept["model"] = copy.deepcopy(state.ema.state_dict()), copy.deepcopy(state.model.state_dict())
        return finish(state, *arguments)

    monkeypatch.setattr(training, "finish_run", spy)
    fit(recipe(select="last", checkpoint_steps=0), small_data, tmp_path / "run", echo=quiet)
    found = weights(tmp_path / "run")
    assert all(torch.equal(found[name], kept["ema"][name]) for name in found)
    assert not torch.equal(found["fc.weight"], kept["model"]["fc.weight"])


@pytest.mark.parametrize("overrides", [{}, {"head_fit_images": 50, "ema_decay": 0.0}])
def test_a_frozen_backbone_is_bit_for_bit_the_same_after_fit(small_data, tmp_path, overrides):
    mine = recipe(freeze="backbone", checkpoint_steps=0, select="last", **overrides)
    fit(mine, small_data, tmp_path / "run", echo=quiet)
    before, after = models.build_model(mine, quiet).state_dict(), weights(tmp_path / "run")
    assert {name for name in before if not torch.equal(before[name], after[name])} == {"fc.weight", "fc.bias"}


def test_the_reported_training_loss_is_plain_cross_entropy_whatever_the_smoothing(small_data, tmp_path):
    # A fitted head makes confident predictions; with lr near 0 the network stays the same, smoothed or not.
    still = {"head_fit_images": 120, "lr": 1e-8, "epochs": 1, "flip": False, "crop_padding": 0, "checkpoint_steps": 0}
    losses = {}
    for smoothing in (0.0, 0.3):
        mine = recipe(**still, head_lr_factor=1, label_smoothing=smoothing, freeze="backbone")
        losses[smoothing] = fit(mine, small_data, tmp_path / str(smoothing), echo=quiet).history.train_loss[0]
    assert losses[0.3] == pytest.approx(losses[0.0], rel=1e-3)
    model = models.build_model(mine, quiet)
    model.load_state_dict(weights(tmp_path / "0.0"))
    with torch.no_grad():
        logits = model.eval()(transforms.eval_transform(mine)(small_data.train.images))
    assert losses[0.0] == pytest.approx(F.cross_entropy(logits, small_data.train.labels).item(), rel=1e-3)
    smoothed = F.cross_entropy(logits, small_data.train.labels, label_smoothing=0.3).item()
    assert smoothed - losses[0.0] > 0.1  # so the two could be told apart


def test_label_smoothing_changes_what_is_learned(whole, small_data, tmp_path):
    fit(recipe(label_smoothing=0.2), small_data, tmp_path / "run", echo=quiet)
    assert not torch.equal(weights(tmp_path / "run")["fc.weight"], weights(whole)["fc.weight"])


def test_fitting_the_head_moves_the_head_alone_and_reports_its_accuracy(small_data):
    mine = recipe(head_fit_images=60, image_size=32)
    model = models.build_model(mine, quiet).train()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    reported = fit_head(model, small_data.train, mine)
    after = model.state_dict()
    assert {name for name in before if not torch.equal(before[name], after[name])} == {"fc.weight", "fc.bias"}
    assert all(module.training for module in model.modules())
    sample = small_data.train.subset(60)
    with evaluating(model), torch.no_grad():
        found = (model(transforms.eval_transform(mine)(sample.images)).argmax(1) == sample.labels).float().mean().item()
    assert reported == pytest.approx(found)
    assert reported > 0.3  # chance is 0.1


def test_progressive_resizing_trains_at_each_epochs_size(small_data, tmp_path, monkeypatch):
    sizes, draw = [], transforms.TrainTransform.__call__

    def spy(self, images, *arguments, **options):
        sizes.append(draw(self, images, *arguments, **options).shape[-1])
        return draw(self, images, *arguments, **options)

    monkeypatch.setattr(transforms.TrainTransform, "__call__", spy)
    fit(recipe(train_sizes=(16, 24), image_size=32, checkpoint_steps=0), small_data, tmp_path / "run", echo=quiet)
    assert sizes == [16] * 5 + [24] * 5


def test_each_epoch_and_each_step_augments_anew_and_each_run_alike(small_data, tmp_path, monkeypatch):
    draws, call = [], transforms.TrainTransform.__call__

    def spy(self, images, *arguments, **options):
        draws.append(tuple(options["draws"][0].flatten().tolist()))
        return call(self, images, *arguments, **options)

    monkeypatch.setattr(transforms.TrainTransform, "__call__", spy)
    for name in ("one", "two"):
        fit(recipe(checkpoint_steps=0), small_data, tmp_path / name, echo=quiet)
    assert len(set(draws)) == 10
    assert draws[:10] == draws[10:]


def test_a_small_network_learns(small_data, tmp_path):
    size = {"epochs": 12, "last_stage": 2, "image_size": 24}
    plain = {"checkpoint_steps": 0, "ema_decay": 0.0, "select": "last", "flip": False, "crop_padding": 0}
    run = fit(recipe(**size, **plain, head_lr_factor=1), small_data, tmp_path / "run", echo=quiet)
    assert run.history.train_loss.iloc[0] > 2
    assert run.history.train_loss.iloc[-1] < 1
    assert run.history.train_accuracy.iloc[-1] > 0.7


def test_a_checkpoint_survives_the_round_trip(tmp_path):
    directory = RunDirectory(tmp_path / "run")
    assert directory.load_checkpoint() is None
    state = {"model": {"w": torch.randn(3)}, "history": [{"epoch": 1, "loss": 0.1 + 0.2}], "best": None}
    directory.save_checkpoint(1, 2, state)
    loaded = directory.load_checkpoint()
    assert torch.equal(loaded["model"]["w"], state["model"]["w"])
    assert loaded["history"] == state["history"]
    directory.close()


def test_an_atomic_write_leaves_the_old_file_or_the_new_one(tmp_path, monkeypatch):
    file = tmp_path / "metrics.json"
    files.write_atomic(file, b"old")
    monkeypatch.setattr(os, "fsync", lambda descriptor: raise_(OSError(errno.EIO, "Input/output error")))
    with pytest.raises(TrainingError, match="Input/output error"):
        files.write_atomic(file, b"new")
    assert file.read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["metrics.json"]


def test_a_damaged_config_is_a_clear_error(whole, small_data, tmp_path):
    path = tmp_path / "run"
    path.mkdir()
    (path / "config.json").write_text((whole / "config.json").read_text()[:100])
    with pytest.raises(TrainingError, match=r"config.json is damaged .*start anew in another folder"):
        fit(recipe(), small_data, path, resume=True, echo=quiet)
