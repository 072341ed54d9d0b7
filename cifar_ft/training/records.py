"""What a run leaves behind: its configuration at the start, and its history, logits, weights and figures at the end."""

from __future__ import annotations

import ast
import csv
import datetime
import hashlib
import io
import json
import platform
import sys
from collections.abc import Iterable
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import save as to_safetensors
from torch import Tensor, nn

import cifar_ft
from cifar_ft.data import Cifar10, Split
from cifar_ft.files import show_path, write_atomic
from cifar_ft.recipes import Recipe
from cifar_ft.results import Run, fit_calibration, runs_root, wilson_interval
from cifar_ft.training.checkpoint import RunDirectory, TrainingError
from cifar_ft.training.hardware import Plan, hardware

HISTORY = (
    "epoch",
    *(f"{part}_{what}" for part in ("train", "val", "test") for what in ("loss", "accuracy")),
    "lr",
    "seconds",
)


# The modules whose code decides the weights that a run ends with.
DECISIVE = (
    *(f"data/{name}" for name in ("cifar10", "loader")),
    *(f"transforms/{name}" for name in ("augmentation", "normalization")),
    *(f"models/{name}" for name in ("backbones", "evaluation", "freezing", "surgery", "weights")),
    *(f"training/{name}" for name in ("convolutions", "distributed", "fit", "loop", "optim", "probe", "steps")),
)


def new_run_dir(recipe: Recipe) -> Path:
    """A folder that does not exist yet, named by recipe and time, under `results.runs_root()`."""
    stamp = datetime.datetime.now().strftime("%Y%m%d-%H%M%S")
    names = (f"{recipe.name}-{stamp}{suffix}" for suffix in ("", *(f"-{i}" for i in range(2, 1000))))
    return next(path for path in (runs_root() / name for name in names) if not path.exists())


def stored_recipe(run_dir: Path) -> Recipe:
    """The recipe that a run was begun with.

    Raises
    ------
    TrainingError
        When config.json is damaged or from another version of the recipes.
    """
    file = Path(run_dir) / "config.json"
    try:
        return Recipe.from_dict(json.loads(file.read_text(encoding="utf-8"))["recipe"])
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise TrainingError(f"{show_path(file)} cannot be read ({error}); start anew in another folder") from error


def describe_run(recipe: Recipe, data: Cifar10, splits: dict[str, Split], model: nn.Module, plan: Plan) -> dict:
    """The run's `config.json`: all that decides it, with digests, and what it runs on."""
    sizes = {name: len(split) for name, split in splits.items()}
    return {
        "recipe": recipe.to_dict(),
        "weights": model.weights_info,
        "data": {"source": data.source, "digest": data.digest, **sizes},
        "precision": plan.precision,
        "plan": asdict(plan),
        "code": code_digests(),
        "versions": _versions(),
        "hardware": hardware(),
    }


def write_run(
    directory: RunDirectory,
    recipe: Recipe,
    model: nn.Module,
    info: dict,
    *,
    history: list[dict],
    val_accuracy: float | None,
    train_images: int,
    logits: Tensor,
    labels: Tensor,
    mirrored: Tensor | None,
    validation: tuple[Tensor, Tensor] | None,
) -> None:
    """Write history, logits, weights and, last of all, the final figures, which mark the run as complete.

    Parameters
    ----------
    info : dict
        The model's `weights_info`.
    val_accuracy : float or None
        Of the weights that are kept.
    logits, labels, mirrored : Tensors [N, 10], [N] and [N, 10] or None
        Of the test images; `mirrored` are averaged with those of the mirror images.
    validation : logits and labels, or None
        Of the validation images, to calibrate on.
    """
    path, n = directory.path, len(labels)
    write_atomic(path / "history.csv", _csv(history))
    for split, pair in {"val": validation, "test": (logits, labels)}.items():
        if pair is not None:
            np.savez(buffer := io.BytesIO(), logits=pair[0].numpy(), labels=pair[1].numpy())
            write_atomic(path / f"{split}_logits.npz", buffer.getvalue())
    weights = {name: tensor.contiguous().cpu() for name, tensor in model.state_dict().items()}
    write_atomic(path / "model.safetensors", to_safetensors(weights, {"format": "pt", "backbone": info["backbone"]}))
    correct = int((logits.argmax(1) == labels).sum())
    training_seconds = sum(row["train_only_seconds"] for row in history)
    metrics = {
        "recipe": recipe.name,
        "backbone": info["backbone"],
        "weights": info["weights"],
        "epochs": recipe.epochs,
        "seed": recipe.seed,
        "train_images": train_images,
        "val_accuracy": val_accuracy,
        "calibration": None if validation is None else fit_calibration(*validation),
        "test_images": n,
        "test_accuracy": correct / n,
        "test_accuracy_ci95": list(wilson_interval(correct, n)),
        "test_loss": F.cross_entropy(logits, labels).item(),
        "test_accuracy_flip_tta": None if mirrored is None else (mirrored.argmax(1) == labels).float().mean().item(),
        "train_seconds": sum(row["seconds"] for row in history),
        "images_per_second": train_images * recipe.epochs / training_seconds,
        "peak_memory_mb": peak_memory_mb(),
        "hardware": hardware(),
        "versions": _versions(),
    }
    directory.write_json("metrics.json", metrics)


FIGURES = ("config.json", "history.csv", "metrics.json", "test_logits.npz", "val_logits.npz")


def keep_figures(run: Run, folder: str | Path, names: Iterable[str] = FIGURES) -> None:
    """Copy a run without its weights, and without the paths of this machine that its description may hold."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    for name in names:
        if (run.path / name).exists():
            content = (run.path / name).read_bytes()
            if name == "config.json":
                content = _without_paths(json.loads(content))
            write_atomic(folder / name, content)


def _without_paths(config: dict) -> bytes:
    weights = config["recipe"]["weights"]
    if weights not in ("imagenet", "none"):
        config["recipe"]["weights"] = Path(weights).name
        config["weights"]["source"] = f"the file {Path(weights).name}"
    return (json.dumps(config, indent=2) + "\n").encode()


def code_digests() -> dict[str, str]:
    """A digest of the code of each module that decides the numbers; comments and docstrings do not count."""
    digests = {}
    for name in DECISIVE:
        tree = ast.parse((Path(cifar_ft.__file__).parent / f"{name}.py").read_text(encoding="utf-8"))
        for node in ast.walk(tree):
            body = getattr(node, "body", None)
            first = body[0] if isinstance(body, list) and body else None
            if isinstance(first, ast.Expr) and isinstance(getattr(first.value, "value", None), str):
                first.value.value = ""
        digests[name] = hashlib.sha256(ast.unparse(tree).encode()).hexdigest()[:12]
    return digests


def _csv(rows: list[dict]) -> bytes:
    text = io.StringIO()
    writer = csv.DictWriter(text, HISTORY, restval="", extrasaction="ignore", lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue().encode()


def peak_memory_mb() -> float:
    """The most memory so far: of the GPU where there is one, else of this process."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 2**20
    try:
        import resource
    except ImportError:  # Windows
        import psutil

        return psutil.Process().memory_info().peak_wset / 2**20
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / 2**20 if sys.platform == "darwin" else peak / 2**10


def _versions() -> dict[str, str]:
    packages = ("torch", "torchvision", "timm", "accelerate", "numpy")
    own = {"cifar_ft": cifar_ft.__version__, "python": platform.python_version()}
    return own | {name: version(name) for name in packages}
