"""Promise: whoever opens a committed notebook, anywhere, sees a complete, readable page with true outputs."""

from __future__ import annotations

import json
from pathlib import Path

import nbformat
import pytest
import rules
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook, new_output

from cifar_ft import course
from cifar_ft.course import WIDGET_VIEW
from tools.badges import notebook_badges, read_address, setup_cell
from tools.publish import KERNELSPEC

FOLDER = Path(__file__).resolve().parents[2] / "notebooks"
BROKEN = Path(__file__).resolve().parent / "broken"


def test_the_notebooks_are_there():
    assert sorted(path.stem for path in FOLDER.glob("*.ipynb")) == list(course.NOTEBOOKS)


@pytest.mark.parametrize("rule", rules.RULES, ids=lambda rule: rule.__name__)
@pytest.mark.parametrize("path", sorted(FOLDER.glob("*.ipynb")), ids=lambda path: path.stem)
def test_committed_notebook_keeps_the_rule(path, rule):
    assert rule(rules.read(path), path) == []


# -- and the rules themselves: green on a good notebook, red on each fault


@pytest.fixture
def good(tmp_path):
    """A notebook that keeps every rule, with the path it is to be written to."""
    path = tmp_path / "07_good.ipynb"
    address = read_address()
    title = "# Good\n\n" + notebook_badges(address, path.name) + "\n\nYou will learn this."
    cells = [
        new_markdown_cell(title),
        new_code_cell(setup_cell(address), metadata={"tags": ["setup"]}),
        new_code_cell('RECIPE: str = "quick"\nSEED: int = 0', metadata={"tags": ["parameters"]}),
        *(new_code_cell(f"print({n})", outputs=[new_output("stream", text=f"{n}\n")]) for n in range(10)),
        new_markdown_cell("word " * 900),
        *(new_markdown_cell(f"### Exercise {n}\n<details><summary>Solution</summary>Six.</details>") for n in (1, 2)),
        new_markdown_cell("## Recap\nYou have learned this."),
    ]
    for cell in cells[3:5]:
        cell.metadata["tags"] = ["nbval-check-output"]
    html = '<figure><img alt="A rising line" src="data:image/png;base64,iVBO/home/x"></figure>'
    cells[5].outputs.append(new_output("display_data", data={"text/html": html}))
    for count, cell in enumerate((c for c in cells if c.cell_type == "code"), 1):
        cell.execution_count = count
    return new_notebook(cells=cells, metadata={"kernelspec": dict(KERNELSPEC)}), path


def problems(notebook, path) -> dict[str, list[str]]:
    nbformat.write(notebook, path)
    return {rule.__name__: found for rule in rules.RULES if (found := rule(rules.read(path), path))}


def test_rules_pass_a_good_notebook(good):
    assert problems(*good) == {}


def display(notebook, **data):
    notebook.cells[6].outputs = [new_output("display_data", data={k.replace("_", "/"): v for k, v in data.items()})]


def stream(notebook, text, name="stdout"):
    notebook.cells[6].outputs = [new_output("stream", name=name, text=text)]


