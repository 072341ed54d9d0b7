"""Every named set of hyper-parameters, the published one first.

A recipe is a frozen record of all that decides a run; `get_recipe("quick", "epochs=1 lr=5e-4")` returns a checked copy.
"""

from __future__ import annotations

import dataclasses
import difflib
import math
import shlex
import types
import typing
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from cifar_ft import CifarFtError


class RecipeError(CifarFtError, ValueError):
    """A recipe name, key or value that does not exist or cannot be used."""


CHOICES = {
    "backbone": ("auto", "resnet50", "resnet18", "efficientnet_lite0"),
    "stem": ("pretrained", "cifar_random", "cifar_resampled"),
    "last_stage": (None, 1, 2, 3),
    "normalization": ("imagenet", "cifar10", "cifar10_published"),
    "head_init": ("small", "default"),
    "freeze": ("none", "stem", "early", *(f"stage{i}" for i in range(1, 8)), "backbone"),
    "optimizer": ("sgd", "adamw"),
    "schedule": ("constant", "cosine", "one_cycle"),
    "select": ("best", "last"),
    "precision": ("auto", "fp32", "bf16", "fp16"),
}


# Lowest and highest allowed value; a bound that is excluded is written as the next representable idea of it.
RANGES = {
    "image_size": (16, 512), "crop_padding": (0, 16), "cutout": (0, 32), "head_fit_images": (0, 50_000),
    "epochs": (1, 10_000), "batch_size": (2, 50_000), "lr": (1e-8, 100.0), "head_lr_factor": (1e-4, 1e4),
    "momentum": (0.0, 0.9999), "weight_decay": (0.0, 10.0), "warmup": (0.0, 0.9), "label_smoothing": (0.0, 0.9),
    "ema_decay": (0.0, 0.99999), "train_images": (10, 50_000), "val_images": (10, 5_000), "test_images": (10, 10_000),
    "accumulation": (1, 1024), "checkpoint_steps": (0, 10_000_000), "seed": (0, 2**31 - 1),
}  # fmt: skip


