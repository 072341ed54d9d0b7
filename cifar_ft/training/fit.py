"""A whole run, from a recipe and the data to a run directory, in one process or several.

All randomness is a function of (seed, epoch, step), so that a run can be stopped anywhere and resumed to the same
weights, and so that several processes see the same global batches, augmented alike, as one.
"""

from __future__ import annotations

import sys
import time
from contextlib import ExitStack
from pathlib import Path

import torch.nn.functional as F
from accelerate import PartialState
from accelerate.utils import broadcast

from cifar_ft import log, transforms
from cifar_ft.data import Cifar10, Split, TrainLoader
from cifar_ft.files import full_path, one_line, progress, show_path
from cifar_ft.models import build_model, is_out_of_memory, refresh_batchnorm
from cifar_ft.recipes import Recipe
from cifar_ft.results import Run, accuracy_text, load_run
from cifar_ft.training.checkpoint import RunDirectory
from cifar_ft.training.distributed import gather_logits, on_main, share_statistics, start_processes
from cifar_ft.training.faults import StopRequest, TrainingError, check_loss, smallest_weights, stop, use_less_memory
from cifar_ft.training.hardware import Plan, choose_plan
from cifar_ft.training.loop import train_epoch
from cifar_ft.training.probe import fit_head
from cifar_ft.training.replay import own_stream
from cifar_ft.training.run_files import describe_run, new_run_dir, step_rows, write_run
from cifar_ft.training.state import Training, prepare

Splits = dict[str, Split]  # "train", "val" and "test"


def fit(
    recipe: Recipe,
    data: Cifar10,
    run_dir: str | Path | None = None,
    *,
    resume: bool = False,
    accept_changes: bool = False,
    device: str = "auto",
) -> Run:
    """Train what a recipe says, evaluate the result on the test set, and leave a complete run directory.

    Parameters
    ----------
    recipe : Recipe
    data : Cifar10
    run_dir : path, optional
        Folder of the run, new or empty; by default a new one under `files.runs_root()`, named by recipe and time.
    resume : bool
        Resume the run in `run_dir` from its last complete checkpoint; a finished run is only loaded.
        Ctrl-C and SIGTERM leave such a checkpoint.
    accept_changes : bool
        Resume a run that other code or versions began, and store in its config.json that they changed.
    device : str
        "cpu", "cuda", "cuda:1", "mps", or "auto" (see `models.choose_device`).

    Returns
    -------
    Run
        As `results.load_run` reads it.

    Raises
    ------
    TrainingError
        When the folder holds another run or other files or is in use, or the loss is no longer finite.
    DeviceError
        When there is no such device.
    FileError
        When the disk is full.
    SourceError, SurgeryError
        When the pretrained weights cannot be had or do not fit.
    """
    state = start_processes(device)
    run_dir = on_main(state, lambda: full_path(run_dir) if run_dir else new_run_dir(recipe))
    directory = RunDirectory(run_dir, active=state.is_main_process)
    with own_stream(state.device), ExitStack() as opened:

        def begun() -> tuple[dict, dict | None]:
            return opened.enter_context(directory).begun(recipe.to_dict(), data.digest, resume)

        stored, checkpoint = on_main(state, begun)
        if stored and on_main(state, directory.finished):
            log.info(f"{show_path(run_dir)} is finished; nothing to resume")
            return load_run(run_dir)
        splits = select_images(recipe, data)
        training = set_up(recipe, state, stored, restored=checkpoint is not None)
        on_main(state, lambda: directory.begin(describe_run(training, data, splits), accept_changes))
        splits = {name: split.to(training.accelerator.device) for name, split in splits.items()}
        if checkpoint:
            continue_from(checkpoint, training)
        else:
            warm_up(training, splits["train"])
        del checkpoint  # as large as the model and its optimiser
        with StopRequest() as request:
            while training.epoch < recipe.epochs:
                run_epoch(training, splits["train"], directory, request)
                finish_epoch(training, splits)
                save(training, directory)
                if request.agreed(training.accelerator):
                    stop(training, directory.path)
        finish_run(training, splits, directory)
    state.wait_for_everyone()
    return load_run(run_dir)


def select_images(recipe: Recipe, data: Cifar10) -> Splits:
    """The images that the recipe trains, validates and tests on."""
    splits = {"train": data.train if recipe.validation else data.full_train, "val": data.val, "test": data.test}
    return {name: split.subset(getattr(recipe, f"{name}_images")) for name, split in splits.items()}


