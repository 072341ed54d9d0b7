"""Bring a file here over HTTP: resumable, verified, quick to leave a silent host.

It knows nothing of what is inside a file; `sources` and `weights` do, and raise the same `SourceError`.
"""

from __future__ import annotations

import contextlib
import difflib
import hashlib
import os
import queue
import re
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import platformdirs
import requests
from filelock import FileLock, Timeout
from tqdm import tqdm

from cifar_ft import CifarFtError

ANSWER_SECONDS = 5.0  # what a silent host costs, name look-up and every address it has included
STALL_SECONDS = 5.0  # how long a transfer may pause before it counts as broken


class SourceError(CifarFtError, RuntimeError):
    """A file could not be fetched, read, verified or stored; the message says why and what to do."""


def show_path(path: str | Path) -> str:
    """Return `path` as text for people, the home directory shortened to `~`."""
    full = Path(os.path.abspath(os.path.expanduser(path)))
    with contextlib.suppress(ValueError, RuntimeError):  # outside of home; no home at all
        inside = full.relative_to(Path.home())
        return "~" if inside == Path(".") else f"~/{inside.as_posix()}"
    return str(full)


def data_root(root: str | Path | None = None) -> Path:
    """Return the folder for data: `root`, else `$CIFAR_FT_DATA`, else the user's cache. It need not exist."""
    chosen = root or os.environ.get("CIFAR_FT_DATA")
    return Path(os.path.expanduser(chosen)) if chosen else platformdirs.user_cache_path("cifar_ft", appauthor=False)


def check_name(kind: str, name: str, allowed: tuple[str, ...]) -> None:
    """Raise a `SourceError` with the nearest allowed name unless `name` is one of `allowed`."""
    if name not in allowed:
        near = difflib.get_close_matches(str(name), allowed, n=1)
        hint = f" (did you mean {near[0]!r}?)" if near else ""
        raise SourceError(f"unknown {kind} {name!r}; choose from {', '.join(allowed)}{hint}")


def file_digest(path: Path, algorithm: str = "sha256") -> str:
    """Return the digest of a file as hex text."""
    digest = hashlib.new(algorithm, usedforsecurity=False)
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


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


@contextlib.contextmanager
def locked(path: Path, what: str, echo: Callable[[str], object]) -> Iterator[None]:
    """Hold the lock file `path`, saying so once if another process has it. The lock ends with its process."""
    path.parent.mkdir(parents=True, exist_ok=True)
    lock = FileLock(path)
    try:
        lock.acquire(timeout=0)
    except Timeout:
        echo(f"{what}: another process is fetching it into {show_path(path.parent)}, waiting for it")
        lock.acquire()
    try:
        yield
    finally:
        lock.release()


def progress_bar(label: str, total: int | None) -> tqdm:
    """Return a byte counter on stderr that is silent where nobody watches (no terminal, no notebook)."""
    notebook = getattr(sys.modules.get("IPython"), "get_ipython", lambda: None)() is not None
    watched = notebook or (sys.stderr is not None and sys.stderr.isatty())
    return tqdm(
        total=total,
        desc=label,
        unit="B",
        unit_scale=True,
        file=sys.stderr,
        leave=False,
        mininterval=0.5,
        disable=not watched,
    )


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
        with open(part, "ab" if have else "wb") as file, progress_bar(label or part.stem, total) as bar:
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