FAULTS = {
    "valid_format: invalid cell": lambda nb: nb.cells[4].pop("outputs"),
    "valid_format: 1 MB": lambda nb: stream(nb, "x" * 1_000_000),
    "size: 26 code cells": lambda nb: nb.cells.extend(new_code_cell("1") for _ in range(14)),
    "size: 11 code cells": lambda nb: nb.cells.__delitem__(slice(7, 9)),
    "size: 16 lines": lambda nb: nb.cells[7].update(source="x = 1\n" * 15 + "x"),
    "size: shell": lambda nb: nb.cells[7].update(source="!pip install torch"),
    "size: too few words": lambda nb: nb.cells[13].update(source="word " * 700),
    "size: too many words": lambda nb: nb.cells[13].update(source="word " * 2000),
    "opening_and_closing: no title": lambda nb: nb.cells.pop(0),
    "opening_and_closing: stale badge": lambda nb: nb.cells[0].update(
        source=nb.cells[0].source.replace("\n\n", "\n\n[![Old](x)](y) ", 1)
    ),
    "opening_and_closing: no goals": lambda nb: nb.cells[0].update(
        source=nb.cells[0].source.replace("You will", "We may")
    ),
    "opening_and_closing: no recap": lambda nb: nb.cells.pop(),
    "parameters_and_setup: none": lambda nb: nb.cells[2].metadata.pop("tags"),
    "parameters_and_setup: derived": lambda nb: nb.cells[2].update(source='RECIPE: str = "quick".upper()'),
    "parameters_and_setup: other default": lambda nb: nb.cells[2].update(source='RECIPE: str = "smoke"'),
    "parameters_and_setup: edited set-up": lambda nb: nb.cells[1].update(source=nb.cells[1].source + "\n"),
    "clean_outputs: not run": lambda nb: nb.cells[7].update(execution_count=None),
    "clean_outputs: run out of order": lambda nb: nb.cells[7].update(execution_count=40),
    "clean_outputs: error": lambda nb: nb.cells[6].update(
        outputs=[new_output("error", ename="ValueError", evalue="no", traceback=[])]
    ),
    "clean_outputs: warning": lambda nb: stream(nb, "FutureWarning", "stderr"),
    "clean_outputs: home": lambda nb: stream(nb, "saved\n/home/ada/run"),
    "clean_outputs: Windows": lambda nb: stream(nb, "saved to C:\\Users\\ada"),
    "clean_outputs: address": lambda nb: stream(nb, "<Figure at 0x7f3a2b3c>"),
    "clean_outputs: widget view": lambda nb: nb.cells[6].update(
        outputs=[new_output("display_data", data={WIDGET_VIEW: {"model_id": "1"}, "text/plain": "x"})]
    ),
    "clean_outputs: widget state": lambda nb: nb.metadata.update(widgets={"a": {"version_major": 2}}),
    "clean_outputs: papermill": lambda nb: nb.cells[3].metadata.update(papermill={"duration": 3}),
    "clean_outputs: kernel": lambda nb: nb.metadata.kernelspec.update(name="my-env"),
    "described_figures: bare figure": lambda nb: display(nb, image_png="iVBO"),
    "described_figures: no alt": lambda nb: display(nb, text_html='<figure><img src="x"></figure>'),
    "described_figures: empty alt": lambda nb: display(nb, text_html='<figure><img alt=" " src="x"></figure>'),
    "described_figures: no figure": lambda nb: display(nb, text_html='<img alt="A line" src="x">'),
    "exercises: one": lambda nb: nb.cells.pop(14),
    "exercises: open solution": lambda nb: nb.cells[14].update(source="### Exercise 1\nSix."),
    "checked_cells: none": lambda nb: [cell.metadata.pop("tags") for cell in nb.cells[3:5]],
    "checked_cells: stripped": lambda nb: nb.cells[3].update(outputs=[]),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_rule_turns_red_on_fault(good, fault):
    notebook, path = good
    FAULTS[fault](notebook)
    if fault.startswith("valid_format: invalid"):  # nbformat.write would refuse it
        path.write_text(json.dumps(notebook), "utf-8")
        found = {"valid_format": rules.valid_format(rules.read(path), path)}
    else:
        found = problems(notebook, path)
    assert found.get(fault.partition(":")[0])


def test_rule_turns_red_on_an_id_used_twice(good):
    notebook, path = good
    nbformat.write(notebook, path)
    path.write_text(path.read_text("utf-8").replace(notebook.cells[4].id, notebook.cells[3].id), "utf-8")
    assert rules.valid_format(rules.read(path), path) == ["cell ids are missing or used twice"]


def test_rules_turn_red_on_the_notebook_with_faults_of_form():
    path = BROKEN / "format.ipynb"
    notebook = rules.read(path)
    assert rules.described_figures(notebook, path) == ["code cell 2: bare image/png, use show_figure"]
    assert len(rules.clean_outputs(notebook, path)) == 2  # a path of one machine, widget state
