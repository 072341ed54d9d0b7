"""How long a recipe will train on this machine, from a few timed steps."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping

import torch

from cifar_ft import log, transforms
from cifar_ft.data import Split
from cifar_ft.models import build_model, predict_logits
from cifar_ft.recipes import Recipe
from cifar_ft.training.distributed import start_processes
from cifar_ft.training.hardware import choose_plan
from cifar_ft.training.loop import train_step
from cifar_ft.training.state import prepare


def estimate_seconds(recipe: Recipe, backbone: str, device: str = "auto") -> float:
    """Seconds of training and evaluation on this machine, by two steps at each image size, on random images.

    Parameters
    ----------
    backbone : str
        What `recipe.backbone` became.
    device : str
        As in `fit`.
    """
    recipe, state = recipe.replace(backbone=backbone, weights="none"), start_processes(device)
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (recipe.batch_size, 3, 32, 32), dtype=torch.uint8, generator=generator)
    split, level = Split(images, torch.arange(len(images)) % 10).to(state.device), log.level
    log.setLevel("WARNING")  # what is built here is not what will be trained
    try:
        training = prepare(recipe, build_model(recipe), choose_plan(recipe, backbone, state.device))
    finally:
        log.setLevel(level)
    augment = transforms.train_transform(recipe)
    training.model.train()

    def step(size: int) -> None:
        train_step(training, len(split), augment(split.images, generator, size), split.labels)

    seconds = {size: _timed(step, size) for size in {*recipe.train_sizes, recipe.image_size}}
    evaluate = transforms.eval_transform(recipe)
    scoring = _timed(lambda _: predict_logits(training.eval_model, split, evaluate, precision=training.plan.precision))
    return run_seconds(recipe, seconds, scoring / len(split))


def run_seconds(recipe: Recipe, step: Mapping[int, float], scoring: float) -> float:
    """Seconds of a run whose steps take `step[size]` seconds each, and whose evaluation takes `scoring` an image."""
    images = recipe.train_images or (45_000 if recipe.validation else 50_000)
    steps = -(-images // recipe.batch_size)
    training = steps * sum(step[recipe.size_at(epoch)] for epoch in range(recipe.epochs))
    val, test = (recipe.val_images or 5_000) * recipe.validation, recipe.test_images or 10_000
    scored = (recipe.epochs + 1) * val + (recipe.epochs * recipe.track_test + 1 + 2 * recipe.flip_tta) * test
    return training + scored * scoring


def _timed(work: Callable[[int], object], size: int = 0) -> float:
    """Seconds of the second of two calls; the first one loads and warms up."""
    for _ in range(2):
        start = time.perf_counter()
        work(size)
        if torch.cuda.is_available():
            torch.cuda.synchronize()
    return time.perf_counter() - start
