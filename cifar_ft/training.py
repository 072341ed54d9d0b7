"""The training loop: one readable path from a recipe and the data to a run directory, on one CPU or many processes.

All randomness is a function of (seed, epoch, step), so that a run can be stopped anywhere and resumed to the same
weights, and so that several processes see the same global batches, augmented alike, as one.
"""

from __future__ import annotations

import copy
import math
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

import torch
import torch.nn.functional as F
from accelerate import Accelerator, PartialState
from accelerate.state import AcceleratorState
from accelerate.utils import broadcast_object_list
from torch import Tensor, nn
from tqdm import tqdm

from cifar_ft import surgery, transforms
from cifar_ft.checkpoints import RunDirectory, TrainingError
from cifar_ft.data import Cifar10, Split, epoch_seed, make_loader
from cifar_ft.probe import fit_head
from cifar_ft.recipes import Recipe
from cifar_ft.records import describe_run, new_run_dir, write_run
from cifar_ft.results import Run, accuracy_text, load_run, predict_logits
from cifar_ft.sources import data_root, show_path
from cifar_ft.speed import choose_precision, keep_memory, speed_up

EMA_EVERY = 4  # steps between updates of the moving average; its decay is taken to this power


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


def make_optimizer(model: nn.Module, recipe: Recipe) -> torch.optim.SGD:
    """SGD on the trainable parameters, with the head at `head_lr_factor` times the backbone's learning rate."""
    head = {id(p) for p in surgery.head(model).parameters()}
    groups = []
    for is_head, factor in ((False, 1.0), (True, recipe.head_lr_factor)):
        parameters = [p for p in model.parameters() if p.requires_grad and (id(p) in head) == is_head]
        if parameters:
            groups.append({"params": parameters, "lr": recipe.lr * factor, "base_lr": recipe.lr * factor})
    return torch.optim.SGD(
        groups,
        momentum=recipe.momentum,
        nesterov=recipe.nesterov,
        weight_decay=recipe.weight_decay,
        fused=_can_fuse(model),
    )


def _can_fuse(model: nn.Module) -> bool:
    return next(model.parameters()).device.type in ("cpu", "cuda")


@dataclass
class Training:
    """What training moves: the model, its moving average, the optimiser, and the place reached."""

    model: nn.Module
    optimizer: torch.optim.Optimizer
    ema: nn.Module | None  # the moving average of the weights, where the recipe wants one
    sums: Tensor  # of the running epoch: cross-entropy, correct predictions, images
    seconds: float = 0.0  # of the running epoch, evaluation aside
    epoch: int = 0  # epochs finished
    step: int = 0  # steps finished within the running epoch
    history: list[dict] = field(default_factory=list)
    best: dict | None = None  # {"val_accuracy": float, "val_loss": float, "model": state dict}

    PLACE = ("seconds", "epoch", "step", "history", "best")

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


def train_epoch(training: Training, split: Split, recipe: Recipe, accelerator: Accelerator, after_step=None) -> None:
    """Train through the rest of one epoch: augment, predict, compare, step.

    `training.sums` collects the plain cross-entropy, the correct predictions and the images, on the device.
    """
    rank, world = accelerator.process_index, accelerator.num_processes
    transform = transforms.train_transform(recipe)
    loader = make_loader(split, recipe, train=True, epoch=training.epoch, rank=rank, world=world)
    training.model.train()
    start, done = time.perf_counter() - training.seconds, training.step
    for step, (images, labels) in enumerate(
        _progress(loader, f"epoch {training.epoch + 1}/{recipe.epochs}", accelerator)
    ):
        if step < done:
            continue  # trained before the run was resumed
        batch = loader.batch_sampler.sizes[step]  # of all processes together
        draws = transforms.draw(batch, recipe.crop_padding, _generator(recipe, training.epoch, step))
        size = recipe.size_at(training.epoch)
        inputs = transform(images, size=size, draws=tuple(values[rank::world] for values in draws))
        set_lr(training.optimizer, lr_factor(recipe, training.epoch * len(loader) + step, len(loader)))

        logits = training.model(inputs).float()
        loss = F.cross_entropy(logits, labels, reduction="sum", label_smoothing=recipe.label_smoothing) / batch
        training.optimizer.zero_grad()
        accelerator.backward(loss * world)  # the processes average their gradients; this makes it the sum
        training.optimizer.step()

        last = step + 1 == len(loader)
        update_ema(training, recipe, accelerator, training.epoch * len(loader) + step, last)
        training.sums += _sums(logits.detach(), labels)
        training.step, training.seconds = step + 1, time.perf_counter() - start
        if accelerator.device.type == "cpu" or last:
            _check_finite(loss, recipe, training)
        if after_step:
            after_step()


