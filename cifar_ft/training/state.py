"""What training moves and measures, and the place it has reached."""

from __future__ import annotations

import copy
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from torch import Tensor, nn

from cifar_ft.recipes import Recipe
from cifar_ft.training.convolutions import speed_up
from cifar_ft.training.distributed import synchronize_batchnorm, without_settings
from cifar_ft.training.hardware import Plan
from cifar_ft.training.optim import make_optimizer
from cifar_ft.training.replay import Replay

LOSS_LIMIT = 100.0  # nats; beyond this training counts as diverged: a guess by chance among ten classes costs 2.3


@dataclass
class Training:
    """The model, its moving average and its optimiser, the metrics of the running epoch, and the place reached."""

    recipe: Recipe
    accelerator: Accelerator
    plan: Plan
    model: nn.Module
    optimizer: torch.optim.Optimizer
    ema: nn.Module | None  # the moving average of the weights, where the recipe wants one
    weights_info: dict  # see `models.build_model`
    accumulation: int  # micro-batches that a process cuts its batch into, to save memory
    replay: Replay = field(default_factory=Replay)  # how a step is called
    steps_per_epoch: int = 1
    seconds: float = 0.0  # of the running epoch, evaluation aside
    epoch: int = 0  # epochs finished
    step: int = 0  # steps finished within the running epoch
    history: list[dict] = field(default_factory=list)
    steps: list[dict] = field(default_factory=list)  # of the finished epochs (see `run_files.step_rows`)
    best: dict | None = None  # {"val_accuracy": float, "model": state dict}

    PLACE = ("accumulation", "seconds", "epoch", "step", "history", "steps", "best")

    def __post_init__(self) -> None:
        device = self.accelerator.device
        # Sums of the running step (a recorded one adds to this very tensor) and of the epoch's finished ones:
        # cross-entropy, correct predictions, images. They stay on the device, so that a GPU is not waited for.
        self.running, self.finished = torch.zeros(3, device=device), []
        # The first step that diverged, and its loss; on the device, so that a GPU is not waited for at each step.
        self.diverged = torch.full((), -1, dtype=torch.long, device=device), torch.zeros((), device=device)

    @property
    def unwrapped_model(self) -> nn.Module:
        """The model without the wrapper that several processes put around it."""
        return self.accelerator.unwrap_model(self.model)

    @property
    def eval_model(self) -> nn.Module:
        """The model that is evaluated and stored: the moving average where there is one."""
        return self.unwrapped_model if self.ema is None else self.ema

    @property
    def global_step(self) -> int:
        """Steps finished since training began."""
        return self.epoch * self.steps_per_epoch + self.step

    @property
    def is_last_step(self) -> bool:
        """Whether the running step is the epoch's last."""
        return self.step + 1 == self.steps_per_epoch

    def measure(self, logits: Tensor, labels: Tensor) -> None:
        """Add a micro-batch to the metrics; the loss is the plain cross-entropy, whatever the recipe smooths."""
        loss = F.cross_entropy(logits, labels, reduction="sum")
        self.running += torch.stack([loss, (logits.argmax(1) == labels).sum(), torch.full_like(loss, len(labels))])

    def finish_step(self) -> None:
        """Close the running step: its metrics join the epoch's, and a loss that has diverged is remembered."""
        loss, (where, value) = self.running[0] / self.running[2].clamp(min=1), self.diverged
        new = ~(loss < LOSS_LIMIT) & (where < 0)  # a comparison with NaN is false
        self.diverged = where.masked_fill(new, self.step), torch.where(new, loss, value)
        self.finished.append(self.running.clone())
        self.running.zero_()
        self.step += 1

    def forget_step(self) -> None:
        """Drop what an unfinished step has added up, to compute it anew."""
        self.running.zero_()
        self.optimizer.zero_grad()

    def sums(self) -> Tensor:
        """What `measure` added up in each finished step of the running epoch, [step, 3], of all processes together."""
        if not self.finished:
            return torch.zeros(0, 3)
        return self.accelerator.reduce(torch.stack(self.finished), reduction="sum").cpu()

    def state(self) -> dict:
        """All of it as tensors and plain values; metrics are those of all processes together."""
        place = {key: getattr(self, key) for key in self.PLACE}
        scaler = self.accelerator.scaler  # of fp16
        return {
            **place,
            "model": self.unwrapped_model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "ema": None if self.ema is None else self.ema.state_dict(),
            "sums": self.sums(),
            "scaler": scaler and scaler.state_dict(),
        }

    def restore(self, state: dict) -> None:
        """The inverse of `state`; what all processes had measured continues in the first one."""
        self.unwrapped_model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        if self.ema is not None:
            self.ema.load_state_dict(state["ema"])
        sums = state["sums"].to(self.running.device)
        self.finished = list(sums if self.accelerator.is_main_process else torch.zeros_like(sums))
        if self.accelerator.scaler is not None and state["scaler"]:
            self.accelerator.scaler.load_state_dict(state["scaler"])
        for key in self.PLACE:
            setattr(self, key, state[key])
        self.accumulation = max(state["accumulation"], self.recipe.accumulation)  # a resumed run may ask for more


def prepare(recipe: Recipe, model: nn.Module, plan: Plan) -> Training:
    """Move the model to the device, make its optimiser and its moving average, and hand them to Accelerate."""
    plan.apply()
    AcceleratorState._reset_state()  # it would else insist on the precision of an earlier run in this process
    with without_settings():
        accelerator = Accelerator(mixed_precision="no" if plan.precision == "fp32" else plan.precision)
    info = model.weights_info
    model = synchronize_batchnorm(model, accelerator)
    model = model.to(accelerator.device, memory_format=torch.channels_last)
    if accelerator.device.type in ("cpu", "cuda"):
        speed_up(model, recipe.batch_size if accelerator.device.type == "cuda" else None)
    ema = copy.deepcopy(model).requires_grad_(False) if recipe.ema_decay else None
    if recipe.compile:
        model.compile()  # in place, so that names in the state dict stay
    with without_settings():
        model, optimizer = accelerator.prepare(model, make_optimizer(model, recipe))
    training = Training(recipe, accelerator, plan, model, optimizer, ema, info, recipe.accumulation)
    alone = accelerator.device.type == "cuda" and accelerator.num_processes == 1
    if alone and accelerator.scaler is None and not recipe.compile:  # the scaler of fp16 decides on the CPU
        training.replay.batch_size = recipe.batch_size
    return training
