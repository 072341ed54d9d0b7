"""Training batches: shuffled by seed and epoch alone, shared among processes, cut into micro-batches.

The whole dataset is in memory, so a batch is one gather by index, and no worker process is needed.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from cifar_ft.data.cifar10 import Split, to_device
from cifar_ft.recipes import Recipe


@dataclass(frozen=True)
class Batch:
    """This process's share of a global batch; with gradient accumulation, a micro-batch of that share.

    Attributes
    ----------
    images : uint8 Tensor [B, 3, 32, 32]
    labels : int64 Tensor [C]
        Of the first C images, those that count; the others only fill a share that is too small for BatchNorm.
    global_size : int
        Images of the global batch.
    places : int64 Tensor [B]
        Which images of the global batch these are.
    seed : int
        Of the global batch's augmentation.
    last : bool
        Whether it is the last micro-batch of its step.
    """

    images: Tensor
    labels: Tensor
    global_size: int
    places: Tensor
    seed: int
    last: bool = True

    @property
    def generator(self) -> torch.Generator:
        """Fresh randomness for the global batch, the same on every process and after a resume."""
        return torch.Generator().manual_seed(self.seed)

    def share(self, values: Tensor) -> Tensor:
        """Of values that were drawn for the global batch, those of these images, on their device."""
        return to_device(values[self.places], self.images.device)


class TrainLoader:
    """The batches of one training epoch, for one of `world` processes.

    The order depends on (seed, epoch) alone, so that a resumed or a distributed run sees the same global batches as a
    plain one. Process `rank` takes every `world`-th image of each. A single image that would be left over joins the
    batch before it, and a share of a single image is filled up with others: BatchNorm cannot be trained on one image.

    Attributes
    ----------
    sizes : list of int
        Images in each global batch; their number is the number of steps.
    start : int
        Steps that are left out, since they were trained before the run was resumed.
    accumulation : int
        Micro-batches that each share is cut into.
    """

    def __init__(self, split: Split, recipe: Recipe, epoch: int = 0, rank: int = 0, world: int = 1):
        self.split, self.seed, self.epoch, self.rank, self.world = split, recipe.seed, epoch, rank, world
        self.start, self.accumulation, n = 0, recipe.accumulation, len(split)
        self.sizes = [min(recipe.batch_size, n - first) for first in range(0, n, recipe.batch_size)]
        if len(self.sizes) > 1 and self.sizes[-1] == 1:
            self.sizes[-2:] = [self.sizes[-2] + 1]

    def __len__(self) -> int:
        return len(self.sizes)

    def __iter__(self) -> Iterator[Batch]:
        for step, members in enumerate(self.order().split(self.sizes)):
            if step < self.start:
                continue
            places, counted = self._share(len(members))
            images, labels = self.split[members[places]]
            cuts = max(1, min(self.accumulation, len(places) // 2))
            seed, done = epoch_seed(self.seed, self.epoch, step + 1), 0
            for part in places.tensor_split(cuts):
                rows = slice(done, done + len(part))
                done += len(part)
                micro_labels = labels[:counted][rows]
                yield Batch(images[rows], micro_labels, len(members), part, seed, last=done == len(places))

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
