"""Logits of a model for every image of a split, with the model left as it was."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch

from cifar_ft.results import ResultError


@contextmanager
def evaluating(model: torch.nn.Module) -> Iterator[None]:
    """Put `model` into eval mode, then give every submodule its own training flag back."""
    flags = [(module, module.training) for module in model.modules()]
    try:
        model.eval()
        yield
    finally:
        for module, training in flags:
            module.training = training


def _autocast(precision: str, device: torch.device):
    if precision == "auto":
        gpu = device.type == "cuda"
        precision = "fp32" if not gpu else "bf16" if torch.cuda.is_bf16_supported() else "fp16"
    dtypes = {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}
    if precision not in dtypes:
        raise ResultError(f"unknown precision {precision!r}; choose from auto, fp32, bf16, fp16")
    return torch.autocast(device.type, dtypes[precision]) if dtypes[precision] else nullcontext()


def predict_logits(
    model: torch.nn.Module,
    split: Any,
    transform: Callable[[torch.Tensor], torch.Tensor],
    *,
    batch_size: int | None = None,
    device: torch.device | str | None = None,
    precision: str = "fp32",
    flip_tta: bool = False,
    progress: Callable[[int, int], object] | None = None,
) -> torch.Tensor:
    """Score every image of a split once, in order; the model's modes and BatchNorm statistics do not change.

    Parameters
    ----------
    model : module that maps float32 [B, 3, S, S] to logits [B, C].
    split : object with `images`, uint8 [N, 3, H, W].
    transform : maps uint8 images to the model's input, as `transforms.eval_transform(recipe)` does.
    batch_size : images at a time; None: 64 on a CPU, else 500.
    device : where to compute; the model is moved there. None means where the model is.
    precision : "fp32", "bf16", "fp16" (autocast), or "auto": half precision on a GPU only.
    flip_tta : average the logits of each image and its mirror.
    progress : called as `progress(images_done, images_in_all)` after each batch.

    Returns
    -------
    float32 tensor [N, C] on the CPU.

    Raises
    ------
    ResultError : empty or misshapen images, impossible batch size, unknown precision.
    """
    images = torch.as_tensor(split.images)
    if images.ndim != 4 or len(images) == 0:
        raise ResultError(f"images have shape {tuple(images.shape)}; expected [N, 3, H, W], N > 0")
    if batch_size is not None and batch_size < 1:
        raise ResultError(f"batch_size is {batch_size}; it must be at least 1")
    first = next(model.parameters(), None)
    device = torch.device(device if device is not None else first.device if first is not None else "cpu")
    model.to(device)
    batch_size = batch_size or (64 if device.type == "cpu" else 500)  # what fits a CPU's cache is quicker
    parts = []
    with evaluating(model), torch.inference_mode(), _autocast(precision, device):
        for start in range(0, len(images), batch_size):
            batch = transform(images[start : start + batch_size].to(device))
            batch = batch.contiguous(memory_format=torch.channels_last)
            logits = model(batch).float()
            if flip_tta:
                logits = (logits + model(batch.flip(3)).float()) / 2
            parts.append(logits.cpu())
            if progress is not None:
                progress(min(start + batch_size, len(images)), len(images))
    return torch.cat(parts)
