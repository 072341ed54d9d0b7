"""Promises of the app that need no browser: its command, its errors, and that it ends what it started.

That nothing but the page is served, and that kernels end too, is tested with a real server in tests/browser.
"""

import json
import logging
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import nbformat
import pytest

from cifar_ft import log
from cifar_ft.predictions import PredictionError, Predictor
from cifar_ft.results import RunError
from cifar_ft.widget import AppError, app, page, serve

SIGNALS = [name for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name)]


@pytest.fixture
def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@pytest.fixture
def stand_in(monkeypatch):
    """Let a small program stand in for Voila; gives the folders that it was to serve."""
    folders = []

    def stand_in(program):
        command = [sys.executable, "-S", "-c", program]
        monkeypatch.setattr(app, "command", lambda folder, *_: folders.append(folder) or command)
        return folders

    monkeypatch.setattr(app, "find_spec", lambda _: True)
    handlers = {name: signal.getsignal(getattr(signal, name)) for name in SIGNALS}
    yield stand_in
    for name, handler in handlers.items():
        signal.signal(getattr(signal, name), handler)


def test_without_voila_the_error_says_how_to_get_it(monkeypatch, free_port):
    monkeypatch.setattr(app, "find_spec", lambda _: None)
    with pytest.raises(AppError, match="pip install"):
        serve(free_port)


def test_a_port_in_use_is_told_before_anything_is_started(stand_in, monkeypatch):
    monkeypatch.setattr(app.subprocess, "Popen", lambda *_, **__: pytest.fail("started"))
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(AppError, match=rf"127.0.0.1:{port}.*choose another with --port"):
            serve(port)
    for port in (0, -1, 70_000):
        with pytest.raises(AppError, match="choose 1 to 65535"):
            serve(port)
    with pytest.raises(AppError, match="choose another address or port"):
        serve(8866, host="192.0.2.1")


