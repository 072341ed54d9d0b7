"""The run directory: checkpoints that survive, one writer, no run overwritten or mixed with another."""

import errno
import importlib
import itertools
import json
import os
import shutil
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from tiny_runs import Crash, interrupted, raise_, recipe, same_run

from cifar_ft.files import FileError
from cifar_ft.training import (
    RunDirectory,
    TrainingError,
    fit,
)

fit_file = importlib.import_module("cifar_ft.training.fit")  # `training.fit` is the function
pytestmark = pytest.mark.usefixtures("one_thread")


def places(path):
    """Where the checkpoints of a run stand: their names without the digest."""
    return [file.name.rpartition("-")[0] for file in sorted((path / "checkpoint").iterdir())]


def test_a_checkpoint_survives_the_round_trip(tmp_path):
    state = {"model": {"w": torch.randn(3)}, "history": [{"epoch": 1, "loss": 0.1 + 0.2}], "best": None}
    with RunDirectory(tmp_path / "run") as directory:
        assert directory.load_checkpoint() is None
        directory.save_checkpoint(1, 2, state)
        loaded = directory.load_checkpoint()
    assert torch.equal(loaded["model"]["w"], state["model"]["w"])
    assert loaded["history"] == state["history"]


def test_only_the_two_newest_checkpoints_are_kept(whole):
    assert places(whole) == ["epoch-00001-step-0000005", "epoch-00002-step-0000000"]


@pytest.mark.parametrize("damage", ["flip", "cut", "empty"])
def test_a_damaged_newest_checkpoint_falls_back_to_the_same_end(whole, small_data, tmp_path, monkeypatch, damage, said):
    path = tmp_path / "run"
    interrupted(monkeypatch, small_data, path, 8)
    newest, before = sorted((path / "checkpoint").glob("*.pt"), reverse=True)
    data = bytearray(newest.read_bytes())
    data[len(data) // 2] ^= 1
    newest.write_bytes({"flip": bytes(data), "cut": bytes(data[:1000]), "empty": b""}[damage])
    fit(recipe(), small_data, path, resume=True)
    assert f"Warning: checkpoint {newest.name} is damaged; falling back to the one before" in said
    assert "Resuming after epoch 1, step 1" in said
    assert before.name.startswith("epoch-00001-step-0000001-")
    same_run(whole, path)


def test_with_every_checkpoint_damaged_the_run_starts_again_to_the_same_end(
    whole, small_data, tmp_path, monkeypatch, said
):
    path = tmp_path / "run"
    interrupted(monkeypatch, small_data, path, 3)
    for file in (path / "checkpoint").glob("*.pt"):
        file.write_bytes(b"damaged")
    fit(recipe(), small_data, path, resume=True)
    assert sum("is damaged" in line for line in said) == 2
    assert "Warning: no checkpoint is usable; starting from the beginning" in said
    same_run(whole, path)


def test_a_folder_in_use_by_another_process_is_refused(small_data, tmp_path):
    code = "import sys, filelock as f; (lock := f.FileLock(sys.argv[1])).acquire(); print('locked', flush=1), input()"
    path, pipes = tmp_path / "run", {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    path.mkdir()
    with subprocess.Popen([sys.executable, "-c", code, str(path / ".lock")], **pipes) as other:
        assert other.stdout.readline() == "locked\n"
        for resume in (False, True):
            with pytest.raises(TrainingError, match="in use by another process; wait for it or choose another"):
                fit(recipe(), small_data, path, resume=resume)
        other.communicate("done\n")
    with RunDirectory(path):  # free again
        pass


def test_a_run_is_never_overwritten_without_resume(whole, small_data, tmp_path):
    before = {file: file.read_bytes() for file in whole.rglob("*") if file.is_file() and file.name != ".lock"}
    with pytest.raises(TrainingError, match=r"already holds a run; resume it .--resume. or choose another folder"):
        fit(recipe(), small_data, whole)
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
        fit(recipe(**overrides), replace(small_data, digest=digest), path, resume=True)
    assert not (path / "checkpoint").exists()


@pytest.mark.parametrize(
    ("part", "key", "value", "words"),
    [
        ("code", "training/loop.py", "0123", r"code.training/loop.py: '0123' then, '\w{12}' now"),
        ("versions", "torch", "2.0.0", r"versions.torch: '2.0.0' then, '[\w.+]+' now"),
        ("versions", "cifar_ft", "0.0.1", r"versions.cifar_ft: '0.0.1' then"),
        ("weights", "sha256", "abc", r"weights.sha256: 'abc' then, None now"),
    ],
)
def test_resume_with_other_code_is_refused_with_the_difference(whole, small_data, tmp_path, part, key, value, words):
    config = json.loads((whole / "config.json").read_text())
    config[part][key] = value
    config["plan"]["channels_last"] = True  # as another version wrote it
    path = tmp_path / "run"
    path.mkdir()
    (path / "config.json").write_text(json.dumps(config))
    with pytest.raises(TrainingError, match=f"cannot resume .*{words}.*start anew in another folder"):
        fit(recipe(), small_data, path, resume=True)
    (path / "metrics.json").write_text((whole / "metrics.json").read_text())
    for name in ("history.csv", "test_logits.npz"):
        shutil.copy(whole / name, path)
    assert fit(recipe(), small_data, path, resume=True).accuracy  # a finished run is only loaded


def test_a_damaged_config_is_a_clear_error(whole, small_data, tmp_path):
    path = tmp_path / "run"
    path.mkdir()
    (path / "config.json").write_text((whole / "config.json").read_text()[:100])
    with pytest.raises(TrainingError, match=r"config.json is damaged .*start anew in another folder"):
        fit(recipe(), small_data, path, resume=True)


@pytest.mark.parametrize("call", ["fsync", "replace"])
def test_a_full_disk_is_a_clear_error_and_earlier_checkpoints_stay_whole(
    whole, small_data, tmp_path, monkeypatch, call, said
):
    path, real, count = tmp_path / "run", getattr(os, call), itertools.count(1)

    def full(*arguments):
        if next(count) > 4:  # config.json and three checkpoints have been written
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return real(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(os, call, full)
        with pytest.raises(FileError, match=r"cannot write .*: No space left on device; make room"):
            fit(recipe(), small_data, path)
    assert not list(path.rglob("*.part"))
    assert places(path) == ["epoch-00000-step-0000002", "epoch-00000-step-0000003"]
    fit(recipe(), small_data, path, resume=True)
    assert "Resuming after epoch 0, step 3" in said
    same_run(whole, path)


def test_an_impossible_folder_is_refused_before_any_training(small_data, tmp_path, monkeypatch):
    monkeypatch.setattr(fit_file, "build_model", lambda *arguments: raise_(Crash()))
    (tmp_path / "file").touch()
    with pytest.raises(TrainingError, match=r"cannot use .* as a run folder: .*choose another"):
        fit(recipe(), small_data, tmp_path / "file" / "run")
