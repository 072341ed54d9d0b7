"""What a committed notebook must look like: one function per rule, each returning the problems it found.
`test_files.py` applies them to the course and to copies that are broken on purpose.
"""

from __future__ import annotations

import re
from copy import deepcopy
from pathlib import Path

import nbformat
from nbstripout import strip_output

from cifar_ft import course
from cifar_ft.course import WIDGET_VIEW
from tools.badges import notebook_badges, read_address, setup_cell
from tools.publish import EXTRA_KEYS

MAX_BYTES = 1_000_000
MACHINE_PATH = re.compile(r"(?<![\w.~-])(?:/(?:root|home|Users|work|tmp|private|var/folders)/\w|[A-Z]:\\\w)[\w./\\-]*")
ADDRESS = re.compile(r" at 0x[0-9a-fA-F]{6,}")
BASE64 = re.compile(r"base64,[A-Za-z0-9+/=\s]+")
TEXTS = {"RECIPE": "quick", "OVERRIDES": "", "DATA_ROOT": "", "RUN_DIR": ""}
PARAMETERS = {"SEED": (0, int), **{name: (text, str) for name, text in TEXTS.items()}}


def code_cells(notebook) -> list:
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def markdown(notebook) -> list[str]:
    return [cell.source for cell in notebook.cells if cell.cell_type == "markdown"]


def tagged(notebook, tag: str) -> list:
    return [cell for cell in notebook.cells if tag in cell.metadata.get("tags", [])]


def outputs(notebook) -> list[tuple[int, dict]]:
    """Every output with the number of its code cell, counted from 1."""
    return [(n, output) for n, cell in enumerate(code_cells(notebook), 1) for output in cell.outputs]


def strings(value) -> list[str]:
    """All texts of an output, however deep."""
    if isinstance(value, (dict, list)):
        return [text for part in (value.values() if isinstance(value, dict) else value) for text in strings(part)]
    return [value] if isinstance(value, str) else []


def valid_format(notebook, path: Path) -> list[str]:
    """A valid notebook of format 4.5 or later with unique cell ids, under 1 MB."""
    ids = [cell.get("id") for cell in notebook.cells]
    if None in ids or len(set(ids)) < len(ids):
        return ["cell ids are missing or used twice"]
    try:
        nbformat.validate(notebook)
    except nbformat.ValidationError as error:
        return [f"not a valid notebook: {error.message}"]
    size = path.stat().st_size
    return [f"{size:,} bytes; at most {MAX_BYTES:,}"] if size >= MAX_BYTES else []


def size(notebook, path: Path) -> list[str]:
    """12 to 25 code cells of at most 15 lines, 800 to 2,000 words."""
    cells = code_cells(notebook)
    text = re.sub(r"<[^>]+>|\]\([^)]*\)", " ", "\n".join(markdown(notebook)))
    words = len(re.findall(r"\w[\w'’.,%-]*", text))
    problems = [] if 12 <= len(cells) <= 25 else [f"{len(cells)} code cells; 12 to 25 are allowed"]
    if not 800 <= words <= 2000:
        problems.append(f"{words} words; 800 to 2,000 are allowed")
    for n, cell in enumerate(cells, 1):
        lines = cell.source.count("\n") + 1
        if lines > 15:
            problems.append(f"code cell {n} has {lines} lines; at most 15")
        if re.search(r"^\s*(?:!|%pip|%%bash|%%sh)", cell.source, re.MULTILINE):
            problems.append(f"code cell {n} runs a shell command, whose failure nobody notices")
    return problems


def opening_and_closing(notebook, path: Path) -> list[str]:
    """A title with the generated badges, goals ('You will') in the first three cells, a recap at the end."""
    first = notebook.cells[0].source if notebook.cells and notebook.cells[0].cell_type == "markdown" else ""
    problems = []
    if not first.startswith("# "):
        problems.append("the first cell must be Markdown that starts with '# ' and the title")
    if notebook_badges(read_address(), path.name) not in first.split("\n"):
        problems.append("the first cell lacks its badge line; run `make badges`")
    if not any("You will" in c.source for c in notebook.cells[:3] if c.cell_type == "markdown"):
        problems.append("none of the first three cells says what 'You will' learn")
    if not any(re.search(r"(?i)\brecap\b|\byou have\b", text) for text in markdown(notebook)[-3:]):
        problems.append("none of the last three Markdown cells is a recap ('Recap' or 'You have')")
    return problems


