"""Promise: the notebooks run start to end, and what their checked cells show is what a fresh run gives.

`python -m cifar_ft course --recipe smoke` runs them once. The cells tagged nbval-check-output are then compared with
what is committed, as nbval does; nbval itself, which is what a reader would use, runs on one of them.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from collections import defaultdict
from copy import deepcopy
from pathlib import Path

import nbformat
import pytest
import rules

from cifar_ft import course

ROOT = Path(__file__).resolve().parents[2]
BROKEN = Path(__file__).resolve().parent / "broken"
UNCOMPARED = {"data", "metadata", "name", "output_type", "execution_count", "image/png", "image/jpeg"}
RANDOM = re.compile(r"0x[0-9a-f]{6,}|[0-9a-f]{8}(?:-[0-9a-f]{4}){3}-[0-9a-f]{12}", re.IGNORECASE)  # addresses, UUIDs
OVERWRITTEN = re.compile(r".*\r(?=[^\n])")  # by what follows on the same line: progress bars
pytestmark = [pytest.mark.notebook, pytest.mark.timeout(900)]


def run(*command: object, cwd: Path) -> subprocess.CompletedProcess:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "CIFAR_FT_RUNS": str(cwd / "runs")}
    command = [sys.executable, *map(str, command)]
    return subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=850)


def shown(cell) -> dict[str, list[str]]:
    """What nbval compares of a cell: printed text by stream, then the values of each type of output, in order."""
    found, streams = defaultdict(list), defaultdict(str)
    for output in cell.outputs:
        if output.output_type == "stream":
            streams[output.name] += output.text
            continue
        for key, value in {**output, **output.get("data", {})}.items():
            if key not in UNCOMPARED | {course.WIDGET_VIEW}:
                found[key].append(RANDOM.sub("", "".join(value)).rstrip())
    printed = {name: OVERWRITTEN.sub("", text) for name, text in streams.items()}
    return {**{name: [RANDOM.sub("", text).rstrip()] for name, text in printed.items()}, **found}


def differences(committed, executed) -> list[tuple[dict, dict]]:
    """The checked cells that show something else than what is committed, as (committed, executed)."""
    cells = [c for c in rules.code_cells(executed) if "injected-parameters" not in c.metadata.get("tags", [])]
    pairs = list(zip(rules.code_cells(committed), cells, strict=True))
    assert all(before.source == after.source for before, after in pairs)
    checked = [pair for pair in pairs if "nbval-check-output" in pair[0].metadata.get("tags", [])]
    assert checked
    return [(shown(before), shown(after)) for before, after in checked if shown(before) != shown(after)]


@pytest.fixture(scope="module")
def smoke_course(tmp_path_factory) -> tuple[Path, subprocess.CompletedProcess]:
    out = tmp_path_factory.mktemp("course") / "out"
    done = run("-m", "cifar_ft", "course", "--recipe", "smoke", "--out", out, cwd=out.parent)
    return out, done


def test_one_command_runs_the_course_and_ends_with_what_was_reached(smoke_course):
    out, done = smoke_course
    assert done.returncode == 0, done.stderr[-2000:]
    assert sorted(path.stem for path in out.glob("*.ipynb")) == list(course.NOTEBOOKS)
    assert sorted(path.stem for path in out.glob("*.html")) == list(course.NOTEBOOKS)
    seconds = json.loads((out / "course.json").read_text("utf-8"))["seconds"]
    assert list(seconds) == list(course.NOTEBOOKS)
    metrics = json.loads((out / "run" / "metrics.json").read_text("utf-8"))
    for part in (f"{100 * metrics['test_accuracy']:.2f} %", metrics["backbone"], *course.NOTEBOOKS):
        assert part in done.stdout
    print(done.stdout)  # -rP shows where the time went


def test_the_course_trains_and_measures(smoke_course):
    out, _ = smoke_course
    metrics = json.loads((out / "run" / "metrics.json").read_text("utf-8"))
    low, high = metrics["test_accuracy_ci95"]
    assert metrics["recipe"] == "smoke"
    assert metrics["backbone"] == "efficientnet_lite0"
    assert metrics["weights"] != "none"
    # 512 images, two epochs at 32 px: far from good, but pretrained weights beat guessing (0.1) beyond doubt
    assert 0.15 < low < metrics["test_accuracy"] < high < 0.9
    assert 0 < metrics["test_loss"] < 2.303  # below ln 10, the loss of guessing
    assert 0 < metrics["train_seconds"] < 600


@pytest.mark.parametrize("name", course.NOTEBOOKS)
def test_checked_cells_show_what_a_fresh_run_gives(name, smoke_course):
    committed, executed = (
        nbformat.read(folder / f"{name}.ipynb", 4) for folder in (ROOT / "notebooks", smoke_course[0])
    )
    assert differences(committed, executed) == []


def test_the_comparison_turns_red_on_a_wrong_committed_output():
    committed = nbformat.read(BROKEN / "wrong_output.ipynb", 4)
    executed = deepcopy(committed)
    assert differences(committed, executed) == []
    rules.tagged(executed, "nbval-check-output")[0].outputs[0].text = "\r 1/2\r    \rten classes\n"
    assert differences(committed, executed) == [({"stdout": ["eleven classes"]}, {"stdout": ["ten classes"]})]
    rules.tagged(executed, "nbval-check-output")[0].outputs = []
    assert differences(committed, executed) == [({"stdout": ["eleven classes"]}, {})]


def test_nbval_passes_a_committed_notebook_and_turns_red_on_a_wrong_output(tmp_path):
    for path in (ROOT / "notebooks" / "01_data_exploration.ipynb", BROKEN / "wrong_output.ipynb"):
        shutil.copy(path, tmp_path)
    options = ["--nbval-lax", "--nbval-current-env", "--nbval-cell-timeout=300", "-p", "no:cacheprovider"]
    done = run("-m", "pytest", "01_data_exploration.ipynb", "wrong_output.ipynb", "-q", *options, cwd=tmp_path)
    assert done.returncode == 1
    assert "eleven classes" in done.stdout
    assert re.search(r"\b1 failed, \d\d passed", done.stdout), done.stdout[-3000:]


def test_the_rules_turn_red_on_a_checked_cell_without_output():
    path = BROKEN / "stripped.ipynb"  # which nbval lets pass
    assert any("without output" in problem for problem in rules.checked_cells(rules.read(path), path))
