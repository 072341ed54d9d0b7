"""Freeze parts of a model for good, their BatchNorm statistics too, and renew the statistics of the rest."""

from __future__ import annotations

import functools
from collections.abc import Iterable

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from cifar_ft.models.backbones import SurgeryError, backbone_of, stages
from cifar_ft.models.evaluation import evaluating


class _Frozen:
    """Mixed into the class of a BatchNorm layer: the layer stays in eval mode whatever `model.train()` says."""

    def train(self, mode: bool = True):
        return super().train(False)

    def __reduce__(self):  # pickle finds no class that was made on the fly: a copy makes its own
        return _frozen_layer, (type(self).__bases__[1],), self.__dict__


@functools.cache
def _frozen(kind: type[nn.Module]) -> type[nn.Module]:
    return type(f"Frozen{kind.__name__}", (_Frozen, kind), {})  # of torch's BatchNorm, or timm's


def _frozen_layer(kind: type[nn.Module]) -> nn.Module:
    return object.__new__(_frozen(kind))


def is_frozen_batchnorm(layer: nn.Module) -> bool:
    """Whether `freeze` has stopped the statistics of this BatchNorm layer."""
    return isinstance(layer, _Frozen)


def freeze(model: nn.Module, upto: str = "backbone", batchnorm: bool = False) -> nn.Module:
    """Freeze the model from its input up to and including a part; the parts after it become trainable. In place.

    A frozen part gets no gradients, and its BatchNorm layers normalise with their stored statistics, which no longer
    move, even after `model.train()`. (With `requires_grad=False` alone they would keep moving: pytorch/pytorch#86590.)

    Parameters
    ----------
    upto : "none", "stem", "stage1", ..., "early" (all stages whose maps have an eighth of the image's width or more,
        which take much of the time) or "backbone" (all but the head).
    batchnorm : stop the statistics of every BatchNorm layer, also of those whose weights are trained.
    """
    parts = stages(model)
    names = [name for name in parts if name not in ("head", "top")]
    ends = {name: position for position, name in enumerate(parts) if name in names}
    ends |= {"none": -1, "early": min(backbone_of(model).early, len(names) - 1), "backbone": len(parts) - 2}
    if upto not in ends:
        raise SurgeryError(f"cannot freeze up to {upto!r}; this model has none, {', '.join(names)}, early, backbone")
    for position, part in enumerate(parts.values()):
        for module in part:
            module.requires_grad_(position > ends[upto])
            for layer in (m for m in module.modules() if isinstance(m, _BatchNorm)):
                kind, frozen = type(layer), is_frozen_batchnorm(layer)
                if frozen != (batchnorm or position <= ends[upto]):
                    # Its class is changed, so that its name, its tensors and whoever refers to it stay.
                    layer.__class__ = kind.__bases__[1] if frozen else _frozen(kind)
                    layer.train(model.training)
    return model


@torch.no_grad()
def refresh_batchnorm(model: nn.Module, batches: Iterable[Tensor]) -> nn.Module:
    """Set the statistics of every BatchNorm that is not frozen to the average over batches [B, 3, S, S]. In place.

    Needed after a change that moves the statistics: another stem, another image size.
    """
    layers = [m for m in model.modules() if isinstance(m, _BatchNorm) and not is_frozen_batchnorm(m)]
    momenta = [layer.momentum for layer in layers]
    try:
        with evaluating(model):  # for what comes after: the modes come back
            model.train()
            for layer in layers:
                layer.reset_running_stats()
                layer.momentum = None  # a plain average over all batches
            for batch in batches:
                model(batch)
    finally:
        for layer, momentum in zip(layers, momenta, strict=True):
            layer.momentum = momentum
    return model
