"""Predictions (notebook 06): a trained model, from a run directory or as shipped, on any picture.

Whatever a picture comes as, it is read, cut square, made 32 pixels wide and predicted, without any network.
"""

from __future__ import annotations

import csv
import datetime
import io
import itertools
import json
import os
import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
import torch.nn.functional as F
from PIL import ExifTags, Image, ImageOps, UnidentifiedImageError
from safetensors import safe_open
from safetensors.torch import save as to_safetensors
from torch import Tensor, nn

from cifar_ft import CifarFtError, __version__
from cifar_ft.data import CLASSES, Split
from cifar_ft.recipes import Recipe
from cifar_ft.results import accuracy_text, load_run, newest_run, predict_logits, runs_root, wilson_interval
from cifar_ft.sources import show_path
from cifar_ft.surgery import build_model
from cifar_ft.transforms import eval_transform

SIZE = 32  # pixels: the width of the pictures that the models were trained on
BATCH = 64  # pictures in memory at a time
MAX_PIXELS = 50_000_000
SHIPPED = Path(__file__).resolve().parent / "assets" / "model.safetensors"
SHIPPED_BYTES = 10_000_000
SUFFIXES = {".png", ".jpg", ".jpeg", ".gif", ".webp", ".bmp", ".tif", ".tiff", ".ppm", ".pgm", ".avif"}
# Named one by one: Pillow would hand other kinds to outside programs (EPS to Ghostscript).
FORMATS = ("PNG", "JPEG", "MPO", "GIF", "WEBP", "BMP", "TIFF", "PPM", "ICO", "AVIF", "JPEG2000")
TRAIN = "train one with `python -m cifar_ft train --recipe quick`"
COLUMNS = ("path", "label", "probability", "error")


class PredictionError(CifarFtError, RuntimeError):
    """A model that cannot be had, or an answer that cannot be given or stored."""


class ImageError(CifarFtError, ValueError):
    """Something that is no picture, or not one that can be predicted."""


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


def read_image(source) -> Tensor:
    """Read one picture, whatever it comes as.

    Parameters
    ----------
    source : path, bytes, file object, PIL image, array or Tensor
        Files are PNG, JPEG, GIF, WebP, BMP, TIFF and the like: turned upright as their EXIF data say, the
        first frame of an animation, transparent parts on white, 16 bits scaled to 8. Arrays are [H, W] or
        [H, W, C], tensors [H, W] or [C, H, W] with C = 1, 3 or 4 (the other order is accepted where only that
        fits); uint8, uint16 (0 to 65,535) or floats, which must be from 0 to 1.

    Returns
    -------
    uint8 Tensor [3, H, W]

    Raises
    ------
    ImageError
        With one line that names the picture and says what is wrong with it. A picture of more than 50 million
        pixels is refused before it is decoded.
    """
    ready = isinstance(source, Image.Image) or (
        hasattr(source, "__array__") and not isinstance(source, (str, bytes))  # NumPy's strings are both
    )
    name, source = ("the picture", source) if ready else _locate(source)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # what Pillow warns of is checked here, or does not matter
            if ready:
                return _decode(source if isinstance(source, Image.Image) else _array_image(source))
            Image.init()
            with Image.open(source, formats=[kind for kind in FORMATS if kind in Image.OPEN]) as image:
                return _decode(image)
    except ImageError as error:
        problem = str(error)
    except UnidentifiedImageError:
        problem = "not a picture that can be read here; use PNG, JPEG, GIF, WebP, BMP or TIFF"
    except Image.DecompressionBombError:
        problem = f"too large; at most {MAX_PIXELS:,} pixels are allowed, make it smaller"
    except Exception as error:  # a damaged file can cause any
        problem = f"damaged, incomplete or of an unknown kind ({error or type(error).__name__}); get it again"
    raise ImageError(_one_line(f"{name}: {problem}"))


def _locate(source) -> tuple[str, object]:
    """A name for messages and what Pillow can open."""
    if isinstance(source, (bytes, bytearray, memoryview)):
        if content := bytes(source):
            return "the picture", io.BytesIO(content)
        raise ImageError("the picture is empty: 0 bytes; choose a picture file")
    if isinstance(source, io.TextIOBase):
        raise ImageError('the picture is opened as text; open it with mode "rb"')
    if hasattr(source, "read"):
        return "the picture", source
    if not isinstance(source, (str, os.PathLike)):
        kinds = "a path, bytes, a file object, a PIL image, an array or a tensor"
        raise ImageError(f"cannot read {type(source).__name__} as a picture; give {kinds}")
    path = os.path.expanduser(os.fsdecode(source))
    shown = _one_line(show_path(path)) if path else "''"
    if "://" in path:
        raise ImageError(f"{_one_line(path)} is an address; download the picture and give its path")
    if os.path.isdir(path):
        raise ImageError(f"{shown} is a folder; give a picture, or the folder to predict_paths")
    if not os.path.isfile(path):
        raise ImageError(
            f"{shown} is no regular file" if os.path.exists(path) else f"there is no file {shown}"
        )
    if not os.path.getsize(path):
        raise ImageError(f"{shown} is empty: 0 bytes; choose another file")
    return shown, path


