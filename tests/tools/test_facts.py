"""No text states a number that `results/` does not have, or has changed."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from tools.facts import MARK, FactError, facts, fill
from tools.report import END, START, filled, results, texts_with_numbers

ROOT = Path(__file__).resolve().parents[1]
TEXTS = texts_with_numbers(ROOT)
# What looks like a result of a run here: 91.4 %, 338 images/s, 2.1x, 4.7 min.
NUMBER = re.compile(r"\d+\.\d+ ?%|\d+\.\d+ points|\d+(?:\.\d+)? images/s|\d+\.\d+x\b|\d+(?:\.\d+)? min\b")
# Numbers from elsewhere, each with its source beside it in the text, or set by hand.
ELSEWHERE = {
    "93.12 %", "93.45 %", "92.34 %", "92.63 %", "88.34 %", "87.68 %", "88.97 %",  # the published texts and log
    "87.7 %", "0.3 points", "0.33 points", "0.1 %",  # of a simulation, the published gain, and of weights counted
}  # fmt: skip


def shown(path: Path) -> str:
    """What people read as prose: a Markdown file, or the Markdown cells of a notebook."""
    if path.suffix != ".ipynb":
        return path.read_text("utf-8")
    cells = json.loads(path.read_text("utf-8"))["cells"]
    return "\n\n".join("".join(cell["source"]) for cell in cells if cell["cell_type"] == "markdown")


def unmarked(text: str) -> list[str]:
    """Numbers in prose that no mark ties to a result; generated tables and trial logs are left out."""
    text = re.sub(re.escape(START) + ".*?" + re.escape(END), "", text, flags=re.DOTALL)
    text = re.sub(r"<!-- by hand -->.*?<!-- /by hand -->", "", text, flags=re.DOTALL)
    text = re.sub(r"```.*?```", "", MARK.sub("", text), flags=re.DOTALL)
    return [number for number in NUMBER.findall(text) if number not in ELSEWHERE]


@pytest.mark.parametrize("path", TEXTS, ids=lambda path: f"{path.parent.name}/{path.name}")
def test_marked_numbers_are_those_of_results(path):
    text = shown(path)
    assert fill(text, facts(ROOT)) == text, "run `make report`"


@pytest.mark.parametrize("path", TEXTS, ids=lambda path: f"{path.parent.name}/{path.name}")
def test_every_number_is_marked_or_from_elsewhere(path):
    assert unmarked(shown(path)) == [], "mark them as <!--name-->value<!--/-->, see cifar_ft/facts.py"


def test_a_changed_result_changes_the_text():
    text = "It reaches <!--quick.percent-->91.4 %<!--/--> and more."
    assert fill(text, {"quick.percent": "95.0 %"}) == "It reaches <!--quick.percent-->95.0 %<!--/--> and more."
    with pytest.raises(FactError, match=r"quick\.percent"):
        fill(text, {"other": "1"})


def test_unmarked_numbers_are_found():
    assert unmarked("It reaches 91.4 % in 4.7 min, 2.1x as fast.") == ["91.4 %", "4.7 min", "2.1x"]
    assert unmarked("<!--quick.percent-->91.4 %<!--/-->, published 93.45 %") == []


def test_only_markdown_cells_of_a_notebook_are_filled(tmp_path):
    mark = "<!--quick.percent-->0 %<!--/-->"
    cells = [{"cell_type": kind, "source": [mark]} for kind in ("markdown", "code")]
    path = tmp_path / "a.ipynb"
    path.write_text(json.dumps({"cells": cells}))
    new = json.loads(filled(path, {"quick.percent": "95.0 %"}))["cells"]
    assert "95.0 %" in new[0]["source"][0]
    assert new[1]["source"] == [mark]


def test_recorded_copies_are_those_of_results():
    for copy in results.RECORDED.rglob("*.*"):
        source = ROOT / "results" / copy.relative_to(results.RECORDED)
        assert copy.read_bytes() == source.read_bytes(), "run `make report`"
