"""TODO tools.study"""

from __future__ import annotations

import csv
import dataclasses
import io
import tempfile
from collections.abc import Iterable, Mapping
from pathlib import Path

import torch
from filelock import FileLock

from cifar_ft.data import CLASSES, Cifar10
from cifar_ft.files import write_atomic
from cifar_ft.recipes import Recipe, get_recipe, parse_overrides
from cifar_ft.results import REDRAWN, Run, StudyError, runs_root, variants
from cifar_ft.training import hardware, keep_figures

# What every ablation starts from: small enough for three seeds of everything on a laptop.
BASE = (
    "backbone=efficientnet_lite0 freeze=none train_sizes= image_size=64 epochs=3 train_images=5000 "
    "label_smoothing=0.05 ema_decay=0.98"
)


def without_test(data: Cifar10) -> Cifar10:
    """The same data with ten validation images in the place of the test set, which a choice must not see."""
    return dataclasses.replace(data, test=data.val.take(torch.arange(len(CLASSES)), "no test"))


def try_recipe(recipe: Recipe, data: Cifar10) -> dict:
    """Train a recipe and score it on validation alone.

    Returns
    -------
    dict
        val_accuracy and val_loss of the weights kept, best_epoch and best_val_accuracy of the epochs, minutes.
    """
    from cifar_ft.training import fit

    with tempfile.TemporaryDirectory() as folder:
        run = fit(recipe, without_test(data), Path(folder) / "run")
    best = run.history.val_accuracy.idxmax()
    kept = run.history.loc[best] if recipe.select == "best" else run.history.iloc[-1]
    return {
        "val_accuracy": kept.val_accuracy,
        "val_loss": kept.val_loss,
        "train_accuracy": kept.train_accuracy,
        "best_epoch": int(run.history.epoch[best]),
        "best_val_accuracy": run.history.val_accuracy[best],
        "minutes": run.metrics["train_seconds"] / 60,
    }


class Log:
    """Rows of a CSV file, appended one at a time; several processes may do so at once."""

    def __init__(self, path: str | Path):
        self.path = Path(path)

    def rows(self) -> list[dict[str, str]]:
        """All rows so far, values as text."""
        if not self.path.exists():
            return []
        with self.path.open(encoding="utf-8", newline="") as file:
            return list(csv.DictReader(file))

    def append(self, row: Mapping[str, object]) -> None:
        """Add a row; a new file gets the row's keys as columns.

        Raises
        ------
        StudyError
            When the file has other columns.
        """
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(self.path.with_name(f".{self.path.name}.lock")):
            rows = self.rows()
            if rows and list(rows[0]) != list(row):
                raise StudyError(f"{self.path.name} has the columns {', '.join(rows[0])}; begin a new file")
            text = io.StringIO()
            writer = csv.DictWriter(text, list(row), lineterminator="\n")
            writer.writeheader()
            writer.writerows([*rows, {key: _text(value) for key, value in row.items()}])
            write_atomic(self.path, text.getvalue().encode())


def log_try(name: str, changes: Iterable[str], data: Cifar10, path: str | Path, note: str = "") -> dict:
    """Try a recipe with some settings changed, and append what came of it to the search log at `path`."""
    recipe, changes = get_recipe(name, list(changes)), " ".join(changes)
    row = {"recipe": name, "changes": changes, "seed": recipe.seed, **try_recipe(recipe, data)}
    row |= {"note": note, "hardware": hardware()}
    Log(path).append(row)
    return row


def redraw(name: str, data: Cifar10, weights: str | Path, out: str | Path, epochs: int, *, settings="") -> Run:
    """Train one of `REDRAWN`, and keep its curves and figures in `out`, without weights.

    The run itself stays below `results.runs_root()` and is gone on with when it was interrupted.

    Parameters
    ----------
    weights : "imagenet", or path
        ImageNet weights of ResNet-50: those of torchvision, or a file of them, whole or up to layer3.
    out : path
        Folder for config.json, history.csv and metrics.json.
    epochs : int
        The same for all that are to be compared; `reference_b32_cosine` decays to zero within them.
    settings : str
        Further changes, such as "last_stage=none" for the whole network.
    """
    from cifar_ft.training import fit

    base, changes, _ = REDRAWN[name]
    common = {"last_stage": 3, "epochs": epochs, "weights": str(weights), "precision": "auto"}
    recipe = get_recipe(base, common | parse_overrides(changes) | parse_overrides(settings))
    network = "whole" if recipe.last_stage is None else f"cut-behind-stage-{recipe.last_stage}"
    # One level below the runs that predictions and notebook 05 look for: none of these is meant to be used.
    folder = runs_root() / "redrawn" / f"{name}-{network}-{epochs}-epochs"
    run = fit(recipe, data, folder, resume=(folder / "config.json").exists())
    keep_figures(run, out, ("config.json", "history.csv", "metrics.json"))
    return run


def run_ablations(data: Cifar10, path: str | Path, seeds: Iterable[int], base: str = BASE) -> None:
    """Train every variant with every seed that the log at `path` does not have yet.

    A seed draws the training images' order and augmentation and the new head; the images are the same.
    """
    log = Log(path)
    for seed in seeds:
        for changes in variants():
            if any((row["changes"], row["seed"]) == (changes, str(seed)) for row in log.rows()):
                continue
            settings = parse_overrides(base) | parse_overrides(changes) | {"seed": seed}
            log.info(f"seed {seed}: {changes or 'base'}")
            found = try_recipe(get_recipe("quick", settings), data)
            log.info(f"    validation {found['val_accuracy']:.2%} in {found['minutes']:.1f} min")
            log.append({"changes": changes, "seed": seed, **found})


def _text(value: object) -> object:
    return f"{value:.6g}" if isinstance(value, float) else value
