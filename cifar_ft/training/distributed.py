"""Several processes, one result: what they share, and how they divide a split."""

from __future__ import annotations

import torch
from accelerate import Accelerator, PartialState
from torch import Tensor, nn

from cifar_ft import log
from cifar_ft.data import Split
from cifar_ft.models import is_frozen_batchnorm, predict_logits
from cifar_ft.recipes import Recipe
from cifar_ft.transforms import eval_transform


def start_processes() -> PartialState:
    """The state of this process among all; one process unless a launcher such as torchrun started more.

    Accelerate starts several processes on CPUs only when it is told that there is no accelerator. Of several, only the
    main one logs.
    """
    state = PartialState(cpu=cpu_only())
    if not state.is_main_process:
        log.setLevel("ERROR")
    return state


def cpu_only() -> bool:
    """Whether there is neither a GPU nor Apple's."""
    return not (torch.cuda.is_available() or torch.backends.mps.is_available())


def synchronize_batchnorm(model: nn.Module, accelerator: Accelerator) -> nn.Module:
    """Let each BatchNorm that is not frozen normalise over the batches of all processes. In place.

    PyTorch has this for GPUs only. Among several processes on CPUs each normalises over its own share, so that a run
    differs a little from one in a single process.
    """
    from timm.layers import convert_sync_batchnorm

    if accelerator.num_processes == 1 or accelerator.device.type != "cuda":
        return model
    for parent in list(model.modules()):
        for name, child in parent.named_children():
            if isinstance(child, nn.modules.batchnorm._BatchNorm) and not is_frozen_batchnorm(child):
                setattr(parent, name, convert_sync_batchnorm(child))
    return model


@torch.no_grad()
def share_statistics(accelerator: Accelerator, *models: nn.Module | None) -> None:
    """Set BatchNorm statistics to their mean over all processes, so that each process evaluates the same model."""
    for model in models:
        buffers = [b for b in model.buffers() if b.is_floating_point()] if model is not None else []
        if accelerator.num_processes == 1 or not buffers:
            continue
        flat = accelerator.reduce(torch.cat([b.flatten() for b in buffers]), reduction="mean")
        for buffer, values in zip(buffers, flat.split([b.numel() for b in buffers]), strict=True):
            buffer.copy_(values.view_as(buffer))


def gather_logits(
    model: nn.Module, split: Split, recipe: Recipe, accelerator: Accelerator, flip_tta: bool = False
) -> Tensor:
    """Logits [N, 10] of every image once, on every process; each process computes its share."""
    rank, world = accelerator.process_index, accelerator.num_processes
    share = split.take(torch.arange(rank, len(split), world)) if world > 1 else split
    precision = {"no": "fp32"}.get(accelerator.mixed_precision, accelerator.mixed_precision)
    options = {"precision": precision, "flip_tta": flip_tta}
    own = predict_logits(model, share, eval_transform(recipe), **options) if len(share) else torch.zeros(0, 10)
    if world == 1:
        return own
    logits = torch.zeros(len(split), 10)
    logits[rank::world] = own
    return accelerator.reduce(logits.to(accelerator.device), reduction="sum").cpu()
