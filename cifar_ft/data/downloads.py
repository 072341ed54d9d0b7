"""Bring a file here: over HTTP with `download`, which resumes, retries and verifies, or with the npm client.

No library keeps all of this. Measured against a local server, huggingface_hub takes 23 s to leave a host that refuses,
had not left a silent one after 100 s, starts over in the next process and accepts wrong bytes. By their code, pooch and
torch.hub do not resume.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import errno
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
from pathlib import Path

import requests
from tqdm import tqdm

from cifar_ft import CifarFtError, log
from cifar_ft.files import file_digest, one_line, progress

RETRIES = 3  # of a transfer that broke off or stalled
RETRY_PAUSE = 1.0  # seconds
NPM_START_SECONDS = 3.0  # what npm itself may take on top of the registry
NPM_PACK_SECONDS = 3600.0

FAILURES = {  # the first of these types in an error's chain of causes says what failed
    requests.exceptions.ProxyError: "the proxy refuses or cannot be reached",
    ssl.SSLCertVerificationError: "its certificate cannot be verified",
    requests.exceptions.SSLError: "no secure connection can be made",
    socket.gaierror: "its host name cannot be resolved",
    ConnectionRefusedError: "the connection is refused",
    ConnectionResetError: "the connection was closed without an answer",
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

    A host that sends nothing is left at once. A transfer that breaks off or stalls is resumed up to `RETRIES` times;
    after that `<target>.part` stays, and the next call resumes from it.

    Parameters
    ----------
    url, target : where from, where to.
    digest : "sha256:..." or "md5:...", the whole hex digest or its beginning; by default the SHA-256 that the
        Hugging Face hub announces (`X-Linked-ETag`), where there is one.
    label : name on the progress bar.

    Raises
    ------
    SourceError : a short reason, such as "HTTP 503".
    OSError : the file system refused; nothing is left over.
    """
    part, label, retries = target.with_name(target.name + ".part"), label or target.name, 0
    target.parent.mkdir(parents=True, exist_ok=True)
    start = _size(part)
    try:
        while True:
            resumed = part.exists()
            try:
                announced = _transfer(url, part, label)
            except SourceError as error:
                retries += 1
                if retries > RETRIES or _size(part) <= start:
                    raise
                log.info(f"{label}: {error}; trying again ({retries} of {RETRIES})")
                time.sleep(RETRY_PAUSE)
                continue
            algorithm, _, expected = (digest or f"sha256:{announced}").partition(":")
            got = file_digest(part, algorithm)
            if got.startswith(expected):
                os.replace(part, target)
                return target
            part.unlink()
            if not resumed:  # else the old beginning may be damaged, or of another version of the file
                raise SourceError(f"the file has the {algorithm.upper()} {got[:12]}... instead of {expected[:12]}...")
    except OSError:
        with contextlib.suppress(OSError):
            part.unlink(missing_ok=True)
        raise


def hub_url(repository: str, file: str) -> str:
    """The address of a file on the Hugging Face hub, or on the mirror named by `$HF_ENDPOINT`."""
    base = os.environ.get("HF_ENDPOINT") or "https://huggingface.co"
    return f"{base.rstrip('/')}/{repository}/resolve/main/{file}"


def _transfer(url: str, part: Path, label: str) -> str:
    """Append what is missing to `part`; return the SHA-256 that the server announced, or an empty text."""
    have = _size(part)
    response = _open(url, have)
    resumes = response.headers.get("Content-Range", "").startswith(f"bytes {have}-")
    if have and response.status_code in (206, 416) and not resumes:
        response.close()
        response = _open(url, 0)
    with response:
        if response.status_code not in (200, 206):
            raise SourceError(f"HTTP {response.status_code}")
        if "text/html" in response.headers.get("Content-Type", ""):
            raise SourceError("answers with a web page instead of the file")
        if response.status_code == 200:
            have = 0  # a server that ignores Range sends everything again
        length = response.headers.get("Content-Length", "")
        total = have + int(length) if length.isdigit() else None
        bar = progress(label=label, total=total, initial=have, unit="B", unit_scale=True)
        with open(part, "ab" if have else "wb") as file, bar:
            try:
                for block in response.iter_content(1 << 16):
                    bar.update(file.write(block))
                complete = total in (None, file.tell())
            except requests.RequestException:
                complete = False
        if not complete:
            of = f" of {total / 1e6:,.1f}" if total else ""
            raise SourceError(f"the transfer broke off after {_size(part) / 1e6:,.1f}{of} MB")
        linked = [r.headers.get("X-Linked-ETag", "").strip('W/"') for r in (*response.history, response)]
    return next((text for text in linked if re.fullmatch("[0-9a-f]{64}", text)), "")


def _open(url: str, have: int) -> requests.Response:
    """Open `url` in a thread: no time-out of `requests` covers name look-up and several addresses."""
    headers = {"Accept-Encoding": "identity"} | ({"Range": f"bytes={have}-"} if have else {})
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
        raise SourceError(f"no answer within {seconds:g} s") from None
    except Exception as error:
        raise SourceError(_reason(error)) from error


def _reason(error: BaseException) -> str:
    """What failed, judged by types: the texts hold the address, in which any word can stand."""
    chain = [error]
    while cause := chain[-1].__cause__ or chain[-1].__context__:
        chain.append(cause)
    for kind, reason in FAILURES.items():
        if any(isinstance(link, kind) for link in chain):
            return reason
    if any(getattr(link, "errno", None) in (errno.ENETUNREACH, errno.EHOSTUNREACH) for link in chain):
        return "the network is unreachable"
    return f"{type(error).__name__}: {one_line(error)[:120]}"


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
        code = re.search(rb"npm (?:ERR!|error) code (\S+)", said.read())
    if process.returncode:
        why = code[1].decode(errors="replace") if code else f"exit status {process.returncode}"
        raise SourceError(f"npm {command[1]} failed ({why})")


def _size(path: Path) -> int:
    """Bytes in a file, 0 where there is none."""
    try:
        return path.stat().st_size
    except FileNotFoundError:
        return 0
