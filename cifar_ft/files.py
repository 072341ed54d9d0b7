"""Files and names: what every room needs and none owns.

Paths as people read them, files that are written whole or not at all, locks, digests, and "did you mean".
"""

from __future__ import annotations

import contextlib
import difflib
import hashlib
import os
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import platformdirs
from filelock import FileLock, Timeout
from tqdm import tqdm

from cifar_ft import CifarFtError, log

PACKAGE = Path(__file__).resolve().parent
ASSETS = PACKAGE / "assets"


class FileError(CifarFtError, RuntimeError):
    """A file or folder that cannot be written; what was there before is whole."""


def checkout() -> Path | None:
    """The repository's folder when the package runs from a checkout, else None."""
    return PACKAGE.parent if (PACKAGE.parent / "pyproject.toml").is_file() else None


def data_root(root: str | Path | None = None) -> Path:
    """The folder for data: `root`, else `$CIFAR_FT_DATA`, else the user's cache. It need not exist."""
    chosen = root or os.environ.get("CIFAR_FT_DATA")
    return Path(os.path.expanduser(chosen)) if chosen else platformdirs.user_cache_path("cifar_ft", appauthor=False)


def runs_root() -> Path:
    """Where runs are kept: $CIFAR_FT_RUNS, else `runs` beside the checkout's pyproject.toml, else ./runs."""
    if os.environ.get("CIFAR_FT_RUNS"):
        return Path(os.environ["CIFAR_FT_RUNS"]).expanduser()
    return (checkout() or Path()) / "runs"


def show_path(path: str | Path) -> str:
    """A path as text for people, the home directory shortened to `~`."""
    full = Path(os.path.abspath(os.path.expanduser(path)))
    with contextlib.suppress(ValueError, RuntimeError):  # outside of home; no home at all
        inside = full.relative_to(Path.home())
        return "~" if inside == Path(".") else f"~/{inside.as_posix()}"
    return str(full)


def one_line(text: object) -> str:
    """Text with all its white space folded into single spaces."""
    return " ".join(str(text).split())


def unknown(what: str, value: object, allowed: Iterable[object]) -> str:
    """The message for a name that is not allowed, with the nearest one that is."""
    names = {str(item).lower(): str(item) for item in allowed}
    near = difflib.get_close_matches(str(value).lower(), names, n=1, cutoff=0.5)
    hint = f" (did you mean {names[near[0]]!r}?)" if near else ""
    return f"unknown {what} {value!r}; choose from {', '.join(names.values())}{hint}"


def file_digest(path: Path, algorithm: str = "sha256") -> str:
    """The digest of a file as hex text."""
    digest = hashlib.new(algorithm, usedforsecurity=False)
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def check_target(path: str | os.PathLike) -> Path:
    """The real path of a file to write, links followed; FileError, as a wrong argument, where it cannot be one."""
    path = Path(os.path.realpath(os.path.expanduser(path)))
    problem = (
        "it is a folder" if path.is_dir() else "it is no regular file" if path.exists() and not path.is_file() else ""
    )
    if not path.parent.is_dir():
        problem = f"there is no folder {show_path(path.parent)}"
    if problem:
        error = FileError(f"cannot write {show_path(path)}: {problem}; choose another file")
        error.wrong_argument = True
        raise error
    return path


@contextlib.contextmanager
def replacing(path: str | os.PathLike, leftover: str = "") -> Iterator[Path]:
    """A temporary file that takes the place of `path` if nothing fails; a link stays, its target is replaced.

    With `leftover`, what an interruption or an error leaves of it is kept under the name with that ending; else it is
    removed.
    """
    path = check_target(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        yield temporary
        os.replace(temporary, path)
    except OSError as error:
        raise FileError(
            f"cannot write {show_path(path)}: {error.strerror or error}; make room or choose another folder"
        ) from error
    finally:
        with contextlib.suppress(OSError):
            if leftover and temporary.exists() and temporary.stat().st_size:
                os.replace(temporary, path.with_name(path.name + leftover))
            temporary.unlink(missing_ok=True)


def write_atomic(path: str | os.PathLike, data: bytes) -> Path:
    """Write a file, and the folders above it, so that readers see the old content or the new one, never a part.

    Raises
    ------
    FileError
        When the disk is full or the folder cannot be written; an earlier file stays whole.
    """
    path = Path(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise FileError(f"cannot write {show_path(path)}: {error.strerror}; choose another folder") from error
    with replacing(path) as temporary, open(temporary, "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    return path


@contextlib.contextmanager
def locked(path: Path, what: str) -> Iterator[None]:
    """Hold the lock file `path`, saying so once if another process has it. The lock ends with its process."""
    path.parent.mkdir(parents=True, exist_ok=True)
    lock = FileLock(path)
    try:
        lock.acquire(timeout=0)
    except Timeout:
        log.info(f"{what}: another process is fetching it into {show_path(path.parent)}, waiting for it")
        lock.acquire()
    try:
        yield
    finally:
        lock.release()


def progress(
    items: Iterable | None = None, label: str = "", file: Any = None, hidden: bool = False, **options: Any
) -> tqdm:
    """A bar for people, on a terminal or in a notebook; silent in a log file, and where there is no output at all."""
    file = sys.stderr if file is None else file
    notebook = getattr(sys.modules.get("IPython"), "get_ipython", lambda: None)() is not None
    watched = file is not None and (notebook or file.isatty())
    return tqdm(items, label or None, leave=False, disable=hidden or not watched, file=file, **options)
