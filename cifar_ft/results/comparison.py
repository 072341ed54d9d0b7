"""Is one model better than another? Tests of a difference, paired and not, and the spread over seeds."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import pandas as pd

from cifar_ft.results.metrics import ResultError, wilson_interval
from cifar_ft.results.runs import Run, load_run

COMPARED = ("recipe", "backbone", "epochs", "seeds", "test_accuracy", "low", "high", "std", "minutes")


class Difference(NamedTuple):
    """Outcome of `difference_test`: fractions, then the z score and its two-sided p value."""

    difference: float
    standard_error: float
    z: float
    p: float


def difference_test(acc_a: float, acc_b: float, n: int) -> Difference:
    """Two-proportion z test (pooled): could accuracies `acc_a`, `acc_b` on `n` images each be one accuracy?

    It knows only the two numbers, as a reader of a README does; `paired_test` knows more. Accuracies are fractions.
    """
    if not (0 <= acc_a <= 1 and 0 <= acc_b <= 1 and n >= 1):
        raise ResultError(f"acc_a={acc_a}, acc_b={acc_b}, n={n}: need fractions from 0 to 1, n > 0")
    pooled, difference = (acc_a + acc_b) / 2, acc_a - acc_b
    error = math.sqrt(2 * pooled * (1 - pooled) / n)
    z = difference / error if error > 0 else 0.0
    return Difference(difference, error, z, math.erfc(abs(z) / math.sqrt(2)))


class PairedDifference(NamedTuple):
    """Outcome of `paired_test`: the difference and its uncertainty as fractions, images, McNemar's p value."""

    difference: float
    standard_error: float
    low: float
    high: float
    only_a: int
    only_b: int
    p: float


def paired_test(right_a: Any, right_b: Any, resamples: int = 10_000, seed: int = 0) -> PairedDifference:
    """Compare two models on the same images: accuracy of a minus that of b, with a 95 % bootstrap interval.

    Only the images that one model alone gets right tell the two apart; `p` is that of McNemar's test on them, exact
    and two-sided (McNemar, Psychometrika 12, 1947).

    Parameters
    ----------
    right_a, right_b : bool arrays [N], whether each model is right on each image, in the same order.
    resamples, seed : of the bootstrap, which draws N images with replacement, each with both of its answers.
    """
    from scipy.stats import binomtest

    right_a, right_b = np.asarray(right_a), np.asarray(right_b)
    if right_a.dtype != bool or right_b.dtype != bool or right_a.shape != right_b.shape or right_a.ndim != 1:
        shapes = f"{right_a.dtype} {right_a.shape} and {right_b.dtype} {right_b.shape}"
        raise ResultError(f"got {shapes}; give two bool arrays [N] of the same images, such as predictions == labels")
    if not (n := len(right_a)):
        raise ResultError("no images to compare on")
    only_a, only_b = int((right_a & ~right_b).sum()), int((right_b & ~right_a).sum())
    shares = np.array([only_a, only_b, n - only_a - only_b]) / n
    # A bootstrap sample matters by its three counts alone, and these are multinomial: no image need be drawn.
    counts = np.random.default_rng(seed).multinomial(n, shares, resamples)
    differences = (counts[:, 0] - counts[:, 1]) / n
    p = binomtest(only_a, only_a + only_b).pvalue if only_a + only_b else 1.0
    low, high = np.quantile(differences, [0.025, 0.975]).tolist()
    return PairedDifference((only_a - only_b) / n, float(differences.std()), low, high, only_a, only_b, float(p))


def compare_runs(runs: Sequence[Run | str | os.PathLike]) -> pd.DataFrame:
    """One row a recipe, its seeds averaged; changed settings make a row of their own and are named in it.

    Returns
    -------
    Columns recipe, backbone, epochs, seeds (their number), test_accuracy (mean), low, high, std (over seeds,
    NaN for one), minutes (mean). The interval is Wilson's at the mean accuracy and counts each test image
    once, whatever the number of seeds: all of them are evaluated on the same images.
    """
    groups: dict[tuple, list[Run]] = {}
    for run in (item if isinstance(item, Run) else load_run(item) for item in runs):
        settings = {key: value for key, value in run.recipe.to_dict().items() if key not in ("seed", "name")}
        kind = run.metrics.get("recipe"), run.metrics.get("backbone"), json.dumps(settings, sort_keys=True)
        groups.setdefault(kind, []).append(run)
    rows = []
    for (name, backbone, settings), members in groups.items():
        mine, alike = json.loads(settings), [json.loads(kind[2]) for kind in groups if kind[:2] == (name, backbone)]
        changed = [f"{key}={mine[key]}" for key in mine if any(each[key] != mine[key] for each in alike)]
        label = f"{name} ({', '.join(changed)})" if changed else name
        scores, images = pd.Series([run.accuracy for run in members]), len(members[0].labels)
        interval = wilson_interval(round(scores.mean() * images), images)
        minutes = pd.Series([run.metrics.get("train_seconds") for run in members], dtype=float).mean() / 60
        head = (label, backbone, members[0].metrics.get("epochs"), len(members))
        rows.append((*head, scores.mean(), *interval, scores.std(), minutes))
    return pd.DataFrame(rows, columns=COMPARED)
