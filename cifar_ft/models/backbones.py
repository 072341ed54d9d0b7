"""Backbones: create them, name their parts from input to output, load pretrained tensors into them and report it."""

from __future__ import annotations

from dataclasses import dataclass

import pandas as pd
import torch
from torch import Tensor, nn

from cifar_ft import CifarFtError


class SurgeryError(CifarFtError, ValueError):
    """A change that this model does not allow, or weights that do not fit it."""


def create_backbone(name: str) -> nn.Module:
    """A backbone with random weights and its 1,000-class ImageNet head: resnet50, resnet18 or efficientnet_lite0."""
    if name in ("resnet50", "resnet18"):
        import torchvision.models

        return getattr(torchvision.models, name)()
    if name == "efficientnet_lite0":
        import timm

        return timm.create_model("tf_efficientnet_lite0")
    raise SurgeryError(f"unknown backbone {name!r}; choose from resnet50, resnet18, efficientnet_lite0")


def stages(model: nn.Module) -> dict[str, list[nn.Module]]:
    """The model's parts from input to output: stem, stage1, stage2, ..., top (if any) and head."""
    if is_resnet(model):
        body = {f"stage{i}": [getattr(model, f"layer{i}")] for i in range(1, 5)}
        body = {name: part for name, part in body.items() if not isinstance(part[0], nn.Identity)}
        return {"stem": [model.conv1, model.bn1], **body, "head": [model.fc]}
    body = {f"stage{i}": [block] for i, block in enumerate(model.blocks, start=1)}
    stem, top = [model.conv_stem, model.bn1], [model.conv_head, model.bn2]
    return {"stem": stem, **body, "top": top, "head": [model.classifier]}


def is_resnet(model: nn.Module) -> bool:
    """Whether the model is a torchvision ResNet (the other backbone is timm's EfficientNet)."""
    return hasattr(model, "layer1")


def head(model: nn.Module) -> nn.Linear:
    """The classification layer."""
    return model.fc if is_resnet(model) else model.classifier


@dataclass(frozen=True)
class LoadReport:
    """What a weights file gave a model, tensor by tensor."""

    loaded: tuple[str, ...]
    missing: tuple[str, ...]
    unused: tuple[str, ...]

    def table(self) -> pd.DataFrame:
        """One row a layer: tensors loaded, tensors of the model, and whether it was loaded, in part, or not."""
        rows: dict[str, list[int]] = {}
        for names, loaded in ((self.loaded, 1), (self.missing, 0)):
            for name in names:
                counts = rows.setdefault(name.rpartition(".")[0], [0, 0])
                counts[0] += loaded
                counts[1] += 1
        frame = pd.DataFrame(
            [(layer, *counts) for layer, counts in rows.items()], columns=["layer", "loaded", "tensors"]
        )
        full, empty = frame.loaded == frame.tensors, frame.loaded == 0
        return frame.assign(
            status=["loaded" if f else "missing" if e else "in part" for f, e in zip(full, empty, strict=True)]
        )


def load_state(model: nn.Module, state: dict[str, Tensor], backbone: str) -> LoadReport:
    """Copy pretrained tensors into a backbone whose head and cut-off stages may differ from the file's.

    A partial file is allowed and reported; a file of another architecture, with other shapes or with values that are
    not finite is refused before anything is changed.

    Raises
    ------
    SurgeryError
    """
    whole = create_backbone(backbone).state_dict()
    head_keys = {"fc.weight", "fc.bias", "classifier.weight", "classifier.bias"}
    strange = [key for key in state if key not in whole]
    common = [key for key in state if key in whole and key not in head_keys]
    if strange or not common:
        example = f"; it has {strange[0]!r}, for example" if strange else ""
        raise SurgeryError(
            f"these weights are not of a {backbone}: {len(common)} of its {len(whole)} tensors are known by name and "
            f"{len(strange)} are of another architecture{example}. Choose the backbone they were made for, with "
            "torchvision's names for ResNets or timm's for efficientnet_lite0"
        )
    own = {key: value for key, value in model.state_dict().items() if key not in head_keys}
    shapes = {key: own.get(key, whole[key]).shape for key in common}  # a changed stem differs from the whole backbone
    wrong = [key for key in common if state[key].shape != shapes[key]]
    if wrong:
        key = wrong[0]
        raise SurgeryError(
            f"{len(wrong)} tensors have the wrong shape for {backbone}: {key} is {list(state[key].shape)} and should "
            f"be {list(shapes[key])}. Choose the backbone they were made for, and load before changing the stem"
        )
    bad = [key for key in common if state[key].is_floating_point() and not state[key].isfinite().all()]
    if bad:
        raise SurgeryError(f"{bad[0]} holds values that are not finite; the weights file is damaged, fetch it again")
    loaded = [key for key in own if key in state]
    # Old files lack the step counters of BatchNorm, which nothing here reads.
    missing = [key for key in own if key not in state and not key.endswith("num_batches_tracked")]
    with torch.no_grad():
        for key in loaded:
            own[key].copy_(state[key])
    return LoadReport(tuple(loaded), tuple(missing), tuple(key for key in state if key not in own))
