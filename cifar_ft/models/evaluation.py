"""Evaluate a model: the logits of every image of a split, with the model left as it was."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from cifar_ft import CifarFtError
from cifar_ft.files import unknown

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


class EvaluationError(CifarFtError, ValueError):
    """Images or settings with which no model can be evaluated."""


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
    batch_size : images at a time; None: 64 on a CPU, where that fits the cache, else 500.
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
    found = []
    with evaluating(model), torch.inference_mode(), autocast:
        for batch in images.split(batch_size or (64 if device.type == "cpu" else 500)):
            inputs = transform(batch.to(device)).contiguous(memory_format=torch.channels_last)
            logits = model(inputs).float()
            if flip_tta:
                logits = (logits + model(inputs.flip(3)).float()) / 2
            found.append(logits.cpu())
    return torch.cat(found)
