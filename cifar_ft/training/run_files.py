"""What a run leaves: its configuration at the start; history, losses, logits, weights and metrics at the end."""

from __future__ import annotations

import datetime
import hashlib
import io
import platform
import sys
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path

import numpy as np
import pandas as pd
import torch
import torch.nn.functional as F
from safetensors.torch import save as to_safetensors
from torch import Tensor

from cifar_ft import __version__
from cifar_ft.data import Cifar10, Split
from cifar_ft.files import PACKAGE, runs_root, show_path
from cifar_ft.models import choose_device
from cifar_ft.recipes import Recipe, weights_name
from cifar_ft.results import fit_calibration, wilson_interval
from cifar_ft.training.checkpoint import RunDirectory
from cifar_ft.training.faults import TrainingError
from cifar_ft.training.hardware import describe_machine
from cifar_ft.training.optim import lr_factor
from cifar_ft.training.state import Training

HISTORY = (
    "epoch",
    *(f"{part}_{what}" for part in ("train", "val", "test") for what in ("loss", "accuracy")),
    "lr",
    "seconds",
)
STEP_ROWS = 2000  # of steps.csv, so that it stays small; in a longer run each is the mean of several steps
# The files whose code decides the weights that a run ends with.
DECISIVE = (
    *(f"data/{name}.py" for name in ("cifar10", "loader")),
    *(f"transforms/{name}.py" for name in ("augmentation", "normalization")),
    *(f"models/{name}.py" for name in ("backbones", "conversion", "evaluation", "freezing", "surgery", "weights")),
    *(f"training/{name}.py" for name in ("convolutions", "distributed", "fit", "loop", "optim", "probe", "state")),
)


def new_run_dir(recipe: Recipe) -> Path:
    """A folder that does not exist yet, named by recipe and time, under `files.runs_root()`."""
    stamp = datetime.datetime.now().strftime("%Y%m%d-%H%M%S")
    names = (f"{recipe.name}-{stamp}{suffix}" for suffix in ("", *(f"-{i}" for i in range(2, 1000))))
    return next(path for path in (runs_root() / name for name in names) if not path.exists())


def stored_recipe(run_dir: Path) -> Recipe:
    """The recipe that a run was begun with.

    Raises
    ------
    TrainingError
        When config.json is damaged, no run's, or from another version of the recipes.
    """
    config, file = RunDirectory(run_dir).config(), Path(run_dir) / "config.json"
    if not config:
        raise TrainingError(f"{show_path(file)} is no run's, so there is nothing to resume; choose another folder")
    try:
        return Recipe.from_dict(config["recipe"])
    except (ValueError, TypeError) as error:
        raise TrainingError(f"{show_path(file)} cannot be read ({error}); start anew in another folder") from error


def describe_run(training: Training, data: Cifar10, splits: dict[str, Split]) -> dict:
    """The run's `config.json`: all that decides it, with digests, and what it runs on."""
    sizes = {name: len(split) for name, split in splits.items()}
    return {
        "recipe": {**training.recipe.to_dict(), "weights": weights_name(training.recipe.weights)},
        "weights": training.weights_info,
        "data": {"source": data.source, "digest": data.digest, **sizes},
        "precision": training.plan.precision,
        "plan": asdict(training.plan),
        "code": code_digests(),
        "versions": _versions(),
        "hardware": describe_machine(training.accelerator.device),
    }


