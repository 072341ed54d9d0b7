"""Faults in the middle of training: memory that does not suffice, a loss that diverges, a stop that is asked for."""

from __future__ import annotations

import signal
import threading
from pathlib import Path
from types import FrameType

import torch
from accelerate import Accelerator
from torch import Tensor

from cifar_ft import CifarFtError, log
from cifar_ft.data import TrainLoader
from cifar_ft.files import command
from cifar_ft.training.state import Training

CHECK_EVERY = 50  # steps between two looks at the loss on a GPU, which would have to be waited for
ASK_EVERY = 10  # steps between two questions to all processes whether one of them was told to stop


class TrainingError(CifarFtError, RuntimeError):
    """Training that cannot start, continue or be stored."""


def smallest_weights(training: Training) -> list[Tensor]:
    """A copy of the smallest tensor of each of the optimiser's groups, which shows whether a step has moved it."""
    groups = [group["params"] for group in training.optimizer.param_groups]
    return [min(weights, key=Tensor.numel).detach().clone() for weights in groups]


def use_less_memory(training: Training, loader: TrainLoader, before: list[Tensor]) -> None:
    """From now on compute each batch in twice as many micro-batches, beginning with the step that failed.

    A recorded step holds the memory of a whole batch; where there is one, dropping it is tried first.

    Parameters
    ----------
    before : what `smallest_weights` gave before that step.

    Raises
    ------
    TrainingError
        When the memory does not suffice for two images, or for one of several processes, or was exhausted after the
        optimiser had begun to move the weights: the step would move them twice.
    """
    if not all(map(torch.equal, before, smallest_weights(training))):
        raise TrainingError(
            f"out of memory while the weights were moved or saved, in epoch {training.epoch + 1}; free some memory, "
            "then resume from the last checkpoint (--resume)"
        )
    recipe, number, images = training.recipe, 2 * training.accumulation, loader.sizes[training.step]
    if loader.world > 1:
        raise TrainingError(
            f"out of memory on process {loader.rank}: resume with --set accumulation={number}, which computes each "
            f"batch in {number} micro-batches, or start again with a smaller size"
        )
    if images // number < 2:
        raise TrainingError(
            f"out of memory with only {-(-images // training.accumulation)} images at a time; "
            f"use a smaller image_size than {recipe.image_size}, or freeze a part of the model"
        )
    training.forget_step()
    recorded = training.replay.forget()
    if training.accelerator.device.type == "cuda":
        torch.cuda.empty_cache()
    if recorded:
        return
    training.accumulation = number
    log.warning(
        f"Out of memory: from now on a batch is computed in {number} micro-batches of up to "
        f"{-(-images // number)} images. The steps stay the same, but BatchNorm sees one micro-batch at a time"
    )


def check_loss(training: Training, loader: TrainLoader, saving: bool = False) -> None:
    """Raise a TrainingError where a step diverged: which it was, its images, and what to try.

    On a CPU after each step; on a GPU now and then, at the end of an epoch, and before a checkpoint is saved.
    """
    now = saving or training.step % CHECK_EVERY == 0 or training.step == len(loader)
    if not now and training.accelerator.device.type != "cpu":
        return
    step, loss = (value.item() for value in training.diverged)
    if step < 0:
        return
    indices = loader.split.indices.cpu()[loader.order().split(loader.sizes)[step]].tolist()
    precision = "" if training.plan.precision == "fp32" else " or --set precision=fp32"
    raise TrainingError(
        f"the loss is {loss:.4g} at epoch {training.epoch + 1}, step {step + 1}: "
        f"training has diverged. Try a lower learning rate (--set lr={training.recipe.lr / 10:g}){precision}, "
        f"in a new folder. The images of the batch were {', '.join(map(str, indices))} of the training set, "
        "in its official order"
    )


class StopRequest:
    """While it is entered, Ctrl-C, SIGTERM and a terminal that is closed ask for a stop at the next safe place.

    A second Ctrl-C stops at once; a process that was told to outlive its terminal (`nohup`) does so.
    """

    SIGNALS = tuple(getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name))

    def __init__(self):
        self.name, self._before = None, {}

    def __enter__(self) -> StopRequest:
        if threading.current_thread() is threading.main_thread():  # only there may handlers be set
            for number in self.SIGNALS:
                if number in (signal.SIGINT, signal.SIGTERM) or signal.getsignal(number) != signal.SIG_IGN:
                    self._before[number] = signal.signal(number, self._ask)
        return self

    def __exit__(self, *_) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler or signal.SIG_DFL)

    def _ask(self, number: int, frame: FrameType | None) -> None:
        if self.name and number == signal.SIGINT:
            raise KeyboardInterrupt
        if not self.name:
            self.name = signal.Signals(number).name
            log.info(f"{self.name}: stopping after this step (Ctrl-C again stops at once)")

    def agreed(self, accelerator: Accelerator, step: int | None = None) -> bool:
        """Whether to stop now. Several processes decide together, at every tenth step or, without a step, at once."""
        if accelerator.num_processes == 1:
            return self.name is not None
        if step is not None and step % ASK_EVERY:
            return False
        asked = torch.tensor([float(self.name is not None)], device=accelerator.device)
        return accelerator.reduce(asked, reduction="sum").item() > 0


def stop(training: Training, folder: Path) -> None:
    """End a training that has just been saved, and say how it is resumed."""
    resuming = command("train", "--out", folder, "--resume")
    log.info(
        f"Stopped after epoch {training.epoch}, step {training.step}, and saved. Resume with: {resuming} "
        "(in Python: the same fit with its run_dir and resume=True)"
    )
    raise KeyboardInterrupt
