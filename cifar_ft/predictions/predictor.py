"""Predictions (notebook 06): a trained model, from a run directory or as shipped, on any picture.

Whatever a picture comes as, it is read, cut square, made 32 pixels wide and predicted, without any network.
"""

from __future__ import annotations

import itertools
import json
import math
import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from PIL import Image
from safetensors import safe_open
from torch import Tensor, nn

from cifar_ft import CifarFtError, log
from cifar_ft.data import CLASSES, Split
from cifar_ft.files import ASSETS, one_line, runs_root, show_path
from cifar_ft.models import choose_device, create_backbone, cut, predict_logits, replace_head, replace_stem
from cifar_ft.predictions.images import SIZE, ImageError, Note, Picture, checked_fit, find_pictures, squared
from cifar_ft.recipes import Recipe
from cifar_ft.results import SHIPPED_RUN, accuracy_text, choose_run, energy, load_run, newest_run, probabilities
from cifar_ft.transforms import eval_transform

BATCH = 32  # pictures in memory at a time
SHIPPED = ASSETS / "model.safetensors"
TRAIN = "train one with `python -m cifar_ft train --recipe quick`"


class PredictionError(CifarFtError, RuntimeError):
    """A model that cannot be had, or an answer that cannot be given or stored."""


@dataclass(frozen=True)
class Prediction:
    """The answer for one picture.

    Attributes
    ----------
    label : str
        The most probable class.
    index : int
        Its number, 0 to 9.
    probability : float
        `Predictor.how_often_right` says what it has been worth on test images.
    probabilities : dict of str to float
        All classes in class order; with `top_k`, only the most probable ones, best first.
    unknown : bool or None
        Whether the picture is unlike anything in CIFAR-10; None where the model was not calibrated. By its threshold
        a known share of CIFAR-10's own pictures is taken for unlike too (`Predictor.calibration["false_alarms"]`).
    notes : tuple of Note
        What was done to the picture before, in words such as "the first of several frames" or "the middle 300 x
        300 of 480 x 300 pixels"; empty for a square picture that was read as it is.
    """

    label: str
    index: int
    probability: float
    probabilities: dict[str, float]
    unknown: bool | None = None
    notes: tuple[Note, ...] = ()

    def top(self, k: int = 5) -> list[tuple[str, float]]:
        """The `k` most probable classes with their probabilities, best first."""
        return sorted(self.probabilities.items(), key=lambda item: -item[1])[: _checked_k(k)]

    def __str__(self) -> str:
        return f"{self.label} ({100 * self.probability:.1f} %)"


