"""One browser, one JupyterLab and one server of the app for all tests in this folder, with settings of their own.

Where no browser can be had the tests are skipped and say so; with CI=true that is a failure. Every test leaves a
screenshot in build/screenshots.
"""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from driving import ROOT, SCREENSHOTS
from finding import launch, missing
from PIL import Image

from cifar_ft.files import ASSETS


@pytest.fixture(scope="session")
def browser():
    """One browser for all tests."""
    try:
        from playwright.sync_api import expect, sync_playwright
    except ImportError:
        missing("Playwright is not installed; pip install playwright")
    expect.set_options(timeout=60_000)  # a machine may be busy
    with sync_playwright() as playwright:
        browser = launch(playwright.chromium)
        if browser is None:
            missing("no browser: there is no Chromium here, and none could be installed")
        yield browser
        browser.close()


@pytest.fixture(scope="session")
def open_page(browser):
    """Open an address in a profile of its own."""

    def open_page(url: str):
        page = browser.new_context(viewport={"width": 1200, "height": 1500}).new_page()
        page.set_default_timeout(60_000)
        page.errors = []
        page.on("pageerror", lambda error: page.errors.append(str(error)))
        page.goto(url, wait_until="domcontentloaded")
        return page

    return open_page


@pytest.fixture
def photograph(request):
    """Keep a picture of each page in this list at the end of the test."""
    pages = []
    yield pages
    SCREENSHOTS.mkdir(parents=True, exist_ok=True)
    for number, page in enumerate(pages, start=1):
        page.screenshot(path=SCREENSHOTS / f"{request.node.name}{f'_{number}' if number > 1 else ''}.png")


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@contextmanager
def running(command: list, environment: dict, cwd: Path):
    """A process with its output in `.lines`; ended at the end, whatever happens."""
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    environment = {**os.environ, "PYTHONPATH": path, **{name: str(value) for name, value in environment.items()}}
    process = subprocess.Popen(
        command, env=environment, cwd=cwd, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    process.lines = []
    reader = threading.Thread(target=lambda: process.lines.extend(process.stdout), daemon=True)
    reader.start()
    try:
        yield process
    finally:
        process.terminate()
        try:
            process.wait(timeout=30)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        reader.join(timeout=5)


def wait_until(condition, process, seconds: float = 120) -> None:
    """Wait for a server to be up; fail with its output if it is not."""
    deadline = time.monotonic() + seconds
    while not condition():
        if process.poll() is not None or time.monotonic() > deadline:
            pytest.fail("the server did not come up:\n" + "".join(process.lines))
        time.sleep(0.1)


def answers(url: str) -> bool:
    """Whether a server answers at all."""
    try:
        urllib.request.urlopen(url, timeout=5).close()
    except urllib.error.HTTPError:
        return True
    except OSError:
        return False
    return True


def make_hostile(home: Path) -> Path:
    """A home whose Jupyter and IPython settings would undo all that the app promises."""
    settings = {
        "VoilaConfiguration": {"strip_sources": False, "file_allowlist": [".*"], "show_tracebacks": True},
        "Voila": {"ip": "0.0.0.0", "open_browser": True},
    }
    startup = home / ".ipython" / "profile_default" / "startup"
    for folder in (startup, home / ".jupyter"):
        folder.mkdir(parents=True)
    for folder in (home, home / ".jupyter"):
        (folder / "voila.json").write_text(json.dumps(settings))
    (startup / "00-broken.py").write_text("raise SystemExit('the startup file of the user')")
    return home


@pytest.fixture(scope="session")
def app(tmp_path_factory):
    """The app's `url`, `port`, `process` and temporary `folder`, started by a user with hostile settings."""
    pytest.importorskip("voila") if os.environ.get("CI") != "true" else __import__("voila")
    home, folder = make_hostile(tmp_path_factory.mktemp("home")), tmp_path_factory.mktemp("app")
    environment = {"HOME": home, "JUPYTER_CONFIG_DIR": home / ".jupyter", "CIFAR_FT_RUNS": home / "runs"}
    port = free_port()
    code = f"from cifar_ft.widget import serve; serve({port}, browser=False, pool=1)"
    with running([sys.executable, "-c", code], {**environment, "TMPDIR": folder}, home) as process:
        wait_until(lambda: any("ready" in line for line in process.lines), process)
        yield SimpleNamespace(url=f"http://127.0.0.1:{port}/", port=port, process=process, folder=folder)


@pytest.fixture(scope="session")
def lab(tmp_path_factory):
    """The address of a JupyterLab with settings of its own, and the folder that it serves."""
    folder, own = tmp_path_factory.mktemp("notebooks"), tmp_path_factory.mktemp("lab")
    quiet = own / "settings" / "@jupyterlab" / "apputils-extension"
    quiet.mkdir(parents=True)
    (quiet / "notification.jupyterlab-settings").write_text('{"fetchNews": "false", "checkForUpdates": false}')
    environment = {
        "JUPYTERLAB_SETTINGS_DIR": own / "settings",
        "JUPYTERLAB_WORKSPACES_DIR": own / "workspaces",
        "JUPYTER_CONFIG_DIR": own / "config",
        "JUPYTER_RUNTIME_DIR": own / "runtime",
        "IPYTHONDIR": own / "ipython",
        "CIFAR_FT_RUNS": own / "runs",
    }
    port = free_port()
    options = {
        "ServerApp.port": port,
        "ServerApp.ip": "127.0.0.1",
        "ServerApp.root_dir": folder,
        "IdentityProvider.token": "",
        "ServerApp.tornado_settings": '{"websocket_max_message_size": 67108864}',
    }
    command = [sys.executable, "-m", "jupyterlab", "--no-browser", "--allow-root", "--expose-app-in-browser"]
    command += [f"--{name}={value}" for name, value in options.items()]
    url = f"http://127.0.0.1:{port}"
    with running(command, environment, folder) as process:
        wait_until(lambda: answers(f"{url}/api"), process)
        yield url, folder


@pytest.fixture(scope="session")
def pictures(tmp_path_factory) -> dict[str, Path]:
    """Files to upload."""
    folder = tmp_path_factory.mktemp("pictures")
    with np.load(ASSETS / "samples.npz") as samples:
        truck = Image.fromarray(samples["images"][samples["labels"] == 9][3])
    files = {name: folder / name for name in ("truck.png", "wide.jpg", "clear.png", "notes.png", "large.png")}
    truck.save(files["truck.png"])
    wide = Image.new("RGB", (480, 320), (120, 150, 180))
    wide.paste(truck.resize((320, 320), Image.Resampling.BICUBIC), (80, 0))
    wide.save(files["wide.jpg"], quality=90)
    Image.new("RGBA", (64, 64), (30, 90, 200, 120)).save(files["clear.png"])
    files["notes.png"].write_text("this is not a picture")
    files["large.png"].write_bytes(files["truck.png"].read_bytes() + bytes(11 * 2**20))
    return files
