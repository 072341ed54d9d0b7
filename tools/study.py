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
    runs: Annotated[
        list[Path],
        typer.Option("--run", parser=full_path, help="Runs to compare with the first, on validation. Repeatable."),
    ] = (),
    out: Annotated[Path | None, typer.Option(parser=full_path, help="JSON file; default: in results/.")] = None,
) -> None:
    """Score the shipped model on the test set, or runs on validation, clean and corrupted."""
    data = load_cifar10()
    if runs:
        measure_runs(out or ROOT / "results" / "defence.json", runs, data.val)
    else:
        measure_shipped(out or ROOT / "results" / "shipped.json", data.test)


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


def measure_shipped(out: Path, test: Split, corrupted_images: int = 200) -> dict:
    """Measure what plain accuracy does not say of the shipped model, write it to `out`, and compare with its run.

    Parameters
    ----------
    test : Split
        The 10,000 test images in the official order.
    corrupted_images : int
        How many of them, a stratified sample, are scored under each corruption and severity.

    Returns
    -------
    dict
        JSON-ready: model, accuracy, ci95, false_alarms (share of test images called unknown), without (see
        `results.accuracy_without`), and what `_corrupted` gives.

    Raises
    ------
    PredictionError
        When its accuracy is more than 0.05 points off that of its run.
    """
    predictor, recorded = Predictor.shipped(), results.load_run(results.SHIPPED_RUN).accuracy
    logits = predict_logits(predictor.model, test, eval_transform(predictor.recipe))
    right = (logits.argmax(1) == test.labels).numpy()
    found = {
        "model": predictor.source,
        "accuracy": float(right.mean()),
        "ci95": results.wilson_interval(int(right.sum()), len(right)),
        "false_alarms": float((results.energy(logits) > predictor.highest_energy).mean()),
        "without": results.accuracy_without(results.test_issues(), right, test.indices.numpy()),
        **_corrupted(predictor, test, corrupted_images)[0],
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


def measure_runs(out: Path, paths: Iterable[Path], val: Split, corrupted_images: int = 2000) -> dict:
    """Score runs on the validation images, clean and corrupted, and write to `out` how they differ from the first one.

    Returns
    -------
    dict
        JSON-ready: images, and runs, of which each has recipe, changes (of the recipe of this name), seed, accuracy,
        ci95, difference (of the accuracy on clean images from the first run's, paired, with its interval),
        mean_difference (alike, of the mean over corruptions), and what `_corrupted` gives.
    """
    found, first = [], None
    for path in paths:
        predictor, recipe = Predictor.from_run(path), results.load_run(path).recipe
        logits = predict_logits(predictor.model, val, eval_transform(recipe))
        right = (logits.argmax(1) == val.labels).numpy()
        corrupted, shares = _corrupted(predictor, val, corrupted_images)
        first = first or (right, shares)
        clean, under = results.paired_test(right, first[0]), shares - first[1]
        named = get_recipe(recipe.name).to_dict()
        found.append(
            {
                "recipe": recipe.name,
                "changes": {key: value for key, value in recipe.to_dict().items() if value != named[key]},
                "seed": recipe.seed,
                "accuracy": float(right.mean()),
                "ci95": results.wilson_interval(int(right.sum()), len(right)),
                "difference": (clean.difference, clean.low, clean.high),
                "mean_difference": (float(under.mean()), *results.mean_interval(under)),
                **corrupted,
            }
        )
    written = {"images": len(val), "runs": found}
    write_atomic(out, (json.dumps(written, indent=1) + "\n").encode())
    return written


def _corrupted(predictor: Predictor, split: Split, images: int) -> tuple[dict, np.ndarray]:
    """How a model does on a stratified sample of so many images under `transforms.CORRUPTIONS`.

    The dictionary has corrupted_images, corruptions (rows of `results.corrupted_accuracy`), and mean and mean_ci95 over
    CIFAR-10-C's corruptions and severities; the array is its `shares`.
    """
    sample, transform = split.subset(min(images, len(split))), eval_transform(predictor.recipe)
    frame, shares = results.corrupted_accuracy(
        lambda seen: predict_logits(predictor.model, replace(sample, images=seen), transform),
        sample.images,
        sample.labels,
    )
    mean = {"mean": float(shares.mean()), "mean_ci95": results.mean_interval(shares)}
    return {"corrupted_images": len(sample), **mean, "corruptions": frame.to_dict("records")}, shares


if __name__ == "__main__":
    training.keep_memory()
    app()
