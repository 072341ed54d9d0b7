"""A real browser, JupyterLab and the app for the tests in this folder.

Where no browser can be had the tests are skipped and say so; with CI=true that is a failure. Every test leaves a
screenshot in build/screenshots.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from contextlib import contextmanager
from pathlib import Path

import pytest
from driving import ROOT, SCREENSHOTS
from finding import launch, missing


def pytest_collection_modifyitems(items):
    """Every test of this folder drives a browser or waits for a server."""
    for item in items:
        if Path(item.fspath).parent == Path(__file__).parent:
            item.add_marker(pytest.mark.browser)


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


@pytest.fixture
def open_page(browser, request):
    """Open an address in a profile of its own; all that is open at the end is photographed and closed."""
    pages = []

    def open_page(url: str, **options):
        context = browser.new_context(viewport={"width": 1200, "height": 1000}, **options)
        page = context.new_page()
        page.set_default_timeout(30_000)
        page.errors = []
        page.on("pageerror", lambda error: page.errors.append(str(error)))
        pages.append(page)
        page.goto(url, wait_until="domcontentloaded")
        return page

    yield open_page
    SCREENSHOTS.mkdir(parents=True, exist_ok=True)
    for number, page in enumerate(pages, start=1):
        name = request.node.name + (f"_{number}" if len(pages) > 1 else "")
        page.set_viewport_size({"width": 1200, "height": 1500})  # pages scroll inside themselves
        page.screenshot(path=SCREENSHOTS / f"{name}.png")
        page.close(run_before_unload=False)
        page.context.close()


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@contextmanager
def running(command: list[str], environment: dict[str, str], cwd: Path):
    """A process with its output in `.lines`; ended at the end, whatever happens."""
    process = subprocess.Popen(
        command, env={**os.environ, **environment}, cwd=cwd, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    process.lines = []
    reader = threading.Thread(target=lambda: process.lines.extend(process.stdout), daemon=True)
    reader.start()
    try:
        yield process
    finally:
        if process.poll() is None:
            process.send_signal(signal.SIGTERM)
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


@pytest.fixture(scope="session")
def hostile_home(tmp_path_factory) -> Path:
    """A home whose Jupyter and IPython settings would undo all that the app promises."""
    home = tmp_path_factory.mktemp("home")
    settings = {
        "VoilaConfiguration": {"strip_sources": False, "file_allowlist": [".*"], "show_tracebacks": True},
        "Voila": {"ip": "0.0.0.0", "open_browser": True},
    }
    for folder in (home, home / ".jupyter"):
        folder.mkdir(exist_ok=True)
        (folder / "voila.json").write_text(json.dumps(settings))
    startup = home / ".ipython" / "profile_default" / "startup"
    startup.mkdir(parents=True)
    (startup / "00-broken.py").write_text("raise SystemExit('the startup file of the user')")
    return home


@pytest.fixture(scope="session")
def app(hostile_home, tmp_path_factory):
    """The address of the app, in an environment that has settings of its own."""
    pytest.importorskip("voila") if os.environ.get("CI") != "true" else __import__("voila")
    port = free_port()
    code = f"from cifar_ft.app import serve; serve({port}, browser=False, echo=lambda line: print(line, flush=True))"
    environment = {
        "HOME": str(hostile_home),
        "JUPYTER_CONFIG_DIR": str(hostile_home / ".jupyter"),
        "CIFAR_FT_RUNS": str(tmp_path_factory.mktemp("runs")),
    }
    with running([sys.executable, "-c", code], environment, hostile_home) as process:
        wait_until(lambda: any("ready" in line for line in process.lines), process)
        yield f"http://127.0.0.1:{port}/"


@pytest.fixture(scope="session")
def lab(tmp_path_factory):
    """The address of a JupyterLab with settings of its own, and the folder that it serves."""
    folder, own = tmp_path_factory.mktemp("notebooks"), tmp_path_factory.mktemp("lab")
    quiet = own / "settings" / "@jupyterlab" / "apputils-extension"
    quiet.mkdir(parents=True)
    (quiet / "notification.jupyterlab-settings").write_text('{"fetchNews": "false", "checkForUpdates": false}')
    environment = {
        "JUPYTERLAB_SETTINGS_DIR": str(own / "settings"),
        "JUPYTERLAB_WORKSPACES_DIR": str(own / "workspaces"),
        "JUPYTER_CONFIG_DIR": str(own / "config"),
        "JUPYTER_RUNTIME_DIR": str(own / "runtime"),
        "IPYTHONDIR": str(own / "ipython"),
        "CIFAR_FT_RUNS": str(own / "runs"),
        "PYTHONPATH": os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")])),
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


@pytest.fixture
def pictures(tmp_path) -> dict[str, Path]:
    """Files to upload."""
    from PIL import Image

    from cifar_ft.data import load_samples

    samples = load_samples()
    truck = samples.images[(samples.labels == 9).nonzero()[3].item()].permute(1, 2, 0).numpy()
    files = {name: tmp_path / name for name in ("truck.png", "wide.jpg", "clear.png", "notes.png", "large.png")}
    Image.fromarray(truck).save(files["truck.png"])
    wide = Image.new("RGB", (480, 320), (120, 150, 180))
    wide.paste(Image.fromarray(truck).resize((320, 320), Image.Resampling.BICUBIC), (80, 0))
    wide.save(files["wide.jpg"], quality=90)
    Image.new("RGBA", (64, 64), (30, 90, 200, 120)).save(files["clear.png"])
    files["notes.png"].write_text("this is not a picture")
    files["large.png"].write_bytes(files["truck.png"].read_bytes() + bytes(11 * 2**20))
    return files
