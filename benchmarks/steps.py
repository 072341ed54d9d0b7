"""How fast a training step is: against the plain recipe loop, against the processor's peak, and as sizes grow."""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader
from torch.utils.flop_counter import FlopCounterMode

from cifar_ft import models, transforms
from cifar_ft.data import Split, TrainLoader
from cifar_ft.recipes import Recipe
from cifar_ft.training import keep_memory, make_optimizer, peak_memory_mb, speed_up


def matmul_peak(precision: str, size: int = 4096, repeats: int = 5) -> float:
    """GFLOP/s of a square matrix product, the fastest of some."""
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[precision]
    a, b, seconds = torch.randn(size, size, dtype=dtype), torch.randn(size, size, dtype=dtype), []
    for _ in range(repeats):
        start = time.perf_counter()
        a @ b
        seconds.append(time.perf_counter() - start)
    return 2 * size**3 / min(seconds) / 1e9


def gflop_per_image(recipe: Recipe) -> float:
    """Of one training step: forward and backward, two for each multiply-add."""
    model = models.build_model(recipe.replace(weights="none")).train()
    with FlopCounterMode(display=False) as counter:
        model(torch.randn(2, 3, recipe.image_size, recipe.image_size)).sum().backward()
    return counter.get_total_flops() / 2 / 1e9


def course_loop(recipe: Recipe, train: Split, precision: str) -> Callable[[], None]:
    """A function that trains one batch the course's way: augmented as a whole, channels last, fast convolutions."""
    model = models.build_model(recipe.replace(weights="none")).train()
    speed_up(model.to(memory_format=torch.channels_last))
    optimizer, transform = make_optimizer(model, recipe), transforms.train_transform(recipe)
    batches = _endless(lambda: TrainLoader(train, recipe, transforms.draw))

    def step() -> None:
        batch = next(batches)
        with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
            logits = model(transform(batch.images, draws=batch.draws)).float()
        optimizer.zero_grad()
        F.cross_entropy(logits, batch.labels).backward()
        optimizer.step()

    return step


def plain_loop(recipe: Recipe, train: Split) -> Callable[[], None]:
    """A function that trains one batch as the published code does: torchvision image by image, DataLoader, fp32."""
    from PIL import Image
    from torchvision import transforms as tv

    mean, std = transforms.NORMALIZATIONS[recipe.normalization]
    augment = tv.Compose(
        [tv.RandomCrop(32, padding=4), tv.RandomHorizontalFlip(), tv.ToTensor(), tv.Normalize(mean, std)]
    )
    pictures = [Image.fromarray(image.permute(1, 2, 0).numpy()) for image in train.images]

    class Pictures(torch.utils.data.Dataset):
        def __len__(self) -> int:
            return len(pictures)

        def __getitem__(self, index: int):
            return augment(pictures[index]), int(train.labels[index])

    model = models.build_model(recipe.replace(weights="none")).train()
    optimizer = torch.optim.SGD(model.parameters(), recipe.lr, recipe.momentum, weight_decay=recipe.weight_decay)
    criterion = nn.CrossEntropyLoss()
    batches = _endless(lambda: DataLoader(Pictures(), recipe.batch_size, shuffle=True))

    def step() -> None:
        images, labels = next(batches)
        optimizer.zero_grad()
        criterion(model(images), labels).backward()
        optimizer.step()

    return step


def alternate(loops: dict[str, Callable[[], None]], batch_size: int, rounds: int = 3, steps: int = 8) -> dict:
    """Images a second of each loop, in turns: a round of each, then the next round; medians and all rounds."""
    speeds = {name: [] for name in loops}
    for step in loops.values():
        step()
        step()
    for _ in range(rounds):
        for name, step in loops.items():
            start = time.perf_counter()
            for _ in range(steps):
                step()
            speeds[name].append(batch_size * steps / (time.perf_counter() - start))
    return {name: {"images_per_second": statistics.median(each), "rounds": each} for name, each in speeds.items()}


def reference_speed(recipe: Recipe, train: Split, rounds: int = 3) -> dict:
    """The published recipe's step, the course's way and the plain way, and its share of the matrix-product peak."""
    keep_memory()
    large = recipe.replace(batch_size=64)
    gflop = gflop_per_image(recipe)
    plain = alternate({"course": course_loop(recipe, train, "bf16"), "plain": plain_loop(recipe, train)}, 32, rounds)
    at_64 = alternate({"course": course_loop(large, train, "bf16")}, 64, rounds)["course"]["images_per_second"]
    peaks = {precision: matmul_peak(precision) for precision in ("fp32", "bf16")}
    return {
        "batch_32": plain,
        "ratio_to_plain": plain["course"]["images_per_second"] / plain["plain"]["images_per_second"],
        "batch_64_images_per_second": at_64,
        "gflop_per_image": gflop,
        "matmul_gflops": peaks,
        "share_of_bf16_peak": at_64 * gflop / peaks["bf16"],
    }


