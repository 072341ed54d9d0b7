"""Promises of `cifar_ft.app` that need no browser: its command, its errors, and that it ends all it started."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import nbformat
import pytest

from cifar_ft import widget

needs_voila = pytest.mark.skipif(widget.find_spec("voila") is None, reason="Voila is not installed")


@pytest.fixture
def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def test_without_voila_the_error_says_how_to_get_it(monkeypatch, free_port):
    monkeypatch.setattr(app, "find_spec", lambda _: None)
    with pytest.raises(widget.AppError, match="pip install"):
        widget.serve(free_port)


@needs_voila
def test_a_port_in_use_is_told_before_anything_is_started(monkeypatch):
    monkeypatch.setattr(widget.subprocess, "Popen", lambda *_, **__: pytest.fail("started"))
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(widget.AppError, match=rf"127.0.0.1:{port}.*choose another with --port"):
            widget.serve(port)
    for port in (0, -1, 70_000):
        with pytest.raises(widget.AppError, match="choose 1 to 65535"):
            widget.serve(port)


def test_a_port_that_was_just_left_is_free(free_port):
    with socket.create_server(("127.0.0.1", free_port)) as server, socket.create_connection(server.getsockname()):
        server.accept()[0].close()
    widget.check_port("127.0.0.1", free_port)


def test_the_notebook_of_the_app_holds_no_output_and_one_short_cell():
    notebook = nbformat.read(widget.NOTEBOOK, 4)
    nbformat.validate(notebook)
    (code,) = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert code.outputs == []
    assert len(code.source.splitlines()) <= 3


def test_the_command_says_everything_that_matters(tmp_path):
    flags = dict(flag.lstrip("-").split("=", 1) for flag in widget.command(tmp_path, 9000, "127.0.0.1", 3)[4:])
    assert flags["Voila.ip"] == "127.0.0.1"
    assert flags["Voila.port"] == "9000"
    assert flags["Voila.port_retries"] == "0"
    assert flags["VoilaConfiguration.strip_sources"] == "True"
    assert flags["VoilaConfiguration.file_denylist"] == ".*"
    assert flags["VoilaConfiguration.default_pool_size"] == "3"
    assert int(flags["MappingKernelManager.cull_idle_timeout"]) > 0
    assert "'allow_remote_access': False" in flags["Voila.tornado_settings"]


def test_the_folder_served_holds_the_notebook_alone(tmp_path):
    widget.prepare(tmp_path)
    assert [path.name for path in (tmp_path / "page").iterdir()] == ["app.ipynb"]
    kernel = json.loads((tmp_path / "kernels/kernels/python3/kernel.json").read_text())
    assert kernel["argv"][0] == sys.executable


def test_the_environment_keeps_the_users_jupyter_out(tmp_path, monkeypatch):
    monkeypatch.setenv("JUPYTER_CONFIG_PATH", "/somewhere")
    monkeypatch.setenv("PYTHONSTARTUP", "/somewhere/startup.py")
    environment = widget.environment(tmp_path)
    assert "JUPYTER_CONFIG_PATH" not in environment
    assert "PYTHONSTARTUP" not in environment
    for name in (
        "JUPYTER_CONFIG_DIR",
        "JUPYTER_DATA_DIR",
        "JUPYTER_RUNTIME_DIR",
        "JUPYTER_PATH",
        "IPYTHONDIR",
        "MPLCONFIGDIR",
    ):
        assert Path(environment[name]).parent == tmp_path


def test_a_page_without_a_model_says_why(monkeypatch, capsys):
    from cifar_ft import widget
    from cifar_ft.predictions import PredictionError

    def refuse(*_):
        raise PredictionError("no <model> here")

    shown = []
    monkeypatch.setattr(widget, "prediction_widget", refuse)
    monkeypatch.setattr("IPython.display.display", shown.append)
    widget.page()
    assert 'role="alert"' in shown[0].data
    assert "no &lt;model&gt; here" in shown[0].data


@needs_voila
@pytest.mark.slow
@pytest.mark.parametrize("how", ["SIGINT", "SIGTERM"])
def test_it_ends_with_all_that_it_started(tmp_path, free_port, how):
    import psutil

    code = f"from cifar_ft.app import serve; serve({free_port}, browser=False, pool=1)"
    environment = {**os.environ, "TMPDIR": str(tmp_path), "PYTHONUNBUFFERED": "1"}
    process = subprocess.Popen(
        [sys.executable, "-c", code], env=environment, stdout=subprocess.PIPE, text=True, start_new_session=True
    )
    try:
        assert "ready" in process.stdout.readline()
        children = psutil.Process(process.pid).children(recursive=True)
        assert len(children) >= 2  # Voila and a kernel
        process.send_signal(getattr(signal, how))
        assert process.wait(timeout=120) == 0
        assert "Stopped." in process.stdout.read()
    finally:
        process.kill()
        process.wait()
        process.stdout.close()
    deadline = time.monotonic() + 10
    while any(child.is_running() for child in children) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert [child for child in children if child.is_running()] == []
    assert list(tmp_path.iterdir()) == []
    widget.check_port("127.0.0.1", free_port)
