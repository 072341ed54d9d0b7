"""Promise: what was run is kept whole: the right notebooks, the run without its weights, the model it ended with."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import nbformat
import numpy as np
import pytest
import torch
from nbformat.v4 import new_code_cell, new_notebook, new_output
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tiny_models import v1_file
from tiny_runs import recipe
from typer.testing import CliRunner

from cifar_ft import predictions, results, training
from cifar_ft.data import CLASSES
from cifar_ft.models import fetch_weights, predict_logits
from cifar_ft.predictions import PredictionError, Predictor, predictor
from cifar_ft.transforms import eval_transform
from tools import record, study
from tools.publish import publish_run
from tools.record import READING, TRAINING, export_shipped


@pytest.fixture
def root(tmp_path, monkeypatch):
    """A checkout of small notebooks, whose report is not written."""
    (tmp_path / "notebooks").mkdir()
    for name in (*TRAINING, *READING):
        cells = [new_code_cell('RUN_DIR: str = ""', metadata={"tags": ["parameters"]}), new_code_cell("f()")]
        nbformat.write(new_notebook(cells=cells), tmp_path / "notebooks" / f"{name}.ipynb")
    monkeypatch.setattr(record, "write_report", lambda root: [root])
    return tmp_path


def printed(root, names) -> set[str]:
    found = set()
    for name in names:
        cells = nbformat.read(root / "notebooks" / f"{name}.ipynb", 4).cells
        found.add("".join(output.get("text", "") for cell in cells for output in cell.get("outputs", [])))
    return found


def ran(root: Path, out: Path, text: str) -> None:
    """What a course run of all notebooks leaves in `out`, whose last cells printed `text`."""
    shutil.copytree(root / "notebooks", out)
    for path in out.glob("*.ipynb"):
        notebook = nbformat.read(path, 4)
        notebook.cells[-1].outputs = [new_output("stream", text=text)]
        nbformat.write(notebook, path)
    seconds = dict.fromkeys((*TRAINING, *READING), 1.0)
    course = {"complete": True, "seconds": seconds, "total_seconds": 6.0, "changed": [], "parameters": {}}
    (out / "course.json").write_text(json.dumps(course))


def test_notebooks_that_read_a_run_read_the_shipped_one_whatever_lies_about(root, monkeypatch):
    publish_run(results.load_run(results.SHIPPED_RUN), root / "runs" / "newer")
    monkeypatch.setenv("CIFAR_FT_RUNS", str(root / "runs"))

    def run_course(out, notebooks):
        assert [path.stem for path in notebooks] == list(READING)
        ran(root, out, f"newest: {results.newest_run()}\n")

    monkeypatch.setattr(record, "run_course", run_course)
    assert record.keep_reading(root) == [root]
    assert printed(root, READING) == {"newest: None\n"}
    assert os.environ["CIFAR_FT_RUNS"] == str(root / "runs")


def test_a_course_run_is_kept_up_to_its_training(root):
    out = root / "out"
    ran(root, out, "3\n")
    publish_run(results.load_run(results.SHIPPED_RUN), out / "run")
    assert record.keep_course(out, root) == [root]
    assert printed(root, TRAINING) == {"3\n"}
    assert printed(root, READING) == {""}
    kept = root / "results" / "cpu"
    assert results.load_run(kept).accuracy == results.load_run(results.SHIPPED_RUN).accuracy
    assert json.loads((kept / "course.json").read_text()) == {
        "seconds": dict.fromkeys((*TRAINING, *READING), 1.0),
        "total_seconds": 6.0,
    }


@pytest.fixture(scope="module")
def finished(small_data, tmp_path_factory, one_thread):
    """A finished run with a calibration, one epoch of a tiny network."""
    return training.fit(recipe(epochs=1, checkpoint_steps=0), small_data, tmp_path_factory.mktemp("record") / "run")


@pytest.fixture
def shipped(tmp_path, monkeypatch):
    """Where the shipped model is, for this test."""
    for module in (predictions, predictor):
        monkeypatch.setattr(module, "SHIPPED", tmp_path / "shipped.safetensors")
    return tmp_path / "shipped.safetensors"


def test_the_shipped_model_is_the_run_in_half_precision_with_its_origin(finished, samples, shipped):
    assert export_shipped(finished.path) == shipped
    assert list(shipped.parent.iterdir()) == [shipped]
    state = load_file(shipped)
    assert {tensor.dtype for tensor in state.values()} == {torch.float16, torch.int64}
    with safe_open(shipped, "pt") as file:
        found = {key: json.loads(text) if text[0] in "{[" else text for key, text in file.metadata().items()}
    assert found["recipe"] == finished.recipe.to_dict()
    assert found["metrics"]["test_accuracy"] == finished.accuracy
    assert found["metrics"]["test_accuracy_ci95"] == pytest.approx(results.wilson_interval(finished.correct, 40))
    assert found["data"] == finished.config["data"]
    assert found["calibration"] == finished.metrics["calibration"]
    assert (found["classes"], found["backbone"]) == (list(CLASSES), "resnet18")
    assert set(found["weights"]) == {"weights", "source", "sha256", "licence"}
    loaded = Predictor.shipped()
    assert f"recipe smoke, resnet18, {results.accuracy_text(finished.correct, 40)} on 40 test images" in loaded.source
    assert next(loaded.model.parameters()).dtype == torch.float32
    whole = Predictor.from_run(finished.path).predict_proba(samples.images[:20])
    np.testing.assert_allclose(loaded.predict_proba(samples.images[:20]), whole, atol=5e-3)


def test_a_model_of_2015_is_loaded_and_shipped_with_its_strides(small_data, samples, shipped, tmp_path):
    v1 = {"backbone": "resnet50", "last_stage": 2, "weights": str(v1_file(tmp_path / "v1.safetensors"))}
    few = {"epochs": 1, "checkpoint_steps": 0, "train_images": 48, "test_images": 40}
    run = training.fit(recipe(**v1, **few), small_data, tmp_path / "run")
    whole = Predictor.from_run(run.path)
    logits = predict_logits(whole.model, small_data.test, eval_transform(run.recipe))
    np.testing.assert_allclose(logits, run.logits, rtol=1e-4, atol=1e-5)
    export_shipped(run.path)
    found = [predictor.predict_proba(samples.images[:20]) for predictor in (Predictor.shipped(), whole)]
    np.testing.assert_allclose(*found, atol=5e-3)
    for file in (shipped, run.path / "model.safetensors"):
        assert fetch_weights("resnet50", file).strides == "v1"


@pytest.fixture
def copied(finished, tmp_path):
    """A copy of the run that a test may change."""
    return shutil.copytree(finished.path, tmp_path / "copy")


def test_the_shipped_model_holds_no_path_of_the_machine_it_was_made_on(copied, tmp_path):
    config = json.loads((copied / "config.json").read_text())
    config["recipe"]["weights"] = "/home/somebody/secret/r18.pth"
    config["weights"]["source"] = "the file /home/somebody/secret/r18.pth"
    (copied / "config.json").write_text(json.dumps(config))
    content = export_shipped(copied, tmp_path / "m.safetensors").read_bytes()
    assert b"r18.pth" in content
    assert b"somebody" not in content
    assert str(tmp_path).encode() not in content


def test_a_model_that_is_too_large_or_out_of_range_is_not_shipped(copied, tmp_path, monkeypatch):
    target = tmp_path / "m.safetensors"
    target.write_bytes(b"the one before")
    with monkeypatch.context() as patch:
        patch.setattr(record, "SHIPPED_BYTES", 100_000)
        with pytest.raises(PredictionError, match=r"takes 0\.3 MB and may take 0; ship a run with backbone="):
            export_shipped(copied, target)
    state = load_file(copied / "model.safetensors")
    save_file({**state, "fc.bias": torch.full((10,), 1e6)}, copied / "model.safetensors")
    with pytest.raises(PredictionError, match=r"fc.bias has values too large for half precision"):
        export_shipped(copied, target)
    assert target.read_bytes() == b"the one before"


def test_ship_keeps_a_finished_run_measures_it_and_runs_the_notebooks(finished, small_data, shipped, monkeypatch):
    done = []
    monkeypatch.setattr(record, "load_cifar10", lambda: small_data)
    monkeypatch.setattr(record, "measure_shipped", lambda out, test: done.append((out.name, test)))
    monkeypatch.setattr(record, "keep_reading", lambda root: done.append(root))
    monkeypatch.setattr(results, "SHIPPED_RUN", shipped.parent / "kept")
    asked = CliRunner().invoke(record.app, ["ship", "--out", str(finished.path)])
    assert asked.exit_code == 0, asked.exception
    assert done == [("shipped.json", small_data.test), record.ROOT]
    assert results.load_run(shipped.parent / "kept").accuracy == finished.accuracy
    assert shipped.exists()


def test_a_shipped_model_that_is_not_its_run_is_found(finished, copied, small_data, shipped, monkeypatch):
    export_shipped(finished.path)
    monkeypatch.setattr(study, "TOLERANCE", 0.03)  # one of 40 images may fall on the other side in 16 bits
    monkeypatch.setattr(results, "SHIPPED_RUN", finished.path)
    found = study.measure_shipped(shipped.parent / "shipped.json", small_data.test)
    assert json.loads((shipped.parent / "shipped.json").read_text()) == json.loads(json.dumps(found))
    assert found["corruptions"][0]["accuracy"] == found["accuracy"]
    assert found["without"]["all"] == {"images": 40, "accuracy": found["accuracy"], "ci95": found["ci95"]}
    labels = finished.logits.argmax(1)  # of a run that had everything right
    np.savez(copied / "test_logits.npz", logits=finished.logits, labels=labels)
    monkeypatch.setattr(results, "SHIPPED_RUN", copied)
    with pytest.raises(PredictionError, match="not as accurate"):
        study.measure_shipped(shipped.parent / "shipped.json", small_data.test)
