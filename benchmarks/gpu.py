"""`python -m benchmarks gpu --minutes 12 --out FOLDER`: what a GPU does, checked and measured, the most valuable first.

Needs no network: the runs take CIFAR-10 and weights from the caches that CIFAR_FT_DATA names, everything before them
random images. Each part is a process of its own, is begun only if its time is left, and leaves FOLDER/<part>.json; run
again, also with the folder copied elsewhere, the parts that are done are not repeated.
"""

from __future__ import annotations

import gc
import io
import itertools
import json
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader

from cifar_ft import CifarFtError, log, models, transforms
from cifar_ft.data import Split, TrainLoader, load_cifar10
from cifar_ft.files import write_atomic
from cifar_ft.recipes import Recipe, get_recipe
from cifar_ft.results import REDRAWN
from cifar_ft.training import (
    Replay,
    RunDirectory,
    StopRequest,
    Training,
    choose_plan,
    describe_machine,
    fit,
    own_stream,
    prepare,
    run_epoch,
    train_epoch,
)

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


def free() -> None:
    """Give back what earlier cases held."""
    gc.collect()
    torch.cuda.empty_cache()


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


# Images a second: the course's loop beside others, in turns.


def course(recipe: Recipe, split: Split, record: bool = True) -> Iterator[float]:
    """Seconds of each epoch of the course's loop."""
    training = begin(recipe, record)
    while True:
        yield steps(training, split)


def course_not_recorded(recipe: Recipe, split: Split) -> Iterator[float]:
    """The same, every kernel started by Python."""
    return course(recipe, split, record=False)


def resident(recipe: Recipe, split: Split, graph: bool = False) -> Iterator[float]:
    """A plain loop in its best setting over data on the GPU, one fixed augmentation: bare steps, no metrics."""
    model = models.build_model(recipe).cuda().train().to(memory_format=torch.channels_last)
    optimizer = torch.optim.SGD(model.parameters(), recipe.lr, recipe.momentum, fused=True)
    dtype = torch.float32 if recipe.precision == "fp32" else torch.bfloat16
    augment, size = transforms.train_transform(recipe), recipe.batch_size
    fixed = augment(split.images[:size]), split.labels[:size]

    def step(inputs: Tensor, labels: Tensor) -> None:
        with torch.autocast("cuda", dtype, enabled=dtype != torch.float32, cache_enabled=not graph):
            loss = F.cross_entropy(model(inputs).float(), labels)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    recorded = None
    while True:
        torch.cuda.synchronize()
        start = time.perf_counter()
        if graph and recorded is None:
            step(*fixed)
            step(*fixed)
            recorded = Replay.capture(lambda: step(*fixed))
        if graph:
            for _ in range(len(split) // size):
                recorded.replay()
        else:
            for order in torch.randperm(len(split), device="cuda").split(size):
                step(augment(split.images[order]), split.labels[order])
        torch.cuda.synchronize()
        yield time.perf_counter() - start


def ceiling(recipe: Recipe, split: Split) -> Iterator[float]:
    """A recorded step on one fixed batch: no loop of this model can be faster."""
    return resident(recipe, split, graph=True)


class _Pictures(torch.utils.data.Dataset):
    """Images as PIL images, transformed one at a time by torchvision."""

    def __init__(self, recipe: Recipe, split: Split):
        from PIL import Image
        from torchvision import transforms as tv

        size, mean_std = (recipe.image_size,) * 2, transforms.NORMALIZATIONS[recipe.normalization]
        crop = [tv.RandomCrop(32, padding=4), tv.RandomHorizontalFlip()]
        resize = [tv.Resize(size)] if recipe.image_size != 32 else []
        self.transform = tv.Compose([*crop, *resize, tv.ToTensor(), tv.Normalize(*mean_std)])
        self.images = [Image.fromarray(image.permute(1, 2, 0).numpy()) for image in split.images.cpu()]
        self.labels = split.labels.tolist()

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int):
        return self.transform(self.images[index]), self.labels[index]


def plain(recipe: Recipe, split: Split, strong: bool = False) -> Iterator[float]:
    """PyTorch's tutorial loop: fp32, images transformed by 8 processes."""
    loader = DataLoader(
        _Pictures(recipe, split), recipe.batch_size, shuffle=True, num_workers=14 if strong else 8,
        pin_memory=strong, persistent_workers=True,
    )  # fmt: skip
    model = models.build_model(recipe).cuda().train()
    if strong:
        model.to(memory_format=torch.channels_last)
    torch.backends.cudnn.benchmark = strong
    optimizer = torch.optim.SGD(model.parameters(), recipe.lr, recipe.momentum, fused=strong or None)
    criterion = nn.CrossEntropyLoss()
    while True:
        torch.cuda.synchronize()
        start = time.perf_counter()
        for images, labels in loader:
            images, labels = images.cuda(non_blocking=True), labels.cuda(non_blocking=True)
            if strong:
                images = images.contiguous(memory_format=torch.channels_last)
            with torch.autocast("cuda", torch.bfloat16, enabled=strong and recipe.precision != "fp32"):
                loss = criterion(model(images), labels)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        torch.cuda.synchronize()
        yield time.perf_counter() - start