def test_a_port_is_checked_before_anything_large_is_imported():
    code = (
        "import sys; from cifar_ft.widget import serve; sys.exit(not {'torch', 'ipywidgets'}.isdisjoint(sys.modules))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_a_port_that_was_just_left_is_free(free_port):
    with socket.create_server(("127.0.0.1", free_port)) as server, socket.create_connection(server.getsockname()):
        server.accept()[0].close()
    app.check_port("127.0.0.1", free_port)


@pytest.mark.skipif(os.name != "posix", reason="a process cannot send itself signals here")
@pytest.mark.parametrize("how", SIGNALS)
def test_it_is_opened_once_ready_and_ends_the_server_and_its_folder(stand_in, monkeypatch, free_port, said, how):
    program = "import pathlib, time; [pathlib.Path(f'ready/{i}').touch() for i in (1, 2)]; time.sleep(600)"
    folders, opened = stand_in(program), []
    popen, started = subprocess.Popen, []
    monkeypatch.setattr(app.subprocess, "Popen", lambda *args, **kw: started.append(popen(*args, **kw)) or started[0])
    monkeypatch.setattr(
        app.webbrowser, "open", lambda url: (opened.append(url), os.kill(os.getpid(), getattr(signal, how)))
    )
    serve(free_port)
    url = f"http://127.0.0.1:{free_port}/"
    assert opened == [url]
    assert said == [f"The app is ready: {url} (Ctrl-C stops it)", "Stopped."]
    assert started[0].returncode is not None
    assert not folders[0].exists()


@pytest.mark.parametrize(
    ("program", "words"),
    [
        ("import sys; sys.exit(3)", r"the server could not start \(status 3\)"),
        ("import pathlib; pathlib.Path('ready/1').touch()", "the server ended by itself with status 0"),
    ],
)
def test_a_server_that_ends_by_itself_is_told_with_its_status(stand_in, free_port, program, words):
    stand_in(program)
    with pytest.raises(AppError, match=words):
        serve(free_port, browser=False, pool=1)


def test_the_notebook_of_the_app_holds_no_output_and_one_short_cell():
    notebook = nbformat.read(app.NOTEBOOK, 4)
    nbformat.validate(notebook)
    (code,) = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert code.outputs == []
    assert len(code.source.splitlines()) <= 3


def test_the_command_says_everything_that_matters(tmp_path):
    flags = dict(flag.lstrip("-").split("=", 1) for flag in app.command(tmp_path, 9000, "127.0.0.1", 3)[4:])
    assert flags["Voila.ip"] == "127.0.0.1"
    assert flags["Voila.port"] == "9000"
    assert flags["Voila.port_retries"] == "0"
    assert flags["VoilaConfiguration.strip_sources"] == "True"
    assert flags["VoilaConfiguration.file_denylist"] == ".*"
    assert flags["VoilaConfiguration.default_pool_size"] == "3"
    assert int(flags["MappingKernelManager.cull_idle_timeout"]) > 0
    assert "'allow_remote_access': False" in flags["Voila.tornado_settings"]


def test_the_folder_served_holds_the_notebook_alone(tmp_path):
    app.prepare(tmp_path)
    assert [path.name for path in (tmp_path / "page").iterdir()] == ["app.ipynb"]
    kernel = json.loads((tmp_path / "kernels/kernels/python3/kernel.json").read_text())
    assert kernel["argv"][0] == sys.executable


def test_the_environment_keeps_the_users_settings_out(tmp_path, monkeypatch):
    monkeypatch.setenv("JUPYTER_CONFIG_PATH", "/somewhere")
    monkeypatch.setenv("PYTHONSTARTUP", "/somewhere/startup.py")
    environment = app.environment(tmp_path)
    assert "JUPYTER_CONFIG_PATH" not in environment
    assert "PYTHONSTARTUP" not in environment
    jupyter = ("JUPYTER_CONFIG_DIR", "JUPYTER_DATA_DIR", "JUPYTER_RUNTIME_DIR", "JUPYTER_PATH")
    for name in (*jupyter, "IPYTHONDIR", "MATPLOTLIBRC"):
        assert Path(environment[name]).parent == tmp_path


def test_the_page_answers_with_the_run_that_is_named_or_the_shipped_model(tmp_path, monkeypatch):
    monkeypatch.setenv("CIFAR_FT_DATA", "cache")
    monkeypatch.chdir(tmp_path)
    environment = app.environment(tmp_path, tmp_path / "my run")
    assert environment["CIFAR_FT_DATA"] == str(tmp_path / "cache")  # kernels work in another folder
    asked = []
    monkeypatch.setattr(Predictor, "load", lambda run: asked.append(run))
    monkeypatch.setattr("IPython.display.display", asked.append)
    level = log.level
    try:
        page()
        monkeypatch.setenv(app.RUN, environment[app.RUN])
        page()
    finally:
        log.setLevel(level)
    assert asked[::2] == ["shipped", str(tmp_path / "my run")]


def test_a_run_that_cannot_answer_is_told_before_anything_is_started(stand_in, monkeypatch, free_port, tmp_path):
    monkeypatch.setattr(app, "find_spec", lambda _: True)
    monkeypatch.setattr(app.subprocess, "Popen", lambda *_, **__: pytest.fail("started"))
    with pytest.raises(RunError, match="no run directory"):
        serve(free_port, run=tmp_path / "none")


def test_a_page_without_a_model_says_why(monkeypatch):
    def refuse(*_):
        raise PredictionError("no <model> here")

    shown = []
    monkeypatch.setattr("cifar_ft.widget.widget.prediction_widget", refuse)
    monkeypatch.setattr("IPython.display.display", shown.append)
    level = log.level
    try:
        page()
        assert not log.isEnabledFor(logging.INFO)  # no line above the widget
    finally:
        log.setLevel(level)
    assert 'role="alert"' in shown[0].data
    assert "no &lt;model&gt; here" in shown[0].data


@pytest.mark.parametrize(
    ("host", "address"),
    [("127.0.0.1", "http://127.0.0.1:80/"), ("::1", "http://[::1]:80/"), ("my-pc", "http://my-pc:80/")],
)
def test_the_page_has_an_address_that_a_browser_opens(host, address):
    assert app.page_address(host, 80) == address
