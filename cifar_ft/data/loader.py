"""TODO data.loader"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Sampler

from cifar_ft.data.cifar10 import Split
from cifar_ft.recipes import Recipe


class EpochBatches(Sampler[Tensor]):
    """Batches of positions for one epoch, shuffled by (seed, epoch) alone and dealt out to the processes.

    The order depends on no earlier epoch and on no number of processes, so that a resumed or a distributed run sees the
    global batches of the plain one. Process `rank` of `world` takes every `world`-th element of each global batch. When
    training, a single image left over joins the batch before it: BatchNorm cannot be trained on one image. For the same
    reason a share of fewer than two images is filled up with others of its batch, behind those that count.

    Attributes
    ----------
    sizes : list of int
        Images in each global batch.
    """

    def __init__(
        self,
        n: int,
        batch_size: int,
        shuffle: bool,
        seed: int = 0,
        epoch: int = 0,
        rank: int = 0,
        world: int = 1,
    ):
        self.n, self.shuffle, self.seed, self.epoch = n, shuffle, seed, epoch
        self.rank, self.world = rank, world
        self.sizes = [min(batch_size, n - start) for start in range(0, n, batch_size)]
        if shuffle and len(self.sizes) > 1 and self.sizes[-1] == 1:
            self.sizes[-2:] = [self.sizes[-2] + 1]

    def __len__(self) -> int:
        return len(self.sizes)

    def __iter__(self) -> Iterator[Tensor]:
        for batch in self.order().split(self.sizes):
            yield batch[self.share(len(batch))]

    def order(self) -> Tensor:
        """Positions [n] in the order of this epoch."""
        if not self.shuffle:
            return torch.arange(self.n)
        return torch.randperm(self.n, generator=torch.Generator().manual_seed(epoch_seed(self.seed, self.epoch)))

    def share(self, size: int) -> Tensor:
        """Places in a global batch of `size` images that this process takes; those behind `counted(size)` only fill."""
        own = torch.arange(size)[self.rank :: self.world]
        if not self.shuffle or self.world == 1 or len(own) >= 2:
            return own
        others = torch.arange(size)
        return torch.cat([own, others[others % self.world != self.rank][: 2 - len(own)]])

    def counted(self, size: int) -> int:
        """Images of a global batch of `size` that count for this process."""
        return len(range(size)[self.rank :: self.world])


def epoch_seed(seed: int, epoch: int, step: int = 0) -> int:
    """One seed for each (seed, epoch, step), far apart, so that randomness needs no state to be resumed."""
    return int(np.random.SeedSequence((seed, epoch, step)).generate_state(1, np.uint64)[0] >> np.uint64(1))


def make_loader(
    split: Split, recipe: Recipe, *, train: bool = False, epoch: int = 0, rank: int = 0, world: int = 1
) -> DataLoader:
    """A DataLoader that yields `(images uint8 [B, 3, 32, 32], labels int64 [B])` on the split's device.

    With `train` the order is shuffled by (recipe.seed, epoch). No worker processes: the data is in memory.
    """
    batches = EpochBatches(len(split), recipe.batch_size, train, recipe.seed, epoch, rank, world)
    return DataLoader(split, batch_sampler=batches, collate_fn=_as_is, num_workers=0)


def _as_is(batch):
    return batch
