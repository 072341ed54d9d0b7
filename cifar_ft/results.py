"""Measured results (notebook 05): logits of a model, metrics with their uncertainty, and recorded runs.

A run directory is read here and nowhere else, so that every table and figure speaks about the same files.
"""

from __future__ import annotations

import json
import math
import operator
import os
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple
from zipfile import BadZipFile

import numpy as np
import pandas as pd
import torch

from cifar_ft import CifarFtError
from cifar_ft.sources import show_path

if TYPE_CHECKING:
    from cifar_ft.recipes import Recipe

PACKAGE = Path(__file__).resolve().parent
DAMAGE = (ValueError, KeyError, TypeError, AttributeError, OSError, EOFError, BadZipFile, zlib.error)
HISTORY_COLUMNS = ("epoch", "train_loss", "train_accuracy")
COMPARED = ("recipe", "backbone", "epochs", "seeds", "test_accuracy", "low", "high", "std", "minutes")


class ResultError(CifarFtError, ValueError):
    """Labels, probabilities or counts that no metric can be computed from."""


class RunError(CifarFtError):
    """A run directory that is missing, unfinished or damaged."""


@contextmanager
def evaluating(model: torch.nn.Module) -> Iterator[None]:
    """Put `model` into eval mode, then give every submodule its own training flag back."""
    flags = [(module, module.training) for module in model.modules()]
    try:
        model.eval()
        yield
    finally:
        for module, training in flags:
            module.training = training


def _autocast(precision: str, device: torch.device):
    if precision == "auto":
        gpu = device.type == "cuda"
        precision = "fp32" if not gpu else "bf16" if torch.cuda.is_bf16_supported() else "fp16"
    dtypes = {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}
    if precision not in dtypes:
        raise ResultError(f"unknown precision {precision!r}; choose from auto, fp32, bf16, fp16")
    return torch.autocast(device.type, dtypes[precision]) if dtypes[precision] else nullcontext()


def predict_logits(
    model: torch.nn.Module,
    split: Any,
    transform: Callable[[torch.Tensor], torch.Tensor],
    *,
    batch_size: int = 500,
    device: torch.device | str | None = None,
    precision: str = "fp32",
    flip_tta: bool = False,
    progress: Callable[[int, int], object] | None = None,
) -> torch.Tensor:
    """Score every image of a split once, in order; the model's modes and BatchNorm statistics do not change.

    Parameters
    ----------
    model : module that maps float32 [B, 3, S, S] to logits [B, C].
    split : object with `images`, uint8 [N, 3, H, W].
    transform : maps uint8 images to the model's input, as `transforms.eval_transform(recipe)` does.
    device : where to compute; the model is moved there. None means where the model is.
    precision : "fp32", "bf16", "fp16" (autocast), or "auto": half precision on a GPU only.
    flip_tta : average the logits of each image and its mirror.
    progress : called as `progress(images_done, images_in_all)` after each batch.

    Returns
    -------
    float32 tensor [N, C] on the CPU.

    Raises
    ------
    ResultError : empty or misshapen images, impossible batch size, unknown precision.
    """
    images = torch.as_tensor(split.images)
    if images.ndim != 4 or len(images) == 0:
        raise ResultError(f"images have shape {tuple(images.shape)}; expected [N, 3, H, W], N > 0")
    if batch_size < 1:
        raise ResultError(f"batch_size is {batch_size}; it must be at least 1")
    first = next(model.parameters(), None)
    device = torch.device(device if device is not None else first.device if first is not None else "cpu")
    model.to(device)
    parts = []
    with evaluating(model), torch.inference_mode(), _autocast(precision, device):
        for start in range(0, len(images), batch_size):
            batch = transform(images[start : start + batch_size].to(device))
            batch = batch.contiguous(memory_format=torch.channels_last)
            logits = model(batch).float()
            if flip_tta:
                logits = (logits + model(batch.flip(3)).float()) / 2
            parts.append(logits.cpu())
            if progress is not None:
                progress(min(start + batch_size, len(images)), len(images))
    return torch.cat(parts)


def wilson_interval(correct: int, total: int, z: float = 1.96) -> tuple[float, float]:
    """Interval (low, high) of a fraction, good also near 0 and 1; z = 1.96 is 95 % (Wilson, JASA 22, 1927).

    Raises ResultError for counts that are not whole, no trials, more hits than trials, or a negative z.
    """
    try:
        correct, total = operator.index(correct), operator.index(total)
    except TypeError:
        raise ResultError(f"correct={correct!r}, total={total!r}: give whole counts, not fractions") from None
    if total < 1 or not 0 <= correct <= total:
        raise ResultError(f"correct={correct}, total={total}: need total > 0 and 0 <= correct <= total")
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


class Difference(NamedTuple):
    """Outcome of `difference_test`: fractions, then the z score and its two-sided p value."""

    difference: float
    standard_error: float
    z: float
    p: float


