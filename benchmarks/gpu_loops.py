"""Images a second on a GPU: the course's loop beside others, in turns."""

from __future__ import annotations

import itertools
import time
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader

from benchmarks.gpu_works import WORKS, begin, free, random_split, steps
from cifar_ft import models, transforms
from cifar_ft.data import Split
from cifar_ft.recipes import Recipe
from cifar_ft.training import Replay


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
