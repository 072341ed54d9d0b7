"""Bring what was run into the repository: outputs of notebooks, and runs without their weights.

Nothing that belongs to one machine or one moment comes along: no paths, no time stamps, no widget state, no warnings.
"""

from __future__ import annotations

import copy
import json
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import nbformat
from nbstripout import strip_output

from cifar_ft.course import CourseError, drop_widgets
from cifar_ft.files import checkout, show_path, write_atomic
from cifar_ft.results import Run

RECORDED_FILES = ("config.json", "history.csv", "steps.csv", "metrics.json", "test_logits.npz", "val_logits.npz")
BASE64 = re.compile(r"base64,[A-Za-z0-9+/=\s]+")
KERNELSPEC = {"display_name": "Python 3 (ipykernel)", "language": "python", "name": "python3"}
EXTRA_KEYS = [
    "metadata.widgets",
    "metadata.papermill",
    "metadata.language_info.version",
    "cell.metadata.papermill",
    "cell.metadata.execution",
]


def publish(out: str | Path, notebooks_dir: str | Path, names: Iterable[str] | None = None) -> list[str]:
    """Copy the outputs of a complete course run into the committed notebooks; publishing twice changes nothing.

    Only outputs and execution counts move; sources, tags and parameters stay those of the committed files.

    Parameters
    ----------
    out : str or Path
        Folder of a `course.run_course` with the notebooks' own parameters.
    notebooks_dir : str or Path
        Folder of the notebooks to update.
    names : iterable of str, optional
        Those to update; default: all that were run.

    Returns
    -------
    list of str
        Names of the updated notebooks.

    Raises
    ------
    CourseError
        The run is not complete or not of these notebooks, or an output holds an error or a path of this
        machine; no file has been changed.
    """
    out, notebooks_dir = Path(out).resolve(), Path(notebooks_dir)
    record = json.loads((out / "course.json").read_text("utf-8")) if (out / "course.json").exists() else {}
    if not record.get("complete"):
        raise CourseError(f"{show_path(out)} holds no complete run of the course; run it again and publish then")
    if record["changed"]:
        raise CourseError(
            f"{show_path(out)} was run with values that the notebooks do not show: {', '.join(record['changed'])}; "
            "publish a run with the default parameters"
        )
    neutral = f"course-output/{record['parameters'].get('RECIPE', 'course')}"
    private = dict.fromkeys((str(out), show_path(out)), neutral)
    updated = {}
    for name in record["seconds"] if names is None else names:
        source = nbformat.read(notebooks_dir / f"{name}.ipynb", 4)
        updated[name] = _with_outputs(source, nbformat.read(out / f"{name}.ipynb", 4), name, private)
    for name, notebook in updated.items():
        nbformat.write(notebook, notebooks_dir / f"{name}.ipynb")
    return list(updated)


def _with_outputs(source: Any, executed: Any, name: str, private: dict[str, str]) -> Any:
    """Return `source` with the outputs of `executed`, counted from 1, free of what must not be committed."""
    cells = [cell for cell in source.cells if cell.cell_type == "code"]
    ran = [cell for cell in executed.cells if cell.cell_type == "code"]
    ran = [cell for cell in ran if "injected-parameters" not in cell.metadata.get("tags", [])]
    if [cell.source for cell in cells] != [cell.source for cell in ran]:
        raise CourseError(f"{name}: its code is not the code that was run; run the course again")
    for count, (cell, done) in enumerate(zip(cells, ran, strict=True), 1):
        shown = [output for output in done.outputs if output.get("name") != "stderr"]
        cell.outputs = [nbformat.from_dict(_neutral(output, private)) for output in _last_state(shown)]
        cell.execution_count = count
        for output in cell.outputs:
            if output.output_type == "error":
                raise CourseError(f"{name}, cell [{count}]: its output is an error ({output.ename}); mend it first")
            if "execution_count" in output:
                output.execution_count = count
        if found := machine_path("\n".join(_strings(cell.outputs))):
            raise CourseError(
                f"{name}, cell [{count}]: its output names {found}, a path of this machine; print show_path()"
            )
    drop_widgets(source)
    source.metadata["kernelspec"] = dict(KERNELSPEC)
    return strip_output(source, keep_output=True, keep_count=True, keep_id=True, extra_keys=EXTRA_KEYS)


def _last_state(outputs: list) -> list:
    """Merge printed text, and of each line keep what the last carriage return left: progress bars vanish."""
    merged: list = []
    for output in outputs:
        if output.output_type == "stream" and merged and merged[-1].output_type == "stream":
            merged[-1].text += output.text
        else:
            merged.append(copy.deepcopy(output))
    for output in merged:
        if output.output_type == "stream":
            output.text = "\n".join(line.rsplit("\r", 1)[-1] for line in output.text.split("\n"))
    return merged


def _neutral(value: Any, private: dict[str, str]) -> Any:
    """Copy an output with private paths replaced by their neutral form."""
    if isinstance(value, dict):
        return {key: _neutral(part, private) for key, part in value.items()}
    if isinstance(value, list):
        return [_neutral(part, private) for part in value]
    if isinstance(value, str):
        for path, neutral in private.items():
            value = value.replace(path, neutral)
    return value


def _strings(value: Any) -> list[str]:
    if isinstance(value, (dict, list)):
        parts = value.values() if isinstance(value, dict) else value
        return [text for part in parts for text in _strings(part)]
    return [value] if isinstance(value, str) else []


def machine_path(text: str) -> str | None:
    """Return the first path in `text` that exists on one machine only, if any; base64 is skipped."""
    here = [str(path) for path in (Path.home(), Path.cwd(), checkout() or Path.cwd()) if len(path.parts) > 1]
    pattern = "|".join([*map(re.escape, here), r"/(?:home|Users|tmp|private|var/folders)/\w", r"\b[A-Z]:\\+\w"])
    found = re.search(rf"(?<![\w.~-])(?:{pattern})[\w./\\-]*", BASE64.sub("", text))
    return found.group() if found else None


def publish_run(run: Run, folder: str | Path, names: Iterable[str] = RECORDED_FILES) -> None:
    """Copy a run's figures into `folder`, without its weights and without the paths its description may hold."""
    for name in names:
        if not (run.path / name).exists():
            continue
        content = (run.path / name).read_bytes()
        if name == "config.json":
            recipe, weights = without_paths(run)
            config = json.loads(content) | {"recipe": recipe, "weights": weights}
            content = (json.dumps(config, indent=2) + "\n").encode()
        write_atomic(Path(folder) / name, content)


def without_paths(run: Run) -> tuple[dict, dict]:
    """A run's recipe and its weights' description, a file of weights named without the folder it was in."""
    recipe, weights = dict(run.config["recipe"]), dict(run.config["weights"])
    if recipe["weights"] not in ("imagenet", "none"):
        recipe["weights"] = Path(recipe["weights"]).name
        weights["source"] = f"the file {recipe['weights']}"
    return recipe, weights
