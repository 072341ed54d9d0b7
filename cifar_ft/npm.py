"""Fetch a package with the npm client, which knows the user's registry and proxy."""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import signal
import subprocess
import tempfile
import time
from pathlib import Path

from tqdm import tqdm

from cifar_ft.downloads import SourceError, progress_bar

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
        with progress_bar(package, size) as bar:
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
