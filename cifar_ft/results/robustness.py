"""What plain accuracy does not say: corrupted pictures, doubtful test images, and answers that may be withheld.

The corruptions are self-made and simple: each acts on the 32-pixel images, before they are resized.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pandas as pd
from torch import Tensor

from cifar_ft import log
from cifar_ft.results.metrics import accuracy_text, wilson_interval
from cifar_ft.transforms import CORRUPTIONS


def corrupted_accuracy(
    logits_of: Callable[[Tensor], Tensor],
    images: Tensor,
    labels: Tensor,
) -> pd.DataFrame:
    """Accuracy under every corruption and level.

    Parameters
    ----------
    logits_of : callable
        uint8 images [N, 3, 32, 32] to logits [N, 10].

    Returns
    -------
    DataFrame
        Columns corruption, level, unit, accuracy, low, high (95 % Wilson interval).
    """
    rows = []
    for name, (function, levels, unit) in CORRUPTIONS.items():
        for level in levels:
            correct = int((logits_of(function(images, level)).argmax(1) == labels).sum())
            interval = wilson_interval(correct, len(labels))
            log.info(f"{name} {level:g}: {accuracy_text(correct, len(labels))}")
            rows.append((name, level, unit, correct / len(labels), *interval))
    return pd.DataFrame(rows, columns=["corruption", "level", "unit", "accuracy", "low", "high"])


def accuracy_without(issues: pd.DataFrame, correct: np.ndarray, indices: np.ndarray | None = None) -> dict[str, dict]:
    """Accuracy on the test set, and without images that have a twin or a label that raters did not confirm.

    Parameters
    ----------
    issues : DataFrame
        `results.test_issues()`: test_index, issue.
    correct : bool array [N]
        Whether each test image is predicted right.
    indices : int array [N], optional
        Their places in the official order of the test set; default: all 10,000, in that order.

    Returns
    -------
    dict
        "all", "without twins", "without unconfirmed labels" and "without both", each with images, accuracy and ci95.
    """
    indices = np.arange(len(correct)) if indices is None else indices
    twins, doubtful = (_marked(issues, kind, indices) for kind in ("twin", "label"))
    kept = {"all": np.ones(len(correct), bool), "without twins": ~twins, "without unconfirmed labels": ~doubtful}
    kept["without both"] = ~twins & ~doubtful
    return {
        name: {
            "images": int(mask.sum()),
            "accuracy": float(correct[mask].mean()),
            "ci95": wilson_interval(int(correct[mask].sum()), int(mask.sum())),
        }
        for name, mask in kept.items()
    }


def _marked(issues: pd.DataFrame, kind: str, indices: np.ndarray) -> np.ndarray:
    return np.isin(indices, issues.test_index[issues.issue.str.contains(kind)])
