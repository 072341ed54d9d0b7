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
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from tiny_runs import Crash, interrupted, raise_, recipe, same_run, weights

from cifar_ft import CifarFtError
from cifar_ft.files import FileError
from cifar_ft.models import create_backbone
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


@pytest.mark.parametrize("ahead", [0, 1, 2, 5])
def test_damaged_checkpoints_go_first_and_the_one_just_written_never(tmp_path, ahead):
    folder, mine = tmp_path / "run" / "checkpoint", tmp_path / "run" / "checkpoint" / "epoch-best-of-mine.pt"
    with RunDirectory(tmp_path / "run") as directory:
        directory.write_json("config.json", {"recipe": {}, "weights": {}})
        directory.save_checkpoint(1, 2, {"step": 2})
        directory.save_checkpoint(1, 9, {"step": 9})
    directory.checkpoints()[0].write_bytes(b"damaged")
    for step in range(ahead):  # of a branch that was left, on a disk that fails
        (folder / f"epoch-00007-step-{step:07d}-{step:016x}.pt").write_bytes(b"damaged")
    mine.write_bytes(b"mine")
    with RunDirectory(tmp_path / "run") as directory:
        assert directory.load_checkpoint() == {"step": 2}
        for step, kept in [(3, {2, 3}), (4, {3, 4}), (4, {4}), (1, {1, 4})]:  # the same step again, and an earlier one
            directory.save_checkpoint(1, step, {"step": step, "seconds": len(kept)})
            files = directory.checkpoints()
            assert {torch.load(file)["step"] for file in files} == kept
            assert len(files) == 2
    assert mine.read_bytes() == b"mine"


def test_a_checkpoint_that_cannot_be_removed_does_not_end_training(tmp_path, monkeypatch, said):
    with RunDirectory(tmp_path / "run") as directory:
        for step in (1, 2):
            directory.save_checkpoint(1, step, {"step": step})
        monkeypatch.setattr(Path, "unlink", lambda *_, **__: raise_(PermissionError(errno.EACCES, "Permission denied")))
        directory.save_checkpoint(1, 3, {"step": 3})
        assert "cannot be removed (Permission denied)" in said[-1]
        assert directory.load_checkpoint() == {"step": 3}
        monkeypatch.undo()


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
    ],
)
def test_resume_with_other_code_is_refused_with_the_difference(whole, small_data, tmp_path, part, key, value, words):
    config = json.loads((whole / "config.json").read_text())
    config[part][key] = value
    config["plan"]["channels_last"] = True  # as another version wrote it
    path = tmp_path / "run"
    path.mkdir()
    (path / "config.json").write_text(json.dumps(config))
    with pytest.raises(TrainingError, match=f"cannot resume .*{words}.*--accept-changes.*start anew in another folder"):
        fit(recipe(), small_data, path, resume=True)
    (path / "metrics.json").write_text((whole / "metrics.json").read_text())
    for name in ("history.csv", "test_logits.npz", "model.safetensors"):
        shutil.copy(whole / name, path)
    assert fit(recipe(), small_data, path, resume=True).accuracy  # a finished run is only loaded


def test_changes_that_are_accepted_are_said_and_stored_and_then_are_the_runs_own(
    whole, small_data, tmp_path, monkeypatch, said
):
    path = tmp_path / "run"
    interrupted(monkeypatch, small_data, path, 3)
    config = json.loads((path / "config.json").read_text())
    now = {part: dict(config[part]) for part in ("code", "versions")}
    config["code"]["training/loop.py"], config["versions"]["torch"] = "0123", "2.0.0"
    (path / "config.json").write_text(json.dumps(config))
    interrupted(monkeypatch, small_data, path, 1, resume=True, accept_changes=True)
    (line,) = [line for line in said if line.startswith("Resuming with changes, which config.json tells: ")]
    assert "code.training/loop.py: '0123' then" in line
    assert "versions.torch: '2.0.0' then" in line
    stored = json.loads((path / "config.json").read_text())
    assert {part: stored[part] for part in now} == now
    assert stored["before"] == [{part: config[part] for part in now}]
    fit(recipe(), small_data, path, resume=True)  # nobody need accept it again
    same_run(whole, path)
    with pytest.raises(TrainingError, match=r"recipe.lr: 0.05 then, 0.5 now"):  # another run stays another run
        fit(recipe(lr=0.5), small_data, path, resume=True, accept_changes=True)


def test_a_checkpoint_that_other_code_cannot_use_is_a_clear_error(small_data, tmp_path, monkeypatch):
    interrupted(monkeypatch, small_data, tmp_path / "run", 3)
    with RunDirectory(tmp_path / "run") as directory:
        state = directory.load_checkpoint()
        del state["model"]["fc.weight"]
        directory.save_checkpoint(1, 5, state)
    with pytest.raises(TrainingError, match=r"the checkpoint does not fit this code \(.*fc.weight.*\); resume it with"):
        fit(recipe(), small_data, tmp_path / "run", resume=True)


@pytest.fixture
def weights_file(tmp_path):
    path = tmp_path / "disk" / "r18.safetensors"
    path.parent.mkdir()
    save_file(
        {name: value for name, value in create_backbone("resnet18").state_dict().items() if "fc" not in name}, path
    )
    return path


