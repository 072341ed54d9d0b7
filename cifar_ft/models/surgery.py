"""Model surgery: change a backbone's stem, cut it, give it ten classes, and show what that did.

`build_model(recipe)` does all of it; the single steps are public because notebook 03 takes them one at a time.
"""

from __future__ import annotations

import pandas as pd
import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from cifar_ft import log
from cifar_ft.files import unknown
from cifar_ft.models.backbones import (
    SurgeryError,
    backbone_of,
    create_backbone,
    guess_backbone,
    head,
    load_state,
    stages,
    strides_of,
)
from cifar_ft.models.evaluation import evaluating
from cifar_ft.models.freezing import freeze, is_frozen_batchnorm
from cifar_ft.models.weights import Weights, fetch_weights, resolve_backbone
from cifar_ft.recipes import Recipe

STEMS = ("pretrained", "cifar_random", "cifar_resampled")


def replace_head(model: nn.Module, num_classes: int = 10, init: str = "small") -> nn.Module:
    """Put a new linear layer with `num_classes` outputs in place of the head. In place.

    With `init="small"` its weights are drawn with a standard deviation of 0.01 and its bias is 0, so that the first
    predictions are almost uniform; `"default"` is PyTorch's own initialisation, as in the published code.
    """
    if init not in ("small", "default"):
        raise SurgeryError(unknown("init", init, ("small", "default")))
    new = nn.Linear(head(model).in_features, num_classes)
    if init == "small":
        nn.init.normal_(new.weight, std=0.01)
        nn.init.zeros_(new.bias)
    setattr(model, backbone_of(model).head, new)
    return model


def replace_stem(model: nn.Module, stem: str = "cifar_random", max_pool: bool = True) -> nn.Module:
    """Change the first convolution for 32-pixel images, and drop the max-pool after it if asked. In place.

    `stem="pretrained"` leaves it as it is. `cifar_random` is a new 3x3 convolution with stride 1 and padding 1, as in
    the published recipe. `cifar_resampled` has the same shape, but its kernel is the pretrained one resampled to 3x3
    with the sum of its weights unchanged (one that is 3x3 already, as EfficientNet-Lite0's, stays as it is: only the
    stride changes); follow it with `refresh_batchnorm`, since its outputs have other statistics.
    """
    if stem not in STEMS:
        raise SurgeryError(unknown("stem", stem, STEMS))
    backbone = backbone_of(model)
    if not max_pool and not backbone.max_pool:
        raise SurgeryError(f"{backbone.model} has no max-pool to drop; use max_pool=true")
    if stem != "pretrained":
        old = getattr(model, backbone.stem[0])
        new = nn.Conv2d(old.in_channels, old.out_channels, kernel_size=3, stride=1, padding=1, bias=False)
        if stem == "cifar_resampled":
            with torch.no_grad():
                new.weight.copy_(resample_kernel(old.weight, 3))
        setattr(model, backbone.stem[0], new)
    if not max_pool:
        setattr(model, backbone.max_pool, nn.Identity())
    return model


def resample_kernel(kernel: Tensor, size: int) -> Tensor:
    """Resample convolution kernels [O, I, K, K] to [O, I, size, size] by area, so that each kernel keeps its sum."""
    old = kernel.shape[-1]
    edges = torch.arange(size, dtype=kernel.dtype)[:, None] * old / size
    cells = torch.arange(old, dtype=kernel.dtype)
    # How much of each old cell lies in each new one; every column sums to 1.
    share = (torch.minimum(edges + old / size, cells + 1) - torch.maximum(edges, cells)).clamp(min=0)
    return share @ kernel @ share.T


def cut(model: nn.Module, last_stage: int | None) -> nn.Module:
    """End a ResNet after stage 1, 2 or 3 and fit the width of the head to it; `None` leaves it whole. In place."""
    if last_stage is None:
        return model
    backbone = backbone_of(model)
    if backbone.top:
        raise SurgeryError(f"{backbone.model} cannot be cut, only ResNets can; use last_stage=none")
    if last_stage not in range(1, len(backbone.stages)):
        raise SurgeryError(f"last_stage={last_stage!r} is out of range; choose 1, 2, 3 or none")
    after = backbone.stages[last_stage:]
    width = next(m.in_channels for m in getattr(model, after[0]).modules() if isinstance(m, nn.Conv2d))
    for name in after:
        setattr(model, name, nn.Identity())
    setattr(model, backbone.head, nn.Linear(width, head(model).out_features))
    return model


def features(model: nn.Module, images: Tensor) -> Tensor:
    """What the head sees: pooled features [B, D] of the input batch [B, 3, S, S]."""
    seen: list[Tensor] = []
    handle = head(model).register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    try:
        model(images)
    finally:
        handle.remove()
    return seen[0]