def difference_test(acc_a: float, acc_b: float, n: int) -> Difference:
    """Two-proportion z test (pooled): could accuracies `acc_a`, `acc_b` on `n` images each be one accuracy?

    It knows only the two numbers, as a reader of a README does. Accuracies are fractions.
    """
    if not (0 <= acc_a <= 1 and 0 <= acc_b <= 1 and n >= 1):
        raise ResultError(f"acc_a={acc_a}, acc_b={acc_b}, n={n}: need fractions from 0 to 1, n > 0")
    pooled, difference = (acc_a + acc_b) / 2, acc_a - acc_b
    error = math.sqrt(2 * pooled * (1 - pooled) / n)
    z = difference / error if error > 0 else 0.0
    return Difference(difference, error, z, math.erfc(abs(z) / math.sqrt(2)))


def _classes(values: Any, name: str, classes: int, n: int | None = None) -> np.ndarray:
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
    labels = _classes(labels, "labels", probabilities.shape[1], len(probabilities))
    finite = np.isfinite(probabilities).all(axis=1)
    if not finite.all():
        raise ResultError(f"probabilities of image {finite.argmin()} are not finite; lower lr")
    if probabilities.min() < 0 or np.abs(probabilities.sum(axis=1) - 1).max() > 1e-2:
        raise ResultError("each row of probabilities must be >= 0 and sum to 1; apply softmax to logits")
    return labels, probabilities


def confusion(labels: Any, predictions: Any, classes: int = 10) -> np.ndarray:
    """Count images by true class (rows) and predicted class (columns): int64 [classes, classes]."""
    labels = _classes(labels, "labels", classes)
    predictions = _classes(predictions, "predictions", classes, len(labels))
    return np.bincount(labels * classes + predictions, minlength=classes * classes).reshape(classes, classes)


def per_class_accuracy(
    labels: Any, predictions: Any, class_names: Sequence[str] | None = None
) -> pd.DataFrame:
    """Accuracy of each true class, NaN without images: columns class, accuracy, low, high (Wilson), n."""
    if class_names is None:
        from cifar_ft.data import CLASSES as class_names
    matrix = confusion(labels, predictions, len(class_names))
    counts = zip(class_names, matrix.diagonal().tolist(), matrix.sum(axis=1).tolist(), strict=True)
    rows = [
        (name, hits / n, *wilson_interval(hits, n), n) if n else (name, *[math.nan] * 3, 0)
        for name, hits, n in counts
    ]
    return pd.DataFrame(rows, columns=["class", "accuracy", "low", "high", "n"])


def calibration(labels: Any, probabilities: Any, bins: int = 15) -> tuple[pd.DataFrame, float]:
    """Compare confidence with accuracy in equal bins of confidence (Guo et al., ICML 2017).

    Parameters
    ----------
    labels : int [N]; probabilities : float [N, C], rows sum to 1; bins : number of equal bins over 0 to 1.

    Returns
    -------
    frame : one row a bin: confidence and accuracy (means, NaN in an empty bin), count, low_edge, high_edge.
    ece : expected calibration error as a fraction, from torchmetrics.
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


def most_confident_mistakes(labels: Any, probabilities: Any, k: int = 16) -> pd.DataFrame:
    """The `k` wrong predictions of highest probability: columns index, label, prediction, probability."""
    labels, probabilities = _scored(labels, probabilities)
    prediction, probability = probabilities.argmax(axis=1), probabilities.max(axis=1)
    frame = pd.DataFrame(
        {
            "index": np.arange(len(labels)),
            "label": labels,
            "prediction": prediction,
            "probability": probability,
        }
    )[prediction != labels]
    return frame.sort_values("probability", ascending=False, kind="stable").head(k).reset_index(drop=True)


@dataclass(frozen=True)
class Run:
    """A finished run as read from its directory; accuracies are fractions, `history` has one row an epoch."""

    path: Path
    config: dict
    history: pd.DataFrame
    metrics: dict
    logits: np.ndarray
    labels: np.ndarray

    @cached_property
    def recipe(self) -> Recipe:
        from cifar_ft.recipes import Recipe

        return Recipe.from_dict(self.config["recipe"])

    @property
    def predictions(self) -> np.ndarray:
        return self.logits.argmax(axis=1)

    @property
    def probabilities(self) -> np.ndarray:
        return torch.from_numpy(self.logits).softmax(dim=1).numpy()

    @property
    def correct(self) -> int:
        return int((self.predictions == self.labels).sum())

    @property
    def accuracy(self) -> float:
        return self.correct / len(self.labels)


def runs_root() -> Path:
    """Where runs are kept: $CIFAR_FT_RUNS, else `runs` beside the checkout's pyproject.toml, else ./runs."""
    if os.environ.get("CIFAR_FT_RUNS"):
        return Path(os.environ["CIFAR_FT_RUNS"]).expanduser()
    return PACKAGE.parent / "runs" if (PACKAGE.parent / "pyproject.toml").is_file() else Path("runs")


def find_runs(root: str | os.PathLike | None = None) -> list[Path]:
    """Directories of the finished runs right below `root` (default `runs_root()`), the newest first."""
    found = Path(root if root is not None else runs_root()).glob("*/metrics.json")
    newest_first = sorted(found, key=lambda file: (file.stat().st_mtime_ns, file), reverse=True)
    return [file.parent for file in newest_first]