@pytest.mark.parametrize("backbone", ["auto", "resnet18"])
def test_a_run_is_resumed_without_the_file_that_it_started_from(
    small_data, tmp_path, monkeypatch, weights_file, backbone, said
):
    """Weights and data are known by their digests; where they lie may change, and weights may be gone."""
    settings = {"weights": str(weights_file), "backbone": backbone, "last_stage": None, "epochs": 1}
    fit(recipe(**settings), small_data, tmp_path / "whole")
    interrupted(monkeypatch, small_data, tmp_path / "run", 2, **settings)
    shutil.copytree(tmp_path / "run", tmp_path / "moved")
    there = weights_file.rename(tmp_path / "there.safetensors")
    fit(recipe(**settings), replace(small_data, source="another disk"), tmp_path / "run", resume=True)
    same_run(tmp_path / "whole", tmp_path / "run")
    assert fit(recipe(**settings), small_data, tmp_path / "run", resume=True).accuracy  # a finished one too
    fit(recipe(**{**settings, "weights": str(there)}), small_data, tmp_path / "moved", resume=True)
    assert weights(tmp_path / "moved").keys() == weights(tmp_path / "whole").keys()
    assert sum("Model: resnet18, weights r18.safetensors" in line for line in said) == 4


@pytest.mark.parametrize("finished", [False, True])
@pytest.mark.parametrize("other", ["other.safetensors", "gone.safetensors", "none", "imagenet"])
def test_other_weights_make_another_run(small_data, tmp_path, monkeypatch, weights_file, other, finished):
    settings = {"weights": str(weights_file), "last_stage": None, "epochs": 1}
    if finished:
        fit(recipe(**settings), small_data, tmp_path / "run")
    else:
        interrupted(monkeypatch, small_data, tmp_path / "run", 2, **settings)
    save_file({"conv1.weight": torch.zeros(64, 3, 7, 7)}, tmp_path / "other.safetensors")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(fit_file, "build_model", lambda *arguments: raise_(Crash()))
    with pytest.raises(TrainingError, match=r"(recipe.weights|weights.sha256): '.*' then, '.*' now"):
        fit(recipe(**{**settings, "weights": other}), small_data, tmp_path / "run", resume=True)


def test_without_a_checkpoint_the_file_is_needed_wherever_it_lies(
    small_data, tmp_path, monkeypatch, weights_file, said
):
    settings, path = {"weights": str(weights_file), "last_stage": None, "epochs": 1}, tmp_path / "run"
    interrupted(monkeypatch, small_data, path, 1, **settings)
    shutil.rmtree(path / "checkpoint")
    settings["weights"] = str(weights_file.rename(tmp_path / "there.safetensors"))
    fit(recipe(**settings), small_data, path, resume=True)
    assert "There is no checkpoint yet: starting from the beginning" in said


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


@pytest.mark.parametrize(
    "name",
    [
        "model.safetensors",
        "history.csv",
        "config.json",
        "notes.txt",
        "checkpoint/epoch-00001-step-0000001-abc.pt",
        "a/b",
    ],
)
@pytest.mark.parametrize("resume", [False, True])
def test_a_folder_that_is_no_runs_is_not_written_into(small_data, tmp_path, name, resume):
    path = tmp_path / "mine"
    file, hidden = path / name, path / "below" / ".letter.odt.12.part"
    for each in (file, hidden, path / ".draft.part"):
        each.parent.mkdir(parents=True, exist_ok=True)
        each.write_text('{"model_type": "bert"}')
    before = sorted(path.rglob("*"))
    with pytest.raises(TrainingError, match=r"mine is no run folder and not empty \(.*\); choose another") as caught:
        fit(recipe(), small_data, path, resume=resume)
    assert caught.value.wrong_argument
    assert sorted(path.rglob("*")) == before
    assert all(each.read_text() == '{"model_type": "bert"}' for each in before if each.is_file())


def test_only_what_a_killed_run_has_left_is_removed(small_data, tmp_path):
    """A folder that is empty but for hidden files may be used."""
    path = tmp_path / "run"
    (path / "checkpoint").mkdir(parents=True)
    (path / "below").mkdir()
    left = ["config.json", "checkpoint/epoch-00001-step-0000002-0123456789abcdef.pt", "test_logits.npz", "steps.csv"]
    left = [(path / name).with_name(f".{Path(name).name}.4711.part") for name in left]
    others = [".letter.odt.12.part", ".config.json.part", ".x.part", "below/.config.json.12.part", ".gitignore"]
    others = [path / name for name in others]
    for file in (*left, *others):
        file.write_text("left")
    (path / "config.json").write_text(json.dumps({"recipe": {}, "weights": {}}))
    with RunDirectory(path):
        pass
    assert not any(file.exists() for file in left)
    assert all(file.read_text() == "left" for file in others)
    new = tmp_path / "new"
    new.mkdir()
    (new / ".DS_Store").write_text("hidden")
    assert fit(recipe(epochs=1, checkpoint_steps=0), small_data, new)


@pytest.mark.parametrize("there", [False, True])
def test_what_fails_before_it_begins_leaves_no_folder(small_data, tmp_path, there):
    path = tmp_path / "runs" / "run"
    if there:
        path.mkdir(parents=True)
    with pytest.raises(CifarFtError, match="no file of this name"):
        fit(recipe(weights="/no/such/file.pt"), small_data, path)
    assert list(tmp_path.rglob("*")) == ([path.parent, path] if there else [])


def test_an_impossible_folder_is_refused_before_any_training(small_data, tmp_path, monkeypatch):
    monkeypatch.setattr(fit_file, "build_model", lambda *arguments: raise_(Crash()))
    (tmp_path / "file").touch()
    with pytest.raises(TrainingError, match=r"cannot use .* as a run folder: .*choose another"):
        fit(recipe(), small_data, tmp_path / "file" / "run")
