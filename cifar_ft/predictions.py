"""Predictions (notebook 06): a trained model, from a run directory or as shipped, on any picture.

Whatever a picture comes as, it is read, cut square, made 32 pixels wide and predicted, without any network.
"""

from __future__ import annotations

import csv
import datetime
import itertools
import json
import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import save as to_safetensors
from torch import Tensor, nn

from cifar_ft import CifarFtError, __version__
from cifar_ft.data import CLASSES, Split
from cifar_ft.pictures import ImageError, one_line, read_image, square
from cifar_ft.recipes import Recipe
from cifar_ft.results import accuracy_text, load_run, newest_run, predict_logits, runs_root, wilson_interval
from cifar_ft.sources import show_path
from cifar_ft.surgery import build_model
from cifar_ft.transforms import eval_transform

__all__ = [
    "ImageError",
    "Prediction",
    "PredictionError",
    "Predictor",
    "export_shipped",
    "predict_paths",
    "read_image",
    "square",
    "write_csv",
]

BATCH = 64  # pictures in memory at a time
SHIPPED = Path(__file__).resolve().parent / "assets" / "model.safetensors"
SHIPPED_BYTES = 10_000_000
SUFFIXES = {".png", ".jpg", ".jpeg", ".gif", ".webp", ".bmp", ".tif", ".tiff", ".ppm", ".pgm", ".avif"}
TRAIN = "train one with `python -m cifar_ft train --recipe quick`"
COLUMNS = ("path", "label", "probability", "error")


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
    probabilities : dict of str to float
        All classes in class order; with `top_k`, only the most probable ones, best first.
    """

    label: str
    index: int
    probability: float
    probabilities: dict[str, float]

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

    Examples
    --------
    >>> predictor = Predictor.newest_or_shipped()  # doctest: +SKIP
    >>> print(predictor.predict("truck.jpg")[0])  # doctest: +SKIP
    truck (99.1 %)
    """

    def __init__(self, model: nn.Module, recipe: Recipe, source: str, precision: str = "fp32"):
        self.model, self.recipe, self.source, self.precision = model.eval(), recipe, source, precision

    def __repr__(self) -> str:
        return f"Predictor({self.source})"

    @classmethod
    def from_run(cls, path: str | os.PathLike | None = None, precision: str = "fp32") -> Predictor:
        """The model of a finished run; without a path, of the newest one.

        Raises
        ------
        RunError, PredictionError
            When there is no such run, or it is unfinished or damaged.
        """
        path = path or newest_run()
        if path is None:
            raise PredictionError(f"there is no finished run in {show_path(runs_root())}; {TRAIN}")
        run = load_run(Path(os.path.expanduser(path)))
        n = len(run.labels)
        source = f"the run {show_path(run.path)} ({accuracy_text(run.correct, n)} on {n:,} test images)"
        advice = "restore it or train this run again"
        with _described(run.path / "config.json", advice):
            recipe, backbone = run.recipe, run.config["weights"]["backbone"]
        state, _ = _read_weights(run.path / "model.safetensors", advice)
        return cls(_rebuild(recipe, backbone, state, source), recipe, source, precision)

    @classmethod
    def shipped(cls, precision: str = "fp32") -> Predictor:
        """The fine-tuned model that comes with the package (see `export_shipped`)."""
        advice = "install the package again"
        if not SHIPPED.is_file():
            raise PredictionError(f"this copy of the package has no shipped model; {TRAIN}")
        state, metadata = _read_weights(SHIPPED, advice)
        with _described(SHIPPED, advice):
            recipe, backbone = Recipe.from_dict(json.loads(metadata["recipe"])), metadata["backbone"]
            metrics = json.loads(metadata["metrics"])
            n, accuracy = metrics["test_images"], metrics["test_accuracy"]
            score = f"{accuracy_text(round(accuracy * n), n)} on {n:,} test images"
        source = f"the shipped model (recipe {recipe.name}, {backbone}, {score})"
        return cls(_rebuild(recipe, backbone, state, source), recipe, source, precision)

    @classmethod
    def newest_or_shipped(cls, run_dir: str | os.PathLike = "", echo=print) -> Predictor:
        """The model of `run_dir`, else of the newest finished run, else as shipped; `echo` hears which."""
        run_dir = run_dir or newest_run()
        predictor = cls.from_run(run_dir) if run_dir else cls.shipped()
        echo(f"Predicting with {predictor.source}")
        return predictor

    def predict(self, images, top_k: int | None = None, *, fit: str = "crop") -> list[Prediction]:
        """Predict one picture or many.

        Parameters
        ----------
        images : picture, batch, Split, or iterable of pictures
            A picture is anything that `read_image` reads; a batch is a Tensor [N, 3, H, W] or an array
            [N, H, W, 3]. An iterable is read 64 pictures at a time.
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
        return [_prediction(row, k) for row in self.predict_proba(images, fit=fit).tolist()]

    def predict_proba(self, images, *, fit: str = "crop") -> np.ndarray:
        """Probabilities, float32 [N, 10] in class order, for what `predict` accepts."""
        parts = [self._probabilities(torch.stack(batch)) for batch in _chunks(_squares(images, fit))]
        return np.concatenate(parts) if parts else np.zeros((0, len(CLASSES)), np.float32)

    def _probabilities(self, images: Tensor) -> np.ndarray:
        split = SimpleNamespace(images=images)
        logits = predict_logits(self.model, split, eval_transform(self.recipe), precision=self.precision)
        if not logits.isfinite().all():
            raise PredictionError(f"{self.source} gives values that are not finite; use another run")
        return logits.softmax(dim=1).numpy()


def _prediction(row: list[float], k: int | None) -> Prediction:
    order = sorted(range(len(row)), key=lambda i: -row[i])
    kept = range(len(row)) if k is None else order[:k]
    return Prediction(CLASSES[order[0]], order[0], row[order[0]], {CLASSES[i]: row[i] for i in kept})


def _checked_k(k: int) -> int:
    if isinstance(k, bool) or not isinstance(k, (int, np.integer)) or not 1 <= k <= len(CLASSES):
        raise PredictionError(f"{k!r} best classes cannot be given; choose 1 to {len(CLASSES)}")
    return int(k)


def _squares(images, fit: str) -> Iterator[Tensor]:
    """Each picture as uint8 [3, 32, 32]."""
    images = images.images if isinstance(images, Split) else images
    kinds = (str, os.PathLike, bytes, bytearray, memoryview, Image.Image, dict)
    if isinstance(images, kinds) or hasattr(images, "read") or getattr(images, "ndim", 1) not in (1, 4):
        yield square(read_image(images), fit)
        return
    if not isinstance(images, Iterable):
        read_image(images)  # says what can be read
    for position, image in enumerate(images):
        try:
            yield square(read_image(image), fit)
        except ImageError as error:
            raise ImageError(f"image {position} of the batch (counted from 0): {error}") from error


def _chunks(items: Iterable, size: int = BATCH) -> Iterator[list]:
    items = iter(items)
    while chunk := list(itertools.islice(items, size)):
        yield chunk


@contextmanager
def _described(file: Path, advice: str) -> Iterator[None]:
    """Turn gaps in a model's own description into one clear error."""
    try:
        yield
    except (CifarFtError, KeyError, ValueError, TypeError, AttributeError) as error:
        problem = one_line(f"{type(error).__name__}: {error}")
        message = f"{show_path(file)} does not say which model this is ({problem}); {advice}"
        raise PredictionError(message) from error