class Predictor:
    """A trained model that predicts pictures.

    Attributes
    ----------
    model : nn.Module
        Maps float32 [B, 3, S, S] to logits [B, 10].
    recipe : Recipe
    source : str
        Which model this is, in one phrase.
    calibration : dict or None
        What validation says about its answers (`results.fit_calibration`): the temperature and the power that make
        probabilities of its logits, and the energy above which a picture is unlike anything trained on; and how often
        they were right on test images (`results.stated`).

    Examples
    --------
    >>> predictor = Predictor.shipped()  # doctest: +SKIP
    >>> print(predictor.predict("truck.jpg")[0])  # doctest: +SKIP
    truck (99.1 %)
    """

    def __init__(self, model: nn.Module, recipe: Recipe, source: str, calibration: dict[str, float] | None = None):
        self.model, self.recipe, self.source, self.calibration = model.eval(), recipe, source, calibration
        if calibration is not None and not _sound(calibration):
            raise PredictionError(f"the calibration of {source} is damaged ({calibration}); {TRAIN}")

    def __repr__(self) -> str:
        return f"Predictor({self.source})"

    @property
    def scaling(self) -> tuple[float, float]:
        """The temperature and the power that make `results.probabilities` of its logits; 1 each without a calibration.

        The power is 1, too, in runs of before it was fitted.
        """
        known = self.calibration or {}
        return known.get("temperature", 1.0), known.get("power", 1.0)

    @property
    def highest_energy(self) -> float:
        """The energy above which a picture is called unlike anything trained on; infinite without a calibration."""
        known = self.calibration or {}
        # Runs of before the sign was that of the literature have `lowest_energy` instead.
        return known.get("highest_energy", -known.get("lowest_energy", -math.inf))

    def how_often_right(self, probability: float) -> tuple[float, float, int, int] | None:
        """What this probability has been worth: (low, high, images, right).

        Of CIFAR-10's test images, `images` got a probability from `low` to `high`, and `right` of them were classified
        correctly. None where that is not known or too few images got so much. Pictures from elsewhere can differ.
        """
        rows = (self.calibration or {}).get("stated", ())
        return next((tuple(row) for row in rows if row[0] <= probability < row[1] or probability == row[1] == 1), None)

    @property
    def track_record(self) -> str:
        """`how_often_right` for all probabilities in one sentence; empty where it is not known."""
        rows = (self.calibration or {}).get("stated", ())
        said = [f"{low:g} to {high:g}: {right / images:.1%} of {images:,}" for low, high, images, right in rows]
        return f"Right on CIFAR-10's test images, by the probability given: {', '.join(said)}" if said else ""

    @classmethod
    def from_run(cls, path: str | os.PathLike | None = None, device: str = "auto") -> Predictor:
        """The model of a finished run; without a path, of the newest one that is no trial (`results.newest_run`).

        Parameters
        ----------
        path : path, optional
        device : str
            "cpu", "cuda", "cuda:1", "mps", or "auto" (see `models.choose_device`), as in the other two.

        Raises
        ------
        RunError, PredictionError
            When there is no such run, or it is unfinished or damaged.
        DeviceError
            When there is no such device.
        """
        device, path = choose_device(device), path or newest_run()
        if path is None:
            raise PredictionError(f"there is no finished run in {show_path(runs_root())}; {TRAIN}")
        run = load_run(path)
        with _usable(f"the run {show_path(run.path)}", "restore it or train this run again"):
            state, _ = _read_weights(run.path / "model.safetensors")
            model = _rebuild(run.recipe, run.config["weights"], state)
        return cls(_placed(model, device), run.recipe, str(run), run.metrics.get("calibration"))

    @classmethod
    def shipped(cls, device: str = "auto") -> Predictor:
        """The fine-tuned model that comes with the package."""
        device = choose_device(device)
        if not SHIPPED.is_file():
            raise PredictionError(f"this copy of the package has no shipped model; {TRAIN}")
        with _usable(f"the shipped model {show_path(SHIPPED)}", "install the package again"):
            state, metadata = _read_weights(SHIPPED)
            recipe, backbone = Recipe.from_dict(json.loads(metadata["recipe"])), metadata["backbone"]
            metrics, calibration = json.loads(metadata["metrics"]), json.loads(metadata.get("calibration", "null"))
            n, accuracy = metrics["test_images"], metrics["test_accuracy"]
            score = f"{accuracy_text(round(accuracy * n), n)} on {n:,} test images"
            model = _rebuild(recipe, metadata, state)
        source = f"the shipped model (recipe {recipe.name}, {backbone}, {score})"
        return cls(_placed(model, device), recipe, source, calibration)

    @classmethod
    def load(cls, run: str | os.PathLike = "shipped", device: str = "auto") -> Predictor:
        """The shipped model, or that of the run that is named; the log says once which of them answers."""
        predictor = cls.shipped(device) if choose_run(run) == SHIPPED_RUN else cls.from_run(run, device)
        log.info(f"Predicting with {predictor.source}")
        return predictor

    def predict(self, images, top_k: int | None = None, *, fit: str = "crop") -> list[Prediction]:
        """Predict one picture or many.

        Parameters
        ----------
        images : picture, folder, batch, Split, or iterable of pictures
            A picture is anything that `read_image` reads; a folder stands for the pictures in it and below, sorted; a
            batch is a Tensor [N, 3, H, W] or an array [N, H, W, 3]. An iterable is read 32 pictures at a time.
        top_k : int, optional
            Keep only the probabilities of the `top_k` best classes.
        fit : {"crop", "pad"}
            How a picture becomes square, see `square`.

        Returns
        -------
        list of Prediction
            One for each picture, in order; for a single picture, a list of one.

        Raises
        ------
        ImageError
            For the first picture that cannot be read, with its position; `predict_paths` goes on instead.
        """
        k = None if top_k is None else _checked_k(top_k)
        logits, notes = self._answer(images, fit)
        unknown = [None] * len(notes)
        if self.calibration:
            unknown = (energy(logits) > self.highest_energy).tolist()
        rows = probabilities(logits, *self.scaling).tolist()
        answers = []
        for row, *rest in zip(rows, unknown, notes, strict=True):
            order = sorted(range(len(row)), key=lambda i: -row[i])
            kept = {CLASSES[i]: row[i] for i in (range(len(row)) if k is None else order[:k])}
            answers.append(Prediction(CLASSES[order[0]], order[0], row[order[0]], kept, *rest))
        return answers

    def predict_proba(self, images, *, fit: str = "crop") -> np.ndarray:
        """Calibrated probabilities, float32 [N, 10] in class order, for what `predict` accepts."""
        return probabilities(self._answer(images, fit)[0], *self.scaling).numpy()

    def _answer(self, images, fit: str) -> tuple[Tensor, list[tuple[Note, ...]]]:
        """Logits [N, 10] of what `predict` accepts, and what was done to each picture."""
        checked_fit(fit)
        images = images.images if isinstance(images, Split) else images
        uint8 = isinstance(images, Tensor) and images.dtype == torch.uint8
        if uint8 and images.shape[1:] == (3, SIZE, SIZE) and len(images):
            # Nothing to read or to cut: as fast as evaluation.
            return self._batch_logits(images), [()] * len(images)
        logits, notes = [torch.zeros(0, len(CLASSES))], []
        for batch in chunks(_squares(images, fit)):
            logits.append(self._batch_logits(torch.stack([picture.image for picture in batch])))
            notes += [picture.notes for picture in batch]
        return torch.cat(logits), notes

    def _batch_logits(self, images: Tensor) -> Tensor:
        split = SimpleNamespace(images=images)
        logits = predict_logits(self.model, split, eval_transform(self.recipe), batch_size=BATCH)
        if not logits.isfinite().all():
            raise PredictionError(f"{self.source} gives values that are not finite; use another run")
        return logits