def strong(recipe: Recipe, split: Split) -> Iterator[float]:
    """The same at its best: bf16, channels last, a fused optimiser, cuDNN's search, pinned memory, 14 processes."""
    return plain(recipe, split, strong=True)


LOOPS = {each.__name__: each for each in (course, ceiling, course_not_recorded, resident, plain, strong)}


def speed(names: str = "", images: int = 11_520, rounds: int = 3) -> dict:
    """Images a second of each loop on each work: its first epoch with all that a start costs, then the others."""
    found, split = {}, random_split(images)
    for work, recipe in WORKS.items():
        loops, seconds = {}, {}
        for name in names.split(",") if names else LOOPS:
            loops[name] = LOOPS[name](recipe, split)
            seconds[name] = [next(loops[name])]
        for _, name in itertools.product(range(rounds), loops):
            seconds[name].append(next(loops[name]))
        found[work] = {name: [round(images / each) for each in values] for name, values in seconds.items()}
        print(work, found[work], flush=True)
        loops.clear()
        free()
    return found


# Whole runs, as a user starts them.


def run(name: str, out: Path) -> dict:
    """A recipe, or one of the redrawn runs, trained by `fit`; an interrupted one is resumed."""
    recipe, changes, _ = REDRAWN.get(name, (name, "", ""))
    start = time.perf_counter()
    done = fit(get_recipe(recipe, changes), load_cifar10(), out / "runs" / name, resume=True)
    keys = ("test_accuracy", "test_accuracy_ci95", "val_accuracy", "train_seconds", "images_per_second", "weights")
    row = {key: done.metrics.get(key) for key in keys}
    return {**row, "wall_seconds": time.perf_counter() - start, "history": done.history.to_dict("list")}


RUNS = ("modern", "quick", "reference_b32", "reference_b64", "reference_b32_cosine", "untouched_one_cycle")
PARTS: dict[str, tuple[Callable[[Path], dict], int]] = {  # with the seconds that each takes on an H100
    "exact": (lambda out: exact(), 60),
    "no_waiting": (lambda out: no_waiting(), 40),
    "resume": (lambda out: resume(), 60),
    "faulty": (lambda out: faulty(), 30),
    "half": (lambda out: half(), 20),
    "new_size": (lambda out: new_size(), 40),
    "speed_course": (lambda out: speed("course,ceiling"), 60),
    "modern": (lambda out: run("modern", out), 120),
    "quick": (lambda out: run("quick", out), 90),
    "reference_b32": (lambda out: run("reference_b32", out), 60),
    "speed": (lambda out: speed(images=5760, rounds=2), 120),
    "reference_b64": (lambda out: run("reference_b64", out), 60),
    "reference_b32_cosine": (lambda out: run("reference_b32_cosine", out), 60),
    "untouched_one_cycle": (lambda out: run("untouched_one_cycle", out), 60),
}


def everything(minutes: float, out: Path, only: str = "") -> None:
    """All parts that are not done yet, in order, each if its time is left and until the time is over."""
    end = time.monotonic() + 60 * minutes
    out.mkdir(parents=True, exist_ok=True)
    for part in only.split(",") if only else PARTS:
        left = end - time.monotonic()
        if (out / f"{part}.json").exists() or left < PARTS[part][1]:
            print(f"{part}: {'done' if (out / f'{part}.json').exists() else 'no time left'}", flush=True)
            continue
        command = [sys.executable, "-m", "benchmarks.gpu", part, str(out)]
        try:
            subprocess.run(command, check=False, timeout=left)
        except subprocess.TimeoutExpired:
            print(f"{part}: out of time", flush=True)


def main(part: str, out: Path) -> None:
    """One part in this process: print and store what it finds."""
    function, start = PARTS[part][0], time.perf_counter()
    if part not in RUNS:
        log.setLevel("WARNING")
    with own_stream(device()):
        found = function(out)
    found = {"machine": describe_machine(), "seconds": round(time.perf_counter() - start, 1), "found": found}
    write_atomic(out / f"{part}.json", (json.dumps(found, indent=1) + "\n").encode())
    shown = {key: value for key, value in found["found"].items() if key != "history"}
    print(f"{part}, {found['seconds']} s: {json.dumps(shown)}", flush=True)


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
