"""A run small enough to be trained in seconds, and what tests compare of it."""

import csv
import itertools
import json

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from cifar_ft.recipes import get_recipe
from cifar_ft.results import load_run
from cifar_ft.training import RunDirectory, fit

ALL = {"train_images": None, "val_images": None, "test_images": None}


def recipe(**overrides):
    """A tiny ResNet (cut behind stage 1), 2 epochs of 5 steps, with everything that has a state to be resumed."""
    defaults = {"backbone": "resnet18", "weights": "none", "last_stage": 1, "image_size": 16, "batch_size": 24}
    rest = {"checkpoint_steps": 1, "select": "best", "ema_decay": 0.8, "lr": 0.05}
    return get_recipe("smoke", {**ALL, **defaults, **rest, **overrides})


def raise_(error):
    raise error


def weights(path):
    return load_file(path / "model.safetensors")


def history(path):
    """The rows of history.csv without their times."""
    with open(path / "history.csv", newline="") as file:
        return [{key: value for key, value in row.items() if key != "seconds"} for row in csv.DictReader(file)]


def same_run(one, other):
    """Bit for bit: weights and their file, test logits, the loss of each step, and the history apart from seconds."""
    for name in ("model.safetensors", "steps.csv"):
        assert (one / name).read_bytes() == (other / name).read_bytes()
    a, b = weights(one), weights(other)
    assert a.keys() == b.keys()
    assert all(torch.equal(a[name], b[name]) for name in a)
    assert history(one) == history(other)
    assert np.array_equal(load_run(one).logits, load_run(other).logits)
    times = {"train_seconds", "images_per_second", "peak_memory_mb"}
    figures = [json.loads((path / "metrics.json").read_text()).items() for path in (one, other)]
    assert [item for item in figures[0] if item[0] not in times] == [
        item for item in figures[1] if item[0] not in times
    ]


class Crash(Exception):
    """What a test interrupts training with."""


def crash_at(patch, nth):
    """Crash right after the nth checkpoint."""
    save, count = RunDirectory.save_checkpoint, itertools.count(1)

    def save_and_crash(self, *arguments):
        save(self, *arguments)
        if next(count) == nth:
            raise Crash

    patch.setattr(RunDirectory, "save_checkpoint", save_and_crash)


def interrupted(patch, data, path, nth, resume=False, accept_changes=False, **overrides):
    """Train `recipe(**overrides)` until its nth checkpoint."""
    with patch.context() as inner:
        crash_at(inner, nth)
        with pytest.raises(Crash):
            fit(recipe(**overrides), data, path, resume=resume, accept_changes=accept_changes)
    assert not (path / "metrics.json").exists()


def write_run(path, *, recipe=None, seed=0, shift=3.0, seconds=120.0):
    """Write the folder of a finished run of two epochs on 200 images; it is right the more often the larger `shift`."""
    rng = np.random.default_rng(seed)
    recipe = recipe or get_recipe("quick", {"seed": seed})
    labels = np.arange(200) % 10
    logits = rng.normal(0, 1, (200, 10)).astype(np.float32)
    logits[np.arange(200), labels] += shift
    path.mkdir(parents=True)
    (path / "config.json").write_text(json.dumps({"recipe": recipe.to_dict()}))
    columns = "epoch,train_loss,train_accuracy,val_loss,val_accuracy,test_loss,test_accuracy,lr,seconds"
    (path / "history.csv").write_text(f"{columns}\n1,1.2,0.6,0.9,0.7,,,0.1,9\n2,0.8,0.7,0.7,0.8,,,0.05,9\n")
    np.savez(path / "test_logits.npz", logits=logits, labels=labels)
    metrics = {"recipe": recipe.name, "backbone": "resnet50", "epochs": 2, "seed": seed, "train_seconds": seconds}
    (path / "metrics.json").write_text(json.dumps(metrics))
    return path
