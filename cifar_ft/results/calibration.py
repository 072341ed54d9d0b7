"""What a model's probabilities are worth: made from logits, compared with how often it is right, used to decline.

All functions take plain arrays of logits, labels or probabilities; none knows a model or a run.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd
import torch

from cifar_ft.results.metrics import ResultError, checked_classes, energy, scored, wilson_interval

FEW = 20  # with fewer images than this, Wilson's interval of one half is wider than 40 points
STATED = (0, 0.5, 0.6, 0.7, 0.8, 0.9, 0.99, 1)  # the bins that a prediction's percentage is explained by


def probabilities(logits: torch.Tensor, temperature: float = 1.0, power: float = 1.0) -> torch.Tensor:
    """Softmax of -(gap / temperature) ** power, gap being how far each logit lies below its image's largest, [N, C].

    With power 1 this is softmax(logits / temperature), temperature scaling (Guo et al., ICML 2017). A power above 1
    makes close decisions less sure and clear ones surer. An image's classes keep their order: it is one of the simplest
    of the order-preserving functions of Rahimi et al., NeurIPS 2020.
    """
    gap = logits.amax(dim=1, keepdim=True) - logits
    return (-((gap / temperature) ** power)).softmax(dim=1)


def fit_scaling(logits: Any, labels: Any) -> tuple[float, float]:
    """The temperature and the power for which `probabilities` have the least cross-entropy.

    The temperature is between 0.05 and 20, the power between 0.25 and 4. Logits [N, C] and labels [N] must be of a
    split that was neither trained on nor is evaluated afterwards: validation.
    """
    from scipy.optimize import minimize

    logits = torch.as_tensor(np.asarray(logits), dtype=torch.float64)
    if logits.ndim != 2 or not logits.isfinite().all():
        raise ResultError(f"logits have shape {tuple(logits.shape)}; expected finite numbers [N, classes]")
    targets = torch.from_numpy(checked_classes(labels, "labels", logits.shape[1], len(logits)))

    def loss(logs: np.ndarray) -> float:
        chosen = probabilities(logits, *np.exp(logs).tolist()).gather(1, targets[:, None])
        return -chosen.clip(min=1e-300).log().mean().item()

    found = minimize(loss, [0.0, 0.0], bounds=np.log([(0.05, 20), (0.25, 4)]))
    return tuple(np.exp(found.x).tolist())


def fit_calibration(
    logits: Any, labels: Any, false_alarms: float = 0.02, tested: tuple[Any, Any] | None = None
) -> dict[str, Any]:
    """What a model's logits on validation say about its answers: temperature and power, and highest familiar energy.

    `highest_energy` is the energy above which a share `false_alarms` of the validation images lies: images above it
    are called unlike anything trained on. With logits and labels of test images, `tested`, also how often answers were
    right on them, `stated`; nothing is fitted to these.
    """
    temperature, power = fit_scaling(logits, labels)
    highest = float(np.quantile(energy(logits), 1 - false_alarms))
    found = {"temperature": temperature, "power": power, "highest_energy": highest, "false_alarms": false_alarms}
    return found | ({"stated": stated(*tested, temperature, power)} if tested else {})


def reliability(labels: Any, probabilities: Any, bins: int | Sequence[float] = 15) -> tuple[pd.DataFrame, float]:
    """Compare confidence, the largest probability, with accuracy, bin by bin (Guo et al., ICML 2017).

    Parameters
    ----------
    labels, probabilities : [N] and [N, C]
    bins : the number of equal bins from 0 to 1, or their edges; a bin holds its lower edge, the last one both.

    Returns
    -------
    One row a bin (low_edge, high_edge, count, right, and, NaN in an empty bin, the means confidence and accuracy with
    its 95 % Wilson interval low, high), and the expected calibration error: the mean over images of the distance
    between confidence and accuracy of their bin, a fraction.
    """
    labels, probabilities = scored(labels, probabilities)
    edges = np.linspace(0, 1, bins + 1) if isinstance(bins, int) else np.asarray(bins, dtype=float)
    if len(edges) < 2 or edges[0] > 0 or edges[-1] < 1 or (np.diff(edges) <= 0).any():
        raise ResultError(f"bins={bins}; give a number of at least 1, or edges that rise from 0 to 1")
    confidence, correct = probabilities.max(axis=1), probabilities.argmax(axis=1) == labels
    place = (np.searchsorted(edges, confidence, side="right") - 1).clip(max=len(edges) - 2)
    count, right, total = (np.bincount(place, each, len(edges) - 1) for each in (None, correct, confidence))
    with np.errstate(invalid="ignore"):
        means = {"confidence": total / count, "accuracy": right / count}
    counts = zip(right.astype(int), count, strict=True)
    low, high = zip(*(wilson_interval(hits, n) if n else (np.nan, np.nan) for hits, n in counts), strict=True)
    columns = {"low_edge": edges[:-1], "high_edge": edges[1:], "count": count, "right": right.astype(int)}
    return pd.DataFrame(columns | means | {"low": low, "high": high}), float(np.abs(total - right).sum() / len(labels))


def stated(logits: Any, labels: Any, temperature: float, power: float) -> list[list]:
    """What a percentage has meant on test images: for each bin of `STATED` its edges, images, and how many were right.

    Bins with fewer than `FEW` images are left out.
    """
    found, _ = reliability(labels, probabilities(torch.as_tensor(np.asarray(logits)), temperature, power), STATED)
    columns = zip(found.low_edge, found.high_edge, found["count"].tolist(), found.right.tolist(), strict=True)
    return [list(row) for row in columns if row[2] >= FEW]


def selective_accuracy(correct: Any, sureness: Any, resamples: int = 0, seed: int = 0) -> pd.DataFrame:
    """Accuracy on the images answered when only the surest are (El-Yaniv and Wiener, JMLR 11, 2010).

    Parameters
    ----------
    correct : bool [N], whether each image is classified correctly.
    sureness : [N], what the images are ranked by, the largest answered first.
    resamples, seed : of a bootstrap over images, which adds a pointwise 95 % band.

    Returns
    -------
    One row for each number of images answered, from the surest alone to all: coverage (their share), threshold (the
    least sureness among them), accuracy, and with a bootstrap low and high. The mean of 1 - accuracy is the area under
    the risk-coverage curve (AURC).
    """
    correct, sureness = np.asarray(correct), np.asarray(sureness)
    if correct.dtype != bool or correct.ndim != 1 or sureness.shape != correct.shape or not len(correct):
        shapes = f"{correct.dtype} {correct.shape} and {sureness.shape}"
        raise ResultError(
            f"got {shapes}; give a bool array [N], such as predictions == labels, and one number an image"
        )
    answered, draw = np.arange(1, len(correct) + 1), np.random.default_rng(seed)

    def accuracy(chosen: np.ndarray) -> np.ndarray:
        return correct[chosen[np.argsort(-sureness[chosen], kind="stable")]].cumsum() / answered

    frame = pd.DataFrame({"coverage": answered / len(correct), "threshold": -np.sort(-sureness)})
    frame["accuracy"] = accuracy(answered - 1)
    if resamples:
        drawn = [accuracy(draw.integers(0, len(correct), len(correct))).astype(np.float32) for _ in range(resamples)]
        frame["low"], frame["high"] = np.quantile(drawn, [0.025, 0.975], axis=0)
    return frame
