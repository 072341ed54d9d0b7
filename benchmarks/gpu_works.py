"""What is trained to check and to time a GPU: recipes on random images, and the steps of the course's loop."""

from __future__ import annotations

import gc
import time

import torch

from cifar_ft import CifarFtError, models, transforms
from cifar_ft.data import Split, TrainLoader
from cifar_ft.recipes import Recipe, get_recipe
from cifar_ft.training import Training, choose_plan, prepare, train_epoch

# The works: published recipe, a ResNet-50 at two batch sizes, EfficientNet-Lite0.
RANDOM = {"weights": "none", "train_images": None, "checkpoint_steps": 0}
WORKS = {
    "reference_b32": get_recipe("reference_b32", RANDOM),
    "resnet50_128px_b128": get_recipe("modern", {**RANDOM, "epochs": 2}),
    "resnet50_128px_b512": get_recipe("modern", {**RANDOM, "epochs": 2, "batch_size": 512}),
    "lite0_112px_b64": get_recipe(
        "quick", {**RANDOM, "backbone": "efficientnet_lite0", "train_sizes": (), "freeze": "none"}
    ),
}


def device() -> torch.device:
    """The GPU."""
    if not torch.cuda.is_available():
        raise CifarFtError("no NVIDIA GPU is to be seen here; the other benchmarks are for a CPU")
    return torch.device("cuda")


def random_split(n: int) -> Split:
    """Images of noise on the GPU, the same each time."""
    generator = torch.Generator().manual_seed(n)
    images = torch.randint(0, 256, (n, 3, 32, 32), dtype=torch.uint8, generator=generator)
    return Split(images, torch.arange(n) % 10).to(device())


def begin(recipe: Recipe, record: bool = True) -> Training:
    """Training as `fit` begins it, without a folder."""
    training = prepare(recipe, models.build_model(recipe), choose_plan(recipe, recipe.backbone, device()))
    if not record:
        training.replay.batch_size = 0
    return training


def steps(training: Training, split: Split, stop: int | None = None) -> float:
    """Train one epoch, or up to a step of it, and give the seconds."""
    loader = TrainLoader(split, training.recipe, transforms.draw, training.epoch)
    loader.start, training.steps_per_epoch = training.step, len(loader)

    class Enough(Exception):
        pass

    def after() -> None:
        if training.step == stop:
            raise Enough

    torch.cuda.synchronize()
    start = time.perf_counter()
    try:
        train_epoch(training, loader, after)
        training.epoch, training.step = training.epoch + 1, 0
    except Enough:
        pass
    torch.cuda.synchronize()
    return time.perf_counter() - start


def free() -> None:
    """Give back what earlier cases held."""
    gc.collect()
    torch.cuda.empty_cache()
