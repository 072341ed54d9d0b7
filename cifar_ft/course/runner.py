"""The whole course in one go: the notebooks run in order, each with checked parameters, into one folder.
What papermill lets pass in silence (unknown names, strings for numbers) is refused here before anything runs.
"""

from __future__ import annotations

import ast
import json
import os
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from cifar_ft import log
from cifar_ft.course.execution import CourseError, execute, write_html
from cifar_ft.files import checkout, show_path
from cifar_ft.recipes import get_recipe

NOTEBOOKS = (
    "01_data_exploration",
    "02_transforms",
    "03_model_surgery",
    "04_training",
    "05_results",
    "06_predictions",
)


TYPES = {"str": str, "int": int, "float": float, "bool": bool}
BOOLEANS = {"true": True, "True": True, "false": False, "False": False}
PATHS = ("DATA_ROOT", "RUN_DIR")  # a notebook runs in its own folder, so relative ones are resolved first


class ParameterError(CourseError, ValueError):
    """A parameter that no notebook declares, or a value of another type than the declared one."""

    wrong_argument = True  # the command line ends with status 2


@dataclass(frozen=True)
class CourseResult:
    """What a run of the course left behind.

    Attributes
    ----------
    rows : list of (str, float)
        Notebook name and seconds, in the order of execution.
    metrics, config : dict or None
        ``metrics.json`` and ``config.json`` of the run that the notebooks made; None when they made none.
    path : Path
        Folder with the executed notebooks, their HTML pages, ``course.json`` and ``run/``.
    """

    rows: list[tuple[str, float]]
    metrics: dict | None
    config: dict | None
    path: Path

    def table(self) -> str:
        """Return seconds per notebook, then the test accuracy and what it was reached with."""
        rows = [*self.rows, ("total", sum(seconds for _, seconds in self.rows))]
        width = max(len(name) for name, _ in rows)
        lines = [f"{name:<{width}}  {seconds:8.1f} s" for name, seconds in rows]
        facts = {"executed notebooks": f"{show_path(self.path)} (.ipynb and .html)"}
        if self.metrics:
            weights, data = (self.config or {}).get("weights", {}), (self.config or {}).get("data", {})
            accuracy, *interval = (
                f"{100 * x:.2f}" for x in (self.metrics["test_accuracy"], *self.metrics["test_accuracy_ci95"])
            )
            facts = {
                "test accuracy": f"{accuracy} % [{', '.join(interval)}]",
                "backbone": self.metrics["backbone"],
                "weights": f"{self.metrics['weights']}, from {weights.get('source', 'nowhere')}",
                "data": data.get("source", "unknown"),
                **facts,
            }
        width = max(map(len, facts))
        return "\n".join([*lines, "", *(f"{name:<{width}}  {fact}" for name, fact in facts.items())])


def find_notebooks(folder: str | Path | None = None) -> list[Path]:
    """Return the notebooks in `folder` (default: the checkout's ``notebooks/``, else ``./notebooks``)."""
    folder = Path(folder) if folder else (checkout() or Path.cwd()) / "notebooks"
    paths = sorted(folder.glob("*.ipynb"))
    if not paths:
        raise CourseError(f"no notebooks in {show_path(folder)}: run from a clone of the course's repository")
    return paths


def parameters(path: str | Path) -> dict[str, tuple[Any, type]]:
    """Read what a notebook declares in its one cell tagged ``parameters``.

    Parameters
    ----------
    path : str or Path
        A notebook.

    Returns
    -------
    dict
        ``{name: (default, type)}`` with type one of str, int, float, bool.

    Raises
    ------
    CourseError
        Not exactly one such cell, or one that holds more than typed literals: papermill would then ignore or
        override what is passed, without a word.
    """
    import nbformat

    path = Path(path)
    cells = nbformat.read(path, 4).cells
    cells = [c for c in cells if c.cell_type == "code" and "parameters" in c.metadata.get("tags", [])]
    if len(cells) != 1:
        raise CourseError(f"{path.name}: needs exactly one cell tagged 'parameters', has {len(cells)}")
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


def _declared(paths: Iterable[str | Path], names: Iterable[str]) -> list[tuple[Path, dict]]:
    """Read every notebook's parameters and refuse names that none of them declares."""
    declared = [(Path(path), parameters(path)) for path in paths]
    known = sorted({name for _, found in declared for name in found})
    for name in names:
        if name not in known:
            near = get_close_matches(name.upper(), known, 1)
            hint = f" (did you mean {near[0]!r}?)" if near else ""
            raise ParameterError(f"unknown parameter {name!r}; the notebooks know {', '.join(known)}{hint}")
    return declared


def check_parameters(paths: Iterable[str | Path], given: Mapping[str, Any]) -> None:
    """Refuse names that no notebook of `paths` declares and values of the wrong type (ParameterError)."""
    for path, found in _declared(paths, given):
        for name in given.keys() & found.keys():
            kind = found[name][1]
            if not _fits(given[name], kind):
                raise ParameterError(
                    f"{name}={given[name]!r}: {path.name} wants {kind.__name__}, e.g. {found[name][0]!r}"
                )


