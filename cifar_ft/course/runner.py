"""The whole course in one go: papermill runs the notebooks in order, each with checked parameters, into one folder.

What papermill lets pass in silence (unknown names, strings for numbers) is refused here before anything runs.
"""

from __future__ import annotations

import ast
import html
import json
import logging
import os
import shlex
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cifar_ft import CifarFtError, log
from cifar_ft.files import checkout, folder_variables, full_path, one_line, show_path, unknown, write_atomic
from cifar_ft.recipes import get_recipe, parse_overrides

NOTEBOOKS = (
    "01_data_exploration",
    "02_transforms",
    "03_model_surgery",
    "04_training",
    "05_results",
    "05b_trust",
    "05c_choices",
    "06_predictions",
    "07_reading_a_publication",
)
TYPES = {"str": str, "int": int, "float": float, "bool": bool}
BOOLEANS = {"true": True, "True": True, "false": False, "False": False}
PATHS = ("DATA_ROOT", "RUN_DIR")  # a notebook runs in its own folder, so they are made full first
CELL_SECONDS = 3600
WIDGET_VIEW = "application/vnd.jupyter.widget-view+json"


class CourseError(CifarFtError):
    """A notebook could not be run or published; the message says which notebook and cell, and why."""


class ParameterError(CourseError, ValueError):
    """A parameter that no notebook declares, or a value of another type than the declared one."""

    wrong_argument = True


@dataclass(frozen=True)
class CourseResult:
    """What a run of the course left behind."""

    rows: list[tuple[str, float]]  # notebook and seconds, in the order of execution
    metrics: dict | None  # metrics.json of the run that the notebooks made; None when they made none
    config: dict | None  # its config.json
    path: Path  # folder with the executed notebooks, their HTML pages, course.json and run/

    def table(self) -> str:
        """Seconds per notebook, then the test accuracy and what it was reached with, as lines of text."""
        rows = [*self.rows, ("total", sum(seconds for _, seconds in self.rows))]
        width = max(len(name) for name, _ in rows)
        lines = [f"{name:<{width}}  {seconds:8.1f} s" for name, seconds in rows]
        facts = {"executed notebooks": f"{show_path(self.path)} (.ipynb and .html)"}
        if self.metrics:
            config, scores = self.config or {}, [self.metrics["test_accuracy"], *self.metrics["test_accuracy_ci95"]]
            accuracy, low, high = (f"{100 * score:.2f}" for score in scores)
            facts = {
                "test accuracy": f"{accuracy} % [{low}, {high}]",
                "backbone": self.metrics["backbone"],
                "weights": f"{self.metrics['weights']}, from {config.get('weights', {}).get('source', 'nowhere')}",
                "data": config.get("data", {}).get("source", "unknown"),
                **facts,
            }
        width = max(map(len, facts))
        return "\n".join([*lines, "", *(f"{name:<{width}}  {fact}" for name, fact in facts.items())])


def find_notebooks(folder: str | Path | None = None) -> list[Path]:
    """The notebooks in `folder` (default: the checkout's ``notebooks/``, else ``./notebooks``)."""
    folder = full_path(folder) if folder else (checkout() or Path.cwd()) / "notebooks"
    paths = sorted(folder.glob("*.ipynb"))
    if not paths:
        raise CourseError(f"no notebooks in {show_path(folder)}: run from a clone of the course's repository")
    return paths


def read_parameters(path: str | Path) -> dict[str, tuple[Any, type]]:
    """What a notebook declares in its one cell tagged ``parameters``: ``{name: (default, type)}``.

    CourseError where there is not exactly one such cell, or one that holds more than typed literals (str, int, float,
    bool): papermill would then ignore or override what is passed, without a word (its `inspect_notebook` skips them).
    """
    import nbformat

    path = Path(path)
    cells = [c for c in nbformat.read(path, 4).cells if "parameters" in c.metadata.get("tags", [])]
    if len(cells) != 1 or cells[0].cell_type != "code":
        raise CourseError(f"{path.name}: needs exactly one code cell tagged 'parameters', has {len(cells)}")
    declared = {}
    for node in ast.parse(cells[0].source).body:
        try:
            target = node.target if isinstance(node, ast.AnnAssign) else node.targets[0]
            default = ast.literal_eval(node.value)
            kind = TYPES[node.annotation.id] if isinstance(node, ast.AnnAssign) else type(default)
            if kind not in TYPES.values() or not _fits(default, kind):
                raise ValueError
            declared[target.id] = (default, kind)
        except (AttributeError, KeyError, ValueError, TypeError) as error:
            raise CourseError(
                f"{path.name}: `{ast.unparse(node)}` is not a typed literal; the parameters cell holds only "
                f"lines like `EPOCHS: int = 5` ({', '.join(TYPES)})"
            ) from error
    return declared


