"""Recorded studies: ablations over seeds, the published recipe redrawn, and the robustness of the shipped model.

`python -m tools.study`, in a checkout, runs them.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import pandas as pd

from cifar_ft import CifarFtError
from cifar_ft.results.metrics import wilson_interval
from cifar_ft.results.runs import RECORDED, published_log

# Question: the settings that answer it, each as changes of BASE ("" is BASE itself). The first of a question is its own
# base, which the others are compared with.
ABLATIONS: dict[str, dict[str, str]] = {
    "What are the ImageNet weights worth?": {"ImageNet weights": "", "random weights": "weights=none"},
    "Which part should be trained?": {
        "everything": "",
        "all but the early stages": "freeze=early",
        "head alone": "freeze=backbone",
        "head alone, lr 0.01": "freeze=backbone lr=0.01",
        "head alone, linear probe": "freeze=backbone head_fit_images=5000 lr=1e-8 epochs=1",
    },
    "Should the head be fitted first?": {
        "BatchNorm frozen": "freeze_batchnorm=true",
        "fitted first": "freeze_batchnorm=true head_fit_images=5000",
        "lr 0.0003": "freeze_batchnorm=true lr=0.0003",
        "fitted first, lr 0.0003": "freeze_batchnorm=true head_fit_images=5000 lr=0.0003",
        "BatchNorm trained": "",
        "fitted first, BatchNorm trained": "head_fit_images=5000",
    },
    "Which rate for which batch?": {
        "batch 64, lr 0.001": "",
        "batch 64, lr 0.002": "lr=0.002",
        "batch 64, lr 0.004": "lr=0.004",
        "batch 32, lr 0.0005": "batch_size=32 lr=0.0005",
        "batch 32, lr 0.001": "batch_size=32",
        "batch 32, lr 0.002": "batch_size=32 lr=0.002",
    },
    "One rate or two?": {
        "both 0.001": "",
        "both 0.002": "lr=0.002",
        "body 0.001, head 0.003": "head_lr_factor=3",
        "body 0.001, head 0.01": "head_lr_factor=10",
        "body 0.0003, head 0.003": "lr=0.0003 head_lr_factor=10",
    },
    "Which input size?": {"64 px": "", "32 px": "image_size=32", "96 px": "image_size=96", "128 px": "image_size=128"},
    "The time of 96 px, or more epochs?": {"96 px, 3 epochs": "image_size=96", "64 px, 6 epochs": "epochs=6"},
    "The time of 128 px, or more epochs?": {"128 px, 3 epochs": "image_size=128", "64 px, 12 epochs": "epochs=12"},
    "Which stem, at equal cost?": {
        "stride 2, 64 px": "",
        "stride 1, 32 px": "stem=cifar_resampled image_size=32",
        "stride 1, 32 px, random weights": "stem=cifar_random image_size=32",
    },
    "Which augmentation, in 3 epochs?": {
        "crop and flip": "",
        "crop": "flip=false",
        "flip": "crop_padding=0",
        "none": "crop_padding=0 flip=false",
    },
    "Which augmentation, in 12 epochs?": {"crop and flip": "epochs=12", "none": "epochs=12 crop_padding=0 flip=false"},
    "Constant or decayed rate?": {"one cycle": "", "one cycle, lr 0.002": "lr=0.002", "constant": "schedule=constant"},
    "And without averaged weights?": {"one cycle": "ema_decay=0", "constant": "ema_decay=0 schedule=constant"},
    "Label smoothing?": {"0.05": "", "none": "label_smoothing=0"},
    "Which normalisation?": {
        "ImageNet's": "",
        "CIFAR-10's std": "normalization=cifar10",
        "the published std": "normalization=cifar10_published",
    },
}
# The published recipe and what is asked of it. Name: the recipe, what is changed in it, and what that is in words.
REDRAWN: dict[str, tuple[str, str, str]] = {
    "reference_b32": ("reference_b32", "", "batch 32, constant lr, as published"),
    "reference_b64": ("reference_b64", "", "batch 64"),
    "reference_b32_cosine": ("reference_b32_cosine", "", "cosine lr, one stair an epoch"),
    "reference_b32_random": ("reference_b32", "weights=none", "random weights everywhere"),
    "untouched_one_cycle": (
        "reference_b32",
        "stem=pretrained image_size=64 normalization=imagenet schedule=one_cycle head_lr_factor=10",
        "pretrained stem, 64 px, one cycle, head at 10 times",
    ),
}


class StudyError(CifarFtError, ValueError):
    """A study that cannot be begun or read."""


def variants(questions: Mapping[str, Mapping[str, str]] = ABLATIONS) -> list[str]:
    """The different settings of all questions, the base first."""
    return list(dict.fromkeys(["", *(changes for each in questions.values() for changes in each.values())]))


def summarize(rows: pd.DataFrame, questions: Mapping[str, Mapping[str, str]] = ABLATIONS) -> pd.DataFrame:
    """One row for each question and variant of runs: columns changes, seed, val_accuracy, train_accuracy, minutes.

    A seed draws the order of the images, their augmentation and the new head, so that two variants are compared seed
    by seed. What has fewer than two seeds in common with its question's base is left out.

    Returns
    -------
    DataFrame
        question, variant, changes, seeds, mean, std (of val_accuracy over the seeds), train (mean of train_accuracy),
        minutes (mean), difference (mean of the paired differences to the question's first variant), low and high
        (95 % interval of Student's t for it).

    Raises
    ------
    StudyError : no variant has two seeds.
    """
    from scipy.stats import t

    runs = rows.fillna({"changes": ""})  # the base is an empty cell
    scores, out = runs.pivot(index="seed", columns="changes", values="val_accuracy"), []
    for question, each in questions.items():
        first, found = next(iter(each.values())), []
        for name, changes in each.items():
            if not {first, changes} <= set(scores):
                continue
            paired = (scores[changes] - scores[first]).dropna()
            if len(paired) < 2:
                continue
            mine = runs[(runs.changes == changes) & runs.seed.isin(paired.index)]
            summary = mine.val_accuracy.mean(), mine.val_accuracy.std(), *mine[["train_accuracy", "minutes"]].mean()
            reach = t.ppf(0.975, len(paired) - 1) * paired.sem()
            interval = paired.mean(), paired.mean() - reach, paired.mean() + reach
            found.append((question, name, changes, len(paired), *summary, *interval))
        out += found if len(found) > 1 else []
    if not out:
        raise StudyError("no variant has two seeds; run `python -m tools.study ablations`")
    columns = (
        "question",
        "variant",
        "changes",
        "seeds",
        "mean",
        "std",
        "train",
        "minutes",
        "difference",
        "low",
        "high",
    )
    return pd.DataFrame(out, columns=columns)


def recorded_ablations() -> pd.DataFrame:
    """`summarize` of the ablations that come with the package."""
    return summarize(pd.read_csv(RECORDED / "ablations.csv"))


def recorded_redrawn(folder: str | Path = RECORDED / "redrawn") -> dict[str, tuple[pd.DataFrame, dict]]:
    """History and metrics of each redrawn run in `folder`, by default as it comes with the package, by its name."""
    return {
        name: (pd.read_csv(run / "history.csv"), json.loads((run / "metrics.json").read_text("utf-8")))
        for name in REDRAWN
        if (run := Path(folder) / name).is_dir()
    }


def redrawn_table(redrawn: Mapping[str, tuple[pd.DataFrame, dict]]) -> pd.DataFrame:
    """One row for each redrawn run, and a last one for the published log after as many epochs.

    Columns: run (in words), epochs, first_epoch and test_accuracy (of the first and the last epoch), train_accuracy
    and last_lr (of the last epoch; None for the published log), low and high (95 %). Accuracies are fractions.
    """

    def row(name: str, history: pd.DataFrame, interval: Sequence[float]) -> tuple:
        first, last = history.iloc[0], history.iloc[-1]
        accuracies = first.test_accuracy, last.test_accuracy, last.train_accuracy
        return (name, int(last.epoch), *accuracies, last.get("lr"), *interval)

    rows = [row(REDRAWN[n][2], h, m["test_accuracy_ci95"]) for n, (h, m) in redrawn.items()]
    log = published_log()
    log = log[log.epoch <= max(history.epoch.max() for history, _ in redrawn.values())]
    interval = wilson_interval(round(10_000 * log.test_accuracy.iloc[-1]), 10_000)
    rows.append(row("published log", log, interval))
    columns = ("run", "epochs", "first_epoch", "test_accuracy", "train_accuracy", "last_lr", "low", "high")
    return pd.DataFrame(rows, columns=columns)


def recorded_robustness() -> dict:
    """What `python -m tools.study robustness` measured once of the shipped model."""
    return json.loads((RECORDED / "shipped.json").read_text("utf-8"))