def _sound(calibration: Any) -> bool:
    """Whether a calibration that was read from a file is one."""
    try:
        highest = "lowest_energy" if "lowest_energy" in calibration else "highest_energy"  # see `highest_energy`
        numbers = [calibration[name] for name in ("temperature", highest, "false_alarms")]
        numbers.append(calibration.get("power", 1.0))
        for low, high, images, right in calibration.get("stated", ()):
            numbers += [low, high, images, right]
            if not (low < high and 0 <= right <= images > 0):
                return False
        return all(map(math.isfinite, numbers)) and numbers[0] > 0 and numbers[3] > 0
    except (TypeError, ValueError, KeyError, AttributeError):
        return False


def _checked_k(k: int) -> int:
    if isinstance(k, bool) or not isinstance(k, (int, np.integer)) or not 1 <= k <= len(CLASSES):
        raise PredictionError(f"{k!r} best classes cannot be given; choose 1 to {len(CLASSES)}")
    return int(k)


def _squares(images, fit: str) -> Iterator[Picture]:
    """Each picture as uint8 [3, 32, 32], with all that was done to it."""
    if isinstance(images, (str, os.PathLike)):
        for path, problem in find_pictures(images):
            if problem:
                problem.about = show_path(path)
                raise problem
            yield squared(path, fit)
        return
    single = isinstance(images, (bytes, bytearray, memoryview, Image.Image, dict)) or hasattr(images, "read")
    numbers = isinstance(images, Tensor) or getattr(getattr(images, "dtype", None), "kind", "O") in "biufc"
    batch = getattr(images, "ndim", 1) in ((4,) if numbers else (1, 4))
    if single or not isinstance(images, Iterable) or not batch:
        yield squared(images, fit)
        return
    for position, image in enumerate(images):
        try:
            yield squared(image, fit)
        except ImageError as error:
            place = f"image {position} of the batch (counted from 0)"
            error.about = f"{place}: {error.about}" if error.about else place
            raise


def chunks(items: Iterable, size: int = BATCH) -> Iterator[list]:
    items = iter(items)
    while chunk := list(itertools.islice(items, size)):
        yield chunk


@contextmanager
def _usable(what: str, advice: str) -> Iterator[None]:
    """Turn missing files, gaps in a model's own description and weights that do not fit it into one clear error."""
    try:
        yield
    except Exception as error:  # damaged files can cause any
        problem = f"{type(error).__name__}: {one_line(error)[:200]}"
        raise PredictionError(f"{what} is damaged or incomplete ({problem}); {advice}") from error


def _read_weights(file: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors and metadata of a safetensors file."""
    with safe_open(file, "pt") as weights:
        metadata = weights.metadata() or {}
        state = {name: weights.get_tensor(name) for name in weights.keys()}  # noqa: SIM118
    for name, values in state.items():
        if not values.isfinite().all():
            raise ValueError(f"{name} in {file.name} holds values that are not finite")
    return state, metadata


def _rebuild(recipe: Recipe, origin: dict, state: dict[str, Tensor]) -> nn.Module:
    """The recipe's model with these weights, whose origin names backbone and, unless it is old, strides."""
    strides = origin.get("strides") or "v1.5"
    with torch.random.fork_rng(devices=[]):  # nobody sees the random weights, nor that some were drawn
        model = cut(create_backbone(origin["backbone"], strides), recipe.last_stage)
        model = replace_head(replace_stem(model, recipe.stem, recipe.max_pool))
    model.load_state_dict(state, strict=True)
    return model.requires_grad_(False)


def _placed(model: nn.Module, device: torch.device) -> nn.Module:
    return model.to(device, memory_format=torch.channels_last)
