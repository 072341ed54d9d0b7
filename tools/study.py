"""Experiments that write results/: tries for a recipe, ablations over seeds, the published recipe redrawn, robustness.

Tries and ablations see the validation images alone; the test set is not even handed to them. Every run becomes a row
of a CSV file as soon as it is done, so that a study can be stopped, resumed, and shared between processes.
"""

from __future__ import annotations

import csv
import hashlib
import io
import itertools
import json
import tempfile
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Annotated

import numpy as np
import torch
import typer
from filelock import FileLock, Timeout
from torch import Tensor

from cifar_ft import log, results, training
from cifar_ft.data import CLASSES, Cifar10, Split, load_cifar10
from cifar_ft.files import full_path, runs_root, unknown, write_atomic
from cifar_ft.models import predict_logits
from cifar_ft.predictions import PredictionError, Predictor
from cifar_ft.recipes import Recipe, get_recipe, parse_overrides
from cifar_ft.results import REDRAWN, Run, StudyError
from cifar_ft.transforms import eval_transform
from tools.publish import publish_run

ROOT = Path(__file__).resolve().parents[1]
# What every ablation starts from: small enough for five seeds of everything on a laptop.
BASE = (
    "backbone=efficientnet_lite0 freeze=none train_sizes= image_size=64 epochs=3 train_images=5000 "
    "label_smoothing=0.05 ema_decay=0.98"
)
TOLERANCE = 0.0005  # between the accuracy of a run and that of its weights in 16 bits

app = typer.Typer(help=__doc__, no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False)
Overrides = Annotated[
    list[str], typer.Option("--set", metavar="KEY=VALUE", help="Change one setting of the recipe; repeatable.")
]
Table = Annotated[Path, typer.Option("--out", parser=full_path, help="The CSV file that gets the rows.")]


@app.command("try")
def try_(
    recipe: Annotated[str, typer.Option(help="Name of the recipe.")] = "cpu",
    overrides: Overrides = (),
    note: Annotated[str, typer.Option(help="Why, in a few words.")] = "",
    out: Table = ROOT / "results" / "search.csv",
) -> None:
    """Train a recipe, score it on validation alone, and add a row to the search log."""
    checked = get_recipe(recipe, list(overrides))  # a mistake is told before the data is loaded
    if not checked.validation:
        raise typer.BadParameter(f"{recipe} trains without validation, which scores a try; add --set validation=true")
    changes = " ".join(overrides).replace(checked.weights, Path(checked.weights).name)  # no folder of this machine
    row = {"recipe": recipe, "changes": changes, "seed": checked.seed, **try_recipe(checked, load_cifar10())}
    append_row(out, row | {"note": note, "hardware": training.describe_machine()})
    typer.echo(f"validation {row['val_accuracy']:.2%} in {row['minutes']:.1f} min; added to {out}")


@app.command()
def ablations(
    seeds: Annotated[list[int], typer.Option("--seed", help="Repeatable.")] = (0, 1, 2, 3, 4),
    out: Table = ROOT / "results" / "ablations.csv",
) -> None:
    """Train every variant with every seed that the table does not have yet."""
    run_ablations(load_cifar10(), out, seeds)


@app.command()
def redrawn(
    epochs: Annotated[int, typer.Option(help="The same for all of them.")] = 3,
    names: Annotated[list[str], typer.Option("--name", help="Some of them; default: all. Repeatable.")] = (),
    overrides: Overrides = (),
    out: Annotated[Path, typer.Option(parser=full_path, help="Folder of the results.")] = ROOT / "results" / "redrawn",
) -> None:
    """Train the published recipe and its variants, all for the same number of epochs."""
    for name in names:
        if name not in REDRAWN:
            raise typer.BadParameter(unknown("name", name, REDRAWN))
    get_recipe("reference_b32", list(overrides))
    data = load_cifar10()
    for name in names or REDRAWN:
        redraw(name, data, out / name, epochs, " ".join(overrides))


@app.command()
def robustness(
    out: Annotated[Path, typer.Option(parser=full_path, help="JSON file.")] = ROOT / "results" / "shipped.json",
) -> None:
    """Score the shipped model on the test set, clean and corrupted, and compare with its recorded accuracy."""
    measure_shipped(out, load_cifar10().test)


def without_test(data: Cifar10) -> Cifar10:
    """The same data with ten validation images in the place of the test set, which a choice must not see."""
    return replace(data, test=data.val.take(torch.arange(len(CLASSES)), "no test"))


def try_recipe(recipe: Recipe, data: Cifar10) -> dict:
    """Train a recipe and score it on validation alone.

    Returns
    -------
    dict
        val_accuracy, val_loss and train_accuracy of the weights kept, best_epoch and best_val_accuracy of the epochs,
        minutes.
    """
    with tempfile.TemporaryDirectory() as folder:
        run = training.fit(recipe.replace(test_images=None), without_test(data), Path(folder) / "run")
    best = run.history.val_accuracy.idxmax()
    final = run.history.loc[best] if recipe.select == "best" else run.history.iloc[-1]
    return {
        "val_accuracy": final.val_accuracy,
        "val_loss": final.val_loss,
        "train_accuracy": final.train_accuracy,
        "best_epoch": int(run.history.epoch[best]),
        "best_val_accuracy": run.history.val_accuracy[best],
        "minutes": run.metrics["train_seconds"] / 60,
    }


