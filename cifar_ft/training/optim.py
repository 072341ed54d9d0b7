"""What moves the weights: the optimiser, its learning rate at each step, and the moving average of the weights."""

from __future__ import annotations

import math
from itertools import chain, compress

import torch
from torch import Tensor, nn

from cifar_ft import models
from cifar_ft.recipes import Recipe

# Steps between two updates of the moving average, which reads and writes every weight. Its decay is taken to this
# power, so that it forgets at the same pace as one that is updated at every step.
EMA_EVERY = 4


def lr_factor(recipe: Recipe, step: int, steps_per_epoch: int) -> float:
    """The learning rate at a step, counted from 0, as a share of `recipe.lr`.

    `constant` stays at 1. `cosine` falls from 1 towards 0, one stair an epoch. `one_cycle` rises linearly over the
    warm-up and falls along a cosine to 1 % at the last step (Smith and Topin 2017, arXiv:1708.07120).
    """
    if recipe.schedule == "constant":
        return 1.0
    if recipe.schedule == "cosine":
        return 0.5 * (1 + math.cos(math.pi * (step // steps_per_epoch) / recipe.epochs))
    progress = step / max(1, recipe.epochs * steps_per_epoch - 1)
    if progress < recipe.warmup:
        return max(progress / recipe.warmup, 0.01)
    return 0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * (progress - recipe.warmup) / (1 - recipe.warmup)))


def set_lr(optimizer: torch.optim.Optimizer, factor: float) -> None:
    """Set every group's learning rate to `factor` times its base.

    On an NVIDIA GPU the rate is a float32 tensor there, which a recorded step reads anew and which is set without
    waiting; elsewhere a float.
    """
    for group in optimizer.param_groups:
        lr, device = group["base_lr"] * factor, group["params"][0].device
        if device.type != "cuda":
            group["lr"] = lr
        elif isinstance(group["lr"], Tensor) and group["lr"].device == device:
            group["lr"].fill_(lr)
        else:
            group["lr"] = torch.full((), lr, device=device)


def make_optimizer(model: nn.Module, recipe: Recipe) -> torch.optim.Optimizer:
    """The recipe's optimiser of the trainable parameters, the head at `head_lr_factor` times the backbone's rate."""
    head = {id(p) for p in models.head(model).parameters()}
    groups = []
    for is_head, factor in ((False, 1.0), (True, recipe.head_lr_factor)):
        parameters = [p for p in model.parameters() if p.requires_grad and (id(p) in head) == is_head]
        if parameters:
            groups.append({"params": parameters, "lr": recipe.lr * factor, "base_lr": recipe.lr * factor})
    fused = next(model.parameters()).device.type in ("cpu", "cuda")
    if recipe.optimizer == "adamw":
        return torch.optim.AdamW(groups, weight_decay=recipe.weight_decay, fused=fused)
    decay = {"momentum": recipe.momentum, "nesterov": recipe.nesterov, "weight_decay": recipe.weight_decay}
    return torch.optim.SGD(groups, **decay, fused=fused)


@torch.no_grad()
def move_average(average: nn.Module, model: nn.Module, decay: float, step: int, last: bool = False) -> None:
    """Move the averaged weights and BatchNorm statistics a little towards the model's, every fourth step.

    The last step of an epoch counts too, so that the shortest run moves them. The decay grows with the steps, so that
    the first weights are soon forgotten.
    """
    if (step + 1) % EMA_EVERY and not last:
        return
    decay = min(decay, (1 + step) / (10 + step)) ** EMA_EVERY
    averaged, current = (list(chain(each.parameters(), each.buffers())) for each in (average, model))
    moving = [tensor.is_floating_point() for tensor in averaged]
    torch._foreach_lerp_(list(compress(averaged, moving)), list(compress(current, moving)), 1 - decay)
    counters = [not flag for flag in moving]
    if any(counters):
        torch._foreach_copy_(list(compress(averaged, counters)), list(compress(current, counters)))
