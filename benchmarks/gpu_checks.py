"""Checks on a GPU: a recorded step computes what an eager one does, resumes, never waits, and survives short memory."""

from __future__ import annotations

import io
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

from benchmarks.gpu_works import RANDOM, WORKS, begin, free, random_split, steps
from cifar_ft.recipes import get_recipe
from cifar_ft.training import Replay, RunDirectory, StopRequest, Training, run_epoch


def tensors(value) -> Iterator[Tensor]:
    """All tensors of a nested state."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, dict | list | tuple):
        for each in value.values() if isinstance(value, dict) else value:
            yield from tensors(each)


def same(one: Training, other: Training) -> bool:
    """Whether all that two trainings hold is equal bit for bit."""
    pairs = zip(tensors(one.state()), tensors(other.state()), strict=True)
    return all(torch.allclose(a.cpu(), b.cpu(), rtol=0, atol=0, equal_nan=True) for a, b in pairs)


CASES = {  # small steps of every kind
    "resnet50 32 px fp32": get_recipe("reference_b32", {**RANDOM, "lr": 0.001}),
    "resnet50 64 px bf16": get_recipe("modern", {**RANDOM, "image_size": 64, "batch_size": 64}),
    "resnet50 64 px bf16, 2 micro-batches": get_recipe(
        "modern", {**RANDOM, "image_size": 64, "batch_size": 64, "accumulation": 2}
    ),
    "lite0 64 px bf16 AdamW": get_recipe(
        "quick",
        {**RANDOM, "backbone": "efficientnet_lite0", "image_size": 64, "train_sizes": (64, 80), "freeze": "none"},
    ),
}


def exact() -> dict:
    """20 steps, replayed and not, leave the same weights, momenta, averages and metrics, bit for bit."""
    found = {}
    for name, recipe in CASES.items():
        split = random_split(20 * recipe.batch_size - 5)
        trainings = [begin(recipe, record) for record in (False, True, True)]
        for training in trainings:
            steps(training, split)
        found[name] = {
            "recorded": trainings[1].replay.graph is not None,
            "replayed_equals_eager": same(trainings[0], trainings[1]),
            "replayed_equals_itself": same(trainings[1], trainings[2]),
        }
        free()
    return found


def resume() -> dict:
    """Stopped at a step, stored, restored in a new training, and trained on: bit for bit the same."""
    found = {}
    for name, recipe in CASES.items():
        split = random_split(12 * recipe.batch_size - 5)
        whole = begin(recipe)
        for _ in range(2):
            steps(whole, split)
        for epoch, step in ((0, 1), (0, 2), (0, 3), (0, 11), (1, 1), (1, 5)):
            first = begin(recipe)
            for _ in range(epoch):
                steps(first, split)
            steps(first, split, step)
            state = first.state()
            second = begin(recipe)
            second.restore(stored(state))
            while second.epoch < 2:
                steps(second, split)
            found[f"{name}, epoch {epoch + 1} step {step}"] = same(whole, second)
        free()
    return found


def stored(state: dict) -> dict:
    """What a checkpoint gives back."""
    torch.save(state, buffer := io.BytesIO())
    return torch.load(io.BytesIO(buffer.getvalue()), map_location="cpu", weights_only=True)


def no_waiting() -> dict:
    """An epoch in which any wait for the GPU is an error; `fit` has one more, the look at the loss every 50 steps."""
    found = {}
    for name, recipe in CASES.items():
        training, split = begin(recipe), random_split(120 * recipe.batch_size - 5)
        steps(training, split, 4)  # loading kernels and recording may wait
        torch.cuda.set_sync_debug_mode("error")
        try:
            steps(training, split)
            found[name] = "none"
        except RuntimeError as error:
            found[name] = str(error).splitlines()[0]
        finally:
            torch.cuda.set_sync_debug_mode("default")
        free()
    return found


def faulty() -> dict:
    """Memory that suffices for half a batch alone, and a step that cannot be recorded."""
    recipe = get_recipe("modern", {**RANDOM, "batch_size": 512, "epochs": 1, "ema_decay": 0})
    training, split = begin(recipe, record=False), random_split(4096)
    steps(training, split, 1)
    peak, total = torch.cuda.max_memory_reserved(), torch.cuda.get_device_properties(0).total_memory
    del training
    free()
    torch.cuda.set_per_process_memory_fraction(0.7 * peak / total)
    training = begin(recipe)
    run_epoch(training, split, RunDirectory(Path(), active=False), StopRequest())
    torch.cuda.set_per_process_memory_fraction(1.0)
    memory = {"micro_batches": training.accumulation, "recorded": training.replay.graph is not None}
    del training
    free()

    recipe = CASES["resnet50 64 px bf16"]
    split = random_split(12 * recipe.batch_size - 5)
    eager, failing = begin(recipe, record=False), begin(recipe)
    failing.replay.capture = lambda work: Replay.capture(lambda: (work(), torch.ones(1, device="cuda").item()))  # waits
    for training in (eager, failing):
        steps(training, split)
    gave_up = failing.replay.batch_size == 0
    return {"memory": memory, "unrecordable": {"gave_up": gave_up, "equals_eager": same(eager, failing)}}


def half() -> dict:
    """fp16, which is not recorded: two runs are equal."""
    recipe = CASES["resnet50 64 px bf16"].replace(precision="fp16", lr=0.001)
    split, trainings = random_split(10 * recipe.batch_size), [begin(recipe) for _ in range(2)]
    for training in trainings:
        steps(training, split)
    return {"equal": same(*trainings), "recorded": trainings[0].replay.graph is not None}


def new_size() -> dict:
    """Seconds of the first step at a new size and batch size, and of a later one, for EfficientNet-Lite0."""
    recipe = WORKS["lite0_112px_b64"]
    training, split = begin(recipe), random_split(64 * 60 + 50)
    found = {"first_step": steps(training, split, 1), "second": steps(training, split, 2)}
    found["third_recorded"] = steps(training, split, 3)
    found["next_55"] = steps(training, split, 58)
    found["rest_and_last_smaller_batch"] = steps(training, split)
    return found
