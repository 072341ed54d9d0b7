"""Every named set of hyper-parameters, the published one first.

A recipe is a frozen record of all that decides a run; `get_recipe("quick", "epochs=1 lr=5e-4")` returns a checked copy.
"""

from __future__ import annotations

import shlex
from collections.abc import Iterable, Mapping
from pathlib import PureWindowsPath
from typing import Annotated, Any, Literal, get_args

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, StrictBool, ValidationError, model_validator

from cifar_ft import CifarFtError
from cifar_ft.files import unknown


class RecipeError(CifarFtError, ValueError):
    """A recipe name, key or value that does not exist or cannot be used."""

    wrong_argument = True


# What text means, as the command line and the notebooks' parameters give it; pydantic turns the rest into numbers.
def _none(value: Any) -> Any:
    return None if isinstance(value, str) and value.strip().lower() in ("none", "all", "") else value


def _flag(value: Any) -> Any:
    return {"true": True, "false": False}.get(value.strip().lower(), value) if isinstance(value, str) else value


def _sizes(value: Any) -> Any:
    if _none(value) is None:
        return ()
    return tuple(item for item in value.strip("()[] ").split(",") if item) if isinstance(value, str) else value


def _number(value: Any) -> Any:
    return [value] if isinstance(value, bool) else value  # Python takes true for 1; a list is refused as no number


Flag = Annotated[StrictBool, BeforeValidator(_flag)]
Int = Annotated[int, BeforeValidator(_number)]
Float = Annotated[float, BeforeValidator(_number)]
Size = Annotated[Int, Field(ge=16, le=512)]  # pixels
OrNone = BeforeValidator(_none)  # of a field that may be None