def _fits(value: Any, kind: type) -> bool:
    return type(value) is kind or (kind is float and type(value) is int)


def check_parameters(given: Mapping[str, Any] | Sequence[str], declared: Mapping[Path, dict]) -> dict[str, Any]:
    """Values by name, from a mapping or from ``name=value`` texts, all of them declared and of the declared type.

    Texts become that type: ``true``, ``True``, ``false``, ``False`` for bool, ``5`` for int, ``0.001`` or ``1e-3`` for
    float. Anything else raises ParameterError.
    """
    kinds = {name: kind for found in declared.values() for name, (_, kind) in found.items()}
    values = dict(given) if isinstance(given, Mapping) else {}
    for pair in () if isinstance(given, Mapping) else given:
        name, equals, text = pair.partition("=")
        name = name.strip()
        if not equals or not name:
            raise ParameterError(f"{pair!r} is not of the form name=value, e.g. RECIPE=quick")
        if name in values:
            raise ParameterError(f"{name} is given twice, at last as {text!r}; give it once")
        kind = kinds.get(name, str)
        try:
            values[name] = BOOLEANS[text] if kind is bool else kind(text)
        except (KeyError, ValueError):
            values[name] = text  # of the wrong type, as is said below
    for name in values:
        if name not in kinds:
            raise ParameterError(unknown("parameter", name, sorted(kinds)))
    for path, found in declared.items():
        for name, (default, kind) in found.items():
            if name in values and not _fits(values[name], kind):
                raise ParameterError(f"{name}={values[name]!r}: {path.name} wants {kind.__name__}, e.g. {default!r}")
    return values


def run_course(
    out: str | Path | None = None,
    parameters: Mapping[str, Any] | Sequence[str] | None = None,
    notebooks: str | Path | Sequence[str | Path] | None = None,
    before: Callable[[Mapping[str, Any]], object] | None = None,
) -> CourseResult:
    """Run the notebooks in order; every argument is checked before the first one starts.

    Parameters
    ----------
    out : path, optional
        New or empty folder for all that the run writes; default ``course-output/<recipe>-<time>``.
    parameters : mapping or sequence of ``name=value``, optional
        Each notebook gets those it declares. ``RUN_DIR`` defaults to ``<out>/run`` where one of them trains.
    notebooks : folder or sequence of paths, optional
        What to run; default: see `find_notebooks`.
    before : callable, optional
        Called with all parameters once they are checked: to fetch what the notebooks need.

    Raises
    ------
    ParameterError, RecipeError
        A wrong argument; nothing has run.
    CourseError
        A cell failed or the kernel died; what ran until then is in `out`, with its HTML page.
    """
    paths = find_notebooks(notebooks) if notebooks is None or isinstance(notebooks, (str, Path)) else notebooks
    declared = {path: read_parameters(path) for path in map(full_path, paths)}
    given = check_parameters(parameters or (), declared)
    defaults = {name: default for found in declared.values() for name, (default, _) in found.items()}
    chosen = {**defaults, **given}
    named = ("",) if "RECIPE" in chosen else ("", "shipped")  # no folders: see `results.choose_run`
    full = {name: str(full_path(value, name)) for name, value in given.items() if name in PATHS and value not in named}
    if "RECIPE" in chosen:
        changes = parse_overrides(chosen.get("OVERRIDES", ""))
        if get_recipe(chosen["RECIPE"], changes).weights not in ("imagenet", "none"):
            changes["weights"] = full_path(changes["weights"], "weights").as_posix()
            full["OVERRIDES"] = shlex.join(f"{key}={value}" for key, value in changes.items())
    changed = sorted(name for name, value in given.items() if name not in PATHS and value != defaults[name])

    out = _empty_folder(out, chosen.get("RECIPE", "course"))
    given = {**given, **full}
    if "RECIPE" in chosen:  # a run will be made
        given["RUN_DIR"] = given.get("RUN_DIR") or str(out / "run")
    if before:
        before({**chosen, **given})
    record = {"complete": False, "seconds": {}, "total_seconds": 0.0, "parameters": given, "changed": changed}
    for number, (path, found) in enumerate(declared.items(), 1):
        log.info(f"[{number}/{len(declared)}] {path.stem} ...")
        start = time.perf_counter()
        try:
            _execute(path, out / path.name, {name: value for name, value in given.items() if name in found})
            record["complete"] = number == len(declared)
        finally:
            seconds = record["seconds"][path.stem] = round(time.perf_counter() - start, 2)
            record["total_seconds"] = round(sum(record["seconds"].values()), 2)
            write_atomic(out / "course.json", (json.dumps(record, indent=2) + "\n").encode())
            _write_page(out / path.name)
        log.info(f"[{number}/{len(declared)}] {path.stem} {seconds:.1f} s")
    files = (Path(given.get("RUN_DIR") or out / "run") / name for name in ("metrics.json", "config.json"))
    metrics, config = (json.loads(file.read_text("utf-8")) if file.exists() else None for file in files)
    return CourseResult(list(record["seconds"].items()), metrics, config, out)


