"""The training loop, as notebook 04 prints it.

What goes wrong on a real machine (short memory, divergence, interruptions) is handled around it, in `fit` and `faults`;
`cifar_ft.data.TrainLoader` makes the batches, and `replay` calls the steps.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import nullcontext
from functools import partial

import torch.nn.functional as F
from torch import Tensor

from cifar_ft import transforms
from cifar_ft.data import Batch
from cifar_ft.training.optim import lr_factor, move_average, set_lr
from cifar_ft.training.state import Training


def train_epoch(training: Training, batches: Iterable[Batch], after_step: Callable[[], None]) -> None:
    """Train the model on the batches of one epoch."""
    recipe, model, optimizer = training.recipe, training.model, training.optimizer
    augment = transforms.train_transform(recipe)
    model.train()
    for batch in batches:  # uint8 images, labels, and the random draws of the augmentation
        inputs = augment(batch.images, size=recipe.size_at(training.epoch), draws=batch.draws)
        set_lr(optimizer, lr_factor(recipe, training.global_step, training.steps_per_epoch))
        step = partial(train_step, training, batch.global_size)
        training.replay(step, inputs, batch.labels, optimizer, training.accumulation)  # a GPU records it once
        if training.ema is not None:
            move_average(
                training.ema, training.unwrapped_model, recipe.ema_decay, training.global_step, training.is_last_step
            )
        training.finish_step()
        after_step()


def train_step(training: Training, global_size: int, inputs: Tensor, labels: Tensor) -> None:
    """Forward, loss, backward, and a step of the optimiser.

    With several processes the batch is this one's share of a global batch. With gradient accumulation it is cut into
    micro-batches, whose gradients add up before the optimiser steps.
    """
    recipe, model, accelerator = training.recipe, training.model, training.accelerator
    cuts = max(1, min(training.accumulation, len(inputs) // 2))
    for part, (images, targets) in enumerate(zip(inputs.tensor_split(cuts), labels.tensor_split(cuts), strict=True)):
        # Processes average their gradients once a step, after its last micro-batch.
        with nullcontext() if part == cuts - 1 else accelerator.no_sync(model):
            logits = model(images).float()[: len(targets)]  # those without a label only fill the batch
            loss = F.cross_entropy(logits, targets, reduction="sum", label_smoothing=recipe.label_smoothing)
            accelerator.backward(loss / global_size * accelerator.num_processes)  # of the mean over the global batch
        training.measure(logits.detach(), targets)
    training.optimizer.step()
    training.optimizer.zero_grad()