def parse_parameters(pairs: Sequence[str], paths: Iterable[str | Path]) -> dict[str, Any]:
    """Turn ``name=value`` strings into values of the declared types.

    Raises ParameterError for a missing ``=``, an unknown name or a text that is not of the declared type:
    ``true``, ``True``, ``false`` and ``False`` for bool, ``5`` for int, ``0.001`` or ``1e-3`` for float.
    """
    values: dict[str, Any] = {}
    for pair in pairs:
        name, equals, text = pair.partition("=")
        if not equals or not name:
            raise ParameterError(f"{pair!r} is not of the form name=value, e.g. RECIPE=quick")
        values[name.strip()] = text
    for _, found in _declared(paths, values):
        for name in values.keys() & found.keys():
            kind = found[name][1]
            try:
                if isinstance(values[name], str):
                    values[name] = BOOLEANS[values[name]] if kind is bool else kind(values[name])
            except (KeyError, ValueError) as error:
                raise ParameterError(
                    f"{name}={values[name]}: expected {kind.__name__}, e.g. {found[name][0]!r}"
                ) from error
    return values


def run_course(
    out: str | Path | None = None,
    recipe: str | None = None,
    parameters: Mapping[str, Any] | Sequence[str] | None = None,
    notebooks: str | Path | Sequence[str | Path] | None = None,
    before: Callable[[Mapping[str, Any]], object] | None = None,
) -> CourseResult:
    """Run the notebooks in order; every argument is checked before the first one starts.

    Parameters
    ----------
    out : path, optional
        New or empty folder for everything the run writes; default ``course-output/<recipe>-<time>``.
    recipe : str, optional
        Name of a recipe, the same as ``RECIPE`` among the parameters; default: what the notebooks declare.
    parameters : mapping or sequence of ``name=value``, optional
        Notebook parameters; each notebook gets those it declares. ``RUN_DIR`` defaults to ``<out>/run``
        where one of them trains.
    notebooks : folder or sequence of paths, optional
        What to run; default: see `find_notebooks`.
    before : callable, optional
        Called with all parameters once they are checked, before the first notebook: to fetch what they need.

    Raises
    ------
    ParameterError, RecipeError
        A wrong argument; nothing has run.
    CourseError
        A cell failed or the kernel died; what ran until then is in `out`, with its HTML page.
    """
    paths = find_notebooks(notebooks) if notebooks is None or isinstance(notebooks, (str, Path)) else notebooks
    paths = [Path(path).resolve() for path in paths]
    given = dict(parameters) if isinstance(parameters, Mapping) else parse_parameters(parameters or (), paths)
    if recipe is not None and given.setdefault("RECIPE", recipe) != recipe:
        raise ParameterError(f"recipe {recipe} and RECIPE={given['RECIPE']} contradict each other; give one")
    check_parameters(paths, given)
    declared = {path: _parameters(path) for path in paths}
    defaults = {name: default for found in declared.values() for name, (default, _) in found.items()}
    chosen = {**defaults, **given}
    if "RECIPE" in chosen:
        get_recipe(chosen["RECIPE"], chosen.get("OVERRIDES", ""))
    changed = sorted(name for name, value in given.items() if name not in PATHS and value != defaults[name])

    out = _empty_folder(out, chosen.get("RECIPE", "course"))
    given = {k: str(Path(os.path.expanduser(v)).resolve()) if k in PATHS and v else v for k, v in given.items()}
    if "RECIPE" in chosen:  # a run will be made
        given["RUN_DIR"] = given.get("RUN_DIR") or str(out / "run")
    if before:
        before({**chosen, **given})
    record = {"complete": False, "seconds": {}, "total_seconds": 0.0, "parameters": given, "changed": changed}
    for number, (path, found) in enumerate(declared.items(), 1):
        log.info(f"[{number}/{len(declared)}] {path.stem} ...")
        start = time.perf_counter()
        try:
            execute(path, out / path.name, {k: v for k, v in given.items() if k in found})
            record["complete"] = number == len(declared)
        finally:
            seconds = record["seconds"][path.stem] = round(time.perf_counter() - start, 2)
            record["total_seconds"] = round(sum(record["seconds"].values()), 2)
            (out / "course.json").write_text(json.dumps(record, indent=2) + "\n", "utf-8")
            write_html(out / path.name)
        log.info(f"[{number}/{len(declared)}] {path.stem} {seconds:.1f} s")
    made = Path(given.get("RUN_DIR") or out / "run")
    metrics, config = (_read_json(made / name) for name in ("metrics.json", "config.json"))
    return CourseResult(list(record["seconds"].items()), metrics, config, out)


_parameters = parameters  # `run_course` has an argument of that name


def _empty_folder(out: str | Path | None, recipe: str) -> Path:
    out = Path(out) if out else Path("course-output") / f"{recipe}-{time.strftime('%Y%m%d-%H%M%S')}"
    out = Path(os.path.expanduser(out)).resolve()
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ParameterError(f"{show_path(out)} is not an empty folder; choose another one or remove it")
    out.mkdir(parents=True, exist_ok=True)
    return out


def _read_json(path: Path) -> dict | None:
    return json.loads(path.read_text("utf-8")) if path.exists() else None
