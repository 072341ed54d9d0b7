"""What plain accuracy does not say: how a model does on corrupted pictures, and without the doubtful test images."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pandas as pd
from torch import Tensor

from cifar_ft import log
from cifar_ft.results.metrics import accuracy_text, wilson_interval
from cifar_ft.transforms import CORRUPTIONS


def corrupted_accuracy(logits_of: Callable[[Tensor], Tensor], images: Tensor, labels: Tensor) -> pd.DataFrame:
    """Accuracy under every corruption and level: columns corruption, level, unit, accuracy, low, high (95 % Wilson).

    `logits_of` maps uint8 images [N, 3, 32, 32] to logits [N, 10]; it resizes them, after they were corrupted.
    """
    rows = []
    for name, (function, levels, unit) in CORRUPTIONS.items():
        for level in levels:
            correct = int((logits_of(function(images, level)).argmax(1) == labels).sum())
            log.info(f"{name} {level:g}: {accuracy_text(correct, len(labels))}")
            rows.append((name, level, unit, correct / len(labels), *wilson_interval(correct, len(labels))))
    return pd.DataFrame(rows, columns=["corruption", "level", "unit", "accuracy", "low", "high"])


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
