"""Training batches: shuffled by seed and epoch alone, shared among processes.

The whole dataset is in memory, so a batch is one gather by index, and no worker process is needed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from cifar_ft.data.cifar10 import Split, to_device
from cifar_ft.recipes import Recipe

Draw = Callable[[int, int, torch.Generator], tuple[Tensor, ...]]


@dataclass(frozen=True)
class Batch:
    """This process's share of a global batch.

    Attributes
    ----------
    images : uint8 Tensor [B, 3, 32, 32]
    labels : int64 Tensor [C]
        Of the first C images, those that count; the others only fill a share that is too small for BatchNorm.
    draws : tuple of Tensors [B, ...]
        What `draw` drew for these images.
    global_size : int
        Images of the global batch.
    """

    images: Tensor
    labels: Tensor
    draws: tuple[Tensor, ...]
    global_size: int


class TrainLoader:
    """The batches of one training epoch, for one of `world` processes.

    The order depends on (seed, epoch) alone, so that a resumed or a distributed run sees the same global batches as a
    plain one. Process `rank` takes every `world`-th image of each. A single image that would be left over joins the
    batch before it, and a share of a single image is filled up with others: BatchNorm cannot be trained on one image.

    Parameters
    ----------
    draw : function of a number of images, `recipe.crop_padding` and a generator
        Draws the augmentation of a global batch, as `transforms.draw` does. It is drawn for a whole epoch before its
        first step and brought to the images' device at once, so that a GPU is not waited for at each step.

    Attributes
    ----------
    sizes : list of int
        Images in each global batch; their number is the number of steps.
    start : int
        Steps that are left out, since they were trained before the run was resumed.
    """

    def __init__(self, split: Split, recipe: Recipe, draw: Draw, epoch: int = 0, rank: int = 0, world: int = 1):
        self.split, self.seed, self.padding, self.draw = split, recipe.seed, recipe.crop_padding, draw
        self.epoch, self.rank, self.world, self.start, n = epoch, rank, world, 0, len(split)
        self.sizes = [min(recipe.batch_size, n - first) for first in range(0, n, recipe.batch_size)]
        if len(self.sizes) > 1 and self.sizes[-1] == 1:
            self.sizes[-2:] = [self.sizes[-2] + 1]

    def __len__(self) -> int:
        return len(self.sizes)

    def __iter__(self) -> Iterator[Batch]:
        # Which images of the epoch each batch holds, how many of them count, and their augmentation.
        members, counts, draws = [], [], []
        for step, batch in enumerate(self.order().split(self.sizes)):
            if step >= self.start:
                places, counted = self._share(len(batch))
                generator = torch.Generator().manual_seed(epoch_seed(self.seed, self.epoch, step + 1))
                draws.append([values[places] for values in self.draw(len(batch), self.padding, generator)])
                members.append(batch[places])
                counts.append(counted)
        shares = [len(batch) for batch in members]
        epoch = [members, *zip(*draws, strict=True)]
        epoch = [to_device(torch.cat(values), self.split.images.device).split(shares) for values in epoch]
        for size, counted, batch, *drawn in zip(self.sizes[self.start :], counts, *epoch, strict=True):
            images, labels = self.split[batch]
            yield Batch(images, labels[:counted], tuple(drawn), size)

    def order(self) -> Tensor:
        """Positions [N] in the split, in the order of this epoch."""
        generator = torch.Generator().manual_seed(epoch_seed(self.seed, self.epoch))
        return torch.randperm(len(self.split), generator=generator)

    def _share(self, size: int) -> tuple[Tensor, int]:
        """Places in a global batch that this process takes, and how many of them count; the rest fill it up."""
        everyone = torch.arange(size)
        own = everyone[self.rank :: self.world]
        others = everyone[everyone % self.world != self.rank]
        return torch.cat([own, others[: max(0, 2 - len(own))]]), len(own)


def epoch_seed(seed: int, epoch: int, step: int = 0) -> int:
    """One seed for each (seed, epoch, step), far apart, so that randomness needs no state to be resumed."""
    return int(np.random.SeedSequence((seed, epoch, step)).generate_state(1, np.uint64)[0] >> np.uint64(1))