def read_rows(path: Path) -> list[dict[str, str]]:
    """The rows of a CSV file, values as text; none when there is no file yet."""
    if not path.exists():
        return []
    with path.open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def append_row(path: Path, row: Mapping[str, object]) -> None:
    """Add a row to a CSV file, which several processes may do at once; a new file gets the row's keys as columns.

    Raises
    ------
    StudyError
        When the file has other columns.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(path.with_name(f".{path.name}.lock")):
        rows = read_rows(path)
        if rows and list(rows[0]) != list(row):
            raise StudyError(f"{path.name} has the columns {', '.join(rows[0])}; begin a new file")
        short = {key: f"{value:.6g}" if isinstance(value, float) else value for key, value in row.items()}
        writer = csv.DictWriter(text := io.StringIO(), list(row), lineterminator="\n")
        writer.writeheader()
        writer.writerows([*rows, short])
        write_atomic(path, text.getvalue().encode())


def run_ablations(data: Cifar10, path: Path, seeds: Iterable[int], base: str = BASE) -> None:
    """Train every variant with every seed that the table at `path` does not have yet.

    A seed draws the training images' order and augmentation and the new head; the images are the same. What another
    process is at is left to it.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    for seed, changes in itertools.product(seeds, results.variants()):
        job = f"seed={seed} {changes}"
        claim = FileLock(path.with_name(f".{path.name}.{hashlib.sha256(job.encode()).hexdigest()[:16]}.lock"))
        with suppress(Timeout), claim.acquire(timeout=0):
            if any((row["changes"], row["seed"]) == (changes, str(seed)) for row in read_rows(path)):
                continue
            log.info(f"seed {seed}: {changes or 'base'}")
            settings = parse_overrides(base) | parse_overrides(changes) | {"seed": seed}
            found = try_recipe(get_recipe("quick", settings), data)
            log.info(f"    validation {found['val_accuracy']:.2%} in {found['minutes']:.1f} min")
            append_row(path, {"changes": changes, "seed": seed, **found})


def redraw(name: str, data: Cifar10, out: Path, epochs: int, settings: str = "") -> Run:
    """Train one of `REDRAWN`, and keep its curves and figures in `out`, without weights and logits.

    The run itself stays below `files.runs_root()`, and is resumed when it was interrupted.

    Parameters
    ----------
    epochs : int
        The same for all that are to be compared; `reference_b32_cosine` is a cosine over so many.
    settings : str
        Further changes of the recipe.
    """
    base, changes, _ = REDRAWN[name]
    common = {"epochs": epochs, "precision": "auto"}
    recipe = get_recipe(base, common | parse_overrides(changes) | parse_overrides(settings))
    # One level below the runs that predictions and notebook 05 look for: none of these is meant to be used.
    folder = runs_root() / "redrawn" / f"{name}-{epochs}-epochs"
    run = training.fit(recipe, data, folder, resume=(folder / "config.json").exists())
    publish_run(run, out, ("config.json", "history.csv", "metrics.json"))
    return run


def measure_shipped(out: Path, test: Split, corrupted_images: int = 2000) -> dict:
    """Measure what plain accuracy does not say of the shipped model, write it to `out`, and compare with its run.

    Parameters
    ----------
    test : Split
        The 10,000 test images in the official order.
    corrupted_images : int
        How many of them, a stratified sample, are scored under each corruption and level.

    Returns
    -------
    dict
        JSON-ready: model, accuracy, ci95, temperature (fitted on validation), ece_before, ece_after, false_alarms
        (share of test images called unknown), without (see `results.accuracy_without`), corruptions (rows), their
        number of images and clean accuracy, and coverage (rows).

    Raises
    ------
    PredictionError
        When its accuracy is more than 0.05 points off that of its run.
    """
    predictor, recorded = Predictor.shipped(), results.load_run(results.SHIPPED_RUN).accuracy
    transform, sample = eval_transform(predictor.recipe), test.subset(min(corrupted_images, len(test)))

    def logits_of(images: Tensor, split: Split = sample) -> Tensor:
        return predict_logits(predictor.model, replace(split, images=images), transform)

    logits, temperature = logits_of(test.images, test), predictor.calibration["temperature"]
    labels, right = test.labels.numpy(), (logits.argmax(1) == test.labels).numpy()
    calibrated = (logits / temperature).softmax(1).numpy()
    coverage = results.selective_accuracy(labels, calibrated)
    drawn = [round(share * len(coverage)) - 1 for share in np.arange(0.2, 1.001, 0.02)]
    found = {
        "model": predictor.source,
        "accuracy": float(right.mean()),
        "ci95": results.wilson_interval(int(right.sum()), len(right)),
        "temperature": temperature,
        "ece_before": results.calibration(labels, logits.softmax(1).numpy())[1],
        "ece_after": results.calibration(labels, calibrated)[1],
        "false_alarms": float((results.energy(logits) < predictor.calibration["lowest_energy"]).mean()),
        "without": results.accuracy_without(results.test_issues(), right, test.indices.numpy()),
        "corrupted_images": len(sample),
        "corrupted_clean": float(right[np.isin(test.indices, sample.indices)].mean()),
        "corruptions": results.corrupted_accuracy(logits_of, sample.images, sample.labels).to_dict("records"),
        "coverage": coverage.iloc[drawn].to_dict("records"),
    }
    write_atomic(out, (json.dumps(found, indent=1) + "\n").encode())
    off = abs(found["accuracy"] - recorded)
    log.info(
        f"recorded {recorded:.2%}, measured now {found['accuracy']:.2%}: "
        f"{100 * off:.3f} points apart (at most {100 * TOLERANCE})"
    )
    if off > TOLERANCE:
        raise PredictionError("the shipped model is not as accurate as its run; ship the run again (make ship)")
    return found


if __name__ == "__main__":
    training.keep_memory()
    app()