def step_rows(training: Training, sums: Tensor) -> list[dict]:
    """Rows of steps.csv for the epoch that ends, from its `Training.sums`.

    Each row is a step or, in a run of more than `STEP_ROWS`, the mean over several steps of the epoch, so many that the
    run has hardly more rows; place and learning rate are those of the last of them.
    """
    recipe, length, rows = training.recipe, training.steps_per_epoch, []
    every = -(-recipe.epochs * length // STEP_ROWS)
    step, seen = training.epoch * length, training.epoch * sums[:, 2].sum().item()
    for part in sums.split(every):
        loss, _, images = part.sum(dim=0).tolist()
        step, seen = step + len(part), seen + images
        lr = training.optimizer.param_groups[0]["base_lr"] * lr_factor(recipe, step - 1, length)
        place = {"step": step, "epoch": step / length, "lr": lr, "loss": loss / images}
        rows.append({**place, "images": int(seen), "image_size": recipe.size_at(training.epoch)})
    return rows


def write_run(directory: RunDirectory, training: Training, splits: dict[str, Split], logits: dict[str, Tensor]) -> None:
    """Write history, losses, logits, weights and, last of all, the metrics, which mark the run as complete.

    Parameters
    ----------
    logits : dict of str to Tensor [N, 10]
        Of the test images ("test") and, if the recipe has them, of the validation images ("val") and of the test images
        averaged with their mirror images ("flip_tta").
    """
    recipe, info = training.recipe, training.weights_info
    labels = {name: split.labels.cpu() for name, split in splits.items()}
    history, steps = pd.DataFrame(training.history, columns=HISTORY), pd.DataFrame(training.steps)
    directory.write("history.csv", history.to_csv(index=False, lineterminator="\n").encode())
    directory.write("steps.csv", steps.to_csv(index=False, lineterminator="\n", float_format="%.6g").encode())
    for name in logits.keys() & labels.keys():
        np.savez(buffer := io.BytesIO(), logits=logits[name].numpy(), labels=labels[name].numpy())
        directory.write(f"{name}_logits.npz", buffer.getvalue())
    weights = {name: tensor.contiguous().cpu() for name, tensor in training.eval_model.state_dict().items()}
    # One entry of metadata: safetensors writes several in any order, and equal weights would be unequal files.
    metadata = {"strides": "v1"} if info.get("strides") == "v1" else {"format": "pt"}
    directory.write("model.safetensors", to_safetensors(weights, metadata))

    def correct(name: str) -> int:
        return int((logits[name].argmax(1) == labels["test"]).sum())

    n, epochs = len(labels["test"]), training.history
    metrics = {
        "recipe": recipe.name,
        "backbone": info["backbone"],
        "weights": info["weights"],
        "epochs": recipe.epochs,
        "seed": recipe.seed,
        "train_images": len(splits["train"]),
        "val_accuracy": (training.best or epochs[-1]).get("val_accuracy"),  # of the weights that are stored
        "calibration": fit_calibration(logits["val"], labels["val"], tested=(logits["test"], labels["test"]))
        if "val" in logits
        else None,
        "test_images": n,
        "test_accuracy": correct("test") / n,
        "test_accuracy_ci95": list(wilson_interval(correct("test"), n)),
        "test_loss": F.cross_entropy(logits["test"], labels["test"]).item(),
        "test_accuracy_flip_tta": correct("flip_tta") / n if "flip_tta" in logits else None,
        "train_seconds": sum(row["seconds"] for row in epochs),
        "images_per_second": len(splits["train"]) * recipe.epochs / sum(row["train_only_seconds"] for row in epochs),
        "peak_memory_mb": peak_memory_mb(training.accelerator.device),
        "hardware": describe_machine(training.accelerator.device),
        "versions": _versions(),
    }
    directory.write_json("metrics.json", metrics)


def code_digests() -> dict[str, str]:
    """A digest of each file that decides the numbers; lines that are empty or only a comment do not count."""
    digests = {}
    for name in DECISIVE:
        lines = (PACKAGE / name).read_text(encoding="utf-8").splitlines()
        code = "\n".join(line for line in lines if line.strip() and not line.lstrip().startswith("#"))
        digests[name] = hashlib.sha256(code.encode()).hexdigest()[:12]
    return digests


def peak_memory_mb(device: torch.device | None = None) -> float:
    """The most memory so far: of the GPU if `device` is one, else of this process; None: what "auto" is."""
    device = device or choose_device()
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    try:
        import resource
    except ImportError:  # Windows
        import psutil

        return psutil.Process().memory_info().peak_wset / 2**20
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / 2**20 if sys.platform == "darwin" else peak / 2**10


def _versions() -> dict[str, str]:
    packages = ("torch", "torchvision", "timm", "accelerate", "numpy")
    own = {"cifar_ft": __version__, "python": platform.python_version()}
    return own | {name: version(name) for name in packages}