def parameters_and_setup(notebook, path: Path) -> list[str]:
    """One cell of typed literal parameters, the course's names and defaults; one generated set-up cell."""
    problems = []
    try:
        for name, found in course.read_parameters(path).items():
            if PARAMETERS.get(name) != found:
                problems.append(f"parameter {name} = {found}; the course has {PARAMETERS.get(name)}")
    except course.CourseError as error:
        problems.append(str(error))
    setup = tagged(notebook, "setup")
    if [cell.source for cell in setup] != [setup_cell(read_address())]:
        problems.append("needs exactly one cell tagged 'setup' with the generated source; run `make badges`")
    return problems


def clean_outputs(notebook, path: Path) -> list[str]:
    """Executed from top to bottom, without errors, stderr, widgets or traces of the machine; normalised."""
    problems = []
    cells = code_cells(notebook)
    if [cell.execution_count for cell in cells] != list(range(1, len(cells) + 1)):
        problems.append("code cells are not counted 1, 2, 3, ...: run and publish it (make record)")
    if not outputs(notebook):
        problems.append("it has no outputs: run and publish it (make record)")
    for n, output in outputs(notebook):
        if output.output_type == "error":
            problems.append(f"code cell {n} ended in {output.ename}")
        if output.get("name") == "stderr":
            problems.append(f"code cell {n} wrote to stderr: {output.text[:80]!r}")
        if WIDGET_VIEW in output.get("data", {}):
            problems.append(f"code cell {n} holds a widget view")
        text = BASE64.sub("", "\n".join(strings(output)))
        for found in (MACHINE_PATH.search(text), ADDRESS.search(text)):
            if found:
                problems.append(f"code cell {n} shows {found.group()!r}, which exists on one machine only")
    problems += [f"{found.group()!r} in a cell" for c in notebook.cells if (found := MACHINE_PATH.search(c.source))]
    if notebook.metadata.get("kernelspec", {}).get("name") != "python3":
        problems.append("the kernelspec must be named python3, the one name that exists everywhere")
    stripped = strip_output(deepcopy(notebook), keep_output=True, keep_count=True, keep_id=True, extra_keys=EXTRA_KEYS)
    if stripped != notebook:
        problems.append("metadata of a run is left (widgets, papermill, times, versions): make record")
    return problems


def described_figures(notebook, path: Path) -> list[str]:
    """Every figure is <figure><img alt="..."> from show_figure; Jupyter drops the alt text of bare PNGs."""
    problems = []
    for n, output in outputs(notebook):
        data = output.get("data", {})
        problems += [f"code cell {n}: bare {kind}, use show_figure" for kind in data if kind.startswith("image/")]
        html = "".join(data.get("text/html", ""))
        if "<img" in re.sub("<figure.*?</figure>", "", html, flags=re.DOTALL):
            problems.append(f"code cell {n}: an image outside <figure>")
        if any(not re.search(r'\balt="\s*[^"\s]', tag) for tag in re.findall(r"<img\b[^>]*>", html)):
            problems.append(f"code cell {n}: an image without alternative text")
    return problems


def exercises(notebook, path: Path) -> list[str]:
    """Two to four exercises, 'Exercise 1' and so on at the start of a line, each with a folded solution."""
    text = "\n".join(markdown(notebook))
    numbers = sorted({int(n) for n in re.findall(r"(?m)^[#>*\s]*Exercise (\d+)", text)})
    folded = len(re.findall(r"<details[ >]", text))
    problems = []
    if not 2 <= len(numbers) <= 4 or numbers != list(range(1, len(numbers) + 1)):
        problems.append(f"exercises {numbers}; 'Exercise 1' up to between 2 and 4 are wanted")
    if folded < len(numbers) or folded != text.count("</details>"):
        problems.append(f"{folded} folded solutions (<details>...</details>) for {len(numbers)} exercises")
    return problems


def checked_cells(notebook, path: Path) -> list[str]:
    """At least two cells tagged nbval-check-output, each with its output: else nbval passes anything."""
    checked = tagged(notebook, "nbval-check-output")
    problems = [] if len(checked) >= 2 else [f"{len(checked)} cells tagged nbval-check-output; at least 2"]
    for cell in checked:
        if cell.cell_type != "code" or not cell.execution_count or not cell.outputs:
            problems.append(f"tagged nbval-check-output but without output: {cell.source[:60]!r}")
    return problems


RULES = [valid_format, size, opening_and_closing, parameters_and_setup]
RULES += [clean_outputs, described_figures, exercises, checked_cells]


def read(path: Path):
    """Read as it is: nbformat.read would silently repair duplicate ids."""
    return nbformat.v4.reads_json(path.read_text("utf-8"))