class Recipe(BaseModel):
    """All that decides a run. Sizes are in pixels, `None` means "all" or "whole"."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    name: str
    # the model
    backbone: Literal["auto", "resnet50", "resnet18", "efficientnet_lite0"] = "auto"  # auto: see resolve_backbone
    weights: str = "imagenet"  # "imagenet", "none" for random weights on purpose, or the path of a weights file
    # a new stem is a 3x3 convolution of stride 1: random, or the pretrained one, resampled if it is not 3x3 already
    stem: Literal["pretrained", "cifar_random", "cifar_resampled"] = "pretrained"
    max_pool: Flag = True  # keep the ResNet's max-pool after the stem
    last_stage: Annotated[
        Literal[1, 2, 3, None], OrNone, BeforeValidator(lambda v: int(v) if v in ("1", "2", "3") else v)
    ] = None  # cut a ResNet after this stage
    head_init: Literal["small", "default"] = "small"  # small: std 0.01 and no bias; default: PyTorch's, as published
    # the part from the input on that keeps its weights and statistics
    freeze: Literal[
        "none", "stem", "early", "stage1", "stage2", "stage3", "stage4", "stage5", "stage6", "stage7", "backbone"
    ] = "none"
    freeze_batchnorm: Flag = False  # all BatchNorm layers keep their statistics, also where weights are trained
    # the pictures
    image_size: Size = 64  # of evaluation, and of training where train_sizes is empty
    train_sizes: Annotated[tuple[Size, ...], BeforeValidator(_sizes)] = ()  # one size an epoch: progressive resizing
    normalization: Literal["imagenet", "cifar10", "cifar10_published"] = "imagenet"
    crop_padding: Int = Field(4, ge=0, le=16)
    flip: Flag = True
    cutout: Int = Field(0, ge=0, le=32)  # side of a square of mean colour, in pixels of the 32-pixel image; 0: none
    degrade: Float = Field(0.0, ge=0, le=1)  # share of the training images that are blurred or made noisy, at random
    train_images: Annotated[Int | None, OrNone] = Field(None, ge=10, le=50_000)
    val_images: Annotated[Int | None, OrNone] = Field(None, ge=10, le=5_000)
    test_images: Annotated[Int | None, OrNone] = Field(None, ge=10, le=10_000)
    validation: Flag = True  # False: train on all 50,000 images, as the published code does
    # the training
    epochs: Int = Field(2, ge=1, le=10_000)
    batch_size: Int = Field(64, ge=2, le=50_000)  # global: the sum over all processes
    accumulation: Int = Field(1, ge=1, le=1024)  # micro-batches of a process for each step, to save memory
    # linear probe first: fit the head on features of so many images; wants freeze_batchnorm where more is trained
    head_fit_images: Int = Field(0, ge=0, le=50_000)
    lr: Float = Field(0.01, ge=1e-8, le=100)  # of the backbone; the peak of a one_cycle schedule
    head_lr_factor: Float = Field(1.0, ge=1e-4, le=1e4)  # the head's lr as a multiple of the backbone's
    optimizer: Literal["sgd", "adamw"] = "sgd"  # adamw has its usual betas, and wants a lower learning rate
    momentum: Float = Field(0.9, ge=0, le=0.9999)  # of sgd, as is nesterov
    nesterov: Flag = False
    weight_decay: Float = Field(5e-4, ge=0, le=10)
    schedule: Literal["constant", "cosine", "one_cycle"] = "constant"  # stepped once an epoch, or at every step
    warmup: Float = Field(0.2, ge=0, le=0.9)  # share of the steps in which a one_cycle schedule rises
    label_smoothing: Float = Field(0.0, ge=0, le=0.9)
    ema_decay: Float = Field(0.0, ge=0, le=0.99999)  # per step; 0 switches the moving average of the weights off
    select: Literal["best", "last"] = "last"  # the weights of the last epoch, or of the best one on validation
    track_test: Flag = False  # log the test set each epoch, to redraw published curves; never selects on it
    flip_tta: Flag = False  # also report the test accuracy averaged over each image and its mirror image
    precision: Literal["auto", "fp32", "bf16", "fp16"] = "auto"  # auto: see training.choose_plan
    compile: Flag = False  # compile the model with torch.compile before training
    checkpoint_steps: Int = Field(0, ge=0, le=10_000_000)  # also checkpoint every N steps; 0: once an epoch
    seed: Int = Field(0, ge=0, le=2**31 - 1)

    def __init__(self, name: str, **values: Any):
        try:
            super().__init__(name=name, **values)
        except ValidationError as error:
            raise RecipeError(_explain(error.errors()[0])) from None

    @model_validator(mode="after")
    def _consistent(self) -> Recipe:
        if self.train_sizes and len(self.train_sizes) != self.epochs:
            raise RecipeError(
                f"train_sizes has {len(self.train_sizes)} sizes for {self.epochs} epochs; give one size an epoch, "
                "or train_sizes=none to train at image_size"
            )
        if self.select == "best" and not self.validation:
            raise RecipeError("select=best needs validation=true: the test set is never used to choose")
        if self.nesterov and self.momentum == 0:
            raise RecipeError("nesterov=true needs a momentum above 0")
        if self.freeze != "none" and self.stem != "pretrained":
            raise RecipeError(f"stem={self.stem} is new and freeze={self.freeze} would never train it; use freeze=none")
        if self.backbone == "efficientnet_lite0" and (self.last_stage or not self.max_pool):
            raise RecipeError("last_stage and max_pool=false are for ResNets; efficientnet_lite0 has neither to change")
        return self

    def size_at(self, epoch: int) -> int:
        """Training image size in pixels at an epoch counted from 0."""
        return self.train_sizes[epoch] if self.train_sizes else self.image_size

    def replace(self, **changes: Any) -> Recipe:
        """A checked copy with other values; for other epochs `train_sizes` is stretched or shortened, its end kept."""
        if self.train_sizes and "epochs" in changes and "train_sizes" not in changes:
            epochs = Recipe("", epochs=changes["epochs"]).epochs
            backwards = [self.train_sizes[-1 - i * self.epochs // epochs] for i in range(epochs)]
            changes["train_sizes"] = tuple(reversed(backwards))
        return Recipe(**{**self.to_dict(), **changes})

    def to_dict(self) -> dict[str, Any]:
        """A JSON-ready dictionary, the inverse of `from_dict`."""
        return self.model_dump(mode="json")

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Recipe:
        """Rebuild a recipe written by `to_dict`; unknown keys are refused."""
        if not isinstance(values, Mapping) or "name" not in values:
            raise RecipeError(f"{values!r} is no recipe written by to_dict")
        return cls(**values)


def _explain(problem: Mapping[str, Any]) -> str:
    """What pydantic found, in words: the key, what was given, what is allowed, the nearest name."""
    if problem["type"] == "value_error":
        return str(problem["ctx"]["error"])
    key, value, kind = str(problem["loc"][0]), problem["input"], problem["type"]
    if kind == "extra_forbidden":
        return unknown("recipe key", key, sorted(Recipe.model_fields.keys() - {"name"}))
    field = Recipe.model_fields[key]
    if kind == "literal_error":
        return unknown(key, value, ["none" if name is None else name for name in get_args(field.annotation)])
    if kind in ("greater_than_equal", "less_than_equal"):
        if key == "train_sizes":
            return f"train_sizes={value} is out of range; each size must be 16 to 512 pixels"
        bounds = field.metadata + [
            part for kind in get_args(field.annotation) for part in getattr(kind, "__metadata__", ())
        ]
        low = next(bound.ge for bound in bounds if hasattr(bound, "ge"))
        high = next(bound.le for bound in bounds if hasattr(bound, "le"))
        return f"{key}={value} is out of range; allowed is {low} to {high}"
    wanted = {
        "bool": "true or false",
        "int": "a whole number",
        "float": "a number",
        "finite": "a number",
        "string": "a text",
    }
    wanted = wanted.get(kind.partition("_")[0], "allowed")
    if key == "train_sizes":
        wanted = "whole numbers with commas, one an epoch, such as 64,96,96"
    value = value[0] if isinstance(value, list) and len(value) == 1 else value
    return f"{key}={value!r} is not {wanted}" + (" (or none)" if type(None) in get_args(field.annotation) else "")


_reference = Recipe(
    "reference_b32", backbone="resnet50", stem="cifar_random", head_init="default", image_size=32,
    normalization="cifar10_published", validation=False, track_test=True, epochs=60, batch_size=32,
    lr=0.01, momentum=0.9, weight_decay=5e-4, schedule="constant", precision="fp32",
)  # fmt: skip
_modern = Recipe(
    "modern", backbone="resnet50", image_size=128, epochs=10, batch_size=128, lr=0.02, head_lr_factor=10,
    nesterov=True, schedule="one_cycle", label_smoothing=0.1, ema_decay=0.999,
)  # fmt: skip

# AdamW, which was ahead of SGD wherever both were tried on EfficientNet-Lite0 (docs/how_recipes_were_found.md).
_quick = Recipe(
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
        _quick,
        _modern.replace(
            name="speedrun", backbone="efficientnet_lite0", freeze="early", epochs=3, train_sizes=(96, 112, 128),
            batch_size=64, lr=0.04, label_smoothing=0.05, ema_decay=0.995, validation=False,
        ),
        _quick.replace(
            name="cpu", backbone="efficientnet_lite0", image_size=192, epochs=12, label_smoothing=0.1, ema_decay=0.998,
            cutout=12, train_sizes=(96, 96, 128, 128, 128, 128, 160, 160, 160, 192, 192, 192),
        ),
        Recipe(
            "smoke", backbone="auto", image_size=32, epochs=2, batch_size=64, lr=0.01, head_lr_factor=10, nesterov=True,
            schedule="one_cycle", ema_decay=0.9, train_images=512, val_images=200, test_images=500, precision="fp32",
        ),
    )
}  # fmt: skip


def weights_name(weights: str) -> str:
    """A recipe's weights for a file that others may read: of a path the name alone, without this machine's folders."""
    return PureWindowsPath(weights).name  # knows either slash


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
        raise RecipeError(unknown("recipe", name, RECIPES))
    return RECIPES[name].replace(**parse_overrides(overrides))


def parse_overrides(overrides: str | Iterable[str] | Mapping[str, object]) -> dict[str, object]:
    """Overrides in any of the three accepted forms as a dictionary; `Recipe.replace` checks the values."""
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
    for key in overrides:
        if key == "name" or key not in Recipe.model_fields:
            raise RecipeError(unknown("recipe key", key, sorted(Recipe.model_fields.keys() - {"name"})))
    return dict(overrides)
