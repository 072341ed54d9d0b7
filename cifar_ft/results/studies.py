"""Recorded experiments: tries for a recipe, ablations over seeds, and the published recipe redrawn.

Tries and ablations see the validation split alone; the test set is not even handed to them. Every run becomes one row
of a CSV file as soon as it is done, so that a study can be stopped, gone on with, and shared between processes.
"""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Mapping
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
    "Which input size?": {
        "64 px": "",
        "32 px": "image_size=32",
        "96 px": "image_size=96",
        "128 px": "image_size=128",
    },
    "Which stem, at equal cost?": {
        "pretrained stem, 64 px": "",
        "random stem of stride 1, 32 px": "stem=cifar_random image_size=32",
        "resampled stem of stride 1, 32 px": "stem=cifar_resampled image_size=32",
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


# The published recipe on ResNet-50 cut behind its third stage (C4), in which all but stem and head can be pretrained
# from a file that lacks layer4. Name: the recipe, what is changed in it, and what that is in words.
REDRAWN: dict[str, tuple[str, str, str]] = {
    "reference_b32": ("reference_b32", "", "batch 32, constant lr, as published"),
    "reference_b64": ("reference_b64", "", "batch 64"),
    "reference_b32_cosine": ("reference_b32_cosine", "", "lr decays to zero (cosine)"),
    "reference_b32_random": ("reference_b32", "weights=none", "random weights everywhere"),
    "untouched_one_cycle": (
        "reference_b32",
        "stem=pretrained image_size=64 normalization=imagenet schedule=one_cycle head_lr_factor=10",
        "pretrained stem, 64 px, one cycle, head at 10 times",
    ),
}


CRITICAL_T = 2.7  # two-sided 99 % of Student's t with some 40 degrees of freedom; there are many comparisons


class StudyError(CifarFtError, ValueError):
    """A study that cannot be begun or read."""


def variants(questions: Mapping[str, Mapping[str, str]] = ABLATIONS) -> list[str]:
    """The different settings of all questions, the base first."""
    return list(dict.fromkeys(["", *(changes for each in questions.values() for changes in each.values())]))


def summarize(rows: pd.DataFrame, questions: Mapping[str, Mapping[str, str]] = ABLATIONS) -> pd.DataFrame:
    """One row for each question and variant.

    Parameters
    ----------
    rows : DataFrame
        Of `run_ablations`: changes, seed, val_accuracy, minutes.

    Returns
    -------
    DataFrame
        question, variant, changes, seeds, mean, std (of val_accuracy over the seeds), minutes (mean), difference
        (of the mean to the question's first variant), standard_error of it, and distinguishable: whether
        it exceeds CRITICAL_T standard errors. The errors come from the two variants' own deviations, but at least
        from the deviation pooled over all variants, since three seeds know little about theirs.

    Raises
    ------
    StudyError
        When a variant has fewer than two seeds.
    """
    groups = dict(iter(rows.fillna({"changes": ""}).groupby("changes")))
    missing = [changes or "the base" for changes in variants(questions) if len(groups.get(changes, ())) < 2]
    if missing:
        raise StudyError(f"fewer than two seeds of: {'; '.join(missing)}; run `python -m cifar_ft study ablations`")
    scores = {changes: group.val_accuracy.tolist() for changes, group in groups.items()}
    pooled = math.sqrt(statistics.mean(statistics.variance(each) for each in scores.values()))
    out = []
    for question, each in questions.items():
        first = scores[next(iter(each.values()))]
        for name, changes in each.items():
            mine = scores[changes]
            error = math.sqrt(sum(max(statistics.stdev(s), pooled) ** 2 / len(s) for s in (mine, first)))
            difference = statistics.mean(mine) - statistics.mean(first)
            row = {"question": question, "variant": name, "changes": changes, "seeds": len(mine)}
            row |= {"mean": statistics.mean(mine), "std": statistics.stdev(mine)}
            row |= {"minutes": groups[changes].minutes.mean(), "difference": difference, "standard_error": error}
            out.append({**row, "distinguishable": abs(difference) > CRITICAL_T * error})
    return pd.DataFrame(out)


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

    Returns
    -------
    DataFrame
        run (in words), epochs, first_epoch and test_accuracy (of the first and the last epoch), low and high (95 %),
        train_accuracy, minutes (None for the published log). Accuracies are fractions.
    """
    rows = []
    for name, (history, metrics) in redrawn.items():
        row = {"run": REDRAWN[name][2], "epochs": metrics["epochs"], "first_epoch": history.test_accuracy.iloc[0]}
        row |= {"test_accuracy": metrics["test_accuracy"], "train_accuracy": history.train_accuracy.iloc[-1]}
        low, high = metrics["test_accuracy_ci95"]
        rows.append(row | {"low": low, "high": high, "minutes": metrics["train_seconds"] / 60})
    epochs, log = max(row["epochs"] for row in rows), published_log()
    first, last = log.iloc[0], log[log.epoch <= epochs].iloc[-1]
    low, high = wilson_interval(round(10_000 * last.test_accuracy), 10_000)
    row = {"run": "published log, whole ResNet-50", "epochs": int(last.epoch), "first_epoch": first.test_accuracy}
    row |= {"test_accuracy": last.test_accuracy, "train_accuracy": last.train_accuracy, "low": low, "high": high}
    return pd.DataFrame([*rows, row | {"minutes": None}])


def recorded_appraisal() -> dict:
    """`robustness.appraise` of the shipped model, as it was measured once."""
    return json.loads((RECORDED / "shipped.json").read_text("utf-8"))
