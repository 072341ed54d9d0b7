"""Runs on disk: finished ones are read here alone, so that all figures tell of the same files."""

from __future__ import annotations

import json
import os
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any
from zipfile import BadZipFile

import numpy as np
import pandas as pd
import torch

from cifar_ft import CifarFtError, log
from cifar_ft.files import ASSETS, PACKAGE, checkout, command, full_path, one_line, printable, runs_root, show_path
from cifar_ft.recipes import Recipe
from cifar_ft.results.metrics import accuracy_text, checked_classes

# What was measured once and is read by notebook 05: the checkout's results/, which an installed package has as a folder
# of its own.
RECORDED = checkout() / "results" if checkout() else PACKAGE / "recorded"
SHIPPED_RUN = RECORDED / "cpu"  # the run of the shipped model, without its weights
ALL_IMAGES = {"train_images": 45_000, "test_images": 10_000}  # 45,000 without those for validation
# The columns that history.csv and steps.csv must have; others of a history may be absent.
HISTORY = {"epoch": int, "train_loss": float, "train_accuracy": float}
STEPS = {"step": int, "epoch": float, "lr": float, "loss": float, "images": int, "image_size": int}


class RunError(CifarFtError):
    """A run directory that is missing, unfinished or damaged."""


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
        return Recipe.from_dict(self.config["recipe"])

    @cached_property
    def steps(self) -> pd.DataFrame:
        """The training loss step by step, empty for a run that kept none; in a long run a row is a mean of several.

        Columns step, epoch (a fraction), lr, loss (nats, the mean over the batch), images (seen so far), image_size.
        A RunError says where the file is damaged.
        """
        file = self.path / "steps.csv"
        return _read(file, partial(_table, columns=STEPS)) if file.exists() else pd.DataFrame(columns=[*STEPS])

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

    def __str__(self) -> str:
        """Which run this is, in one phrase that names no folder but its own: files carry it to others."""
        name = "that comes with the course" if self.path == SHIPPED_RUN else printable(self.path.name)
        n = len(self.labels)
        return f"the run {name} ({accuracy_text(self.correct, n)} on {n:,} test images)"


def find_runs(root: str | os.PathLike | None = None) -> list[Path]:
    """Directories of the finished runs right below `root` (default `runs_root()`), the newest first."""
    found = (full_path(root) if root is not None else runs_root()).glob("*/metrics.json")
    return [file.parent for file in sorted(found, key=lambda file: (file.stat().st_mtime_ns, file), reverse=True)]


def newest_run(root: str | os.PathLike | None = None) -> Path | None:
    """The most recently finished run that is no trial, or None when there is none yet; the log names a newer trial."""
    finished = find_runs(root)
    chosen = next((path for path in finished if not _is_trial(path)), None)
    if finished and chosen != finished[0]:
        name = printable(finished[0].name)
        log.info(f"The newest run, {name}, is a trial on a part of the images and passed over; name it to use it")
    return chosen


def choose_run(run: str | os.PathLike = "") -> Path:
    """The folder of the run that is named, by default of `newest_run`, else the one that comes with the course.

    "shipped" names the latter; its weights are the shipped model, which `Predictor` takes for it.
    """
    return SHIPPED_RUN if str(run) == "shipped" else full_path(run or newest_run() or SHIPPED_RUN)


def _is_trial(path: Path) -> bool:
    """Whether the run has trained or been scored on a part of the images, as `smoke` does."""
    try:
        recipe, metrics = _json(path / "config.json")["recipe"], _json(path / "metrics.json")
        used = {name: metrics.get(name) or recipe.get(name) or all_ for name, all_ in ALL_IMAGES.items()}
        return any(used[name] < all_ for name, all_ in ALL_IMAGES.items())
    except (ValueError, TypeError, OSError):  # damaged, as is said when it is loaded
        return False


def load_run(path: str | os.PathLike) -> Run:
    """Read a finished run directory; a RunError says what is missing, unfinished or damaged."""
    path = full_path(path)
    if not any((path / name).exists() for name in ("config.json", "metrics.json")):
        problem = f"no run directory at {show_path(path)}"
        problem += ": it has no config.json" if path.is_dir() else "; results.find_runs() lists finished ones"
        error = RunError(problem)
        error.wrong_argument = True
        raise error
    config = _read(path / "config.json", _json)
    if not (path / "metrics.json").exists():
        raise RunError(
            f"the run in {show_path(path)} has not finished (no metrics.json); resume it with "
            f"`{command('train', '--out', path, '--resume')}`"
        )
    history, metrics = _read(path / "history.csv", _table), _read(path / "metrics.json", _json)
    return Run(path, config, history, metrics, *_read(path / "test_logits.npz", _test_logits))


def _read(path: Path, reader: Callable[[Path], Any]) -> Any:
    """Read one file of a run; whatever is wrong with it becomes a RunError that names it."""
    try:
        return reader(path)
    except FileNotFoundError:
        problem = "is missing"
    except (ValueError, KeyError, TypeError, AttributeError, OSError, EOFError, BadZipFile, zlib.error) as error:
        problem = f"is damaged or unreadable ({one_line(error)[:120] or type(error).__name__})"
    raise RunError(f"{show_path(path)} {problem}; restore it or train this run again")


def _json(path: Path) -> dict:
    content = json.loads(path.read_text(encoding="utf-8"))
    kind = dict if path.name == "config.json" else str  # all settings, or the recipe's name
    if not isinstance(content, dict) or not isinstance(content.get("recipe"), kind):
        raise ValueError("expected a JSON object with a recipe")
    return content


def _table(path: Path, columns: dict[str, type] = HISTORY) -> pd.DataFrame:
    frame = pd.read_csv(path)
    if missing := [name for name in columns if name not in frame]:
        raise ValueError(f"columns missing: {', '.join(missing)}")
    return frame.astype(float).astype(columns)


def _test_logits(path: Path) -> tuple[np.ndarray, np.ndarray]:
    with np.load(path, allow_pickle=False) as arrays:
        logits, labels = arrays["logits"].astype(np.float32), arrays["labels"]
    if logits.ndim != 2:
        raise ValueError(f"logits have shape {logits.shape}, expected [N, classes]")
    if not np.isfinite(logits).all():
        raise ValueError("logits are not finite: the training diverged; lower lr")
    return logits, checked_classes(labels, "labels", logits.shape[1], len(logits))


def published_log() -> pd.DataFrame:
    """The published 60-epoch log: columns epoch, train_loss, train_accuracy, test_loss, test_accuracy."""
    return pd.read_csv(ASSETS / "published_log.csv")


def test_issues() -> pd.DataFrame:
    """Known problems among the test images: test_index, issue, detail, train_index."""
    return pd.read_csv(ASSETS / "test_issues.csv")


test_issues.__test__ = False  # pytest would collect a function of this name where it is imported