def _empty_folder(out: str | Path | None, recipe: str) -> Path:
    out = full_path(out or Path("course-output") / f"{recipe}-{time.strftime('%Y%m%d-%H%M%S')}")
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ParameterError(f"{show_path(out)} is not an empty folder; choose another one or remove it")
    out.mkdir(parents=True, exist_ok=True)
    return out


def _execute(path: Path, out: Path, given: dict[str, Any]) -> None:
    """Run one notebook in its own folder and save it to `out` after each cell, whatever happens."""
    try:
        import papermill
        from nbclient.exceptions import CellTimeoutError
        from papermill.exceptions import PapermillExecutionError
    except ModuleNotFoundError as error:
        raise CourseError(f"running notebooks needs {error.name}: pip install -r requirements.txt") from error
    logging.getLogger("papermill").setLevel(logging.ERROR)  # it warns of comments it cannot parse
    # papermill calls str.format on its paths
    source, target = (str(name).replace("{", "{{").replace("}", "}}") for name in (path, out))
    kernel = {"kernel_name": "python3", "language": "python", "kernel_manager_class": _kernel_manager_class()}
    options = {"cwd": str(path.parent), "execution_timeout": CELL_SECONDS, "progress_bar": False}
    try:
        papermill.execute_notebook(source, target, given, **kernel, **options)
    except PapermillExecutionError as error:
        raise CourseError(_failure(out, f"{error.ename}: {error.evalue}")) from error
    except CellTimeoutError as error:
        raise CourseError(_failure(out, f"still running after {CELL_SECONDS} s, stopped")) from error
    except RuntimeError as error:  # DeadKernelError, or a kernel that never started
        raise CourseError(_failure(out, f"the kernel died ({error}); often a lack of memory")) from error


def _kernel_manager_class() -> type:
    """Start kernels with this very interpreter and this very package, whatever kernelspecs are installed."""
    from jupyter_client import AsyncKernelManager
    from jupyter_client.kernelspec import KernelSpec

    argv = [sys.executable, "-m", "ipykernel_launcher", "-f", "{connection_file}", "--log-level=CRITICAL"]
    path = os.pathsep.join(filter(None, [str(checkout() or ""), os.environ.get("PYTHONPATH", "")]))
    env = {**folder_variables(), "PYTHONPATH": path}

    class ThisInterpreter(AsyncKernelManager):
        kernel_spec = KernelSpec(argv=argv, env=env, language="python", display_name="Python 3")

    return ThisInterpreter


def _failure(out: Path, reason: str) -> str:
    """Say in two lines which cell of the notebook at `out` was the last to start, and why it stopped."""
    import nbformat

    cells = [cell for cell in nbformat.read(out, 4).cells if cell.cell_type == "code"]
    started = [n for n, cell in enumerate(cells, 1) if cell.metadata.get("papermill", {}).get("start_time")]
    where = f"cell [{started[-1]}]" if started else "before the first cell"
    return f"{out.name}, {where}: {one_line(reason)[:300]}\nwhat ran until then is in {show_path(out)}"


def drop_widgets(notebook: Any) -> None:
    """Remove widget state and views in place: a file cannot run them, and GitHub refuses half of one."""
    notebook.metadata.pop("widgets", None)
    for cell in notebook.cells:
        for output in cell.get("outputs", []):
            output.get("data", {}).pop(WIDGET_VIEW, None)


def _write_page(path: Path) -> None:
    """Write an executed notebook as an HTML page beside it, for others: without the folders above its own."""
    if path.exists():
        import nbformat
        from nbconvert import HTMLExporter

        notebook = nbformat.read(path, 4)
        drop_widgets(notebook)
        page, _ = HTMLExporter(template_name="lab").from_notebook_node(notebook, {"metadata": {"name": path.stem}})
        for folder, shown in ((str(path.parent), path.parent.name), (show_path(path.parent), path.parent.name)):
            page = page.replace(folder, shown).replace(html.escape(folder), html.escape(shown))
        write_atomic(path.with_suffix(".html"), page.encode())
