"""Backbones: how each is made, where its parts are, and how pretrained tensors get into it.

To add one, add it to `BACKBONES`, which surgery and freezing ask, to the choices of `Recipe.backbone`, and to `SOURCES`
(and `HUB_NAMES`) in `weights.py`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from torchvision.models.resnet import Bottleneck

from cifar_ft import CifarFtError
from cifar_ft.files import unknown


class SurgeryError(CifarFtError, ValueError):
    """A change that this model does not allow, or weights that do not fit it."""


@dataclass(frozen=True)
class Backbone:
    """What the course has to know of a network; its parts are given by the names of their submodules."""

    library: str  # torchvision or timm: whose model it is, and whose names its tensors have
    model: str  # its name there
    stem: tuple[str, str]  # the first convolution and its BatchNorm
    stages: tuple[str, ...]
    head: str
    top: tuple[str, ...] = ()  # layers that join the last stage to the head; without them, the network can be cut
    max_pool: str | None = None  # after the stem
    early: int = 2  # stages whose maps have an eighth of the image's width or more


_RESNET50 = Backbone(
    "torchvision", "resnet50", ("conv1", "bn1"), ("layer1", "layer2", "layer3", "layer4"), "fc", max_pool="maxpool"
)
_LITE0_STAGES = tuple(f"blocks.{i}" for i in range(7))
BACKBONES = {
    "resnet50": _RESNET50,
    "resnet18": replace(_RESNET50, model="resnet18"),
    "efficientnet_lite0": Backbone(
        "timm",
        "tf_efficientnet_lite0",
        ("conv_stem", "bn1"),
        _LITE0_STAGES,
        "classifier",
        top=("conv_head", "bn2"),
        early=3,
    ),
}


def create_backbone(name: str, strides: str = "v1.5") -> nn.Module:
    """A backbone with random weights and its 1,000-class ImageNet head: resnet50, resnet18 or efficientnet_lite0.

    `strides` is for ResNet-50 alone. Its stages 2 to 4 begin with a block that halves the picture, in its 3x3
    convolution ("v1.5", as torchvision has it) or in the 1x1 before that ("v1", as He et al. released it in 2015).
    Both have the same tensors, but those that were trained in one are wrong in the other.
    """
    if name not in BACKBONES:
        raise SurgeryError(unknown("backbone", name, BACKBONES))
    if strides not in ("v1", "v1.5"):
        raise SurgeryError(unknown("strides", strides, ("v1", "v1.5")))
    if BACKBONES[name].library == "timm":
        from timm import create_model
    else:
        from torchvision.models import get_model as create_model
    model = create_model(BACKBONES[name].model)
    if strides == "v1":
        for block in _bottlenecks(model):
            block.conv1.stride, block.conv2.stride = block.conv2.stride, block.conv1.stride
    return model


def strides_of(model: nn.Module) -> str | None:
    """Which strides a model has, see `create_backbone`; None where its network leaves no choice."""
    strides = {block.conv1.stride > block.conv2.stride for block in _bottlenecks(model) if block.stride > 1}
    return ("v1" if strides.pop() else "v1.5") if strides else None


def _bottlenecks(model: nn.Module) -> list[Bottleneck]:
    return [module for module in model.modules() if isinstance(module, Bottleneck)]


def backbone_of(model: nn.Module) -> Backbone:
    """The entry of `BACKBONES` whose parts this model has (resnet50 and resnet18 have the same)."""
    names = {name for name, _ in model.named_modules()}
    for backbone in BACKBONES.values():
        if names.issuperset((*backbone.stem, *backbone.stages, backbone.head)):
            return backbone
    raise SurgeryError(f"a {type(model).__name__} is none of {', '.join(BACKBONES)}; make it with create_backbone")


def stages(model: nn.Module) -> dict[str, list[nn.Module]]:
    """The model's parts from input to output: stem, stage1, stage2, ..., top (if any) and head."""
    backbone = backbone_of(model)
    names = {f"stage{i}": (name,) for i, name in enumerate(backbone.stages, start=1)}
    names = {"stem": backbone.stem, **names, "top": backbone.top, "head": (backbone.head,)}
    parts = {part: [model.get_submodule(name) for name in each] for part, each in names.items()}
    return {part: each for part, each in parts.items() if each and not isinstance(each[0], nn.Identity)}


def head(model: nn.Module) -> nn.Linear:
    """The classification layer."""
    return getattr(model, backbone_of(model).head)


def guess_backbone(state: Mapping[str, Tensor]) -> str:
    """The backbone that weights are of: it has most of their names, and fewest besides."""
    with torch.device("meta"):  # names only
        own = {name: create_backbone(name).state_dict().keys() for name in BACKBONES}
    return max(own, key=lambda name: (len(own[name] & state.keys()), -len(own[name])))


def load_state(model: nn.Module, state: Mapping[str, Tensor], backbone: str) -> tuple[list[str], list[str]]:
    """Copy pretrained tensors into a backbone whose head and cut-off stages may differ from the file's.

    Returns the names of the tensors loaded, and of those that a partial file lacks, which stay as they were; the head
    is in neither. A file of another architecture, with other shapes or with values that are not finite is refused with
    a SurgeryError before anything is changed.
    """
    # Not on the meta device: what this draws decides which new head `build_model` draws next, and so recorded runs.
    whole = create_backbone(backbone).state_dict()
    head_keys = {f"{BACKBONES[backbone].head}.{name}" for name in ("weight", "bias")}
    strange = [key for key in state if key not in whole]
    common = [key for key in state if key in whole and key not in head_keys]
    if strange or not common:
        example = f"; it has {strange[0]!r}, for example" if strange else ""
        raise SurgeryError(
            f"these weights are not of a {backbone}: {len(common)} of its {len(whole)} tensors are known by name and "
            f"{len(strange)} are of another architecture{example}. Choose the backbone they were made for, with "
            f"{BACKBONES[backbone].library}'s names"
        )
    own = {key: value for key, value in model.state_dict().items() if key not in head_keys}
    for key in common:
        shape = own.get(key, whole[key]).shape  # a changed stem differs from the whole backbone
        if state[key].shape != shape:
            raise SurgeryError(
                f"a tensor has the wrong shape for {backbone}: {key} is {list(state[key].shape)} and should be "
                f"{list(shape)}. Choose the backbone they were made for, and load before changing the stem"
            )
        if state[key].is_floating_point() and not state[key].isfinite().all():
            raise SurgeryError(f"{key} holds values that are not finite; the weights file is damaged, fetch it again")
    loaded = [key for key in own if key in state]
    # Old files lack the step counters of BatchNorm, which nothing here reads.
    missing = [key for key in own if key not in state and not key.endswith("num_batches_tracked")]
    with torch.no_grad():
        for key in loaded:
            own[key].copy_(state[key])
    return loaded, missing