def build_model(recipe: Recipe, restored: dict | None = None) -> nn.Module:
    """The model that a recipe asks for: backbone, ImageNet weights, cut, stem, new head, frozen parts.

    It maps float images [B, 3, S, S] to logits [B, 10]. Its attribute `weights_info` says which backbone and weights
    were used, with which strides (see `create_backbone`), from where, with which digest and licence, and which tensors
    a partial file left random.

    Parameters
    ----------
    restored : the `weights_info` of a model whose tensors will take the place of this one's, which are then random:
        nothing is fetched, and no file is read.

    Raises
    ------
    SourceError : the weights cannot be had; random ones are only ever used on purpose, with `weights="none"`.
    SurgeryError : they do not fit the backbone.
    """
    backbone, weights = (restored["backbone"], None) if restored else _backbone_and_weights(recipe)
    recipe.replace(backbone=backbone)  # what "auto" became must allow the recipe's other settings
    strides = weights.strides if weights else (restored or {}).get("strides") or "v1.5"
    loaded, missing = [], []
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(recipe.seed)
        model = cut(create_backbone(backbone, strides), recipe.last_stage)
        if weights:
            loaded, missing = load_state(model, weights.state_dict, backbone)
        replace_head(replace_stem(model, recipe.stem, recipe.max_pool), init=recipe.head_init)
    freeze(model, recipe.freeze, recipe.freeze_batchnorm)
    model.weights_info = restored or {
        "backbone": backbone,
        "strides": strides_of(model),
        "weights": weights.name if weights else "none",
        "source": weights.source if weights else "random initialisation, as asked",
        "sha256": weights.sha256 if weights else None,
        "licence": weights.licence if weights else None,
        "loaded": len(loaded),
        "missing": missing,
    }
    strides = f" (strides {model.weights_info['strides']})" if model.weights_info.get("strides") else ""
    log.info(f"Model: {backbone}{strides}, weights {model.weights_info['weights']} ({model.weights_info['source']})")
    if recipe.freeze != "none" and not (weights or restored):
        log.info(f"Note: the weights are random, and freeze={recipe.freeze} leaves a part of them so")
    if missing:
        layers = sorted({key.split(".")[0] for key in missing})
        log.info(f"Note: the weights file has no {', '.join(layers)}; {len(missing)} tensors there stay random")
    return model


def _backbone_and_weights(recipe: Recipe) -> tuple[str, Weights | None]:
    if recipe.weights == "none":
        return ("resnet50" if recipe.backbone == "auto" else recipe.backbone), None
    if recipe.weights == "imagenet":
        backbone = resolve_backbone(recipe.backbone)
        return backbone, fetch_weights(backbone)
    weights = fetch_weights(recipe.backbone, recipe.weights)
    return (guess_backbone(weights.state_dict) if recipe.backbone == "auto" else recipe.backbone), weights


def summarize(model: nn.Module, image_size: int) -> pd.DataFrame:
    """One row for each part of the model, for an image of `image_size` pixels (torchinfo does the counting).

    Columns: part, output (channels x height x width), parameters, trainable (parameters with gradients), gmac (10^9
    multiply-adds an image) and batchnorm ("moves", "frozen", or empty where there is none).
    """
    from torchinfo import summary

    device = next(model.parameters()).device
    with evaluating(model):
        info = summary(model, input_size=(1, 3, image_size, image_size), depth=9, verbose=0, device=device)
    calls = {id(layer.module): layer for layer in info.summary_list}
    rows = []
    for name, part in stages(model).items():
        modules = nn.ModuleList(part)
        leaves = [m for m in modules.modules() if not list(m.children())]
        frozen = [is_frozen_batchnorm(m) for m in modules.modules() if isinstance(m, _BatchNorm)]
        rows.append(
            {
                "part": name,
                "output": "x".join(map(str, calls[id(part[-1])].output_size[1:])),
                "parameters": sum(p.numel() for p in modules.parameters()),
                "trainable": sum(p.numel() for p in modules.parameters() if p.requires_grad),
                "gmac": round(sum(calls[id(m)].macs for m in leaves if id(m) in calls) / 1e9, 6),
                "batchnorm": ("frozen" if all(frozen) else "moves") if frozen else "",
            }
        )
    return pd.DataFrame(rows)


def compare(before: nn.Module, after: nn.Module, image_size: int, size_before: int | None = None) -> pd.DataFrame:
    """The tables of two models side by side, one row a part, with a row of totals."""
    sides = []
    for model, size in ((before, size_before or image_size), (after, image_size)):
        side = summarize(model, size).set_index("part")
        side.loc["total"] = side[["parameters", "trainable", "gmac"]].sum()
        sides.append(side.fillna({"output": "", "batchnorm": ""}))
    order = list(dict.fromkeys([*sides[0].index.drop("total"), *sides[1].index.drop("total"), "total"]))
    table = pd.concat(sides, axis=1, keys=["before", "after"]).reindex(order)
    counted = [column for column in table if column[1] in ("parameters", "trainable")]
    return table.astype(dict.fromkeys(counted, "Int64"))
