"""TODO training.loop"""

from __future__ import annotations

import sys
import time

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from torch import Tensor
from tqdm import tqdm

from cifar_ft import transforms
from cifar_ft.data import Split, epoch_seed, make_loader, to_device
from cifar_ft.recipes import Recipe
from cifar_ft.training.optim import lr_factor, move_average, set_lr
from cifar_ft.training.steps import LossWatch, Training, backward


def train_epoch(training: Training, split: Split, recipe: Recipe, accelerator: Accelerator, after_step=None) -> None:
    """Train through the rest of one epoch: augment, predict, compare, step.

    `training.sums` collects the plain cross-entropy, the correct predictions and the images, on the device.
    """
    rank, world = accelerator.process_index, accelerator.num_processes
    transform, size = transforms.train_transform(recipe), recipe.size_at(training.epoch)
    loader = make_loader(split, recipe, train=True, epoch=training.epoch, rank=rank, world=world)
    batches, watch = loader.batch_sampler, LossWatch(accelerator.device)
    training.model.train()
    start, done = time.perf_counter() - training.seconds, training.step
    for step, (images, labels) in enumerate(
        _progress(loader, f"epoch {training.epoch + 1}/{recipe.epochs}", accelerator)
    ):
        if step < done:
            continue  # trained before the run was resumed
        batch = batches.sizes[step]  # images of all processes together
        own, counted = batches.share(batch), batches.counted(batch)
        draws = transforms.draw(batch, recipe.crop_padding, _generator(recipe, training.epoch, step))
        draws = tuple(to_device(values[own], accelerator.device) for values in draws)
        inputs = transform(images, size=size, draws=draws)
        set_lr(training.optimizer, lr_factor(recipe, training.epoch * len(loader) + step, len(loader)))

        logits = backward(training, inputs, labels, counted, batch, recipe, accelerator)
        training.optimizer.step()

        last = step + 1 == len(loader)
        if training.ema is not None:
            model, total = accelerator.unwrap_model(training.model), training.epoch * len(loader) + step
            move_average(training.ema, model, recipe.ema_decay, total, last)
        sums = _sums(logits, labels[:counted])
        training.sums += sums
        watch.see(sums, step)
        training.step, training.seconds = step + 1, time.perf_counter() - start
        if last or watch.due(step + 1, recipe):
            watch.check(training, batches, split, recipe)
        if after_step:
            after_step()


def _sums(logits: Tensor, labels: Tensor) -> Tensor:
    loss = F.cross_entropy(logits, labels, reduction="sum")
    return torch.stack([loss, (logits.argmax(1) == labels).sum(), loss.new_tensor(len(labels))])


def _generator(recipe: Recipe, epoch: int, step: int) -> torch.Generator:
    return torch.Generator().manual_seed(epoch_seed(recipe.seed, epoch, step + 1))


def _progress(loader, label: str, accelerator: Accelerator) -> tqdm:
    """A bar for people: on a terminal or in a notebook, not in a log file."""
    watched = sys.stdout.isatty() or "ipykernel" in sys.modules
    hidden = not (watched and accelerator.is_main_process)
    return tqdm(loader, label, leave=False, disable=hidden, file=sys.stdout, mininterval=5, ncols=80, unit="step")
