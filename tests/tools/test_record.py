"""What was run is kept whole: the right notebooks, the run without its weights, the model it ended with."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import nbformat
import pytest
from test_course import write
from tiny_runs import quiet, recipe

from cifar_ft import results, training
from cifar_ft.course import CourseError
from cifar_ft.predictions import PredictionError
from cifar_ft.training import keep_figures
from tools.record import MAKING, READING, appraise_shipped, record, record_reading
from tools.ship import export_shipped

READS = """
from cifar_ft import results
print(RUN_DIR or results.newest_run() or results.SHIPPED_RUN.name)
"""


@pytest.fixture
def root(tmp_path, monkeypatch):
    """A checkout of six small notebooks, whose report is not written."""
    for name in MAKING:
        write(tmp_path / "notebooks", name, "print(EPOCHS)")
    for name in READING:
        write(tmp_path / "notebooks", name, READS, parameters='RUN_DIR: str = ""')
    monkeypatch.setattr(recording, "write_report", lambda root: [root])
    monkeypatch.setattr(recording, "recorded_copies", lambda root: [])
    return tmp_path


def printed(root: Path, name: str) -> str:
    cells = nbformat.read(root / "notebooks" / f"{name}.ipynb", 4).cells
    return "".join(output.get("text", "") for cell in cells for output in cell.get("outputs", []))


def test_notebooks_that_read_a_run_read_the_shipped_one_whatever_lies_about(root, monkeypatch):
    other = root / "runs" / "newer"
    keep_figures(results.load_run(results.SHIPPED_RUN), other)
    monkeypatch.setenv("CIFAR_FT_RUNS", str(root / "runs"))
    record_reading(root, quiet)
    assert {name: printed(root, name) for name in READING} == dict.fromkeys(
        READING, "shipped_run\n"
    )
    assert {printed(root, name) for name in MAKING} == {""}
    assert os.environ["CIFAR_FT_RUNS"] == str(root / "runs")


def test_a_course_run_is_kept_up_to_its_training(root):
    out = root / "out"
    shutil.copytree(root / "notebooks", out)
    for name in (*MAKING, *READING):
        notebook = nbformat.read(out / f"{name}.ipynb", 4)
        notebook.cells[-1].outputs = [nbformat.v4.new_output("stream", text="3\n")]
        nbformat.write(notebook, out / f"{name}.ipynb")
    keep_figures(results.load_run(results.SHIPPED_RUN), out / "run")
    names = [*MAKING, *READING]
    course = {"complete": True, "seconds": dict.fromkeys(names, 1.0), "total_seconds": 6.0, "changed": []}
    (out / "course.json").write_text(json.dumps({**course, "parameters": {"RECIPE": "quick"}}))
    assert record(out, root) == [root]
    assert {printed(root, name) for name in MAKING} == {"3\n"}
    assert {printed(root, name) for name in READING} == {""}
    kept = root / "results" / results.load_run(results.SHIPPED_RUN).recipe.name
    assert results.load_run(kept).accuracy == results.load_run(results.SHIPPED_RUN).accuracy
    assert json.loads((kept / "course.json").read_text()) == {"seconds": course["seconds"], "total_seconds": 6.0}


def test_a_shipped_model_that_is_not_its_run_is_found(small_data, tmp_path, monkeypatch):
    from cifar_ft import results

    changes = {"backbone": "resnet18", "last_stage": 1, "epochs": 1, "checkpoint_steps": 0}
    run = training.fit(recipe(**changes), small_data, tmp_path / "run", echo=quiet)
    monkeypatch.setattr(predictions, "SHIPPED", tmp_path / "model.safetensors")
    monkeypatch.setattr(results, "SHIPPED_RUN", run.path)
    monkeypatch.setattr(recording, "appraise", lambda predictor, test, echo: {"accuracy": run.accuracy - 0.025})
    export_shipped(run.path)
    with pytest.raises(PredictionError, match="not as accurate"):
        appraise_shipped(tmp_path / "shipped.json", small_data.test, quiet)
    monkeypatch.setattr(recording, "appraise", lambda predictor, test, echo: {"accuracy": run.accuracy})
    assert appraise_shipped(tmp_path / "shipped.json", small_data.test, quiet) == {"accuracy": run.accuracy}
    assert json.loads((tmp_path / "shipped.json").read_text()) == {"accuracy": run.accuracy}


def test_recording_outside_a_checkout_is_refused(monkeypatch):
    monkeypatch.setattr(recording, "checkout", lambda: None)
    with pytest.raises(CourseError, match="checkout"):
        record_reading()