def _read_weights(file: Path, advice: str) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors and metadata of a safetensors file."""
    try:
        with safe_open(file, "pt") as weights:
            metadata = weights.metadata() or {}
            state = {name: weights.get_tensor(name) for name in weights.keys()}  # noqa: SIM118
    except FileNotFoundError:
        raise PredictionError(f"{show_path(file)} is missing; {advice}") from None
    except Exception as error:  # a damaged file can cause any
        message = f"{show_path(file)} is damaged or incomplete ({one_line(error)}); {advice}"
        raise PredictionError(message) from error
    if bad := _not_finite(state):
        raise PredictionError(f"{show_path(file)}: {bad} holds values that are not finite; {advice}")
    return state, metadata


def _not_finite(state: dict[str, Tensor]) -> str:
    """The first tensor with a NaN or an infinity, if any."""
    floats = ((name, values) for name, values in state.items() if values.is_floating_point())
    return next((name for name, values in floats if not values.isfinite().all()), "")


def _rebuild(recipe: Recipe, backbone: str, state: dict[str, Tensor], source: str) -> nn.Module:
    """The recipe's model with these weights, on the GPU where there is one."""
    model = build_model(recipe.replace(weights="none", backbone=backbone), echo=lambda *_: None)
    try:
        model.load_state_dict(state, strict=True)
    except RuntimeError as error:
        problem = one_line(error)[:200]
        raise PredictionError(f"the weights of {source} are not those of its recipe: {problem}") from error
    device = "cuda" if torch.cuda.is_available() else "cpu"
    return model.requires_grad_(False).to(device, memory_format=torch.channels_last)


def predict_paths(paths, predictor: Predictor, *, fit: str = "crop") -> Iterator[dict]:
    """Predict files and folders; a bad one is reported in its row and does not stop the others.

    Parameters
    ----------
    paths : path or iterable of paths
        A folder stands for all pictures in it and below, sorted, without hidden ones.
    predictor : Predictor
    fit : {"crop", "pad"}

    Yields
    ------
    dict
        One for each picture, in order: path (str), label ("" on error), probability (None on error), error
        ("" if none). A folder without pictures gives one row with an error.
    """
    paths = [paths] if isinstance(paths, (str, os.PathLike)) else paths
    for chunk in _chunks(_files(paths)):
        rows, pictures = [], []
        for path, error in chunk:
            name = os.fsdecode(path) if isinstance(path, (str, os.PathLike)) else type(path).__name__
            rows.append({"path": name, "label": "", "probability": None, "error": error})
            try:
                if not error:
                    pictures.append((rows[-1], square(read_image(path), fit)))
            except ImageError as problem:
                rows[-1]["error"] = str(problem)
        for (row, _), answer in zip(pictures, predictor.predict([picture for _, picture in pictures]), strict=True):
            row.update(label=answer.label, probability=answer.probability)
        yield from rows


