"""A run: one seed gives one run, whatever interrupts it; the test set is scored once and chooses nothing."""

import copy
import importlib
import itertools
import json
import os
import shutil
import signal
import subprocess
import sys
import textwrap
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from tiny_models import v1_file
from tiny_runs import Crash, crash_at, history, interrupted, raise_, recipe, same_run, weights

from cifar_ft import CifarFtError, models, transforms
from cifar_ft.results import load_run
from cifar_ft.training import TrainingError, distributed, fit, loop, move_average

fit_file = importlib.import_module("cifar_ft.training.fit")  # `training.fit` is the function
pytestmark = pytest.mark.usefixtures("one_thread")


def test_the_same_seed_gives_the_same_run_bit_for_bit(whole, small_data, tmp_path):
    torch.manual_seed(123)
    np.random.seed(5)
    fit(recipe(), small_data, tmp_path / "run")
    same_run(whole, tmp_path / "run")


def test_another_seed_gives_another_run(whole, small_data, tmp_path):
    fit(recipe(seed=1), small_data, tmp_path / "run")
    assert history(tmp_path / "run") != history(whole)


def test_several_threads_are_as_repeatable(small_data, tmp_path):
    mine, threads = recipe(epochs=1, checkpoint_steps=0, train_images=60), torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        for name in ("one", "two"):
            fit(mine, small_data, tmp_path / name)
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
    fit(mine, small_data, tmp_path / "one")
    with monkeypatch.context() as patch:
        crash_at(patch, 1)
        with pytest.raises(Crash):
            fit(mine, small_data, tmp_path / "two")
    fit(mine, small_data, tmp_path / "two", resume=True)
    same_run(tmp_path / "one", tmp_path / "two")


