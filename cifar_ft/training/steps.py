"""What training moves, and one step of it: gradients of a global batch, in pieces where memory is short, and a watch
over the loss."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from torch import Tensor, nn

from cifar_ft import log
from cifar_ft.data import EpochBatches, Split
from cifar_ft.recipes import Recipe
from cifar_ft.training.checkpoint import TrainingError
from cifar_ft.training.hardware import Plan

LOSS_LIMIT = 100.0  # nats; a guess by chance among ten classes costs 2.3
CHECK_EVERY = 50  # steps between two looks at the loss on a GPU, which would have to be waited for


@dataclass
class Training:
    """What training moves: the model, its moving average, the optimiser, and the place reached."""

    model: nn.Module
    optimizer: torch.optim.Optimizer
    ema: nn.Module | None  # the moving average of the weights, where the recipe wants one
    sums: Tensor  # of the running epoch: cross-entropy, correct predictions, images
    plan: Plan = field(default_factory=lambda: Plan("fp32"))
    pieces: int = 1  # that a process cuts its batch into, to save memory
    seconds: float = 0.0  # of the running epoch, evaluation aside
    epoch: int = 0  # epochs finished
    step: int = 0  # steps finished within the running epoch
    history: list[dict] = field(default_factory=list)
    best: dict | None = None  # {"val_accuracy": float, "model": state dict}

    PLACE = ("pieces", "seconds", "epoch", "step", "history", "best")

    @property
    def kept(self) -> nn.Module:
        """The module whose weights the run will keep: the moving average where there is one."""
        return self.model if self.ema is None else self.ema

    def state(self) -> dict:
        """All of it as tensors and plain values."""
        place = {key: getattr(self, key) for key in self.PLACE}
        model = getattr(self.model, "module", self.model)  # without the wrapper of several processes
        parts = {"model": model.state_dict(), "optimizer": self.optimizer.state_dict(), "sums": self.sums}
        return {**place, **parts, "ema": None if self.ema is None else self.ema.state_dict()}

    def restore(self, state: dict) -> None:
        """The inverse of `state`."""
        getattr(self.model, "module", self.model).load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.sums = state["sums"].to(self.sums.device)
        if self.ema is not None:
            self.ema.load_state_dict(state["ema"])
        for key in self.PLACE:
            setattr(self, key, state[key])


def backward(
    training: Training,
    inputs: Tensor,
    labels: Tensor,
    counted: int,
    batch: int,
    recipe: Recipe,
    accelerator: Accelerator,
) -> Tensor:
    """Leave the gradients of one step in the model, and return the logits [counted, 10] of this process's images.

    The gradients are those of the mean loss over the global batch of `batch` images, however many processes share it
    and into however many pieces each cuts its share. Where the GPU's memory does not suffice, there will be twice as
    many pieces from now on.

    Raises
    ------
    TrainingError
        When the memory does not suffice for two images, or for one of several processes.
    """
    inputs = inputs.contiguous(memory_format=training.plan.memory_format)
    while True:
        training.optimizer.zero_grad()
        try:
            return _backward(training, inputs, labels, counted, batch, recipe, accelerator)
        except RuntimeError as error:
            if not _out_of_memory(error):
                raise
            _must_go_on(training, len(inputs), recipe, accelerator)
        training.pieces *= 2
        if accelerator.device.type == "cuda":
            torch.cuda.empty_cache()
        smaller = -(-len(inputs) // training.pieces)
        log.info(
            f"Out of memory: from now on a batch is computed in {training.pieces} pieces of up to {smaller} images. "
            "The steps stay the same, but BatchNorm sees a piece at a time"
        )


def _backward(training, inputs, labels, counted, batch, recipe, accelerator) -> Tensor:
    pieces, left, parts = max(1, min(training.pieces, len(inputs) // 2)), counted, []  # BatchNorm needs two images
    chunks = list(zip(inputs.tensor_split(pieces), labels.tensor_split(pieces), strict=True))
    for number, (images, targets) in enumerate(chunks, start=1):
        alone = accelerator.no_sync(training.model) if number < len(chunks) else nullcontext()
        with alone:
            logits = training.model(images).float()[: max(left, 0)]
            loss = F.cross_entropy(
                logits, targets[: len(logits)], reduction="sum", label_smoothing=recipe.label_smoothing
            )
            # The processes average their gradients; this makes it the sum, and so the mean over the global batch.
            accelerator.backward(loss / batch * accelerator.num_processes)
        parts.append(logits.detach())
        left -= len(images)
    return torch.cat(parts)


def _out_of_memory(error: RuntimeError) -> bool:
    return isinstance(error, torch.cuda.OutOfMemoryError) or "DefaultCPUAllocator" in str(error)


def _must_go_on(training: Training, images: int, recipe: Recipe, accelerator: Accelerator) -> None:
    pieces = 2 * training.pieces
    if accelerator.num_processes > 1:
        advice = f"start again with --set accumulation={pieces}, which computes each batch in {pieces} pieces"
        raise TrainingError(f"out of memory on process {accelerator.process_index}: {advice}, or with a smaller size")
    if images // pieces < 2:
        raise TrainingError(
            f"out of memory with only {-(-images // training.pieces)} images at a time; "
            f"use a smaller image_size than {recipe.image_size}, or freeze a part of the model"
        )


class LossWatch:
    """Notes the first step whose loss is not finite or has exploded, on the device, without waiting for it."""

    def __init__(self, device: torch.device):
        self.step = torch.full((), -1, dtype=torch.long, device=device)
        self.loss = torch.zeros((), device=device)

    def see(self, sums: Tensor, step: int) -> None:
        """Look at the cross-entropy and the number of images of a step, `sums[0]` and `sums[2]`."""
        loss = sums[0] / sums[2].clamp(min=1)
        new = ~(loss < LOSS_LIMIT) & (self.step < 0)  # a comparison with NaN is false
        self.step, self.loss = torch.where(new, step, self.step), torch.where(new, loss, self.loss)

    def due(self, steps: int, recipe: Recipe) -> bool:
        """Whether to look behind so many steps of the epoch: always on a CPU, on a GPU at times and before a save."""
        saved = recipe.checkpoint_steps and steps % recipe.checkpoint_steps == 0
        return bool(saved) or self.step.device.type == "cpu" or steps % CHECK_EVERY == 0

    def check(self, training: Training, batches: EpochBatches, split: Split, recipe: Recipe) -> None:
        """Raise a TrainingError where there was such a step: which it was, its images, and what to try."""
        step = self.step.item()
        if step < 0:
            return
        positions = batches.order().split(batches.sizes)[step]
        indices = split.indices.cpu()[positions].tolist()
        precision = "" if training.plan.precision == "fp32" else " or --set precision=fp32"
        raise TrainingError(
            f"the loss is {self.loss.item():.4g} at epoch {training.epoch + 1}, step {step + 1}: "
            f"training has diverged. Try a lower learning rate (--set lr={recipe.lr / 10:g}){precision}, "
            f"in a new folder. The batch were images {', '.join(map(str, indices))} of the training set, "
            "in its official order"
        )
