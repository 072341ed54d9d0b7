"""The browser of these tests: a Chromium on the PATH, else Debian's package, else Playwright's own download."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

import pytest

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
FLAGS = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]


def missing(what: str) -> None:
    """Skip, or fail where everything has to be tested."""
    if os.environ.get("CI") == "true":
        pytest.fail(f"{what}, and CI=true")
    pytest.skip(what)


def find_chromium() -> str | None:
    """The path of a Chromium: found, or installed as Debian's package."""
    found = next(filter(None, map(shutil.which, NAMES)), None)
    if found or not shutil.which("apt-get") or os.geteuid() != 0:
        return found
    attempt(["apt-get", "update"])
    attempt(["apt-get", "install", "-y", "--no-install-recommends", "chromium"])
    return shutil.which("chromium")


def attempt(command: list[str], seconds: float = 600) -> None:
    """Run a command that may fail or hang; what it was to bring is looked for afterwards."""
    environment = {**os.environ, "DEBIAN_FRONTEND": "noninteractive"}
    with suppress(subprocess.TimeoutExpired):
        subprocess.run(
            command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, timeout=seconds, check=False
        )


def launch(chromium):
    """The browser: a Chromium of the system, else Playwright's own, fetched once."""
    if path := find_chromium():
        return chromium.launch(executable_path=path, args=FLAGS)
    if not Path(chromium.executable_path).exists():
        attempt([sys.executable, "-m", "playwright", "install", "chromium"])
    return chromium.launch(args=FLAGS) if Path(chromium.executable_path).exists() else None
