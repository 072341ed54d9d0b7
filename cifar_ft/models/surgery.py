"""Model surgery: open a pretrained backbone, change its stem, cut it, give it ten classes, freeze what should stay.

`build_model(recipe)` does all of it; the single steps are public because notebook 03 takes them one at a time.
"""

from __future__ import annotations

from pathlib import Path

import pandas as pd
import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from cifar_ft import log
from cifar_ft.models.backbones import SurgeryError, create_backbone, head, is_resnet, load_state, stages
from cifar_ft.models.freezing import freeze, is_frozen_batchnorm
from cifar_ft.models.weights import fetch_weights, resolve_backbone
from cifar_ft.recipes import Recipe


def replace_head(model: nn.Module, num_classes: int = 10, init: str = "small") -> nn.Module:
    """Put a new linear layer with `num_classes` outputs in place of the head. In place.

    With `init="small"` its weights are drawn with a deviation of 0.01 and its bias is 0, so that the first predictions
    are almost uniform; `"default"` is PyTorch's own initialisation, as in the published code.
    """
    if init not in ("small", "default"):
        raise SurgeryError(f"unknown init {init!r}; choose small or default")
    new = nn.Linear(head(model).in_features, num_classes)
    if init == "small":
        nn.init.normal_(new.weight, std=0.01)
        nn.init.zeros_(new.bias)
    setattr(model, "fc" if is_resnet(model) else "classifier", new)
    return model


def replace_stem(model: nn.Module, stem: str = "cifar_random", max_pool: bool = True) -> nn.Module:
    """Change the first convolution for 32-pixel images, and drop the max-pool behind it if asked. In place.

    Parameters
    ----------
    stem : {"pretrained", "cifar_random", "cifar_resampled"}
        `pretrained` leaves it as it is. `cifar_random` is a new 3x3 convolution with stride 1 and padding 1, as in the
        published recipe. `cifar_resampled` has the same shape, but its kernel is the pretrained one resampled to 3x3
        with the sum of its weights kept; follow it with `refresh_batchnorm`, since its outputs have other statistics.
    max_pool : bool
        Keep the ResNet's 3x3 stride-2 max-pool behind the stem.
    """
    name = "conv1" if is_resnet(model) else "conv_stem"
    old = getattr(model, name)
    if stem not in ("pretrained", "cifar_random", "cifar_resampled"):
        raise SurgeryError(f"unknown stem {stem!r}; choose from pretrained, cifar_random, cifar_resampled")
    if stem != "pretrained":
        new = nn.Conv2d(old.in_channels, old.out_channels, kernel_size=3, stride=1, padding=1, bias=False)
        if stem == "cifar_resampled":
            with torch.no_grad():
                new.weight.copy_(resample_kernel(old.weight, 3))
        setattr(model, name, new)
    if not max_pool:
        if not is_resnet(model):
            raise SurgeryError("efficientnet_lite0 has no max-pool to drop; use max_pool=true")
        model.maxpool = nn.Identity()
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
    """End a ResNet behind stage 1, 2 or 3 and fit the width of the head to it; `None` leaves it whole. In place."""
    if last_stage is None:
        return model
    if not is_resnet(model):
        raise SurgeryError("only ResNets can be cut; use last_stage=none for efficientnet_lite0")
    if last_stage not in (1, 2, 3):
        raise SurgeryError(f"last_stage={last_stage!r} is out of range; choose 1, 2, 3 or none")
    for stage in range(last_stage + 1, 5):
        setattr(model, f"layer{stage}", nn.Identity())
    block = getattr(model, f"layer{last_stage}")[-1]
    width = (block.bn3 if hasattr(block, "bn3") else block.bn2).num_features
    model.fc = nn.Linear(width, model.fc.out_features)
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