def test_a_run_keeps_the_strides_of_its_weights_to_its_end(small_data, tmp_path, monkeypatch):
    few = {"epochs": 1, "train_images": 48, "val_images": 10, "test_images": 10}
    v1 = {**few, "backbone": "resnet50", "last_stage": 2, "weights": str(v1_file(tmp_path / "v1.safetensors"))}
    fit(recipe(**v1), small_data, tmp_path / "one")
    interrupted(monkeypatch, small_data, tmp_path / "two", 1, **v1)
    run = fit(recipe(**v1), small_data, tmp_path / "two", resume=True)
    same_run(tmp_path / "one", tmp_path / "two")
    assert run.config["weights"]["strides"] == "v1"
    again = models.build_model(recipe(**{**v1, "weights": str(run.path / "model.safetensors")})).eval()
    again.load_state_dict(weights(run.path))
    with torch.no_grad():
        logits = again(transforms.eval_transform(recipe())(small_data.test.subset(10).images))
    np.testing.assert_allclose(logits.numpy(), run.logits, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("nth", [1, 5, 6, 9, 12], ids=["step 1", "last step", "epoch 1", "step 3 of epoch 2", "end"])
def test_interrupted_anywhere_and_resumed_is_as_if_never_interrupted(
    whole, small_data, tmp_path, monkeypatch, nth, said
):
    path = tmp_path / "run"
    interrupted(monkeypatch, small_data, path, nth)
    run = fit(recipe(), small_data, path, resume=True)
    same_run(whole, path)
    assert run.path == path
    epoch, step = divmod(nth, 6)  # each epoch has five checkpoints within and one at its end
    assert any(line == f"Resuming after epoch {epoch}, step {step}" for line in said)


def test_interrupted_in_the_middle_of_a_step_is_resumed_too(whole, small_data, tmp_path, monkeypatch):
    update, count = move_average, itertools.count(1)

    def fail(*arguments):
        update(*arguments)
        if next(count) in (2, 5):
            raise Crash

    monkeypatch.setattr(loop, "move_average", fail)
    for resume in (False, True):
        with pytest.raises(Crash):
            fit(recipe(), small_data, tmp_path / "run", resume=resume)
    fit(recipe(), small_data, tmp_path / "run", resume=True)
    same_run(whole, tmp_path / "run")


@pytest.mark.parametrize("name", ["steps.csv", "test_logits.npz", "model.safetensors", "metrics.json"])
def test_interrupted_while_the_final_files_are_written_is_resumed_too(whole, small_data, tmp_path, monkeypatch, name):
    with monkeypatch.context() as patch:
        rename = os.replace
        patch.setattr(os, "replace", lambda a, b: raise_(Crash()) if b.name == name else rename(a, b))
        with pytest.raises(Crash):
            fit(recipe(), small_data, tmp_path / "run")
    fit(recipe(), small_data, tmp_path / "run", resume=True)
    same_run(whole, tmp_path / "run")


def test_without_checkpoint_steps_the_epoch_is_trained_again_to_the_same_end(whole, small_data, tmp_path, monkeypatch):
    interrupted(monkeypatch, small_data, tmp_path / "run", 1, checkpoint_steps=0)
    fit(recipe(checkpoint_steps=0), small_data, tmp_path / "run", resume=True)
    for other in ({"checkpoint_steps": 0}, {"flip_tta": False}):  # how often to checkpoint is no part of the result
        assert fit(recipe(**other), small_data, tmp_path / "run", resume=True)
    same_run(whole, tmp_path / "run")


def test_resume_where_nothing_has_begun_is_a_start_and_says_so(whole, small_data, tmp_path, said):
    fit(recipe(), small_data, tmp_path / "run", resume=True)
    assert said[0].startswith("There is nothing to resume in ")
    assert said[0].endswith("/run: beginning")
    same_run(whole, tmp_path / "run")


@pytest.mark.parametrize("name", ["cuda", "mps", "gpu"])
def test_a_device_that_is_not_here_is_refused_before_any_work(small_data, tmp_path, monkeypatch, name):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    with pytest.raises(models.DeviceError, match=f"there is no device '{name}' here; choose from auto, cpu"):
        fit(recipe(), small_data, tmp_path / "run", device=name)
    assert not (tmp_path / "run").exists()


def test_the_device_that_is_named_is_the_one_that_trains(small_data, tmp_path, monkeypatch):
    """Stand-ins: a machine whose GPUs are busy, and whose CPU is asked for."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    run = fit(recipe(epochs=1, checkpoint_steps=0), small_data, tmp_path / "run", device="cpu")
    assert "GPU" not in run.metrics["hardware"]
    assert run.metrics["peak_memory_mb"] > 100  # of the process


def test_a_run_in_half_precision_of_a_gpu_cannot_go_on_elsewhere(small_data, tmp_path, monkeypatch):
    interrupted(monkeypatch, small_data, tmp_path / "run", 3)
    config = json.loads((tmp_path / "run" / "config.json").read_text())
    config["plan"]["precision"] = "fp16"
    (tmp_path / "run" / "config.json").write_text(json.dumps(config))
    with pytest.raises(CifarFtError, match="precision=fp16 needs an NVIDIA GPU"):
        fit(recipe(), small_data, tmp_path / "run", resume=True, device="cpu")


KILLED = """
    import os, signal, sys, torch
    sys.path.insert(0, {tests!r})
    from conftest import small_data, samples
    from cifar_ft.training import fit
    from tiny_runs import recipe
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
    fit(recipe(), unwrap(small_data)(unwrap(samples)()), {path!r})
"""


@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="this system has no SIGKILL")
def test_killed_while_writing_a_checkpoint_and_resumed_is_as_if_never_killed(whole, small_data, tmp_path, said):
    path, tests = tmp_path / "run", str(Path(__file__).resolve().parents[1])
    code = textwrap.dedent(KILLED).format(tests=tests, path=str(path))
    command, root = [sys.executable, "-c", code], os.path.dirname(tests)
    child = subprocess.run(command, cwd=root, capture_output=True, timeout=300, check=False)
    assert child.returncode == -signal.SIGKILL, child.stderr.decode()
    assert list(path.rglob("*.part"))  # the torn file is there, under another name
    fit(recipe(), small_data, path, resume=True)
    assert "Resuming after epoch 1, step 0" in said
    assert not list(path.rglob("*.part"))
    same_run(whole, path)


def test_resume_of_a_finished_run_only_loads_it(whole, small_data, monkeypatch, said):
    monkeypatch.setattr(fit_file, "train_epoch", lambda *arguments: raise_(Crash()))
    monkeypatch.setattr(distributed, "predict_logits", lambda *arguments, **options: raise_(Crash()))
    run = fit(recipe(), small_data, whole, resume=True)
    assert run.accuracy == load_run(whole).accuracy
    assert "finished; nothing to resume" in said[-1]


def test_a_finished_run_from_before_a_setting_existed_is_loaded_too(whole, small_data, tmp_path):
    path = shutil.copytree(whole, tmp_path / "run")
    config = json.loads((path / "config.json").read_text())
    del config["recipe"]["cutout"]
    (path / "config.json").write_text(json.dumps(config))
    assert fit(recipe(), small_data, path, resume=True).accuracy == load_run(whole).accuracy
    with pytest.raises(TrainingError, match=r"recipe.cutout: 0 then, 8 now"):
        fit(recipe(cutout=8), small_data, path, resume=True)


def test_a_run_with_adamw_resumes_to_the_same_weights(small_data, tmp_path, monkeypatch):
    mine = recipe(optimizer="adamw", lr=0.001)
    fit(mine, small_data, tmp_path / "whole")
    interrupted(monkeypatch, small_data, tmp_path / "parts", 6, optimizer="adamw", lr=0.001)
    fit(mine, small_data, tmp_path / "parts", resume=True)
    same_run(tmp_path / "whole", tmp_path / "parts")


def scored(patch):
    """The names of the splits that are scored from now on, in order."""
    names, predict = [], models.predict_logits

    def spy(model, split, *arguments, **options):
        names.append(split.name)
        return predict(model, split, *arguments, **options)

    patch.setattr(distributed, "predict_logits", spy)
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
    fit(recipe(checkpoint_steps=0, **overrides), small_data, tmp_path / "run")
    assert names == expected


@pytest.mark.parametrize("track", [False, True])
def test_the_test_labels_choose_nothing(small_data, tmp_path, track):
    shuffled = replace(small_data.test, labels=(small_data.test.labels + 3) % 10)
    for name, data in (("true", small_data), ("false", replace(small_data, test=shuffled))):
        fit(recipe(track_test=track, checkpoint_steps=0), data, tmp_path / name)
    a, b = weights(tmp_path / "true"), weights(tmp_path / "false")
    assert all(torch.equal(a[name], b[name]) for name in a)
    assert load_run(tmp_path / "true").metrics["test_loss"] != load_run(tmp_path / "false").metrics["test_loss"]


@pytest.mark.parametrize(("select", "kept"), [("best", 1), ("last", 2)])
def test_the_weights_kept_are_those_of_the_best_epoch_on_validation_or_of_the_last(
    small_data, tmp_path, monkeypatch, select, kept
):
    states, correct, labels = [], iter([12, 20, 20]), small_data.val.labels  # the first of two equals is kept

    def gather(model, split, *arguments):
        if split.name != "val" or len(states) == 3:
            return torch.zeros(len(split), 10)
        states.append({name: tensor.clone() for name, tensor in model.state_dict().items()})
        right = torch.arange(len(labels)) < next(correct)
        return F.one_hot(torch.where(right, labels, (labels + 1) % 10), 10).float()

    monkeypatch.setattr(fit_file, "gather_logits", gather)
    run = fit(recipe(epochs=3, select=select, checkpoint_steps=0), small_data, tmp_path / "run")
    found = weights(tmp_path / "run")
    assert all(torch.equal(found[name], tensor) for name, tensor in states[kept].items())
    assert not torch.equal(states[1]["fc.weight"], states[2]["fc.weight"])
    assert run.metrics["val_accuracy"] == 0.5


def test_the_average_is_what_is_scored_and_kept(small_data, tmp_path, monkeypatch):
    kept = {}
    finish = fit_file.finish_run

    def spy(state, *arguments):
        kept["ema"], kept["model"] = copy.deepcopy(state.ema.state_dict()), copy.deepcopy(state.model.state_dict())
        return finish(state, *arguments)

    monkeypatch.setattr(fit_file, "finish_run", spy)
    fit(recipe(select="last", checkpoint_steps=0), small_data, tmp_path / "run")
    found = weights(tmp_path / "run")
    assert all(torch.equal(found[name], kept["ema"][name]) for name in found)
    assert not torch.equal(found["fc.weight"], kept["model"]["fc.weight"])


@pytest.mark.parametrize(
    "damage", [lambda run: (run / "model.safetensors").unlink(), lambda run: (run / "metrics.json").write_text("{")]
)
def test_a_finished_run_that_lost_a_file_is_finished_again_from_its_checkpoint(whole, small_data, tmp_path, damage):
    shutil.copytree(whole, tmp_path / "run")
    damage(tmp_path / "run")
    fit(recipe(), small_data, tmp_path / "run", resume=True)
    same_run(tmp_path / "run", whole)
