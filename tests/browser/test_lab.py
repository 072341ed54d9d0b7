"""Chapter 06 in JupyterLab, in a real browser: its cells run, and its widget answers and saves nothing."""

from __future__ import annotations

import json
import re

import nbformat
import pytest
from driving import ROOT, SCREENSHOTS, Widget

expect = pytest.importorskip("playwright.sync_api").expect
pytestmark = [pytest.mark.browser, pytest.mark.xdist_group("browser")]

RUN_ALL = """async () => {
  const app = window.jupyterapp;
  await app.restored;
  const panel = app.shell.currentWidget;
  await panel.context.ready;
  await panel.sessionContext.ready;
  await panel.sessionContext.session.kernel.info;
  await app.commands.execute('notebook:run-all-cells');
}"""
ERRORS = """() => [...window.jupyterapp.shell.currentWidget.content.model.sharedModel.cells]
  .flatMap(cell => cell.toJSON().outputs ?? []).filter(output => output.output_type === 'error')
  .map(output => `${output.ename}: ${output.evalue}`)"""


@pytest.fixture
def notebook(lab, open_page, photograph):
    """Chapter 06 up to its first answers, and its widget, opened and run; tests/notebooks runs all that is between."""
    url, folder = lab
    chapter = nbformat.read(ROOT / "notebooks" / "06_predictions.ipynb", 4)
    code = [cell for cell in chapter.cells if cell.cell_type == "code"]
    chapter.cells = [*code[:5], *(cell for cell in code if cell.source.startswith("prediction_widget("))]
    assert len(chapter.cells) == 6
    nbformat.write(chapter, folder / "06_predictions.ipynb")
    page = open_page(f"{url}/lab/tree/06_predictions.ipynb?reset")
    photograph.append(page)
    page.set_default_timeout(120_000)
    page.wait_for_function("window.jupyterapp?.shell?.currentWidget?.sessionContext")
    page.evaluate(RUN_ALL)
    return page


def test_the_notebooks_widget_answers_and_nothing_of_it_is_saved(notebook, lab, pictures):
    widget = Widget(notebook, notebook.locator(".jp-Notebook"))
    assert notebook.evaluate(ERRORS) == []
    expect(widget.root.get_by_text("Preview; run the notebook")).to_have_count(0)
    widget.list("Sample image").select_option(index=5)
    expect(widget.root).to_contain_text("sample 5: ")
    widget.button("Predict").click()
    expect(widget.status).to_contain_text("predicted")
    widget.upload(pictures["wide.jpg"])
    expect(widget.answers_of("")).to_have_count(0)
    widget.button("Predict").click()
    expect(widget.status).to_contain_text("wide.jpg: predicted truck")
    widget.list("Heat map").check()
    expect(widget.root.get_by_alt_text(re.compile("^Heat map of wide.jpg"))).to_be_visible()
    widget.upload(pictures["large.png"])
    expect(widget.alert).to_contain_text("large.png: 11.0 MiB; at most 10 MiB are allowed")
    widget.upload(pictures["truck.png"], pictures["clear.png"])
    widget.button("Predict").click()
    expect(widget.status).to_contain_text("truck.png: predicted truck")
    SCREENSHOTS.mkdir(parents=True, exist_ok=True)
    notebook.set_viewport_size({"width": 1200, "height": 2000})
    predict = notebook.get_by_role("button", name="Predict", exact=True)
    notebook.locator(".jp-OutputArea-output", has=predict).screenshot(path=SCREENSHOTS / "widget_in_lab.png")
    notebook.evaluate("() => window.jupyterapp.commands.execute('docmanager:save')")
    saved = json.loads((lab[1] / "06_predictions.ipynb").read_text())
    assert "widgets" not in saved["metadata"]
    assert "truck.png" not in json.dumps(saved["cells"])