def set_lr(optimizer: torch.optim.Optimizer, factor: float) -> None:
    """Set every group's learning rate to `factor` times its base."""
    for group in optimizer.param_groups:
        group["lr"] = group["base_lr"] * factor


@torch.no_grad()
def update_ema(training: Training, recipe: Recipe, accelerator: Accelerator, step: int, last: bool = False) -> None:
    """Move the averaged weights and BatchNorm statistics a little towards the model's, every fourth step.

    The last step of an epoch counts too, so that the shortest run moves them. The decay grows with the steps, so that
    the first weights are soon forgotten.
    """
    if training.ema is None or ((step + 1) % EMA_EVERY and not last):
        return
    decay = min(recipe.ema_decay, (1 + step) / (10 + step)) ** EMA_EVERY
    model = accelerator.unwrap_model(training.model)
    for averaged, current in zip(training.ema.state_dict().values(), model.state_dict().values(), strict=True):
        if averaged.is_floating_point():
            averaged.lerp_(current, 1 - decay)
        else:
            averaged.copy_(current)


def fit(recipe: Recipe, data: Cifar10, run_dir: str | Path | None = None, *, resume: bool = False, echo=print) -> Run:
    """Train what a recipe says, score the test set once, and leave a complete run directory.

    Parameters
    ----------
    recipe : Recipe
    data : Cifar10
    run_dir : path, optional
        Folder of the run; by default a new one under `results.runs_root()`, named by recipe and time.
    resume : bool
        Go on with the run in `run_dir` from its last complete checkpoint; a finished run is only loaded.
    echo : callable
        Receives one line an epoch.

    Returns
    -------
    Run
        As `results.load_run` reads it.

    Raises
    ------
    TrainingError
        When the folder holds another run or is in use, the disk is full, or the loss is no longer finite.
    SourceError, SurgeryError
        When the pretrained weights cannot be had or do not fit.
    """
    keep_memory()
    state = PartialState(cpu=_cpu_only())
    echo = echo if state.is_main_process else _silent
    run_dir = Path(run_dir or new_run_dir(recipe))
    directory = RunDirectory(run_dir, echo) if state.is_main_process else None
    try:
        if resume and (run_dir / "metrics.json").exists():
            if directory:
                directory.check({"recipe": recipe.to_dict(), "data": {"digest": data.digest}})
            echo(f"{show_path(run_dir)} is finished; nothing to resume")
            return load_run(run_dir)
        run = _fit(recipe, data, directory, resume, echo)
    finally:
        if directory:
            directory.close()
    state.wait_for_everyone()
    return run or load_run(run_dir)


def _fit(recipe: Recipe, data: Cifar10, directory: RunDirectory | None, resume: bool, echo) -> Run | None:
    splits = {
        "train": data.train if recipe.validation else data.full_train,
        "val": data.val,
        "test": data.test,
    }
    splits = {name: split.subset(getattr(recipe, f"{name}_images")) for name, split in splits.items()}
    model = surgery.build_model(recipe, echo)
    precision, accelerator = make_accelerator(recipe, model, directory, echo)
    if directory:
        directory.start(describe_run(recipe, data, splits, model, precision), resume)
    splits = {name: split.to(accelerator.device) for name, split in splits.items()}
    training = prepare(recipe, model, accelerator)
    checkpoint = directory.load_checkpoint() if directory and resume else None
    checkpoint = broadcast_object_list([checkpoint])[0]
    if checkpoint:
        training.restore(checkpoint)
        echo(f"Resuming behind epoch {training.epoch}, step {training.step}")
    else:
        warm_up(recipe, accelerator.unwrap_model(training.model), training.ema, splits["train"], echo)

    def save():
        if directory:
            directory.save_checkpoint(training.epoch, training.step, training.state())

    def after_step():
        if recipe.checkpoint_steps and training.step % recipe.checkpoint_steps == 0:
            save()

    while training.epoch < recipe.epochs:
        train_epoch(training, splits["train"], recipe, accelerator, after_step)
        finish_epoch(training, splits, recipe, accelerator, echo)
        save()
    return finish_run(training, splits, recipe, accelerator, directory, echo)


