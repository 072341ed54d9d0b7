"""The prediction widget as a page of its own: `python -m cifar_ft app`, served by Voila.

Voila runs as a process of its own with its whole configuration on the command line, in an empty temporary folder,
so that neither the user's Jupyter settings nor any other file has a part in it. Every visitor gets a kernel.
"""

from __future__ import annotations

import errno
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import webbrowser
from importlib.util import find_spec
from pathlib import Path

from cifar_ft import CifarFtError, log
from cifar_ft.files import ASSETS, PACKAGE, folder_variables, full_path

NOTEBOOK = ASSETS / "app.ipynb"
HOST = "127.0.0.1"
PORT = 8866
READY = "CIFAR_FT_APP_READY"  # environment variable: the folder where a kernel says that its page is ready
RUN = "CIFAR_FT_APP_RUN"  # likewise: the run whose model answers, or "shipped"
PATIENCE = 120  # seconds for the first kernels
# As `python -m voila`, without the warnings that it means for its own authors.
VOILA = "import warnings; from voila.app import main; warnings.simplefilter('ignore', DeprecationWarning); main()"
LEFT_ALONE = 300  # seconds after which the kernel of a page that was closed is ended
MOST_BYTES = 64 * 2**20  # of one message; the widget itself refuses files above its own limit, in words


class AppError(CifarFtError, RuntimeError):
    """The page cannot be served."""


def serve(
    port: int = PORT, host: str = HOST, browser: bool = True, pool: int = 2, run: str | os.PathLike = "shipped"
) -> None:
    """Serve the page until Ctrl-C (or SIGTERM), then end all that was started.

    Parameters
    ----------
    port : int
    host : str
        The address to listen on; the default cannot be reached from other machines.
    browser : bool
        Open the page in a browser once it is ready.
    pool : int
        Kernels kept ready, each with its own copy of the model: so many visitors who come at once need not wait.
    run : path
        The run whose model answers, instead of the shipped one.

    Raises
    ------
    RunError, PredictionError
        When the run is missing, unfinished or damaged.
    AppError
        Without Voila, when the port cannot be had, or when the server ends by itself.
    """
    if find_spec("voila") is None:
        raise AppError('the app needs Voila; install it with `pip install "voila>=0.5.8,<0.6"`')
    check_port(host, port)
    if str(run) != "shipped":
        from cifar_ft.predictions import Predictor  # which brings PyTorch

        Predictor.load(run := full_path(run))  # says here, where it is read, which model answers, or why none does
    with tempfile.TemporaryDirectory(prefix="cifar_ft_app_", ignore_cleanup_errors=True) as name:
        folder = Path(name)
        prepare(folder)
        arguments, settings = command(folder, port, host, pool), environment(folder, run)
        for end in ("SIGTERM", "SIGHUP"):  # a request to end, or a terminal that is closed, is like Ctrl-C
            if hasattr(signal, end):
                signal.signal(getattr(signal, end), signal.default_int_handler)
        # In a session of its own: Ctrl-C reaches this process alone, which then ends the server in good order.
        server = subprocess.Popen(arguments, env=settings, cwd=folder, start_new_session=True)
        try:
            _wait_until_ready(server, folder / "ready", pool)
            url = page_address(host, port)
            log.info(f"The app is ready: {url} (Ctrl-C stops it)")
            if browser:
                webbrowser.open(url)
            status = server.wait()
            raise AppError(f"the server ended by itself with status {status}; its messages stand above")
        except KeyboardInterrupt:
            log.info("Stopped.")
        finally:
            _end(server)


def page_address(host: str, port: int) -> str:
    """Where the page is; an IPv6 address stands in brackets there."""
    return f"http://{f'[{host}]' if ':' in host else host}:{port}/"


def check_port(host: str, port: int) -> None:
    """Raise AppError unless the port can be listened on."""
    if not 1 <= port <= 65535:
        raise AppError(f"{port} is no port; choose 1 to 65535, such as --port {PORT}")
    with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as probe:
        if os.name == "posix":  # as servers do: a port whose last connections are just closing is free
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
            probe.listen()
        except OSError as error:
            taken = error.errno in (errno.EADDRINUSE, errno.EACCES)
            advice = "choose another with --port" if taken else "choose another address or port"
            raise AppError(f"cannot listen on {host}:{port} ({error.strerror}); {advice}") from error


def prepare(folder: Path) -> None:
    """Put into an empty folder what Voila needs: the notebook alone, and a kernel that keeps no history."""
    for name in ("page", "ready", "kernels/kernels/python3"):
        (folder / name).mkdir(parents=True)
    shutil.copyfile(NOTEBOOK, folder / "page" / "app.ipynb")
    quiet = ("--HistoryManager.enabled=False", "--log-level=40")  # errors only
    launch = [sys.executable, "-m", "ipykernel_launcher", "-f", "{connection_file}", *quiet]
    kernel = {"argv": launch, "display_name": "Python 3", "language": "python"}
    (folder / "kernels/kernels/python3/kernel.json").write_text(json.dumps(kernel))
    (folder / "matplotlibrc").touch()


