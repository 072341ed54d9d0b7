"""Evaluate a model: the logits of every image of a split, with the model left as it was; and on which device."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from cifar_ft import CifarFtError, log
from cifar_ft.files import unknown

BATCH_SIZES = {"cpu": 64, "cuda": 2000}  # in evaluation; 64 images fit a CPU's cache
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


class EvaluationError(CifarFtError, ValueError):
    """Images or settings with which no model can be evaluated."""


class DeviceError(CifarFtError):
    """A device that does not exist, or not here."""

    wrong_argument = True


def choose_device(name: str | torch.device = "auto") -> torch.device:
    """The device of this name: "cpu", "cuda", "cuda:1", "mps", or "auto".

    "auto" is what `$CIFAR_FT_DEVICE` names, else a GPU (the current one of PyTorch), else Apple's, else the CPU.

    Raises
    ------
    DeviceError
        When there is no such device, or none here.
    """
    name = str(name)
    name = (os.environ.get("CIFAR_FT_DEVICE") or name) if name == "auto" else name
    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    here = ["cuda", *(f"cuda:{number}" for number in range(gpus))] if gpus else []
    here += ["mps", "cpu"] if torch.backends.mps.is_available() else ["cpu"]
    if name not in ("auto", *here):
        raise DeviceError(f"there is no device {name!r} here; choose from auto, {', '.join(here)}")
    return torch.device(here[0] if name == "auto" else name)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether PyTorch, or Python itself, says so: on CUDA, on Apple's GPU or on a CPU."""
    if isinstance(error, MemoryError | torch.cuda.OutOfMemoryError):
        return True
    signs = ("out of memory", "DefaultCPUAllocator", "CUBLAS_STATUS_ALLOC_FAILED", "CUDNN_STATUS_ALLOC_FAILED")
    ours = isinstance(error, CifarFtError)  # which may speak of memory, or of a file of that name
    return isinstance(error, RuntimeError) and not ours and any(sign in str(error) for sign in signs)


def in_batches(compute: Callable[[Tensor], Tensor], images: Tensor, size: int) -> Tensor:
    """What `compute` makes of images [N, ...], so many at a time, and fewer from where memory does not suffice."""
    found, start = [], 0
    while start < len(images):
        try:
            found.append(compute(images[start : start + size]))
            start += size
            continue
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            if size == 1:
                raise EvaluationError(
                    "out of memory with a single image; use a smaller image_size, or another device (device=cpu)"
                ) from error
        # Not in the except block, where the error still holds the tensors.
        size = min(size, len(images)) // 2 or 1
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        log.warning(f"Out of memory in evaluation: from now on {size} images at a time")
    return torch.cat(found)


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Put `model` into eval mode, then give every submodule its own training flag back."""
    flags = [(module, module.training) for module in model.modules()]
    try:
        model.eval()
        yield
    finally:
        for module, training in flags:
            module.training = training


def predict_logits(
    model: nn.Module,
    split: Any,
    transform: Callable[[Tensor], Tensor],
    *,
    batch_size: int | None = None,
    precision: str = "fp32",
    flip_tta: bool = False,
) -> Tensor:
    """Evaluate a model on every image of a split: logits, float32 [N, C] on the CPU, in order.

    Modes and BatchNorm statistics of the model do not change. An EvaluationError names what cannot be used.

    Parameters
    ----------
    model : module that maps float32 [B, 3, S, S] to logits [B, C].
    split : object with `images`, uint8 [N, 3, H, W].
    transform : maps uint8 images to the model's input, as `transforms.eval_transform(recipe)` does.
    batch_size : images at a time, fewer where memory is short; None: see `BATCH_SIZES`.
    precision : "fp32", or "bf16" or "fp16" (autocast).
    flip_tta : average the logits of each image and its mirror image.
    """
    images = torch.as_tensor(split.images)
    if images.ndim != 4 or len(images) == 0:
        raise EvaluationError(f"images have shape {tuple(images.shape)}; expected [N, 3, H, W], N > 0")
    if batch_size is not None and batch_size < 1:
        raise EvaluationError(f"batch_size is {batch_size}; it must be at least 1")
    if precision not in DTYPES:
        raise EvaluationError(unknown("precision", precision, DTYPES))
    device = next((parameter.device for parameter in model.parameters()), torch.device("cpu"))
    autocast = torch.autocast(device.type, DTYPES[precision], enabled=precision != "fp32")

    def logits_of(batch: Tensor) -> Tensor:
        inputs = transform(batch.to(device)).contiguous(memory_format=torch.channels_last)
        logits = model(inputs).float()
        if flip_tta:
            logits = (logits + model(inputs.flip(3)).float()) / 2
        return logits

    with evaluating(model), torch.inference_mode(), autocast:
        return in_batches(logits_of, images, batch_size or BATCH_SIZES.get(device.type, 500)).cpu()