def make_accelerator(recipe: Recipe, model: nn.Module, directory: RunDirectory | None, echo) -> tuple[str, Accelerator]:
    """The precision to train in and the Accelerator that does it; a resumed run keeps the precision it started with."""
    state = PartialState(cpu=_cpu_only())
    precision = recipe.precision
    if state.is_main_process:
        stored = directory.config().get("precision") if directory else None
        if stored or precision == "auto":
            cache = data_root() / "precision.json"
            size, batch = recipe.image_size, recipe.batch_size
            precision = stored or choose_precision(model, state.device, size, batch, cache, echo)
    precision = broadcast_object_list([precision])[0]
    if precision == "fp16" and state.device.type != "cuda":
        raise TrainingError("precision=fp16 needs an NVIDIA GPU; use bf16, fp32 or auto here")
    AcceleratorState._reset_state()  # it would else insist on the precision of an earlier run in this process
    return precision, Accelerator(mixed_precision="no" if precision == "fp32" else precision, cpu=_cpu_only())


def prepare(recipe: Recipe, model: nn.Module, accelerator: Accelerator) -> Training:
    """Move the model to the device, make its optimiser and its moving average, and hand them to Accelerate."""
    info = model.weights_info
    model = model.to(accelerator.device, memory_format=torch.channels_last)
    if accelerator.device.type == "cpu":
        speed_up(model)
    ema = copy.deepcopy(model).requires_grad_(False) if recipe.ema_decay else None
    model, optimizer = accelerator.prepare(model, make_optimizer(model, recipe))
    accelerator.unwrap_model(model).weights_info = info
    return Training(model, optimizer, ema, torch.zeros(3, device=accelerator.device))


def warm_up(recipe: Recipe, model: nn.Module, ema: nn.Module | None, train: Split, echo) -> None:
    """Before the first step: fit BatchNorm statistics to a resampled stem, and the head to the features, if asked."""
    if recipe.stem == "cifar_resampled":
        transform, sample = transforms.eval_transform(recipe), train.subset(min(len(train), 4096))
        surgery.refresh_batchnorm(model, (transform(images) for images in sample.images.split(256)))
    if recipe.head_fit_images:
        echo(f"Head fitted on frozen features: {fit_head(model, train, recipe):.1%} of the images it was fitted on")
    if ema is not None:
        ema.load_state_dict(model.state_dict())


def finish_epoch(training: Training, splits: dict[str, Split], recipe: Recipe, accelerator: Accelerator, echo) -> None:
    """Score what the recipe scores each epoch, remember the best weights, write the epoch's row."""
    start = time.perf_counter()
    sums = accelerator.reduce(training.sums.clone(), reduction="sum").tolist()
    lr = training.optimizer.param_groups[0]["lr"]
    row = {"epoch": training.epoch + 1, "train_loss": sums[0] / sums[2], "train_accuracy": sums[1] / sums[2]}
    if recipe.validation:
        row["val_loss"], row["val_accuracy"] = _score(training.kept, splits["val"], recipe, accelerator)
    if recipe.track_test:
        row["test_loss"], row["test_accuracy"] = _score(training.kept, splits["test"], recipe, accelerator)
    seconds = training.seconds + time.perf_counter() - start
    training.history.append({**row, "lr": lr, "seconds": seconds, "train_only_seconds": training.seconds})
    if recipe.select == "best" and row["val_accuracy"] > (training.best or {"val_accuracy": -1})["val_accuracy"]:
        weights = accelerator.unwrap_model(training.kept).state_dict()
        training.best = {
            "val_accuracy": row["val_accuracy"],
            "model": {k: v.clone() for k, v in weights.items()},
        }
    training.epoch, training.step, training.seconds = training.epoch + 1, 0, 0.0
    training.sums.zero_()
    shown = [f"{name} {row[f'{key}_accuracy']:.2%}" for key, name in _SCORED.items() if f"{key}_accuracy" in row]
    echo(f"Epoch {row['epoch']}/{recipe.epochs}: loss {row['train_loss']:.4f}, {', '.join(shown)}, {seconds:.0f} s")