def growth(recipe: Recipe) -> dict:
    """Seconds of an epoch and peak memory against images, image size and batch size, a process a case, with fits.

    The fits are least squares straight lines (slope, intercept, R squared): an epoch's seconds on its images; seconds
    for 1,000 images on the image's area in units of 64 x 64 pixels, and on steps for 1,000 images; and MB on the batch.
    """
    images, sizes, batches = (1024, 2048, 4096, 8192), (32, 48, 64, 96, 128), (16, 32, 64, 128, 256)
    cases = {(number, 64, 64) for number in images} | {(2048, size, 64) for size in sizes}
    cases |= {(2048, 64, batch) for batch in batches}
    found = {case: _in_a_process(recipe, *case) for case in sorted(cases)}

    def line(cases, x, y) -> dict:
        xs, ys = [x(found[case]) for case in cases], [y(found[case]) for case in cases]
        slope, intercept = statistics.linear_regression(xs, ys)
        return {"slope": slope, "intercept": intercept, "r_squared": statistics.correlation(xs, ys) ** 2}

    def per_1000(row) -> float:
        return 1000 * row["epoch_seconds"] / row["images"]

    by_batch = [(2048, 64, batch) for batch in batches]
    fits = {
        "epoch_seconds_by_images": line(
            [(n, 64, 64) for n in images], lambda r: r["images"], lambda r: r["epoch_seconds"]
        ),
        "seconds_per_1000_by_area": line(
            [(2048, s, 64) for s in sizes], lambda r: (r["image_size"] / 64) ** 2, per_1000
        ),
        "seconds_per_1000_by_steps": line(by_batch, lambda r: 1000 / r["batch_size"], per_1000),
        "memory_mb_by_batch": line(by_batch, lambda r: r["batch_size"], lambda r: r["peak_memory_mb"]),
    }
    return {"backbone": recipe.backbone, "cases": list(found.values()), "fits": fits}


def _in_a_process(recipe: Recipe, images: int, size: int, batch: int) -> dict:
    changes = {"train_images": images, "image_size": size, "batch_size": batch}
    mine = json.dumps(recipe.replace(train_sizes=(), **changes).to_dict())
    command = [sys.executable, "-m", "benchmarks.steps"]
    done = subprocess.run(command, input=mine, stdout=subprocess.PIPE, text=True, check=True)
    return {"images": images, "image_size": size, "batch_size": batch, **json.loads(done.stdout.splitlines()[-1])}


def measure(recipe: Recipe) -> dict:
    """Seconds of an epoch of a recipe's steps in bf16, median of three, and the most memory this process has held."""
    keep_memory()
    images = torch.randint(0, 256, (recipe.train_images, 3, 32, 32), dtype=torch.uint8)  # what they show costs nothing
    loop = course_loop(recipe, Split(images, torch.arange(len(images)) % 10), "bf16")
    steps = recipe.train_images // recipe.batch_size
    speed = alternate({"course": loop}, recipe.batch_size, 3, steps)["course"]["images_per_second"]
    return {"epoch_seconds": recipe.train_images / speed, "peak_memory_mb": peak_memory_mb()}


def start_up(repeats: int = 3) -> dict:
    """Seconds to import the package beyond importing torch, and to load the cached dataset; medians."""
    beyond = "import time, torch; t = time.perf_counter(); import cifar_ft; print(time.perf_counter() - t)"
    everything = beyond.replace("import cifar_ft;", "import cifar_ft.training;")
    load = (
        "import time; from cifar_ft.data import load_cifar10; t = time.perf_counter(); "
        "load_cifar10(); print(time.perf_counter() - t)"
    )
    codes = {"import_cifar_ft": beyond, "import_cifar_ft_training": everything, "load_cached_dataset": load}
    return {name: statistics.median(_seconds(code) for _ in range(repeats)) for name, code in codes.items()}


def _seconds(code: str) -> float:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return float(done.stdout.splitlines()[-1])


def _endless(loader: Callable):
    while True:
        yield from loader()


if __name__ == "__main__":
    print(json.dumps(measure(Recipe.from_dict(json.load(sys.stdin)))))
