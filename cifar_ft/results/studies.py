"""Recorded studies: ablations over seeds, the published recipe redrawn, and the robustness of the shipped model.

`python -m tools.study`, in a checkout, runs them.
"""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path

import pandas as pd

from cifar_ft import CifarFtError
from cifar_ft.results.metrics import wilson_interval
from cifar_ft.results.runs import RECORDED, published_log

# Question: the settings that answer it, each as changes of BASE; "" is BASE itself.
ABLATIONS: dict[str, dict[str, str]] = {
    "What are the ImageNet weights worth?": {"ImageNet weights": "", "random weights": "weights=none"},
    "Which part should be trained?": {
        "everything": "",
        "head only": "freeze=backbone",
        "all but the early stages": "freeze=early",
        "head fitted first, then everything": "head_fit_images=5000",
    },
    "Which input size?": {"64 px": "", "32 px": "image_size=32", "96 px": "image_size=96", "128 px": "image_size=128"},
    "Which stem, at equal cost?": {
        "pretrained stem, 64 px": "",
        "random stem of stride 1, 32 px": "stem=cifar_random image_size=32",
        "pretrained stem of stride 1, 32 px": "stem=cifar_resampled image_size=32",
    },
    "Batch 32 or 64?": {
        "batch 64": "",
        "batch 32": "batch_size=32",
        "batch 32, half the lr": "batch_size=32 lr=0.0005",
    },
    "Which augmentation?": {
        "crop and flip": "",
        "crop": "flip=false",
        "flip": "crop_padding=0",
        "none": "crop_padding=0 flip=false",
    },
    "Constant or decayed learning rate?": {"one cycle": "", "constant": "schedule=constant"},
    "Label smoothing?": {"0.05": "", "none": "label_smoothing=0"},
    "One learning rate or two?": {"one for all": "", "head at 10 times": "head_lr_factor=10"},
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
CRITICAL_T = 2.7  # two-sided 99 % of Student's t with some 40 degrees of freedom; there are many comparisons


SUMMARY = (
    *("question", "variant", "changes", "seeds", "mean", "std"),
    *("train", "minutes", "difference", "standard_error", "distinguishable"),
)


class StudyError(CifarFtError, ValueError):
    """A study that cannot be begun or read."""


def variants(questions: Mapping[str, Mapping[str, str]] = ABLATIONS) -> list[str]:
    """The different settings of all questions, the base first."""
    return list(dict.fromkeys(["", *(changes for each in questions.values() for changes in each.values())]))


def summarize(rows: pd.DataFrame, questions: Mapping[str, Mapping[str, str]] = ABLATIONS) -> pd.DataFrame:
    """One row for each question and variant of runs: columns changes, seed, val_accuracy, train_accuracy, minutes.

    Returns
    -------
    DataFrame
        question, variant, changes, seeds, mean, std (of val_accuracy over the seeds), train (mean of train_accuracy),
        minutes (mean), difference (of the mean to the question's first variant), standard_error of it, and
        distinguishable: whether it exceeds CRITICAL_T standard errors. The errors come from the two variants' own
        deviations, but at least from the deviation pooled over all variants, since three seeds know little
        about theirs.

    Raises
    ------
    StudyError : a variant has fewer than two seeds.
    """
    groups = dict(iter(rows.fillna({"changes": ""}).groupby("changes")))  # the base is an empty cell
    missing = [changes or "the base" for changes in variants(questions) if len(groups.get(changes, ())) < 2]
    if missing:
        raise StudyError(f"fewer than two seeds of: {'; '.join(missing)}; run `python -m tools.study ablations`")
    scores = {changes: group.val_accuracy.tolist() for changes, group in groups.items()}
    pooled = math.sqrt(statistics.mean(statistics.variance(each) for each in scores.values()))
    out = []
    for question, each in questions.items():
        first = scores[next(iter(each.values()))]
        for name, changes in each.items():
            mine = scores[changes]
            error = math.sqrt(sum(max(statistics.stdev(s), pooled) ** 2 / len(s) for s in (mine, first)))
            difference = statistics.mean(mine) - statistics.mean(first)
            row = (question, name, changes, len(mine), statistics.mean(mine), statistics.stdev(mine))
            far = abs(difference) > CRITICAL_T * error
            means = groups[changes][["train_accuracy", "minutes"]].mean()
            out.append((*row, *means, difference, error, far))
    return pd.DataFrame(out, columns=SUMMARY)


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
    and last_lr (of the last epoch), low and high (95 %), minutes (None for the published log, as is last_lr).
    Accuracies are fractions.
    """

    def row(name: str, history: pd.DataFrame, interval: Sequence[float], minutes: float | None) -> tuple:
        first, last = history.iloc[0], history.iloc[-1]
        accuracies = first.test_accuracy, last.test_accuracy, last.train_accuracy
        return (name, int(last.epoch), *accuracies, last.get("lr"), *interval, minutes)

    rows = [row(REDRAWN[n][2], h, m["test_accuracy_ci95"], m["train_seconds"] / 60) for n, (h, m) in redrawn.items()]
    log = published_log()
    log = log[log.epoch <= max(history.epoch.max() for history, _ in redrawn.values())]
    interval = wilson_interval(round(10_000 * log.test_accuracy.iloc[-1]), 10_000)
    rows.append(row("published log", log, interval, None))
    columns = ("run", "epochs", "first_epoch", "test_accuracy", "train_accuracy", "last_lr", "low", "high", "minutes")
    return pd.DataFrame(rows, columns=columns)


def recorded_robustness() -> dict:
    """What `python -m tools.study robustness` measured once of the shipped model."""
    return json.loads((RECORDED / "shipped.json").read_text("utf-8"))
