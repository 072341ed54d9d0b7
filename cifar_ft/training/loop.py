"""The training loop, as notebook 04 prints it.

What goes wrong on a real machine (short memory, divergence, interruptions) is handled around it, in `fit` and `faults`;
`cifar_ft.data.TrainLoader` makes the batches.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import nullcontext

import torch.nn.functional as F

from cifar_ft import transforms
from cifar_ft.data import Batch
from cifar_ft.training.optim import lr_factor, move_average, set_lr
from cifar_ft.training.state import Training


def train_epoch(training: Training, batches: Iterable[Batch], after_step: Callable[[], None]) -> None:
    """Train the model on the batches of one epoch.

    With several processes a batch is this one's share of a global batch. With gradient accumulation it is a
    micro-batch of that share: the gradients of several micro-batches add up before the optimiser steps.
    """
    recipe, model, optimizer = training.recipe, training.model, training.optimizer
    accelerator, augment = training.accelerator, transforms.train_transform(recipe)
    model.train()
    for batch in batches:  # uint8 images and labels
        draws = transforms.draw(batch.global_size, recipe.crop_padding, batch.generator)  # for the whole global batch
        draws = tuple(map(batch.share, draws))
        inputs = augment(batch.images, size=recipe.size_at(training.epoch), draws=draws)

        # Processes average their gradients once a step, after its last micro-batch.
        with nullcontext() if batch.last else accelerator.no_sync(model):
            logits = model(inputs).float()[: len(batch.labels)]  # those without a label only fill the batch
            loss = F.cross_entropy(logits, batch.labels, reduction="sum", label_smoothing=recipe.label_smoothing)
            accelerator.backward(
                loss / batch.global_size * accelerator.num_processes
            )  # of the mean over the global batch
        training.measure(logits.detach(), batch.labels)
        if not batch.last:
            continue

        set_lr(optimizer, lr_factor(recipe, training.global_step, training.steps_per_epoch))
        optimizer.step()
        optimizer.zero_grad()
        if training.ema is not None:
            move_average(
                training.ema, training.unwrapped_model, recipe.ema_decay, training.global_step, training.is_last_step
            )
        training.finish_step()
        after_step()
