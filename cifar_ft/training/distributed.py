"""Several processes, one result: what they share, and how they divide a split."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TypeVar

import torch
from accelerate import Accelerator, PartialState
from accelerate.utils import broadcast_object_list
from torch import Tensor, nn

from cifar_ft import CifarFtError, log
from cifar_ft.data import Split
from cifar_ft.files import one_line
from cifar_ft.models import DeviceError, choose_device, is_frozen_batchnorm, predict_logits
from cifar_ft.recipes import Recipe
from cifar_ft.transforms import eval_transform

Result = TypeVar("Result")


def start_processes(device: str | torch.device = "auto") -> PartialState:
    """The state of this process among all, on `device`; one process unless a launcher such as torchrun started more.

    Accelerate starts several processes on CPUs only when it is told that there is no accelerator. Of several, each
    takes a GPU of its own, and only the main one logs.

    Raises
    ------
    DeviceError
        When there is no such device here, or several processes would share a GPU.
    CifarFtError
        When the environment has what a launcher sets, but not all of it.
    """
    chosen = choose_device(device)
    try:
        with without_settings():
            state = PartialState(cpu=chosen.type == "cpu")
    except ValueError as error:
        raise CifarFtError(
            "the environment names several processes (WORLD_SIZE, RANK, LOCAL_RANK or those of MPI), but not how they "
            f"meet: {one_line(error)}. Start them with torchrun; for a single one, unset these variables"
        ) from error
    if not state.is_main_process:
        log.setLevel("ERROR")
    if state.num_processes == 1:  # it stays for the life of the process, and the next run may want another device
        state.device = chosen
        if chosen.index is not None:
            torch.cuda.set_device(chosen)
    elif chosen.index is not None:
        raise DeviceError(f"{chosen} is one GPU for several processes; use device=cuda and set CUDA_VISIBLE_DEVICES")
    return state


@contextmanager
def without_settings() -> Iterator[None]:
    """Hide what the environment says to Accelerate: the recipe decides a run, whatever a shell or launcher has set."""
    hidden = {name: os.environ.pop(name) for name in list(os.environ) if name.startswith("ACCELERATE_")}
    try:
        yield
    finally:
        os.environ.update(hidden)


def on_main(state: PartialState, action: Callable[[], Result]) -> Result:
    """What `action` returns in the main process, in all of them. Its error ends them all; the others say nothing."""
    result = error = None
    if state.is_main_process:
        try:
            result = action()
        except CifarFtError as caught:
            error = caught
    result, failed = broadcast_object_list([result, error is not None])
    if error:
        raise error
    if failed:
        raise SystemExit(1)
    return result


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