def _decode(image: Image.Image) -> Tensor:
    width, height = image.size
    if not width or not height:
        raise ImageError(f"{width} x {height} pixels is no picture; each side must have at least 1")
    if width * height > MAX_PIXELS:
        raise ImageError(f"too large: {width:,} x {height:,} pixels; at most {MAX_PIXELS:,} are allowed")
    image.load()
    with suppress(Exception):  # of damaged EXIF data; the picture itself has just been decoded
        if image.getexif().get(ExifTags.Base.Orientation, 1) != 1:
            image = ImageOps.exif_transpose(image)
    if image.mode[0] in "IF":  # 16 bits and more, in one channel
        values = np.asarray(image)
        if image.mode == "I" and not (values >> 16).any():
            values = values.astype(np.uint16)
        image = _array_image(values)
    if "transparency" in image.info or image.mode in ("RGBA", "LA", "PA", "RGBa", "La"):
        white = Image.new("RGBA", image.size, "white")
        white.alpha_composite(image.convert("RGBA"))
        image = white
    pixels = np.asarray(image if image.mode == "RGB" else image.convert("RGB"))
    return torch.from_numpy(pixels).permute(2, 0, 1).clone(memory_format=torch.contiguous_format)


def _array_image(source) -> Image.Image:
    """An array or tensor as a PIL image of mode L, RGB or RGBA."""
    axes, wanted = (2, 0), "[H, W] or [H, W, 3]"
    if isinstance(source, Tensor):
        axes, wanted = (0, 2), "[H, W] or [3, H, W]"
        source = source.detach().cpu()
        source = (source.float() if source.dtype == torch.bfloat16 else source).numpy()
    array = np.asarray(source)
    axis = next((axis for axis in axes if array.ndim == 3 and array.shape[axis] in (1, 3, 4)), None)
    if axis is None and array.ndim != 2:
        raise ImageError(f"shape {list(array.shape)} is no picture; give {wanted}, with 1, 3 or 4 channels")
    if not array.size:
        raise ImageError(f"shape {list(array.shape)} has no pixels; each side must have at least 1")
    array = _uint8(array if axis is None else np.moveaxis(array, axis, 2))
    return Image.fromarray(np.ascontiguousarray(array[..., 0] if array.shape[2:] == (1,) else array))


def _uint8(array: np.ndarray) -> np.ndarray:
    kind = f"{array.dtype.kind}{array.dtype.itemsize}"
    if kind == "u1":
        return array
    if kind == "u2":
        return ((array.astype(np.uint32) + 128) // 257).astype(np.uint8)
    if kind[0] != "f":
        allowed = "uint8 (0 to 255), uint16 (0 to 65,535) or floats from 0 to 1"
        raise ImageError(f"pixels of type {array.dtype}; use {allowed}")
    if not np.isfinite(array).all():
        raise ImageError("some pixels are NaN or infinite; use finite values from 0 to 1")
    low, high = array.min(), array.max()
    if low < -1e-3 or high > 1 + 1e-3:  # leaves room for rounding in an earlier resize
        hint = (
            "undo a normalisation with transforms.denormalize" if low < 0 else "divide by 255 or give uint8"
        )
        raise ImageError(f"float pixels must be from 0 to 1; these run from {low:.4g} to {high:.4g}, {hint}")
    return (array.clip(0, 1).astype(np.float32) * 255).round().astype(np.uint8)


def _one_line(text: object) -> str:
    return " ".join(str(text).split())


def square(image: Tensor, fit: str = "crop") -> Tensor:
    """Make a picture square and 32 pixels wide, as the network is used to.

    The networks were trained on 32-pixel pictures, enlarged to the recipe's `image_size`. A sharp photograph
    of `image_size` would show them details they have never seen, so every picture first loses these in an
    anti-aliased resize to 32 pixels; `transforms.eval_transform` then enlarges it as in training.

    Parameters
    ----------
    image : uint8 Tensor [3, H, W]
    fit : {"crop", "pad"}
        Keep the square in the middle, or the whole picture between black borders.

    Returns
    -------
    uint8 Tensor [3, 32, 32]
    """
    if fit not in ("crop", "pad"):
        raise PredictionError(f"unknown fit {fit!r}; choose crop or pad")
    height, width = image.shape[1:]
    size = (SIZE, SIZE)
    if fit == "crop":
        side = min(height, width)
        top, left = (height - side) // 2, (width - side) // 2
        image = image[:, top : top + side, left : left + side]
    else:
        size = tuple(max(1, round(SIZE * length / max(height, width))) for length in (height, width))
    if image.shape[1:] != size:
        image = F.interpolate(image[None], size, mode="bilinear", align_corners=False, antialias=True)[0]
    down, right = SIZE - size[0], SIZE - size[1]
    return F.pad(image, (right // 2, right - right // 2, down // 2, down - down // 2))


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
        run = load_run(Path(path).expanduser())
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
        problem = _one_line(f"{type(error).__name__}: {error}")
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
        message = f"{show_path(file)} is damaged or incomplete ({_one_line(error)}); {advice}"
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
        problem = _one_line(error)[:200]
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
        for (row, _), answer in zip(
            pictures, predictor.predict([picture for _, picture in pictures]), strict=True
        ):
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
            _replacing(Path(file).expanduser()) as temporary,
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
    target = Path(target).expanduser() if target else SHIPPED
    run, model = load_run(Path(run_dir).expanduser()), Predictor.from_run(run_dir).model
    state = {
        name: (values.half() if values.is_floating_point() else values).cpu().contiguous()
        for name, values in model.state_dict().items()
    }
    if large := _not_finite(state):
        raise PredictionError(
            f"{large} has values too large for half precision; this model cannot be shipped"
        )
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
