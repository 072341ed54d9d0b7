"""The training loop: one readable path from a recipe and the data to a run directory, on one CPU or many processes.

All randomness is a function of (seed, epoch, step), so that a run can be stopped anywhere and resumed to the same
weights, and so that several processes see the same global batches, augmented alike, as one.
"""

from __future__ import annotations

import copy
import shlex
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.utils import broadcast, broadcast_object_list
from torch import nn

from cifar_ft import log, models, transforms
from cifar_ft.data import Cifar10, Split
from cifar_ft.files import data_root, show_path
from cifar_ft.recipes import Recipe
from cifar_ft.results import Run, accuracy_text, load_run
from cifar_ft.training.checkpoint import RunDirectory, TrainingError
from cifar_ft.training.convolutions import speed_up
from cifar_ft.training.distributed import (
    StopRequest,
    cpu_only,
    gather_logits,
    share_statistics,
    start_processes,
    synchronize_batchnorm,
)
from cifar_ft.training.hardware import Plan, choose_plan, keep_memory
from cifar_ft.training.loop import train_epoch
from cifar_ft.training.optim import make_optimizer
from cifar_ft.training.probe import fit_head
from cifar_ft.training.records import describe_run, new_run_dir, write_run
from cifar_ft.training.steps import Training


def fit(recipe: Recipe, data: Cifar10, run_dir: str | Path | None = None, *, resume: bool = False) -> Run:
    """Train what a recipe says, score the test set once, and leave a complete run directory.

    Parameters
    ----------
    recipe : Recipe
    data : Cifar10
    run_dir : path, optional
        Folder of the run; by default a new one under `results.runs_root()`, named by recipe and time.
    resume : bool
        Go on with the run in `run_dir` from its last complete checkpoint; a finished run is only loaded.
        Ctrl-C and SIGTERM leave such a checkpoint.

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
    state = start_processes()
    run_dir = Path(broadcast_object_list([str(run_dir or new_run_dir(recipe))])[0])
    directory = RunDirectory(run_dir) if state.is_main_process else None
    try:
        if resume and (run_dir / "metrics.json").exists():
            if directory:
                directory.check({"recipe": recipe.to_dict(), "data": {"digest": data.digest}})
            log.info(f"{show_path(run_dir)} is finished; nothing to resume")
            return load_run(run_dir)
        run = _fit(recipe, data, directory, resume)
    finally:
        if directory:
            directory.close()
    state.wait_for_everyone()
    return run or load_run(run_dir)


def _fit(recipe: Recipe, data: Cifar10, directory: RunDirectory | None, resume: bool) -> Run | None:
    splits = {
        "train": data.train if recipe.validation else data.full_train,
        "val": data.val,
        "test": data.test,
    }
    splits = {name: split.subset(getattr(recipe, f"{name}_images")) for name, split in splits.items()}
    model = models.build_model(recipe)
    plan, accelerator = make_accelerator(recipe, model, directory)
    if directory:
        directory.start(describe_run(recipe, data, splits, model, plan), resume)
    splits = {name: split.to(accelerator.device) for name, split in splits.items()}
    training = prepare(recipe, model, accelerator, plan)
    checkpoint = directory.load_checkpoint() if directory and resume else None
    checkpoint = broadcast_object_list([checkpoint])[0]
    if checkpoint:
        training.restore(checkpoint)
        if not accelerator.is_main_process:
            training.sums.zero_()  # what all processes had summed up goes on in the first one
        if accelerator.scaler is not None and checkpoint.get("scaler"):
            accelerator.scaler.load_state_dict(checkpoint["scaler"])  # of fp16
        log.info(f"Resuming behind epoch {training.epoch}, step {training.step}")
    else:
        warm_up(recipe, accelerator.unwrap_model(training.model), training.ema, splits["train"])
    with StopRequest() as stop:
        _train(training, splits, recipe, accelerator, directory, stop)
    return finish_run(training, splits, recipe, accelerator, directory)


def _train(training: Training, splits, recipe: Recipe, accelerator: Accelerator, directory, stop: StopRequest):
    """All epochs that are left, with a checkpoint behind each, every N steps where asked, and when told to stop."""

    def save() -> None:
        share_statistics(accelerator, accelerator.unwrap_model(training.model), training.ema)
        sums = accelerator.reduce(training.sums.clone(), reduction="sum")
        if directory:
            scaler = accelerator.scaler and accelerator.scaler.state_dict()
            state = {**training.state(), "sums": sums, "scaler": scaler}
            directory.save_checkpoint(training.epoch, training.step, state)

    def stop_if(asked: bool) -> None:
        if asked:
            if directory:
                command = f"python -m cifar_ft train --out {shlex.quote(str(directory.path))} --resume"
                log.info(
                    f"Stopped behind epoch {training.epoch}, step {training.step}, and saved. Go on with: {command} "
                    "(in Python: the same fit with its run_dir and resume=True)"
                )
            raise KeyboardInterrupt

    def after_step() -> None:
        asked = stop.agreed(accelerator, training.step)
        if asked or (recipe.checkpoint_steps and training.step % recipe.checkpoint_steps == 0):
            save()
        stop_if(asked)

    while training.epoch < recipe.epochs:
        train_epoch(training, splits["train"], recipe, accelerator, after_step)
        share_statistics(accelerator, accelerator.unwrap_model(training.model), training.ema)
        finish_epoch(training, splits, recipe, accelerator)
        save()
        stop_if(stop.agreed(accelerator))


def make_accelerator(recipe: Recipe, model: nn.Module, directory: RunDirectory | None) -> tuple[Plan, Accelerator]:
    """How to compute, and the Accelerator that does it; a resumed run goes on as it began."""
    state, plan = start_processes(), None
    if state.is_main_process:
        stored = directory.config().get("plan") if directory else None
        cache, backbone = data_root() / "speed.json", model.weights_info["backbone"]
        plan = Plan(**stored) if stored else choose_plan(recipe, backbone, state.device, cache, state.num_processes)
    plan = broadcast_object_list([plan])[0]
    if plan.precision == "fp16" and state.device.type != "cuda":
        raise TrainingError("precision=fp16 needs an NVIDIA GPU; use bf16, fp32 or auto here")
    plan.apply()
    AcceleratorState._reset_state()  # it would else insist on the precision of an earlier run in this process
    return plan, Accelerator(mixed_precision="no" if plan.precision == "fp32" else plan.precision, cpu=cpu_only())


def prepare(recipe: Recipe, model: nn.Module, accelerator: Accelerator, plan: Plan) -> Training:
    """Move the model to the device, make its optimiser and its moving average, and hand them to Accelerate."""
    info = model.weights_info
    model = synchronize_batchnorm(model, accelerator).to(accelerator.device, memory_format=plan.memory_format)
    if accelerator.device.type == "cpu" and plan.channels_last:
        speed_up(model)
    ema = copy.deepcopy(model).requires_grad_(False) if recipe.ema_decay else None
    if recipe.compile:
        model.compile()  # in place, so that names in the state dict stay
    model, optimizer = accelerator.prepare(model, make_optimizer(model, recipe))
    accelerator.unwrap_model(model).weights_info = info
    return Training(model, optimizer, ema, torch.zeros(3, device=accelerator.device), plan, recipe.accumulation)


def warm_up(recipe: Recipe, model: nn.Module, ema: nn.Module | None, train: Split) -> None:
    """Before the first step: fit BatchNorm statistics to a resampled stem, and the head to the features, if asked."""
    if recipe.stem == "cifar_resampled":
        transform, sample = transforms.eval_transform(recipe), train.subset(min(len(train), 4096))
        models.refresh_batchnorm(model, (transform(images) for images in sample.images.split(256)))
    if recipe.head_fit_images:
        log.info(f"Head fitted on frozen features: {fit_head(model, train, recipe):.1%} of the images it was fitted on")
        for parameter in model.parameters():  # each process has fitted its own; rounding must not part them
            broadcast(parameter.data)
    if ema is not None:
        ema.load_state_dict(model.state_dict())


def finish_epoch(training: Training, splits: dict[str, Split], recipe: Recipe, accelerator: Accelerator) -> None:
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
    log.info(f"Epoch {row['epoch']}/{recipe.epochs}: loss {row['train_loss']:.4f}, {', '.join(shown)}, {seconds:.0f} s")


_SCORED = {"train": "train", "val": "validation", "test": "test"}


def finish_run(training: Training, splits, recipe: Recipe, accelerator: Accelerator, directory: RunDirectory | None):
    """Score the kept weights on the test set, once, and write the run's final files, `metrics.json` last."""
    model = accelerator.unwrap_model(training.kept)
    if training.best:
        model.load_state_dict(training.best["model"])
    validation = gather_logits(model, splits["val"], recipe, accelerator) if recipe.validation else None
    logits = gather_logits(model, splits["test"], recipe, accelerator)
    mirrored = gather_logits(model, splits["test"], recipe, accelerator, flip_tta=True) if recipe.flip_tta else None
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
        validation=None if validation is None else (validation, splits["val"].labels.cpu()),
    )
    run = load_run(directory.path)
    log.info(
        f"Test accuracy {accuracy_text(run.correct, len(labels))} on {len(labels):,} images; "
        f"run in {show_path(run.path)}"
    )
    return run


def _score(model: nn.Module, split: Split, recipe: Recipe, accelerator: Accelerator) -> tuple[float, float]:
    logits, labels = gather_logits(accelerator.unwrap_model(model), split, recipe, accelerator), split.labels.cpu()
    return F.cross_entropy(logits, labels).item(), (logits.argmax(1) == labels).double().mean().item()


def _silent(*_) -> None:
    return None