def _files(paths: Iterable) -> Iterator[tuple[object, str]]:
    """Each path, folders opened, with what is wrong with it ("" if nothing is yet)."""
    for path in paths:
        folder = os.path.expanduser(path) if isinstance(path, (str, os.PathLike)) else ""
        if not os.path.isdir(folder):
            yield path, ""
            continue
        found, failures = False, []
        for root, folders, names in os.walk(folder, onerror=failures.append):
            folders[:] = sorted(name for name in folders if not name.startswith("."))
            for name in sorted(names):
                if os.path.splitext(name)[1].lower() in SUFFIXES and not name.startswith("."):
                    found = True
                    yield os.path.join(root, name), ""
        for failure in failures:
            yield failure.filename, f"this folder cannot be read: {failure.strerror}"
        if not found and not failures:
            yield path, f"there are no pictures in this folder; looked for {' '.join(sorted(SUFFIXES))}"


def write_csv(rows: Iterable[dict], file) -> tuple[int, int]:
    """Write the rows of `predict_paths` as CSV (UTF-8) as they come.

    Parameters
    ----------
    rows : iterable of dict
    file : path or text stream
        A file appears under its name only when it is complete.

    Returns
    -------
    (int, int)
        Rows in all, and rows with an error.
    """
    if not hasattr(file, "write"):
        with (
            _replacing(Path(os.path.expanduser(file))) as temporary,
            open(temporary, "w", encoding="utf-8", errors="backslashreplace", newline="") as stream,
        ):
            return write_csv(rows, stream)
    total = failed = 0
    writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
    writer.writeheader()
    for row in rows:
        writer.writerow(row)
        total, failed = total + 1, failed + bool(row["error"])
    return total, failed


@contextmanager
def _replacing(path: Path) -> Iterator[Path]:
    """A temporary file that takes the place of `path` if nothing fails."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        yield temporary
        os.replace(temporary, path)
    except OSError as error:
        raise PredictionError(
            f"cannot write {show_path(path)}: {error.strerror or error}; choose another file"
        ) from error
    finally:
        temporary.unlink(missing_ok=True)


def export_shipped(run_dir: str | os.PathLike, target: str | os.PathLike | None = None) -> Path:
    """Write a run's model as the one that the package ships: half precision, below 10 MB, with its origin.

    Parameters
    ----------
    run_dir : path of a finished run
    target : path, optional
        By default the package's own `assets/model.safetensors`.

    Returns
    -------
    Path
        The file. Its metadata, JSON where not plain text: recipe, backbone, weights (what training started
        from, with digest and licence), data (digest), metrics (test accuracy with its 95 % interval),
        classes, created, cifar_ft.

    Raises
    ------
    PredictionError
        When the model is too large or does not fit half precision.
    """
    target = Path(os.path.expanduser(target)) if target else SHIPPED
    run, model = load_run(Path(os.path.expanduser(run_dir))), Predictor.from_run(run_dir).model
    state = {
        name: (values.half() if values.is_floating_point() else values).cpu().contiguous()
        for name, values in model.state_dict().items()
    }
    if large := _not_finite(state):
        raise PredictionError(f"{large} has values too large for half precision; this model cannot be shipped")
    data = to_safetensors(state, _metadata(run))
    if len(data) > SHIPPED_BYTES:
        sizes = f"{len(data) / 1e6:.1f} MB and may take {SHIPPED_BYTES / 1e6:.0f}"
        advice = "ship a run with backbone=efficientnet_lite0"
        raise PredictionError(f"the model of {show_path(run.path)} takes {sizes}; {advice}")
    with _replacing(target) as temporary:
        temporary.write_bytes(data)
    return target


def _metadata(run) -> dict[str, str]:
    recipe, weights, n = run.recipe, dict(run.config["weights"]), len(run.labels)
    if recipe.weights not in ("imagenet", "none"):  # a path of this machine says nothing elsewhere
        recipe = recipe.replace(weights=Path(recipe.weights).name)
        weights["source"] = f"the file {recipe.weights}"
    metrics = {
        "test_accuracy": run.accuracy,
        "test_accuracy_ci95": wilson_interval(run.correct, n),
        "test_images": n,
    }
    return {
        "format": "pt",
        "recipe": json.dumps(recipe.to_dict()),
        "backbone": weights["backbone"],
        "weights": json.dumps({key: weights.get(key) for key in ("weights", "source", "sha256", "licence")}),
        "data": json.dumps(run.config.get("data", {})),
        "metrics": json.dumps(metrics),
        "classes": json.dumps(CLASSES),
        "created": datetime.date.today().isoformat(),
        "cifar_ft": __version__,
    }
