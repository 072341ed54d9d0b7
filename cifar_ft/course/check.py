"""Is this machine ready for the course? Each check says what it found and, where it fails, what to do."""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Callable, Iterator
from importlib.metadata import PackageNotFoundError, version

from cifar_ft import CifarFtError, __version__
from cifar_ft.files import data_root, show_path

PACKAGES = ("torch", "torchvision", "timm", "accelerate", "ipywidgets", "jupyterlab", "papermill")
DISK_MB = 1000  # data, weights and one run


def checks() -> Iterator[tuple[bool, str, str]]:
    """Yield (passed, what was found, what to do if not) for versions, hardware, disk, data and weights.

    Nothing is fetched: what is not here yet is told with its size, and is no fault.
    """
    python = sys.version.split()[0]
    yield sys.version_info >= (3, 10), f"Python {python}, cifar_ft {__version__}", "install Python 3.10 or newer"
    for name in PACKAGES:
        try:
            yield True, f"{name} {version(name)}", ""
        except PackageNotFoundError:
            yield False, f"{name} is not installed", "pip install -r requirements.txt"
    import torch  # here and below: what is missing has been told by now

    from cifar_ft.training import describe_machine

    note = "" if torch.cuda.is_available() else "; no GPU, which is fine: the quick recipe is made for that"
    yield True, describe_machine() + note, ""
    root = data_root()
    free = shutil.disk_usage(next(folder for folder in (root, *root.parents) if folder.exists())).free // 2**20
    advice = f"free {DISK_MB:,} MB there, or set CIFAR_FT_DATA to a folder on another disk"
    yield free >= DISK_MB, f"{free:,} MB free for {show_path(root)}", advice
    yield _attempt("CIFAR-10", _data)
    yield _attempt("weights", _weights)


def _attempt(what: str, check: Callable[[], str]) -> tuple[bool, str, str]:
    try:
        return True, check(), ""
    except CifarFtError as error:
        return False, what, str(error)


def _data() -> str:
    from cifar_ft.data import CIFAR10_MB, fetch_cifar10

    if raw := fetch_cifar10(fetch=False):
        return f"CIFAR-10 is verified, in {show_path(raw.path)} (from {raw.source})"
    return f"CIFAR-10 is not here yet: {CIFAR10_MB} MB, which `python -m cifar_ft data` or the first use fetches"


def _weights() -> str:
    from cifar_ft.models import WEIGHTS_MB, choose_device, fetch_weights, resolve_backbone

    auto = os.environ.get("CIFAR_FT_BACKBONE", "") in ("", "auto") and choose_device().type != "cpu"
    backbone = "resnet50" if auto else resolve_backbone("auto")
    if weights := fetch_weights(backbone, fetch=False):
        return f"ImageNet weights of {backbone}: {weights.name}, from {weights.source}"
    return (
        f"ImageNet weights of {backbone} are not here yet: {WEIGHTS_MB[backbone]} MB, which "
        f"`python -m cifar_ft data --backbone {backbone}` or the first training fetches"
        + ("; where they cannot be had, efficientnet_lite0 is taken" if auto else "")
    )