_SCORED = {"train": "train", "val": "validation", "test": "test"}


def finish_run(
    training: Training, splits, recipe: Recipe, accelerator: Accelerator, directory: RunDirectory | None, echo
):
    """Score the kept weights on the test set, once, and write the run's final files, `metrics.json` last."""
    model = accelerator.unwrap_model(training.kept)
    if training.best:
        model.load_state_dict(training.best["model"])
    logits = _logits(model, splits["test"], recipe, accelerator)
    mirrored = _logits(model, splits["test"], recipe, accelerator, flip_tta=True) if recipe.flip_tta else None
    if directory is None:
        return None
    labels = splits["test"].labels.cpu()
    info = accelerator.unwrap_model(training.model).weights_info
    write_run(
        directory,
        recipe,
        model,
        info,
        history=training.history,
        val_accuracy=(training.best or training.history[-1]).get("val_accuracy"),
        train_images=len(splits["train"]),
        logits=logits,
        labels=labels,
        mirrored=mirrored,
    )
    run = load_run(directory.path)
    echo(
        f"Test accuracy {accuracy_text(run.correct, len(labels))} on {len(labels):,} images; "
        f"run in {show_path(run.path)}"
    )
    return run


def _logits(model: nn.Module, split: Split, recipe: Recipe, accelerator: Accelerator, flip_tta: bool = False) -> Tensor:
    """Logits [N, 10] of every image once, on every process; each process scores its share."""
    rank, world = accelerator.process_index, accelerator.num_processes
    share = split.take(torch.arange(rank, len(split), world, device=split.labels.device)) if world > 1 else split
    precision = {"no": "fp32"}.get(accelerator.mixed_precision, accelerator.mixed_precision)
    options = {"device": accelerator.device, "precision": precision, "flip_tta": flip_tta}
    own = predict_logits(model, share, transforms.eval_transform(recipe), batch_size=250, **options)
    if world == 1:
        return own
    logits = torch.zeros(len(split), own.shape[1])
    logits[rank::world] = own
    return accelerator.reduce(logits.to(accelerator.device), reduction="sum").cpu()


def _score(model: nn.Module, split: Split, recipe: Recipe, accelerator: Accelerator) -> tuple[float, float]:
    logits, labels = _logits(accelerator.unwrap_model(model), split, recipe, accelerator), split.labels.cpu()
    return F.cross_entropy(logits, labels).item(), (logits.argmax(1) == labels).double().mean().item()


def _sums(logits: Tensor, labels: Tensor) -> Tensor:
    loss = F.cross_entropy(logits, labels, reduction="sum")
    return torch.stack([loss, (logits.argmax(1) == labels).sum(), loss.new_tensor(len(labels))])


def _generator(recipe: Recipe, epoch: int, step: int) -> torch.Generator:
    return torch.Generator().manual_seed(epoch_seed(recipe.seed, epoch, step + 1))


def _check_finite(loss: Tensor, recipe: Recipe, training: Training) -> None:
    if not torch.isfinite(loss):
        raise TrainingError(
            f"the loss is {loss.item()} at epoch {training.epoch + 1}, step {training.step}: training has diverged. "
            f"Try a lower learning rate (--set lr={recipe.lr / 10:g}) or precision=fp32, and start in a new folder"
        )


def _progress(loader, label: str, accelerator: Accelerator) -> tqdm:
    """A bar for people: on a terminal or in a notebook, not in a log file."""
    watched = sys.stdout.isatty() or "ipykernel" in sys.modules
    hidden = not (watched and accelerator.is_main_process)
    return tqdm(loader, label, leave=False, disable=hidden, file=sys.stdout, mininterval=5, ncols=80, unit="step")


def _cpu_only() -> bool:
    """Whether there is no accelerator; Accelerate starts several processes on CPUs only when it is told so."""
    return not (torch.cuda.is_available() or torch.backends.mps.is_available())


def _silent(*_) -> None:
    return None
