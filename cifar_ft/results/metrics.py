"""Metrics with their uncertainty: intervals, confusion, mistakes.

All functions take plain arrays of labels, predictions or probabilities; none knows a model or a run.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import combinations
from typing import Any

import numpy as np
import pandas as pd
import torch

from cifar_ft import CifarFtError
from cifar_ft.data import CLASSES


class ResultError(CifarFtError, ValueError):
    """Labels, probabilities or counts that no metric can be computed from."""


def wilson_interval(correct: int, total: int, z: float = 1.96) -> tuple[float, float]:
    """Interval (low, high) of a fraction, good also near 0 and 1; z = 1.96 is 95 % (Wilson, JASA 22, 1927).

    Raises ResultError for counts that are not whole, no trials, more hits than trials, or a negative z.
    """
    if not (hasattr(correct, "__index__") and hasattr(total, "__index__") and 0 <= correct <= total and total > 0):
        raise ResultError(f"correct={correct!r}, total={total!r}: give whole counts, total > 0, 0 <= correct <= total")
    correct, total = int(correct), int(total)
    if not (z >= 0 and math.isfinite(z)):
        raise ResultError(f"z={z}: need a finite number of standard errors, such as 1.96 for 95 %")
    p, shrink = correct / total, 1 + z * z / total
    centre = (p + z * z / (2 * total)) / shrink
    half = z / shrink * math.sqrt(p * (1 - p) / total + z * z / (4 * total * total))
    return max(0.0, min(p, centre - half)), min(1.0, max(p, centre + half))  # p stays inside


def accuracy_text(correct: int, total: int) -> str:
    """Accuracy with its 95 % Wilson interval: `accuracy_text(912, 1000)` is "91.2 % [89.3, 92.8]"."""
    low, high = wilson_interval(correct, total)
    return f"{100 * correct / total:.1f} % [{100 * low:.1f}, {100 * high:.1f}]"


def checked_classes(values: Any, name: str, classes: int, n: int | None = None) -> np.ndarray:
    """Class numbers as int64 [N], or a ResultError; `n` is the length that another array demands."""
    array = np.asarray(values)
    if array.ndim != 1 or len(array) == 0 or array.dtype.kind not in "iu":
        raise ResultError(f"{name}: shape {array.shape}, dtype {array.dtype}; need integers [N], N > 0")
    if n is not None and len(array) != n:
        raise ResultError(f"{len(array)} {name} for {n} images; all arrays must describe the same images")
    if array.min() < 0 or array.max() >= classes:
        raise ResultError(f"{name} run from {array.min()} to {array.max()}; allowed are 0 to {classes - 1}")
    return array.astype(np.int64)


def scored(labels: Any, probabilities: Any) -> tuple[np.ndarray, np.ndarray]:
    """Labels as int64 [N] and probabilities as float32 [N, C], or a ResultError."""
    probabilities = np.asarray(probabilities, dtype=np.float32)
    if probabilities.ndim != 2:
        raise ResultError(f"probabilities have shape {probabilities.shape}; expected [N, classes]")
    labels = checked_classes(labels, "labels", probabilities.shape[1], len(probabilities))
    finite = np.isfinite(probabilities).all(axis=1)
    if not finite.all():
        raise ResultError(f"probabilities of image {finite.argmin()} are not finite; lower lr")
    if probabilities.min() < 0 or np.abs(probabilities.sum(axis=1) - 1).max() > 1e-2:
        raise ResultError("each row of probabilities must be >= 0 and sum to 1; apply softmax to logits")
    return labels, probabilities


def confusion(labels: Any, predictions: Any, classes: int = 10) -> np.ndarray:
    """Count images by true class (rows) and predicted class (columns): int64 [classes, classes]."""
    from torchmetrics.functional.classification import multiclass_confusion_matrix

    labels = checked_classes(labels, "labels", classes)
    predictions = checked_classes(predictions, "predictions", classes, len(labels))
    return multiclass_confusion_matrix(torch.from_numpy(predictions), torch.from_numpy(labels), classes).numpy()


def most_confused(matrix: Any, class_names: Sequence[str] = CLASSES, k: int = 5) -> pd.DataFrame:
    """The `k` pairs of classes that are confused most, either way: columns class, other, confusions, share.

    `matrix` is that of `confusion`; share is the part of all errors.
    """
    errors = np.asarray(matrix) * (1 - np.eye(len(class_names), dtype=int))
    rows = [
        (class_names[a], class_names[b], errors[a, b] + errors[b, a]) for a, b in combinations(range(len(errors)), 2)
    ]
    frame = pd.DataFrame(rows, columns=["class", "other", "confusions"]).nlargest(k, "confusions")
    return frame.assign(share=frame.confusions / max(errors.sum(), 1)).reset_index(drop=True)


def per_class_accuracy(labels: Any, predictions: Any, class_names: Sequence[str] = CLASSES) -> pd.DataFrame:
    """Accuracy of each true class, NaN without images: columns class, accuracy, low, high (Wilson), n."""
    matrix = confusion(labels, predictions, len(class_names))
    counts = zip(class_names, matrix.diagonal().tolist(), matrix.sum(axis=1).tolist(), strict=True)
    none = math.nan, math.nan, math.nan
    rows = [(name, *((hits / n, *wilson_interval(hits, n)) if n else none), n) for name, hits, n in counts]
    return pd.DataFrame(rows, columns=["class", "accuracy", "low", "high", "n"])


def energy(logits: Any) -> np.ndarray:
    """The energy of each image, -log of the sum of exp(logits), [N, C] to [N] (Liu et al., NeurIPS 2020).

    It tends to be higher for images unlike those trained on.
    """
    return -torch.as_tensor(np.asarray(logits)).double().logsumexp(dim=1).numpy()


def most_confident_mistakes(labels: Any, probabilities: Any, k: int = 16) -> pd.DataFrame:
    """The `k` wrong predictions of highest probability: columns index, label, prediction, probability."""
    labels, probabilities = scored(labels, probabilities)
    columns = {"index": np.arange(len(labels)), "label": labels, "prediction": probabilities.argmax(axis=1)}
    frame = pd.DataFrame(columns | {"probability": probabilities.max(axis=1)})[columns["prediction"] != labels]
    return frame.sort_values("probability", ascending=False, kind="stable").head(k).reset_index(drop=True)
