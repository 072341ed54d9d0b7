"""Freeze parts of a model for good, their BatchNorm statistics too, and renew the statistics of the rest."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from cifar_ft.models.backbones import SurgeryError, is_resnet, stages


class _Frozen:
    """Mixed into a BatchNorm layer's class: the layer stays in eval mode whatever `model.train()` says."""

    def train(self, mode: bool = True):
        return super().train(False)


_FROZEN: dict[type, type] = {}


def is_frozen_batchnorm(layer: nn.Module) -> bool:
    """Whether `freeze` has stopped the statistics of this BatchNorm layer."""
    return isinstance(layer, _Frozen)


def freeze(model: nn.Module, upto: str = "backbone", batchnorm: bool = False) -> nn.Module:
    """Freeze the model from its input up to and including a part; parts behind it become trainable. In place.

    A frozen part gets no gradients, and its BatchNorm layers normalise with their stored statistics, which no longer
    move, even after `model.train()`. (With `requires_grad=False` alone they would keep moving: pytorch/pytorch#86590.)

    Parameters
    ----------
    upto : str
        "none", "stem", "stage1", ..., "early" (all stages whose maps have an eighth of the image's width or more,
        which take much of the time) or "backbone" (all but the head).
    batchnorm : bool
        Stop the statistics of every BatchNorm layer, also of those whose weights are trained.
    """
    parts = stages(model)
    names = [name for name in parts if name not in ("head", "top")]
    if upto not in ("none", "early", "backbone", *names):
        raise SurgeryError(f"cannot freeze up to {upto!r}; this model has none, {', '.join(names)}, early, backbone")
    if upto == "early":
        upto = names[min(2 if is_resnet(model) else 3, len(names) - 1)]
    last = {"none": -1, "backbone": len(parts) - 2}.get(upto)
    last = list(parts).index(upto) if last is None else last
    for position, part in enumerate(parts.values()):
        for module in part:
            module.requires_grad_(position > last)
            for layer in module.modules():
                if isinstance(layer, _BatchNorm):
                    _set_frozen(layer, batchnorm or position <= last, model.training)
    return model


def _set_frozen(layer: _BatchNorm, frozen: bool, training: bool) -> None:
    kind = type(layer)
    if frozen and not isinstance(layer, _Frozen):
        layer.__class__ = _FROZEN.setdefault(kind, type(f"Frozen{kind.__name__}", (_Frozen, kind), {}))
        layer.eval()
    elif not frozen and isinstance(layer, _Frozen):
        layer.__class__ = kind.__mro__[2]
        layer.train(training)


@torch.no_grad()
def refresh_batchnorm(model: nn.Module, batches: Iterable[Tensor]) -> nn.Module:
    """Set the statistics of every BatchNorm that is not frozen to the average over these input batches. In place.

    Needed after a change that moves the statistics: another stem, another image size.

    Parameters
    ----------
    batches : iterable of float Tensor [B, 3, S, S]
    """
    layers = [m for m in model.modules() if isinstance(m, _BatchNorm) and not isinstance(m, _Frozen)]
    momenta, training = [layer.momentum for layer in layers], {m: m.training for m in model.modules()}
    for layer in layers:
        layer.reset_running_stats()
        layer.momentum = None  # a plain average over all batches
    model.train()
    for batch in batches:
        model(batch)
    for layer, momentum in zip(layers, momenta, strict=True):
        layer.momentum = momentum
    for module, mode in training.items():
        module.training = mode
    return model