def command(folder: Path, port: int, host: str, pool: int) -> list[str]:
    """The command that starts Voila with all that matters said, whatever configuration files there are."""
    local = host in (HOST, "localhost", "::1")
    tornado = {
        "websocket_max_message_size": MOST_BYTES,
        "allow_remote_access": not local,  # else a foreign page could reach it under a name that points here
    }
    settings = {
        "Voila.ip": host,
        "Voila.port": port,
        "Voila.port_retries": 0,
        "Voila.open_browser": False,
        "Voila.root_dir": folder / "page",
        "Voila.config_file_paths": folder / "config",
        "Voila.connection_dir_root": folder,
        "Voila.tornado_settings": tornado,
        "Voila.log_level": "ERROR",
        "VoilaConfiguration.strip_sources": True,
        "VoilaConfiguration.show_tracebacks": False,
        "VoilaConfiguration.file_allowlist": "a^",  # matches no file
        "VoilaConfiguration.file_denylist": ".*",
        "VoilaConfiguration.allow_template_override": "NO",
        "VoilaConfiguration.allow_theme_override": "NO",
        "VoilaConfiguration.preheat_kernel": True,
        "VoilaConfiguration.default_pool_size": pool,
        "VoilaKernelManager.fill_delay": 5,  # seconds, in which the visitor's page has the processor to itself
        "MappingKernelManager.cull_idle_timeout": LEFT_ALONE,
        "MappingKernelManager.cull_interval": 30,
    }
    flags = [f"--{name}={value}" for name, value in settings.items()]
    return [sys.executable, "-c", VOILA, str(folder / "page" / "app.ipynb"), *flags]


def environment(folder: Path, run: str | os.PathLike = "shipped") -> dict[str, str]:
    """This process's environment and the run; all settings of Jupyter, IPython and matplotlib are inside `folder`."""
    own = {
        "JUPYTER_CONFIG_DIR": folder / "config",
        "JUPYTER_DATA_DIR": folder / "data",
        "JUPYTER_RUNTIME_DIR": folder / "runtime",
        "JUPYTER_PATH": folder / "kernels",
        "IPYTHONDIR": folder / "ipython",
        RUN: run,
        READY: folder / "ready",
        "PYTHONPATH": os.pathsep.join(filter(None, [str(PACKAGE.parent), os.environ.get("PYTHONPATH")])),
        "TMPDIR": folder,
        "MATPLOTLIBRC": folder / "matplotlibrc",
        "PYDEVD_DISABLE_FILE_VALIDATION": 1,  # of a debugger that nobody uses here, else it warns
    }
    dropped = ("JUPYTER_CONFIG_PATH", "JUPYTER_NO_CONFIG", "PYTHONSTARTUP")
    inherited = {name: value for name, value in os.environ.items() if name not in dropped}
    # One thread is enough for one small picture, and visitors share the processor.
    return {
        "OMP_NUM_THREADS": "1",
        **inherited,
        **folder_variables(),
        **{name: str(value) for name, value in own.items()},
    }


def _wait_until_ready(server: subprocess.Popen, ready: Path, pool: int) -> None:
    """Wait until as many kernels have built the page as are kept ready."""
    deadline = time.monotonic() + PATIENCE
    while len(list(ready.iterdir())) < pool:
        if server.poll() is not None:
            raise AppError(f"the server could not start (status {server.returncode}); its messages stand above")
        if time.monotonic() > deadline:
            log.info("The model is still being loaded; the first page may take its time.")
            return
        time.sleep(0.1)


def _end(server: subprocess.Popen) -> None:
    """End the server, which ends its kernels; kill it if it takes too long."""
    server.terminate()
    try:
        server.wait(timeout=15)
    except subprocess.TimeoutExpired:
        server.kill()
        server.wait()


def page() -> None:
    """Show the page, in app.ipynb: the widget for the model that `serve` names, or why there is none."""
    from IPython.display import HTML, display

    from cifar_ft.predictions import Predictor
    from cifar_ft.widget.html import alert_html
    from cifar_ft.widget.widget import prediction_widget

    log.setLevel("WARNING")  # the widget itself says which model it is
    try:
        widget = prediction_widget(Predictor.load(os.environ.get(RUN, "shipped")))
        widget.state.preview()  # the first answer takes longest, so it is given before anybody waits
        display(widget)
    except Exception as error:
        display(HTML(alert_html("en", f"{type(error).__name__}: {error}")))
    if os.environ.get(READY):
        Path(os.environ[READY], str(os.getpid())).touch()