def build_model(recipe: Recipe) -> nn.Module:
    """The model that a recipe asks for: backbone, ImageNet weights, cut, stem, new head, frozen parts.

    Parameters
    ----------
    recipe : Recipe

    Returns
    -------
    nn.Module
        Maps float images [B, 3, S, S] to logits [B, 10]. Its attribute `weights_info` says which backbone and weights
        were used, from where, with which digest and licence, and which tensors a partial file left random.

    Raises
    ------
    SourceError
        When the weights cannot be had; random weights are only ever used on purpose, with `weights="none"`.
    SurgeryError
        When they do not fit the backbone.
    """
    backbone, weights = _backbone_and_weights(recipe)
    recipe.replace(backbone=backbone)  # what "auto" became must allow the recipe's other settings
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(recipe.seed)
        model = cut(create_backbone(backbone), recipe.last_stage)
        report = load_state(model, weights.state_dict, backbone) if weights else None
        replace_head(replace_stem(model, recipe.stem, recipe.max_pool), init=recipe.head_init)
    freeze(model, recipe.freeze, recipe.freeze_batchnorm)
    model.weights_info = {
        "backbone": backbone,
        "weights": weights.name if weights else "none",
        "source": weights.source if weights else "random initialisation, as asked",
        "sha256": weights.sha256 if weights else None,
        "licence": weights.licence if weights else None,
        "loaded": len(report.loaded) if report else 0,
        "missing": list(report.missing) if report else [],
    }
    log.info(f"Model: {backbone}, weights {model.weights_info['weights']} ({model.weights_info['source']})")
    if recipe.freeze != "none" and not weights:
        log.info(f"Note: the weights are random, and freeze={recipe.freeze} leaves a part of them so")
    if report and report.missing:
        layers = sorted({key.split(".")[0] for key in report.missing})
        log.info(f"Note: the weights file has no {', '.join(layers)}; {len(report.missing)} tensors there stay random")
    return model


def _backbone_and_weights(recipe: Recipe):
    if recipe.weights == "none":
        return ("resnet50" if recipe.backbone == "auto" else recipe.backbone), None
    if recipe.weights == "imagenet":
        backbone = resolve_backbone(recipe.backbone)
        return backbone, fetch_weights(backbone, "imagenet")
    backbone = recipe.backbone
    weights = fetch_weights(backbone, str(Path(recipe.weights).expanduser()))
    if backbone == "auto":  # a local file says by its names which backbone it is for
        names = weights.state_dict
        resnet = "resnet50" if "layer1.0.conv3.weight" in names else "resnet18"
        backbone = "efficientnet_lite0" if "conv_stem.weight" in names else resnet
    return backbone, weights


def summarize(model: nn.Module, image_size: int) -> pd.DataFrame:
    """One row for each part of the model, for an image of `image_size` pixels (torchinfo does the counting).

    Returns
    -------
    DataFrame
        Columns part, output (channels x height x width), parameters, trainable (parameters with gradients), gmac
        (10^9 multiply-adds an image) and batchnorm ("moves", "frozen", or empty where there is none).
    """
    from torchinfo import summary

    training = {m: m.training for m in model.modules()}
    device = next(model.parameters()).device
    info = summary(model, input_size=(1, 3, image_size, image_size), depth=9, verbose=0, mode="eval", device=device)
    for module, mode in training.items():
        module.training = mode
    calls = {id(layer.module): layer for layer in info.summary_list}
    rows = []
    for name, part in stages(model).items():
        leaves = [m for module in part for m in module.modules() if not list(m.children())]
        norms = [m for m in leaves if isinstance(m, _BatchNorm)]
        norms = norms or [m for module in part for m in module.modules() if isinstance(m, _BatchNorm)]
        parameters = [p for module in part for p in module.parameters()]
        rows.append(
            {
                "part": name,
                "output": "x".join(map(str, calls[id(part[-1])].output_size[1:])),
                "parameters": sum(p.numel() for p in parameters),
                "trainable": sum(p.numel() for p in parameters if p.requires_grad),
                "gmac": round(sum(calls[id(m)].macs for m in leaves if id(m) in calls) / 1e9, 6),
                "batchnorm": ("frozen" if all(is_frozen_batchnorm(m) for m in norms) else "moves") if norms else "",
            }
        )
    return pd.DataFrame(rows)


def compare(before: nn.Module, after: nn.Module, image_size: int, size_before: int | None = None) -> pd.DataFrame:
    """The tables of two models side by side, one row a part, with a row of totals."""
    frames = [summarize(before, size_before or image_size), summarize(after, image_size)]
    sides = []
    for frame in frames:
        counts = {column: frame[column].sum() for column in ("parameters", "trainable", "gmac")}
        total = pd.DataFrame([{"part": "total", "output": "", "batchnorm": "", **counts}])
        sides.append(pd.concat([frame, total]).set_index("part"))
    order = list(dict.fromkeys([*sides[0].index, *sides[1].index]))
    order.append(order.pop(order.index("total")))
    table = pd.concat(sides, axis=1, keys=["before", "after"]).reindex(order)
    counted = [column for column in table if column[1] in ("parameters", "trainable")]
    return table.astype(dict.fromkeys(counted, "Int64"))