def set_up(recipe: Recipe, state: PartialState, stored: dict, restored: bool) -> Training:
    """The model, its optimiser, and how to compute; a resumed run (`stored`: its config.json) computes as it began.

    Where a checkpoint will be restored, all weights are in it: nothing is fetched, and no file is read.
    """
    model = build_model(recipe, stored["weights"] if restored else None)

    def plan() -> Plan:
        if stored.get("plan"):
            return Plan.stored(stored["plan"], state.device)
        share = recipe.replace(batch_size=max(2, recipe.batch_size // state.num_processes))
        return choose_plan(share, model.weights_info["backbone"], state.device)

    return prepare(recipe, model, on_main(state, plan))


def continue_from(checkpoint: dict, training: Training) -> None:
    """Restore a checkpoint."""
    try:
        training.restore(checkpoint)
    except (RuntimeError, LookupError, TypeError, ValueError) as error:
        raise TrainingError(
            f"the checkpoint does not fit this code ({one_line(error)[:200]}); resume it with the version that began it"
        ) from error
    log.info(f"Resuming after epoch {training.epoch}, step {training.step}")


def warm_up(training: Training, train: Split) -> None:
    """What comes before the first step: refresh BatchNorm after a resampled stem, and fit the head if asked."""
    recipe, model = training.recipe, training.unwrapped_model
    if recipe.stem == "cifar_resampled":
        transform, sample = transforms.eval_transform(recipe), train.subset(min(len(train), 4096))
        refresh_batchnorm(model, (transform(images) for images in sample.images.split(256)))
    if recipe.head_fit_images:
        log.info(f"Head fitted on frozen features: {fit_head(model, train, recipe):.1%} of the images it was fitted on")
        for parameter in model.parameters():  # each process has fitted its own; rounding must not part them
            broadcast(parameter.data)
    if training.ema is not None:
        training.ema.load_state_dict(model.state_dict())


def run_epoch(training: Training, train: Split, directory: RunDirectory, request: StopRequest) -> None:
    """Train through the rest of an epoch; save and stop where asked, and continue with less memory where it must be."""
    recipe, accelerator = training.recipe, training.accelerator
    loader = TrainLoader(
        train, recipe, transforms.draw, training.epoch, accelerator.process_index, accelerator.num_processes
    )
    training.steps_per_epoch, start = len(loader), time.perf_counter() - training.seconds

    def after_step() -> None:
        nonlocal before
        training.seconds = time.perf_counter() - start
        bar.update()
        asked = request.agreed(accelerator, training.step)
        last = training.step == len(loader)  # saved before it is scored
        saving = asked or last or (recipe.checkpoint_steps and training.step % recipe.checkpoint_steps == 0)
        check_loss(training, loader, saving)
        if saving:
            save(training, directory)
        if asked:
            stop(training, directory.path)
        before = smallest_weights(training)

    before = smallest_weights(training)
    with _progress(training) as bar:
        while training.step < len(loader):
            loader.start = training.step
            try:
                train_epoch(training, loader, after_step)
                continue
            except (RuntimeError, MemoryError) as error:
                if not is_out_of_memory(error):
                    raise
            # Not in the except block, where the error still holds the step's tensors.
            use_less_memory(training, loader, before)


def save(training: Training, directory: RunDirectory) -> None:
    """Write a checkpoint; all processes take part."""
    share_statistics(training.accelerator, training.unwrapped_model, training.ema)
    directory.save_checkpoint(training.epoch, training.step, training.state())


def finish_epoch(training: Training, splits: Splits) -> None:
    """Evaluate what the recipe evaluates each epoch, remember the best weights, and add the epoch's rows."""
    recipe, accelerator, start = training.recipe, training.accelerator, time.perf_counter()
    share_statistics(accelerator, training.unwrapped_model, training.ema)
    sums = training.sums().double()
    loss, correct, images = sums.sum(dim=0).tolist()
    row = {"epoch": training.epoch + 1, "train_loss": loss / images, "train_accuracy": correct / images}
    for name, wanted in {"val": recipe.validation, "test": recipe.track_test}.items():
        if wanted:
            logits, labels = _logits(training, splits[name]), splits[name].labels.cpu()
            row[f"{name}_loss"] = F.cross_entropy(logits, labels).item()
            row[f"{name}_accuracy"] = (logits.argmax(1) == labels).double().mean().item()
    seconds = training.seconds + time.perf_counter() - start
    training.steps += step_rows(training, sums)
    lr = training.steps[-1]["lr"]  # of the last step
    training.history.append({**row, "lr": lr, "seconds": seconds, "train_only_seconds": training.seconds})
    if recipe.select == "best" and row["val_accuracy"] > (training.best or {"val_accuracy": -1})["val_accuracy"]:
        weights = {name: values.clone() for name, values in training.eval_model.state_dict().items()}
        training.best = {"val_accuracy": row["val_accuracy"], "model": weights}
    training.epoch, training.step, training.seconds = training.epoch + 1, 0, 0.0
    training.finished.clear()
    names = {"train": "train", "val": "validation", "test": "test"}
    shown = [f"{name} {row[f'{key}_accuracy']:.2%}" for key, name in names.items() if f"{key}_accuracy" in row]
    log.info(f"Epoch {row['epoch']}/{recipe.epochs}: loss {row['train_loss']:.4f}, {', '.join(shown)}, {seconds:.0f} s")


def finish_run(training: Training, splits: Splits, directory: RunDirectory) -> None:
    """Score the weights to be stored on the test set, once, and write the run's final files."""
    recipe = training.recipe
    if training.best:
        training.eval_model.load_state_dict(training.best["model"])
    logits = {"val": _logits(training, splits["val"])} if recipe.validation else {}
    logits["test"] = _logits(training, splits["test"])
    if recipe.flip_tta:
        logits["flip_tta"] = _logits(training, splits["test"], flip_tta=True)
    if directory.active:
        write_run(directory, training, splits, logits)
        run = load_run(directory.path)
        score = accuracy_text(run.correct, len(run.labels))
        log.info(f"Test accuracy {score} on {len(run.labels):,} images; run in {show_path(run.path)}")


def _logits(training: Training, split: Split, flip_tta: bool = False):
    return gather_logits(training.eval_model, split, training.recipe, training.accelerator, flip_tta)


def _progress(training: Training):
    """A bar of the epoch's steps, in the main process alone."""
    label, hidden = f"epoch {training.epoch + 1}/{training.recipe.epochs}", not training.accelerator.is_main_process
    place = {"total": training.steps_per_epoch, "initial": training.step, "unit": "step"}
    return progress(None, label, sys.stdout, hidden, mininterval=5, ncols=80, **place)