@dataclass(frozen=True)
class Recipe:
    """All that decides a run. Sizes are in pixels, `None` means "all" or "whole"."""

    name: str
    # the model
    backbone: str = "auto"  # auto: resnet50 where its ImageNet weights can be had, else efficientnet_lite0
    weights: str = "imagenet"  # "imagenet", "none" for random weights on purpose, or the path of a weights file
    stem: str = "pretrained"  # pretrained | cifar_random (new 3x3, stride 1) | cifar_resampled (3x3 made of it)
    max_pool: bool = True  # keep the ResNet's max-pool behind the stem
    last_stage: int | None = None  # cut a ResNet behind this stage
    head_init: str = "small"  # small: weights of deviation 0.01 and no bias; default: PyTorch's, as published
    freeze: str = "none"  # none | stem | early | stage1 ... | backbone: the part that keeps weights and statistics
    freeze_batchnorm: bool = False  # all BatchNorm layers keep their statistics, also where weights are trained
    # the pictures
    image_size: int = 64  # of evaluation, and of training where train_sizes is empty
    train_sizes: tuple[int, ...] = ()  # one size an epoch: progressive resizing
    normalization: str = "imagenet"
    crop_padding: int = 4
    flip: bool = True
    cutout: int = 0  # side of a square covered with the mean colour, in pixels of the 32-pixel image; 0: none
    train_images: int | None = None
    val_images: int | None = None
    test_images: int | None = None
    validation: bool = True  # False: train on all 50,000 images, as the published code does
    # the training
    epochs: int = 2
    batch_size: int = 64  # global: the sum over all processes
    accumulation: int = 1  # pieces that a process cuts its batch into, to save memory; the step stays the same
    head_fit_images: int = 0  # linear probe first: the new head is fitted on the features of this many images
    lr: float = 0.01  # of the backbone; the peak of a one_cycle schedule
    head_lr_factor: float = 1.0  # the head's lr as a multiple of the backbone's
    optimizer: str = "sgd"  # adamw has its usual betas of 0.9 and 0.999, and wants a lower learning rate
    momentum: float = 0.9  # of sgd, as is nesterov
    nesterov: bool = False
    weight_decay: float = 5e-4
    schedule: str = "constant"  # cosine is stepped once an epoch, one_cycle at every step
    warmup: float = 0.2  # share of the steps that a one_cycle schedule rises
    label_smoothing: float = 0.0
    ema_decay: float = 0.0  # per step; 0 switches the moving average of the weights off
    select: str = "last"  # the weights kept: of the last epoch, or of the best one on validation
    track_test: bool = False  # log the test set each epoch, to redraw published curves; never selects on it
    flip_tta: bool = False  # also report the test accuracy averaged over each image and its mirror image
    precision: str = "auto"
    compile: bool = False  # compile the model with torch.compile before training
    checkpoint_steps: int = 0  # also checkpoint every N steps; 0: at the end of each epoch
    seed: int = 0

    def __post_init__(self):
        for key, allowed in CHOICES.items():
            if getattr(self, key) not in allowed:
                raise RecipeError(_not_allowed(key, getattr(self, key), allowed))
        for key, (low, high) in RANGES.items():
            value = getattr(self, key)
            if value is not None and not low <= value <= high:
                raise RecipeError(f"{key}={value} is out of range; allowed is {low} to {high}")
        if self.train_sizes and len(self.train_sizes) != self.epochs:
            raise RecipeError(
                f"train_sizes has {len(self.train_sizes)} sizes for {self.epochs} epochs; give one size an epoch, "
                "or train_sizes=none to train at image_size"
            )
        if any(not 16 <= size <= 512 for size in self.train_sizes):
            raise RecipeError(f"train_sizes={self.train_sizes} is out of range; each size must be 16 to 512 pixels")
        if self.select == "best" and not self.validation:
            raise RecipeError("select=best needs validation=true: the test set is never used to choose")
        if self.nesterov and self.momentum == 0:
            raise RecipeError("nesterov=true needs a momentum above 0")
        if self.freeze != "none" and self.stem != "pretrained":
            raise RecipeError(f"stem={self.stem} is new and freeze={self.freeze} would never train it; use freeze=none")
        if self.backbone == "efficientnet_lite0" and (self.last_stage or not self.max_pool):
            raise RecipeError("last_stage and max_pool=false are for ResNets; efficientnet_lite0 has neither to change")

    def size_at(self, epoch: int) -> int:
        """Training image size in pixels at an epoch counted from 0."""
        return self.train_sizes[epoch] if self.train_sizes else self.image_size

    def replace(self, **changes) -> Recipe:
        """A checked copy with other values; for other epochs `train_sizes` is stretched or shortened, its end kept."""
        epochs = changes.get("epochs", self.epochs)
        low, high = RANGES["epochs"]  # a number out of range is refused below, not stretched to
        if self.train_sizes and "train_sizes" not in changes and epochs != self.epochs and low <= epochs <= high:
            backwards = [self.train_sizes[-1 - i * self.epochs // epochs] for i in range(epochs)]
            changes["train_sizes"] = tuple(reversed(backwards))
        return dataclasses.replace(self, **changes)

    def to_dict(self) -> dict:
        """A JSON-ready dictionary, the inverse of `from_dict`."""
        return {**dataclasses.asdict(self), "train_sizes": list(self.train_sizes)}

    @classmethod
    def from_dict(cls, values: Mapping) -> Recipe:
        """Rebuild a recipe written by `to_dict`; unknown keys are refused."""
        known = {field.name for field in dataclasses.fields(cls)}
        for key in values:
            if key not in known:
                raise RecipeError(_not_allowed("recipe key", key, sorted(known)))
        try:
            return cls(**{**values, "train_sizes": tuple(values.get("train_sizes", ()))})
        except TypeError as error:
            raise RecipeError(f"this is no recipe written by to_dict: {error}") from error


_reference = Recipe(
    "reference_b32", backbone="resnet50", stem="cifar_random", head_init="default", image_size=32,
    normalization="cifar10_published", validation=False, track_test=True, epochs=60, batch_size=32,
    lr=0.01, momentum=0.9, weight_decay=5e-4, schedule="constant", precision="fp32",
)  # fmt: skip


_modern = Recipe(
    "modern", backbone="resnet50", image_size=128, epochs=10, batch_size=128, lr=0.02, head_lr_factor=10,
    nesterov=True, schedule="one_cycle", label_smoothing=0.1, ema_decay=0.999,
)  # fmt: skip


# AdamW suits EfficientNet-Lite0: at the same number of steps SGD stays far behind.
_light = Recipe(
    "quick", freeze="early", image_size=112, epochs=2, train_sizes=(80, 112), batch_size=64, optimizer="adamw",
    lr=0.001, weight_decay=0.05, schedule="one_cycle", label_smoothing=0.05, ema_decay=0.995,
)  # fmt: skip


RECIPES: dict[str, Recipe] = {
    recipe.name: recipe
    for recipe in (
        _reference,
        _reference.replace(name="reference_b64", batch_size=64),
        _reference.replace(name="reference_b32_cosine", schedule="cosine"),
        _modern,
        _light,
        _modern.replace(
            name="speedrun", backbone="efficientnet_lite0", freeze="early", epochs=3, train_sizes=(96, 112, 128),
            batch_size=64, lr=0.04, label_smoothing=0.05, ema_decay=0.995, validation=False,
        ),
        _light.replace(
            name="cpu", backbone="efficientnet_lite0", image_size=192, epochs=12, label_smoothing=0.1, ema_decay=0.998,
            cutout=12, train_sizes=(96, 96, 128, 128, 128, 128, 160, 160, 160, 192, 192, 192),
        ),
        Recipe(
            "smoke", backbone="auto", image_size=32, epochs=2, batch_size=64, lr=0.01, head_lr_factor=10, nesterov=True,
            schedule="one_cycle", ema_decay=0.9, train_images=512, val_images=200, test_images=500, precision="fp32",
        ),
    )
}  # fmt: skip


def get_recipe(name: str, overrides: str | Iterable[str] | Mapping[str, object] = ()) -> Recipe:
    """A named recipe with overrides applied and checked.

    Parameters
    ----------
    name : str
        One of `RECIPES`.
    overrides : str, iterable of str, or mapping
        `"epochs=1 lr=0.1"`, `["epochs=1", "lr=0.1"]` or `{"epochs": 1, "lr": 0.1}`.

    Raises
    ------
    RecipeError
        For an unknown name or key (the nearest valid one is named), a value of the wrong type, or one out of range.

    Examples
    --------
    >>> get_recipe("quick", "epochs=1").epochs
    1
    """
    if name not in RECIPES:
        raise RecipeError(_not_allowed("recipe", name, RECIPES))
    return RECIPES[name].replace(**parse_overrides(overrides))


def parse_overrides(overrides: str | Iterable[str] | Mapping[str, object]) -> dict[str, object]:
    """Turn overrides in any of the three accepted forms into a dictionary of typed values."""
    if isinstance(overrides, str):
        try:
            overrides = shlex.split(overrides.replace("\\", "\\\\"))
        except ValueError as error:
            raise RecipeError(
                f"cannot read the overrides {overrides!r}: {error}; write them as 'epochs=1 lr=0.1'"
            ) from error
    if not isinstance(overrides, Mapping):
        pairs = [str(item).partition("=") for item in overrides]
        for key, equals, _ in pairs:
            if not equals:
                raise RecipeError(f"override {key!r} has no value; write it as key=value, for example epochs=1")
        if len({key.strip() for key, _, _ in pairs}) != len(pairs):
            raise RecipeError(f"a key is given twice in {' '.join(map(''.join, pairs))!r}; give each key once")
        overrides = {key.strip(): value.strip() for key, _, value in pairs}
    hints = typing.get_type_hints(Recipe)
    allowed = [key for key in hints if key != "name"]
    values = {}
    for key, value in overrides.items():
        if key not in allowed:
            raise RecipeError(_not_allowed("recipe key", key, allowed))
        values[key] = _typed(key, value, hints[key])
    return values


def _typed(key: str, value: object, hint: object) -> object:
    """The value as the field's type, from its text or from a Python value; a lossy conversion is refused."""
    union = isinstance(hint, types.UnionType)
    kind = next(t for t in typing.get_args(hint) if t is not types.NoneType) if union else hint
    text = value.strip() if isinstance(value, str) else None
    if value is None or (
        text is not None and text.lower() in ("none", "all", "") and (union or typing.get_origin(kind))
    ):
        if union:
            return None
        if typing.get_origin(kind) is tuple:
            return ()
    try:
        if typing.get_origin(kind) is tuple:
            items = text.strip("()[]").split(",") if text is not None else value
            return tuple(_typed(key, item, int) for item in items if item != "")  # a trailing comma is fine
        if kind is bool:
            return value if isinstance(value, bool) else {"true": True, "false": False}[str(text).lower()]
        if isinstance(value, bool) or (kind is str and text is None):
            raise ValueError
        if kind is int and text is None and value != int(value):
            raise ValueError
        number = kind(text if text is not None else value)
        if kind is float and not math.isfinite(number):
            raise ValueError
        return number
    except (ValueError, TypeError, KeyError, OverflowError):
        wanted = {bool: "true or false", int: "a whole number", float: "a number", str: "a text"}.get(
            kind, "whole numbers with commas, one an epoch, such as 64,96,96"
        )
        raise RecipeError(f"{key}={value!r} is not {wanted}" + (" (or none)" if union else "")) from None


def _not_allowed(what: str, value: object, allowed: Iterable) -> str:
    names = [str(item).lower() if item is None else str(item) for item in allowed]
    close = difflib.get_close_matches(str(value), names, n=1, cutoff=0.5)
    hint = f" (did you mean {close[0]!r}?)" if close else ""
    return f"unknown {what} {value!r}; choose from {', '.join(names)}{hint}"
