"""Files and names: what every room needs and none owns.

Paths as people read them, files that are written whole or not at all, locks, digests, and "did you mean".
"""

from __future__ import annotations

import contextlib
import difflib
import hashlib
import os
import re
import shlex
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
FOLDER_VARIABLES = ("CIFAR_FT_DATA", "CIFAR_FT_RUNS", "TORCH_HOME")
ADDRESS = re.compile(r"[A-Za-z][\w+.-]*:[\\/]")  # s3://bucket, and C:\x where there are no drives
# Control characters, line separators, what turns the direction of writing, and bytes that are no text.
UNPRINTABLE = re.compile("[\0-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069\udc80-\udcff]")


class FileError(CifarFtError, RuntimeError):
    """A file or folder that cannot be written; what was there before is whole."""


def checkout() -> Path | None:
    """The repository's folder when the package runs from a checkout, else None."""
    return PACKAGE.parent if (PACKAGE.parent / "pyproject.toml").is_file() else None


def full_path(path: str | os.PathLike, what: str = "path") -> Path:
    """The absolute path of what a person gave, with `~` and `~user` as their homes.

    Every path is made full once, where it enters: later the current folder, or whoever reads the path, may be another.

    Raises
    ------
    FileError
        As a wrong argument: for an empty path, an address, or the home of somebody unknown; `what` names it.
    """
    given = os.fsdecode(path)
    text = os.path.expanduser(given)
    problem = ""
    if not given.strip():
        problem = "it is empty; name a file or folder"
    elif ADDRESS.match(text) and not os.path.isabs(text):
        problem = "it is an address or another system's path; name a file or folder of this machine"
    elif text.lstrip().startswith("~"):
        problem = f"there is no such home folder; write it in full, or ./{given} for a name that begins with ~"
    if problem and not (given.strip() and os.path.lexists(text)):
        error = FileError(f"{what} {given!r}: {problem}")
        error.wrong_argument = True
        raise error
    # `link/..` is the folder above the link's target, which abspath does not know
    return Path(os.path.realpath(text) if ".." in Path(text).parts else os.path.abspath(text))


def folder_variable(name: str) -> Path | None:
    """The folder that an environment variable names, if any; `set NAME="C:\\x"` leaves the quotes in its value."""
    value = re.sub(r"^(['\"])(.*)\1$", r"\2", os.environ.get(name, "").strip())
    return full_path(value, name) if value.strip() else None


def folder_variables() -> dict[str, str]:
    """Those that are set, in full: for a process that works in another folder."""
    found = ((name, folder_variable(name)) for name in FOLDER_VARIABLES)
    return {name: str(folder) for name, folder in found if folder}


def data_root(root: str | Path | None = None) -> Path:
    """The folder for data: `root`, else `$CIFAR_FT_DATA`, else the user's cache. It need not exist."""
    default = platformdirs.user_cache_path("cifar_ft", appauthor=False)
    return full_path(root) if root else folder_variable("CIFAR_FT_DATA") or default


def runs_root() -> Path:
    """Where runs are kept: $CIFAR_FT_RUNS, else `runs` beside the checkout's pyproject.toml, else ./runs."""
    return folder_variable("CIFAR_FT_RUNS") or (checkout() or Path.cwd()) / "runs"


def show_path(path: str | Path) -> str:
    """A path for people to read, the home directory shortened to `~`: neither data nor part of a command."""
    full = os.path.abspath(os.path.expanduser(path))
    with contextlib.suppress(ValueError, RuntimeError):  # outside of home; no home at all
        inside = Path(full).relative_to(Path.home())
        full = "~" if inside == Path(".") else f"~/{inside.as_posix()}"
    return printable(full)


def printable(text: str) -> str:
    """Text from elsewhere, such as a file's name, that does nothing to a terminal but be shown."""
    return UNPRINTABLE.sub(_escaped, text)


def command(*words: object) -> str:
    """`python -m cifar_ft` with these words as a line to type, quoted as the platform's shell wants it."""
    return " ".join(map(_quoted, ["python", "-m", "cifar_ft", *map(str, words)]))


def _quoted(word: str) -> str:
    if os.name == "nt":  # where no name holds a quote
        return word if re.fullmatch(r"[\w\\/:.=+-]+", word) else f'"{word}"'
    if not UNPRINTABLE.search(word):
        return shlex.quote(word)
    return "$'" + UNPRINTABLE.sub(_escaped, re.sub(r"([\\'])", r"\\\1", word)) + "'"


def _escaped(found: re.Match) -> str:
    return "".join(f"\\x{byte:02x}" for byte in found[0].encode(errors="surrogateescape"))


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
    path = Path(os.path.realpath(full_path(path)))
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
    path = full_path(path)
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
    gone = file is None or getattr(file, "closed", False)
    watched = not gone and (notebook or file.isatty())
    return tqdm(items, label or None, leave=False, disable=hidden or not watched, file=file, **options)
