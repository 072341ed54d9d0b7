"""One notebook at a time, for `course`: run it with this interpreter and keep whatever it wrote.
`publish` brings the outputs of a complete run back into the committed files.
"""

from __future__ import annotations

import logging
import os
import sys
from pathlib import Path
from typing import Any

from cifar_ft import CifarFtError
from cifar_ft.files import checkout, show_path

CELL_SECONDS = 3600
WIDGET_VIEW = "application/vnd.jupyter.widget-view+json"


class CourseError(CifarFtError):
    """A notebook could not be run or published; the message says which notebook and cell, and why."""


def execute(path: Path, out: Path, given: dict[str, Any]) -> None:
    """Run one notebook in its own folder and save it to `out` after each cell, whatever happens."""
    try:
        import papermill
        from nbclient.exceptions import CellTimeoutError
        from papermill.exceptions import PapermillExecutionError
    except ModuleNotFoundError as error:
        raise CourseError(f"running notebooks needs {error.name}: pip install -r requirements.txt") from error
    logging.getLogger("papermill").setLevel(logging.ERROR)  # it warns of comments it cannot parse
    source, target = (str(name).replace("{", "{{").replace("}", "}}") for name in (path, out))
    try:
        papermill.execute_notebook(  # it calls str.format on its paths
            source,
            target,
            given,
            kernel_name="python3",
            language="python",
            kernel_manager_class=_kernel_manager_class(),
            progress_bar=False,
            cwd=str(path.parent),
            execution_timeout=CELL_SECONDS,
        )
    except PapermillExecutionError as error:
        raise CourseError(_failure(out, f"{error.ename}: {error.evalue}")) from error
    except CellTimeoutError as error:
        raise CourseError(_failure(out, f"still running after {CELL_SECONDS} s, stopped")) from error
    except RuntimeError as error:  # DeadKernelError, or a kernel that never started
        raise CourseError(_failure(out, f"the kernel died ({error}); often a lack of memory")) from error


def _kernel_manager_class() -> type:
    """Start kernels with this very interpreter and this very package, whatever kernelspecs are installed."""
    import traitlets
    from jupyter_client import AsyncKernelManager
    from jupyter_client.kernelspec import KernelSpec, KernelSpecManager

    argv = [sys.executable, "-m", "ipykernel_launcher", "-f", "{connection_file}", "--log-level=CRITICAL"]
    path = [str(checkout() or ""), os.environ.get("PYTHONPATH", "")]
    env = {"PYTHONPATH": os.pathsep.join(filter(None, path))}

    class ThisInterpreter(KernelSpecManager):
        def get_kernel_spec(self, kernel_name: str) -> KernelSpec:
            return KernelSpec(argv=argv, env=env, language="python", display_name="Python 3")

    class ThisKernelManager(AsyncKernelManager):
        @traitlets.default("kernel_spec_manager")
        def _this_interpreter(self) -> KernelSpecManager:
            return ThisInterpreter(parent=self)

    return ThisKernelManager


def _failure(out: Path, reason: str) -> str:
    """Say in two lines which cell of the notebook at `out` was the last to start, and why it stopped."""
    import nbformat

    cells = [cell for cell in nbformat.read(out, 4).cells if cell.cell_type == "code"]
    started = [n for n, cell in enumerate(cells, 1) if cell.metadata.get("papermill", {}).get("start_time")]
    where = f"cell [{started[-1]}]" if started else "before the first cell"
    reason = " ".join(reason.split())[:300]
    return f"{out.name}, {where}: {reason}\nwhat ran until then is in {show_path(out)}"


def drop_widgets(notebook: Any) -> None:
    """Remove widget state and views in place: a file cannot run them, and GitHub refuses half of one."""
    notebook.metadata.pop("widgets", None)
    for cell in notebook.cells:
        for output in cell.get("outputs", []):
            output.get("data", {}).pop(WIDGET_VIEW, None)


def write_html(path: Path) -> None:
    if path.exists():
        import nbformat
        from nbconvert import HTMLExporter

        notebook = nbformat.read(path, 4)
        drop_widgets(notebook)
        html, _ = HTMLExporter(template_name="lab").from_notebook_node(notebook, {"metadata": {"name": path.stem}})
        path.with_suffix(".html").write_text(html, "utf-8")
