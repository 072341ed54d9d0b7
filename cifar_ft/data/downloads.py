"""Bring a file here: over HTTP with `download`, which resumes, retries and verifies, or with the npm client.

No library keeps all of this. Measured against a local server, huggingface_hub takes 23 s to leave a host that refuses,
had not left a silent one after 100 s, starts over in the next process and accepts wrong bytes. By their code, pooch and
torch.hub do not resume.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import errno
import gzip
import http.client
import os
import re
import shutil
import signal
import socket
import ssl
import subprocess
import tempfile
import threading
import time
import zlib
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import quote

import requests
import urllib3
from tqdm import tqdm

from cifar_ft import CifarFtError, log
from cifar_ft.files import file_digest, one_line, progress

RETRIES = 3  # in a row, of a transfer that broke off or stalled before it brought `WORTH` more
WORTH = 250_000  # bytes
RETRY_PAUSE = 1.0  # seconds
BLOCK = 1 << 13  # bytes; what a stall in the middle of a block costs, too
NPM_START_SECONDS = 3.0  # what npm itself may take on top of the registry
NPM_PACK_SECONDS = 3600.0

UNRESOLVED, REFUSED = "its host name cannot be resolved", "the connection is refused"
CLOSED, UNREACHABLE = "the connection was closed without an answer", "the network is unreachable"
NO_ANSWER, UNVERIFIED = "no answer", "its certificate cannot be verified"
FOREIGN = "its certificate is signed by nobody known here (a proxy on the way? name its file in {})"
OUTDATED = "its certificate is not valid at this time (is this machine's clock right?)"
WEB_PAGE = "answers with a web page instead of the file (does this network want a login first?)"
FAILURES = {  # the first of these types in an error's chain of causes says what failed
    requests.exceptions.SSLError: "no secure connection can be made",
    socket.gaierror: UNRESOLVED,
    ConnectionRefusedError: REFUSED,
    ConnectionError: CLOSED,
    TimeoutError: NO_ANSWER,
    http.client.HTTPException: "answers with something other than HTTP",
}
CERTIFICATES = {  # by OpenSSL's codes
    **dict.fromkeys((9, 10), OUTDATED),
    **dict.fromkeys((2, 18, 19, 20, 21), FOREIGN.format("REQUESTS_CA_BUNDLE")),
    **dict.fromkeys((62, 64), "its certificate is that of another host"),
}
STATUS = {
    401: "it wants a login",
    403: "it refuses access",
    404: "the file is not there",
    407: "the proxy wants a user name and a password in HTTPS_PROXY",
    410: "the file is no longer there",
    429: "too many requests, try again later",
    451: "it may not be given out here",
}
NPM_CODES = {
    **dict.fromkeys(("ENOTFOUND", "EAI_AGAIN"), UNRESOLVED),
    "ECONNREFUSED": REFUSED,
    "ECONNRESET": CLOSED,
    **dict.fromkeys(("ENETUNREACH", "EHOSTUNREACH"), UNREACHABLE),
    **dict.fromkeys(("ETIMEDOUT", "ESOCKETTIMEDOUT", "ERR_SOCKET_TIMEOUT"), NO_ANSWER),
    **dict.fromkeys(
        ("SELF_SIGNED_CERT_IN_CHAIN", "DEPTH_ZERO_SELF_SIGNED_CERT", "UNABLE_TO_GET_ISSUER_CERT_LOCALLY"),
        FOREIGN.format("NODE_EXTRA_CA_CERTS"),
    ),
    "UNABLE_TO_VERIFY_LEAF_SIGNATURE": UNVERIFIED,
    **dict.fromkeys(("CERT_HAS_EXPIRED", "CERT_NOT_YET_VALID"), OUTDATED),
    "ENOSPC": "no space left on the disk",
    **dict.fromkeys(("EACCES", "EPERM", "EROFS"), "npm may not write to its folders"),
}


class SourceError(CifarFtError, RuntimeError):
    """A file could not be fetched, read, verified or stored; the message says why and what to do."""


def patience() -> float:
    """Seconds for which a host may be silent, before it answers and during a transfer: `$CIFAR_FT_PATIENCE`, else 5."""
    text = os.environ.get("CIFAR_FT_PATIENCE") or "5"
    with contextlib.suppress(ValueError):
        if 0 < float(text) < threading.TIMEOUT_MAX:
            return float(text)
    raise SourceError(f"CIFAR_FT_PATIENCE={text!r} is no time; give a number of seconds, such as 5")


def download(url: str, target: Path, digest: str = "", label: str = "") -> Path:
    """Fetch `url` into `target`, which appears only when complete and verified.

    A host that sends nothing is left at once. A transfer that breaks off or stalls is resumed as long as it gets on,
    and `RETRIES` times in a row otherwise; after that `<target>.part` stays, and the next call resumes from it.

    Parameters
    ----------
    url, target : where from, where to.
    digest : "sha256:..." or "md5:...", the whole hex digest or its beginning; by default the SHA-256 that the
        Hugging Face hub announces (`X-Linked-ETag`), where there is one.
    label : name on the progress bar.

    Raises
    ------
    SourceError : a short reason, such as "HTTP 404 (the file is not there)".
    OSError : the file system refused; nothing is left over.
    """
    part, label = _Part(target.with_name(target.name + ".part"), digest), label or target.name
    target.parent.mkdir(parents=True, exist_ok=True)
    retries, again = 0, False
    try:
        while True:
            before = _size(part.path)
            try:
                _transfer(url, part, label)
            except SourceError as error:
                retries = 1 if _size(part.path) - before >= WORTH else retries + 1
                if retries > RETRIES or not part.came:
                    if not _size(part.path):
                        part.path.unlink(missing_ok=True)
                    raise
                log.info(f"{label}: {error}; trying again ({retries} of {RETRIES})")
                time.sleep(RETRY_PAUSE)
                continue
            if not (wrong := part.verify()):
                os.replace(part.path, target)
                return target
            part.path.unlink()
            if again or not before:  # else the old beginning may be damaged, or of another version of the file
                raise SourceError(wrong)
            again = True
    except OSError:
        with contextlib.suppress(OSError):
            part.path.unlink(missing_ok=True)
        raise


@dataclass
class _Part:
    """What came of a file so far: the bytes as they were sent, which sizes and ranges count."""

    path: Path
    digest: str  # of the file, "algorithm:hex"; "" as long as nobody has said it
    etag: str = ""  # of the version that was begun, where the server gives one; an earlier call's is not known
    encoding: str = ""  # gzip, where the server compresses although it was asked not to
    came: int = 0  # bytes in this call

    def continues(self, response: requests.Response) -> bool:
        """Whether an answer goes on where this ends, with the same version of the file."""
        etag, have = _strong_etag(response), _size(self.path)
        other = etag and etag != self.etag and (self.etag or not self.digest)
        return not other and response.headers.get("Content-Range", "").startswith(f"bytes {have}-")

    def verify(self) -> str:
        """What is wrong with the whole file, or an empty text; what was compressed on the way is unpacked."""
        algorithm, _, expected = self.digest.partition(":")
        got = file_digest(self.path, algorithm or "sha256")
        # servers also call an archive that is a .gz itself encoded
        if self.encoding and not (expected and got.startswith(expected)):
            unpacked = self.path.with_name(self.path.name + ".unpacked")
            try:
                with gzip.open(self.path) as packed, open(unpacked, "wb") as file:
                    shutil.copyfileobj(packed, file)
                os.replace(unpacked, self.path)
            except (gzip.BadGzipFile, EOFError, zlib.error):
                return "the file was sent as gzip and cannot be unpacked"
            finally:
                unpacked.unlink(missing_ok=True)
            got = file_digest(self.path, algorithm or "sha256")
        fits = got.startswith(expected)
        return "" if fits else f"the file has the {algorithm.upper()} {got[:12]}... instead of {expected[:12]}..."


def hub_url(repository: str, file: str) -> str:
    """The address of a file on the Hugging Face hub, or on the mirror named by `$HF_ENDPOINT`."""
    base = os.environ.get("HF_ENDPOINT") or "https://huggingface.co"
    return f"{base.rstrip('/')}/{quote(repository)}/resolve/main/{quote(file)}"


def _transfer(url: str, part: _Part, label: str) -> None:
    """Append to `part` what is missing."""
    have = _size(part.path)
    response = _open(url, have, part.etag)
    linked = [r.headers.get("X-Linked-ETag", "").strip('W/"') for r in (*response.history, response)]
    announced = next((f"sha256:{text}" for text in linked if re.fullmatch("[0-9a-f]{64}", text)), "")
    part.digest = part.digest or announced
    if have and response.status_code in (206, 416) and not part.continues(response):
        response.close()
        response = _open(url, 0)
    with response:
        if response.status_code not in (200, 206):
            raise SourceError(_status(response.status_code))
        if "text/html" in response.headers.get("Content-Type", ""):
            raise SourceError(WEB_PAGE)
        encoding = response.headers.get("Content-Encoding", "").lower().removeprefix("x-").replace("identity", "")
        if encoding not in ("", "gzip"):
            raise SourceError(f"sends the file compressed with {encoding}, although it was asked not to")
        if response.status_code == 200:
            have = 0  # a server that ignores Range, or has another version, sends everything again
        total = _total(response)
        bar, broken = progress(label=label, total=total, initial=have, unit="B", unit_scale=True), True
        with open(part.path, "ab") as file, bar, contextlib.suppress(urllib3.exceptions.HTTPError):
            for block in response.raw.stream(BLOCK, decode_content=False):
                if not have:  # only now, so that what came before survives an answer without a file
                    if re.match(rb"(\xef\xbb\xbf)?\s*<(!doctype html|html)\b", block, re.IGNORECASE):
                        raise SourceError(WEB_PAGE)
                    if file.tell():
                        file.truncate(0)
                    part.etag = _strong_etag(response)
                part.encoding = encoding
                file.write(block)
                bar.update(len(block))
                have += len(block)
                part.came += len(block)
            broken = False
        if broken or not have or total not in (None, have):
            of = f" of {total / 1e6:,.1f}" if total else ""
            raise SourceError(f"the transfer broke off after {have / 1e6:,.1f}{of} MB")


def _strong_etag(response: requests.Response) -> str:
    """The name of the version that was sent, where it stands for the same bytes."""
    etag = response.headers.get("ETag", "")
    return "" if etag.startswith("W/") else etag


def _total(response: requests.Response) -> int | None:
    """Bytes of the whole file as it is sent."""
    if response.status_code == 206:
        length = response.headers.get("Content-Range", "").rpartition("/")[2]
    else:
        length = response.headers.get("Content-Length", "")
    return int(length) if length.isdigit() else None


def _open(url: str, have: int, etag: str = "") -> requests.Response:
    """Open `url` in a thread: no time-out of `requests` covers name look-up and several addresses."""
    headers = {"Accept-Encoding": "identity"}
    if have:
        headers |= {"Range": f"bytes={have}-"} | ({"If-Range": etag} if etag else {})
    seconds, answer = patience(), concurrent.futures.Future()

    def ask() -> None:
        try:
            answer.set_result(requests.get(url, headers=headers, stream=True, timeout=seconds))
        except Exception as error:
            answer.set_exception(error)

    threading.Thread(target=ask, daemon=True).start()
    try:
        return answer.result(seconds)
    except (concurrent.futures.TimeoutError, requests.Timeout):
        answer.add_done_callback(lambda late: late.exception() or late.result().close())
        raise SourceError(f"{NO_ANSWER} within {seconds:g} s (CIFAR_FT_PATIENCE=60 waits longer)") from None
    except Exception as error:
        raise SourceError(_reason(error)) from error


def _status(code: int) -> str:
    """An HTTP status, and what it means for whoever wants the file."""
    meaning = STATUS.get(code, "a fault of the server, try again later" if code >= 500 else "")
    return f"HTTP {code}" + (f" ({meaning})" if meaning else "")


def _reason(error: BaseException) -> str:
    """What failed, judged by types: the texts hold the address, in which any word can stand."""
    chain = [error]
    while cause := chain[-1].__cause__ or chain[-1].__context__:
        chain.append(cause)
    if isinstance(error, requests.exceptions.ProxyError):
        # http.client has no type for this answer, and no address in its text
        refusals = (re.match(r"Tunnel connection failed: (\d{3})\b", str(link)) for link in chain)
        code = next((int(refusal[1]) for refusal in refusals if refusal), None)
        return f"the proxy answers {_status(code)}" if code else f"the proxy cannot be used: {_cause(chain)}"
    return _cause(chain)


def _cause(chain: list[BaseException]) -> str:
    for link in chain:
        if isinstance(link, ssl.SSLCertVerificationError):
            return CERTIFICATES.get(getattr(link, "verify_code", None), UNVERIFIED)
    for kind, reason in FAILURES.items():
        if any(isinstance(link, kind) for link in chain):
            return reason
    if any(getattr(link, "errno", None) in (errno.ENETUNREACH, errno.EHOSTUNREACH) for link in chain):
        return UNREACHABLE
    return f"{type(chain[0]).__name__}: {one_line(chain[0])[:120]}"


def npm_pack(package: str, target: Path, size: int) -> Path:
    """Fetch the archive of an npm package with the `npm` client.

    Parameters
    ----------
    package : "name@version".
    target : where the .tgz goes; the npm cache used on the way stands beside it and is removed.
    size : expected size in bytes, for the progress bar.
    """
    npm = shutil.which("npm")
    if npm is None:
        raise SourceError("npm is not on the PATH")
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="npm-", dir=target.parent, ignore_cleanup_errors=True) as folder:
        work = Path(folder)
        options = [f"--cache={work / 'cache'}", "--loglevel=error", "--no-update-notifier", "--ignore-scripts"]
        # a small question first, so that a silent registry is left within seconds
        ask = [npm, "view", package, "dist.shasum", "--fetch-retries=0", f"--fetch-timeout={1000 * patience():.0f}"]
        _npm(ask + options, work, patience() + NPM_START_SECONDS)
        fetch = [npm, "pack", package, f"--fetch-retries={RETRIES}", "--fetch-retry-mintimeout=1000"]
        with progress(label=package, total=size, unit="B", unit_scale=True) as bar:
            _npm([*fetch, "--fetch-timeout=60000", *options], work, NPM_PACK_SECONDS, bar)
        packed = next(work.glob("*.tgz"), None)
        if packed is None:
            raise SourceError("npm pack left no archive")
        return packed.replace(target)


def _npm(command: list[str], folder: Path, seconds: float, bar: tqdm | None = None) -> None:
    deadline, own_group = time.monotonic() + seconds, {"start_new_session": True}  # its children end with it
    with open(folder / "npm.log", "w+b") as said:
        streams = {"stdin": subprocess.DEVNULL, "stdout": said, "stderr": said}
        try:
            process = subprocess.Popen(command, cwd=folder, **streams, **own_group)
        except OSError as error:
            raise SourceError(f"npm cannot be started ({error.strerror})") from error
        try:
            while process.poll() is None:
                if time.monotonic() > deadline:
                    raise SourceError(f"npm {command[1]} gave no result within {seconds:g} s")
                if bar is not None:
                    bar.update(min(sum(map(_size, folder.rglob("*"))), bar.total) - bar.n)
                time.sleep(0.1)
        finally:
            if process.poll() is None and os.name == "nt":
                subprocess.run(["taskkill", "/T", "/F", "/PID", str(process.pid)], capture_output=True)
            elif process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        said.seek(0)
        found = re.search(rb"npm (?:ERR!|error) code (\S+)", said.read())
    if process.returncode:
        code = found[1].decode(errors="replace") if found else f"exit status {process.returncode}"
        why = _status(int(code[1:])) if re.fullmatch(r"E\d{3}", code) else NPM_CODES.get(code)
        raise SourceError(f"npm {command[1]} failed ({f'{code}: {why}' if why else code})")


def _size(path: Path) -> int:
    """Bytes in a file, 0 where there is none."""
    try:
        return path.stat().st_size
    except FileNotFoundError:
        return 0
