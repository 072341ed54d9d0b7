"""Promise: the six notebooks run start to end, and what their checked cells show is what a fresh run gives.

`python -m cifar_ft course --recipe smoke` runs them once with papermill. nbval then runs each again and
compares the cells tagged nbval-check-output with what is committed. Last, each gate meets a broken notebook.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import nbformat
import notebook_rules as rules
import pytest

from cifar_ft import course

ROOT = Path(__file__).resolve().parents[2]
FOLDER = ROOT / "notebooks"
BROKEN = Path(__file__).resolve().parent / "broken"
SAME_EVERYWHERE = {"PYTHONPATH": str(ROOT), "CIFAR_FT_BACKBONE": "efficientnet_lite0"}  # "auto" asks the network
pytestmark = [pytest.mark.notebook, pytest.mark.timeout(900)]


def run(*command: object, cwd: Path, **environment: object) -> subprocess.CompletedProcess:
    environment = {**os.environ, **SAME_EVERYWHERE, **{k: str(v) for k, v in environment.items()}}
    command = [sys.executable, *map(str, command)]
    return subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=850)


def nbval(path: Path, folder: Path, **parameters: object) -> subprocess.CompletedProcess:
    """Compare the checked cells of `path` with a run under `parameters`, on a copy in `folder`."""
    import papermill

    declared = course.parameters(path)
    given = {name: value for name, value in parameters.items() if name in declared}
    course.check_parameters([path], given)
    folder.mkdir(exist_ok=True)
    copy = folder / path.name
    papermill.execute_notebook(str(path), str(copy), given, prepare_only=True, kernel_name="python3", language="python")
    options = ["--nbval-lax", "--nbval-current-env", "--nbval-cell-timeout=300", "-p", "no:cacheprovider"]
    return run("-m", "pytest", copy.name, "-q", *options, cwd=folder, CIFAR_FT_RUNS=folder / "runs")


@pytest.fixture(scope="session")
def smoke_course(tmp_path_factory) -> tuple[Path, subprocess.CompletedProcess]:
    out = tmp_path_factory.mktemp("course") / "out"
    done = run("-m", "cifar_ft", "course", "--recipe", "smoke", "--out", out, cwd=out.parent)
    return out, done


def test_one_command_runs_the_course(smoke_course):
    out, done = smoke_course
    assert done.returncode == 0, done.stderr[-2000:]
    assert sorted(path.stem for path in out.glob("*.ipynb")) == list(course.NOTEBOOKS)
    assert sorted(path.stem for path in out.glob("*.html")) == list(course.NOTEBOOKS)
    assert list(json.loads((out / "course.json").read_text("utf-8"))["seconds"]) == list(course.NOTEBOOKS)


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


def test_the_course_ends_with_what_was_reached(smoke_course):
    out, done = smoke_course
    metrics = json.loads((out / "run" / "metrics.json").read_text("utf-8"))
    assert f"{100 * metrics['test_accuracy']:.2f} %" in done.stdout
    assert metrics["backbone"] in done.stdout
    for name in course.NOTEBOOKS:
        assert name in done.stdout


@pytest.mark.parametrize("name", course.NOTEBOOKS)
def test_checked_cells_show_what_a_fresh_run_gives(name, smoke_course, tmp_path):
    out, _ = smoke_course
    trained = out / "run"
    assert (trained / "metrics.json").exists(), "the course has not trained; see test_one_command_runs_the_course"
    run_dir = tmp_path / "run" if name == "04_training" else trained
    done = nbval(FOLDER / f"{name}.ipynb", tmp_path / "copy", RECIPE="smoke", RUN_DIR=str(run_dir))
    assert done.returncode == 0, done.stdout[-4000:]


# -- each gate, shown a notebook that is broken on purpose


def test_nbval_passes_the_control(tmp_path):
    done = nbval(BROKEN / "control.ipynb", tmp_path, RECIPE="smoke")
    assert done.returncode == 0, done.stdout


def test_nbval_turns_red_on_a_wrong_committed_output(tmp_path):
    done = nbval(BROKEN / "wrong_output.ipynb", tmp_path, RECIPE="smoke")
    assert done.returncode == 1
    assert "eleven classes" in done.stdout


def test_the_guard_turns_red_on_a_checked_cell_without_output(tmp_path):
    path = BROKEN / "stripped.ipynb"
    assert any("without output" in problem for problem in rules.checked_cells(rules.read(path), path))
    assert nbval(path, tmp_path).returncode == 0  # which is why the guard is needed


def test_the_course_turns_red_on_a_failing_cell(tmp_path):
    with pytest.raises(course.CourseError, match=r"failing_cell\.ipynb, cell \[2\]: ValueError: broken on purpose"):
        course.run_course(tmp_path / "out", notebooks=[BROKEN / "failing_cell.ipynb"], echo=lambda _: None)
    assert nbformat.read(tmp_path / "out" / "failing_cell.ipynb", 4).cells


def test_the_parameter_check_turns_red_on_an_unknown_name(tmp_path):
    with pytest.raises(course.ParameterError, match="unknown parameter 'EPOCHS'"):
        course.run_course(tmp_path / "out", parameters=["EPOCHS=1"], notebooks=[BROKEN / "control.ipynb"])


def test_the_parameter_check_turns_red_on_a_computed_default():
    with pytest.raises(course.CourseError, match=r"WARMUP.*not a typed literal"):
        course.parameters(BROKEN / "derived_parameter.ipynb")


def test_the_command_line_turns_red_on_an_unknown_parameter(tmp_path):
    done = run("-m", "cifar_ft", "course", "-p", "EPOCHZ=1", "--out", tmp_path / "out", cwd=tmp_path)
    assert done.returncode == 2
    assert "EPOCHZ" in done.stderr
    assert len(done.stderr.strip().split("\n")) <= 2
    assert not (tmp_path / "out").exists()