def newest_run(root: str | os.PathLike | None = None) -> Path | None:
    """The most recently finished run, or None when there is none yet."""
    return next(iter(find_runs(root)), None)


def _read(path: Path, reader: Callable[[Path], Any]) -> Any:
    """Read one file of a run; whatever is wrong with it becomes a RunError that names it."""
    try:
        return reader(path)
    except FileNotFoundError:
        problem = "is missing"
    except DAMAGE as error:
        problem = f"is damaged or unreadable ({' '.join(str(error).split())[:120] or type(error).__name__})"
    raise RunError(f"{show_path(path)} {problem}; restore it or train this run again")


def _json(path: Path) -> dict:
    content = json.loads(path.read_text(encoding="utf-8"))
    kind = dict if path.name == "config.json" else str  # all settings, or the recipe's name
    if not isinstance(content, dict) or not isinstance(content.get("recipe"), kind):
        raise ValueError("expected a JSON object with a recipe")
    return content


def _history(path: Path) -> pd.DataFrame:
    frame = pd.read_csv(path)
    if missing := [name for name in HISTORY_COLUMNS if name not in frame]:
        raise ValueError(f"columns missing: {', '.join(missing)}")
    return frame.astype(float).astype({"epoch": int})


def _test_logits(path: Path) -> tuple[np.ndarray, np.ndarray]:
    with np.load(path, allow_pickle=False) as arrays:
        logits, labels = arrays["logits"].astype(np.float32), arrays["labels"]
    if logits.ndim != 2:
        raise ValueError(f"logits have shape {logits.shape}, expected [N, classes]")
    labels = _classes(labels, "labels", logits.shape[1], len(logits))
    if not np.isfinite(logits).all():
        raise ValueError("logits are not finite: the training diverged; lower lr")
    return logits, labels


def load_run(path: str | os.PathLike) -> Run:
    """Read a finished run directory; a RunError says what is missing, unfinished or damaged."""
    path = Path(path)
    if not path.is_dir():
        raise RunError(f"no run directory at {show_path(path)}; results.find_runs() lists finished ones")
    if not any((path / name).exists() for name in ("config.json", "metrics.json")):
        raise RunError(f"{show_path(path)} is no run directory: it has no config.json")
    config = _read(path / "config.json", _json)
    if not (path / "metrics.json").exists():
        name = config["recipe"].get("name", "NAME")
        raise RunError(
            f"the run in {show_path(path)} has not finished (no metrics.json); resume it with "
            f"`python -m cifar_ft train --recipe {name} --out {show_path(path)} --resume`"
        )
    history, metrics = _read(path / "history.csv", _history), _read(path / "metrics.json", _json)
    return Run(path, config, history, metrics, *_read(path / "test_logits.npz", _test_logits))


def _settings(run: Run) -> dict:
    return {key: value for key, value in run.config["recipe"].items() if key not in ("seed", "name")}


def compare_runs(runs: Sequence[Run | str | os.PathLike]) -> pd.DataFrame:
    """One row a recipe, its seeds averaged; changed settings make a row of their own and are named in it.

    Returns
    -------
    Columns recipe, backbone, epochs, seeds (their number), test_accuracy (mean), low, high, std (over seeds,
    NaN for one), minutes (mean). The interval is Wilson's at the mean accuracy and counts each test image
    once, whatever the number of seeds: all of them are scored on the same images.
    """
    groups: dict[tuple, list[Run]] = {}
    for run in (item if isinstance(item, Run) else load_run(item) for item in runs):
        kind = run.metrics.get("recipe"), run.metrics.get("backbone")
        groups.setdefault((*kind, json.dumps(_settings(run), sort_keys=True)), []).append(run)
    rows = []
    for (name, backbone, _), members in groups.items():
        mine, first = _settings(members[0]), members[0]
        others = [_settings(group[0]) for kind, group in groups.items() if kind[:2] == (name, backbone)]
        changed = [f"{key}={mine[key]}" for key in mine if any(each.get(key) != mine[key] for each in others)]
        scores = pd.Series([run.accuracy for run in members])
        low, high = wilson_interval(round(scores.mean() * len(first.labels)), len(first.labels))
        minutes = pd.Series([run.metrics.get("train_seconds") for run in members], dtype=float).mean() / 60
        label = f"{name} ({', '.join(changed)})" if changed else name
        head = (label, backbone, first.metrics.get("epochs"), len(members))
        rows.append((*head, scores.mean(), low, high, scores.std(), minutes))
    return pd.DataFrame(rows, columns=COMPARED)


def published_log() -> pd.DataFrame:
    """The published 60-epoch log: columns epoch, train_loss, train_accuracy, test_loss, test_accuracy."""
    return pd.read_csv(PACKAGE / "assets" / "published_log.csv")


def test_issues() -> pd.DataFrame:
    """Known problems among the test images: test_index, issue, detail, train_index."""
    return pd.read_csv(PACKAGE / "assets" / "test_issues.csv")


test_issues.__test__ = False  # pytest would collect a function of this name where it is imported
