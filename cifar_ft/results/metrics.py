"""Metrics with their uncertainty: intervals, confusion, calibration.

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


def _scored(labels: Any, probabilities: Any) -> tuple[np.ndarray, np.ndarray]:
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


def calibration(labels: Any, probabilities: Any, bins: int = 15) -> tuple[pd.DataFrame, float]:
    """Compare confidence with accuracy in `bins` equal bins of confidence over 0 to 1 (Guo et al., ICML 2017).

    Returns one row a bin (means of confidence and accuracy, NaN in an empty bin, count, low_edge, high_edge), and the
    expected calibration error as a fraction, from torchmetrics.
    """
    from torchmetrics.functional.classification import multiclass_calibration_error

    labels, probabilities = _scored(labels, probabilities)
    if bins < 1:
        raise ResultError(f"bins={bins}; it must be at least 1")
    # torchmetrics gives a confidence of exactly 1 a bin of its own; just below 1 it joins the last one
    scores = torch.from_numpy(probabilities.clip(max=np.nextafter(np.float32(1), np.float32(0))))
    ece = multiclass_calibration_error(scores, torch.from_numpy(labels), scores.shape[1], n_bins=bins).item()
    confidence, prediction = scores.max(dim=1)
    edges = torch.linspace(0, 1, bins + 1)
    place = (torch.bucketize(confidence, edges, right=True) - 1).numpy()
    count = np.bincount(place, minlength=bins)
    means = {"confidence": confidence.numpy(), "accuracy": prediction.numpy() == labels}
    with np.errstate(invalid="ignore"):
        frame = pd.DataFrame({name: np.bincount(place, each, bins) / count for name, each in means.items()})
    return frame.assign(count=count, low_edge=edges[:-1].numpy(), high_edge=edges[1:].numpy()), ece


def fit_temperature(logits: Any, labels: Any) -> float:
    """The temperature T for which softmax(logits / T) has the least cross-entropy (Guo et al., ICML 2017).

    It is between 0.05 and 20, and above 1 for a model that is too sure of itself. Logits [N, C] and labels [N] must be
    of a split that was neither trained on nor is evaluated afterwards: validation.
    """
    logits = torch.as_tensor(np.asarray(logits), dtype=torch.float64)
    if logits.ndim != 2 or not logits.isfinite().all():
        raise ResultError(f"logits have shape {tuple(logits.shape)}; expected finite numbers [N, classes]")
    targets = torch.from_numpy(checked_classes(labels, "labels", logits.shape[1], len(logits)))
    inverse = torch.zeros((), dtype=torch.float64, requires_grad=True)  # log of 1 / T: the loss is convex in 1 / T
    optimizer = torch.optim.LBFGS([inverse], max_iter=100, line_search_fn="strong_wolfe")

    def loss() -> torch.Tensor:
        optimizer.zero_grad()
        value = torch.nn.functional.cross_entropy(logits * inverse.exp(), targets)
        value.backward()
        return value

    optimizer.step(loss)
    return float(np.clip(math.exp(-inverse.item()), 0.05, 20))


def energy(logits: Any) -> np.ndarray:
    """How much a model recognises in each image: log of the sum of exp(logits), [N, C] to [N].

    It is the negative of the energy of Liu et al., NeurIPS 2020: low for images unlike those trained on.
    """
    return torch.as_tensor(np.asarray(logits)).double().logsumexp(dim=1).numpy()


def fit_calibration(logits: Any, labels: Any, false_alarms: float = 0.02) -> dict[str, float]:
    """What a model's logits on validation say about its answers: temperature, and lowest familiar energy.

    One temperature has the least cross-entropy over all images together; where few images are, probabilities may be
    further off with it than without (`calibration` shows where).

    `lowest_energy` is the energy below which a share `false_alarms` of the validation images lies: images below it
    are called unlike anything trained on.
    """
    temperature = fit_temperature(logits, labels)
    lowest = float(np.quantile(energy(logits), false_alarms))
    return {"temperature": temperature, "lowest_energy": lowest, "false_alarms": false_alarms}


def selective_accuracy(labels: Any, probabilities: Any) -> pd.DataFrame:
    """Accuracy on the images answered when only the surest are: columns coverage, threshold, accuracy.

    One row for each number of images answered, from the surest alone to all; coverage is their share, threshold the
    lowest probability among them (El-Yaniv and Wiener, JMLR 11, 2010).
    """
    labels, probabilities = _scored(labels, probabilities)
    sure = probabilities.max(axis=1)
    order = np.argsort(-sure, kind="stable")
    right = (probabilities.argmax(axis=1) == labels)[order]
    answered = np.arange(1, len(labels) + 1)
    columns = {"coverage": answered / len(labels), "threshold": sure[order], "accuracy": right.cumsum() / answered}
    return pd.DataFrame(columns)


def most_confident_mistakes(labels: Any, probabilities: Any, k: int = 16) -> pd.DataFrame:
    """The `k` wrong predictions of highest probability: columns index, label, prediction, probability."""
    labels, probabilities = _scored(labels, probabilities)
    columns = {"index": np.arange(len(labels)), "label": labels, "prediction": probabilities.argmax(axis=1)}
    frame = pd.DataFrame(columns | {"probability": probabilities.max(axis=1)})[columns["prediction"] != labels]
    return frame.sort_values("probability", ascending=False, kind="stable").head(k).reset_index(drop=True)
