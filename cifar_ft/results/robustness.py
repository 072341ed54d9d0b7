"""What plain accuracy does not say: how a model does on corrupted pictures, and without the doubtful test images."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import numpy as np
import pandas as pd
from torch import Tensor

from cifar_ft import log
from cifar_ft.results.metrics import accuracy_text, wilson_interval
from cifar_ft.transforms import CORRUPTIONS, OURS, corrupt

SEVERITIES = range(1, 6)
MEAN = f"mean of the {len(CORRUPTIONS) - 1}"


def corrupted_accuracy(
    logits_of: Callable[[Tensor], Tensor], images: Tensor, labels: Tensor
) -> tuple[pd.DataFrame, np.ndarray]:
    """Accuracy under every corruption at every severity.

    Parameters
    ----------
    logits_of : maps uint8 images [N, 3, 32, 32] to logits [N, 10]; it resizes them, after they were corrupted.

    Returns
    -------
    frame : columns corruption, severity, accuracy, low, high (95 %). The first row, "none" of severity 0, is of the
        clean images; the last five, `MEAN`, are the means over CIFAR-10-C's corruptions, without those that are ours.
    shares : float array [N], under which share of CIFAR-10-C's corruptions and severities each image was classified
        right. `mean_interval` of it is what to compare models by: one image is right or wrong under many corruptions
        at once, so that intervals of their accuracies must not be combined as if other images were behind each.
    """

    right, rows = {}, []
    for name, severity in [("none", 0), *itertools.product(CORRUPTIONS, SEVERITIES)]:
        seen = corrupt(images, name, severity) if severity else images
        right[name, severity] = hits = (logits_of(seen).argmax(1) == labels).cpu().numpy()
        log.info(f"{name} {severity}: {accuracy_text(int(hits.sum()), len(hits))}")
        rows.append((name, severity, hits.mean(), *wilson_interval(int(hits.sum()), len(hits))))
    theirs = [
        np.mean([right[name, severity] for name in CORRUPTIONS if name != OURS], axis=0) for severity in SEVERITIES
    ]
    rows += [(MEAN, severity, share.mean(), *mean_interval(share)) for severity, share in enumerate(theirs, 1)]
    return pd.DataFrame(rows, columns=["corruption", "severity", "accuracy", "low", "high"]), np.mean(theirs, axis=0)


def mean_interval(values: np.ndarray) -> tuple[float, float]:
    """The 95 % interval of the mean of values [N] that were drawn independently, by the normal distribution."""
    error = 1.96 * values.std(ddof=1) / len(values) ** 0.5
    return float(values.mean() - error), float(values.mean() + error)


def accuracy_without(issues: pd.DataFrame, correct: np.ndarray, indices: np.ndarray | None = None) -> dict[str, dict]:
    """Accuracy on the test set, and without images that have a twin or a label that raters did not confirm.

    Parameters
    ----------
    issues : `results.test_issues()`.
    correct : bool array [N], whether each test image is predicted right.
    indices : int array [N], their places in the official order of the test set; default: all, in that order.

    Returns
    -------
    dict
        "all", "without twins", "without unconfirmed labels" and "without both", each with images, accuracy and ci95.
    """
    indices = np.arange(len(correct)) if indices is None else indices
    twins, doubtful = (
        np.isin(indices, issues.test_index[issues.issue.str.contains(kind)]) for kind in ("twin", "label")
    )
    left_out = {"all": np.zeros(len(correct), bool), "without twins": twins, "without unconfirmed labels": doubtful}
    found = {}
    for name, mask in (left_out | {"without both": twins | doubtful}).items():
        hits, n = int(correct[~mask].sum()), int((~mask).sum())
        found[name] = {"images": n, "accuracy": hits / n, "ci95": wilson_interval(hits, n)}
    return found
