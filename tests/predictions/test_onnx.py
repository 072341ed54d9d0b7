"""Promises of `cifar_ft.export`: the file answers as the predictor does, whole or not at all, and says what it is."""

from __future__ import annotations

import json
import sys
import time
import warnings
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import tiny_runs
import torch
from tiny_runs import quiet, raise_

from cifar_ft import files, predictions
from cifar_ft.data import CLASSES, load_samples
from cifar_ft.models import build_model, features
from cifar_ft.predictions import (
    ExportError,
    PredictionError,
    Predictor,
    check_onnx,
    export_checked,
    export_onnx,
    latency,
)
from cifar_ft.training import SmallMapConv2d, speed_up
from cifar_ft.transforms import eval_transform, resize

PACKAGES = ("onnx", "onnxscript", "onnxruntime")
needs_onnx = pytest.mark.skipif(
    any(find_spec(name) is None for name in PACKAGES), reason=f"pip install {' '.join(PACKAGES)}"
)
pytestmark = pytest.mark.usefixtures("one_thread")


def tiny(calibration=None, fast=False, **settings):
    """A tiny ResNet with decided answers and statistics that are not 0 and 1, the same each time."""
    recipe = tiny_runs.recipe(**settings)
    model, generator = build_model(recipe, quiet), torch.Generator().manual_seed(1)
    for module in model.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.running_mean.normal_(0, 0.2, generator=generator)
            module.running_var.uniform_(0.5, 2, generator=generator)
    seen = features(model.eval(), eval_transform(recipe)(load_samples().images)).detach()
    torch.nn.init.normal_(model.fc.weight, std=2, generator=generator)
    model.fc.bias.data = -model.fc.weight.detach() @ seen.mean(0)  # so that no class is ahead on average
    return Predictor(speed_up(model) if fast else model, recipe, "a random model", calibration=calibration)


def run(path, images):
    """Probabilities and logits of ONNX Runtime, as a user without this library gets them."""
    import onnxruntime

    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    return session.run(["probabilities", "logits"], {"images": images.numpy()})


@pytest.fixture(scope="module")
def calibrated():
    return tiny({"temperature": 2.5, "lowest_energy": 1.0, "false_alarms": 0.02})


@pytest.fixture(scope="module")
def model_file(calibrated, tmp_path_factory):
    return export_onnx(calibrated, tmp_path_factory.mktemp("export") / "model.onnx")


@needs_onnx
@pytest.mark.parametrize("image_size", [16, 32, 45])
def test_one_file_answers_one_picture_and_seven_as_the_predictor_does(image_size, samples, tmp_path):
    predictor = tiny(image_size=image_size)
    path = export_onnx(predictor, tmp_path / "model.onnx")
    for n in (1, 7):
        probabilities, logits = run(path, samples.images[:n])
        assert probabilities.dtype == logits.dtype == np.float32
        assert probabilities.shape == logits.shape == (n, 10)
        np.testing.assert_allclose(probabilities, predictor.predict_proba(samples.images[:n]), atol=1e-5)
    assert probabilities.max() > 0.5  # decided, so that the comparison means something
    assert len(set(probabilities.argmax(1))) > 1


@needs_onnx
def test_the_input_is_uint8_pixels_of_any_number_and_the_file_says_what_it_is(model_file, calibrated):
    import onnxruntime

    session = onnxruntime.InferenceSession(str(model_file), providers=["CPUExecutionProvider"])
    (images,) = session.get_inputs()
    assert (images.name, images.type, images.shape) == ("images", "tensor(uint8)", ["N", 3, 32, 32])
    assert [(out.name, out.type, out.shape) for out in session.get_outputs()] == [
        ("probabilities", "tensor(float)", ["N", 10]),
        ("logits", "tensor(float)", ["N", 10]),
    ]
    metadata = session.get_modelmeta().custom_metadata_map
    assert json.loads(metadata["classes"]) == list(CLASSES)
    assert metadata["source"] == "a random model"
    assert metadata["recipe"] == calibrated.recipe.name
    assert json.loads(metadata["calibration"]) == calibrated.calibration


@needs_onnx
def test_the_file_is_valid_and_holds_no_path_of_the_machine_it_was_made_on(model_file):
    import onnx

    onnx.checker.check_model(str(model_file), full_check=True)
    content = model_file.read_bytes()
    for trace in (b".py", b"site-packages", str(Path(torch.__file__).parents[1]).encode(), str(Path.cwd()).encode()):
        assert trace not in content
    assert list(model_file.parent.iterdir()) == [model_file]  # no second file with the weights


@needs_onnx
def test_the_temperature_of_the_predictor_divides_the_logits(model_file, calibrated, samples):
    probabilities, logits = (torch.from_numpy(values) for values in run(model_file, samples.images[:7]))
    np.testing.assert_allclose(probabilities, (logits / 2.5).softmax(1), atol=1e-6)
    assert (probabilities - logits.softmax(1)).abs().max() > 0.05
    np.testing.assert_allclose(probabilities, calibrated.predict_proba(samples.images[:7]), atol=1e-5)


@needs_onnx
def test_exporting_warns_of_nothing_and_leaves_the_predictor_as_it_was(tmp_path, capfd):
    predictor = tiny()
    model = predictor.model.to(memory_format=torch.channels_last)
    model.layer1.train()
    model.fc.requires_grad_(False)
    before = {name: values.clone() for name, values in model.state_dict().items()}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        export_onnx(predictor, tmp_path / "model.onnx")
    assert capfd.readouterr() == ("", "")
    assert predictor.model is model
    assert model.layer1.training
    assert not model.fc.training
    assert [p.requires_grad for p in model.fc.parameters()] == [False, False]
    assert model.conv1.weight.requires_grad
    assert model.conv1.weight.is_contiguous(memory_format=torch.channels_last)
    assert all(torch.equal(values, before[name]) for name, values in model.state_dict().items())


@needs_onnx
def test_a_model_with_fast_convolutions_is_exported_too(samples, tmp_path):
    fast = tiny(fast=True)
    assert any(isinstance(module, SmallMapConv2d) for module in fast.model.modules())
    probabilities, _ = run(export_onnx(fast, tmp_path / "fast.onnx"), samples.images[:7])
    np.testing.assert_allclose(probabilities, tiny().predict_proba(samples.images[:7]), atol=1e-5)


@needs_onnx
def test_the_check_measures_the_largest_differences_and_counts_labels(model_file, calibrated, samples):
    found = check_onnx(model_file, calibrated, samples)
    assert list(found) == ["images", "probability_difference", "logit_difference", "different_labels", "agreement"]
    assert (found["images"], found["different_labels"], found["agreement"]) == (200, 0, 1)
    assert found["probability_difference"] < 1e-5
    assert found["logit_difference"] < 1e-4
    assert check_onnx(model_file.read_bytes(), calibrated, samples.images[:3])["images"] == 3
    other = tiny()
    with torch.no_grad():
        other.model.fc.bias[4] += 3
    other.calibration = calibrated.calibration
    found = check_onnx(model_file, other, samples)
    wrong = (other.predict_proba(samples).argmax(1) != calibrated.predict_proba(samples).argmax(1)).sum()
    assert 0 < wrong < 200
    assert (found["different_labels"], found["agreement"]) == (wrong, pytest.approx(1 - wrong / 200))
    assert found["logit_difference"] == pytest.approx(3, abs=1e-3)
    expected = np.abs(other.predict_proba(samples) - calibrated.predict_proba(samples)).max()
    assert found["probability_difference"] == pytest.approx(expected, abs=1e-4)


@needs_onnx
def test_a_damaged_file_is_refused_in_one_line(model_file, calibrated, samples, tmp_path):
    (tmp_path / "half.onnx").write_bytes(model_file.read_bytes()[:1000])
    for path in (tmp_path / "half.onnx", tmp_path / "none.onnx"):
        with pytest.raises(ExportError, match=rf"cannot load .*{path.name}.*export it again") as caught:
            check_onnx(path, calibrated, samples)
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize("size", [16, 31, 32, 33, 112])
def test_two_products_are_the_resize_of_the_transforms(size, samples):
    matrix, pictures = predictions._resize_matrix(size), samples.images[:5].float()
    assert matrix.shape == (size, 32)
    torch.testing.assert_close(matrix @ pictures @ matrix.T, resize(pictures, size), atol=1e-3, rtol=0)


@pytest.mark.parametrize(
    ("path", "message"),
    [("none/model.onnx", r"there is no folder .*none; make it"), ("folder", r"cannot write .*folder: .*another file")],
)
def test_a_target_that_cannot_be_written_leaves_nothing_behind(path, message, calibrated, tmp_path, monkeypatch):
    monkeypatch.setattr(export, "_serialized", lambda _: b"a model")
    (tmp_path / "folder").mkdir()
    with pytest.raises((ExportError, PredictionError), match=message):
        export_onnx(calibrated, tmp_path / path)
    assert list(tmp_path.rglob("*")) == [tmp_path / "folder"]


def test_an_interrupted_export_leaves_the_earlier_file(calibrated, tmp_path, monkeypatch):
    path = tmp_path / "model.onnx"
    path.write_bytes(b"the one before")
    monkeypatch.setattr(export, "_serialized", lambda _: raise_(KeyboardInterrupt()))
    with pytest.raises(KeyboardInterrupt):
        export_onnx(calibrated, path)
    monkeypatch.setattr(export, "_serialized", lambda _: b"a model")
    with monkeypatch.context() as patch:
        patch.setattr(Path, "write_bytes", lambda path, data: path.touch() or raise_(OSError(28, "No space left")))
        with pytest.raises(PredictionError, match="No space left"):
            export_onnx(calibrated, path)
    assert path.read_bytes() == b"the one before"
    assert list(tmp_path.iterdir()) == [path]
    assert export_onnx(calibrated, path).read_bytes() == b"a model"


@pytest.mark.parametrize("missing", [["onnxscript"], ["onnx", "onnxscript", "onnxruntime"]])
def test_missing_packages_are_named_with_what_to_install(missing, calibrated, tmp_path, monkeypatch):
    for name in missing:
        monkeypatch.setitem(sys.modules, name, None)
    for name in {*PACKAGES} - {*missing}:
        monkeypatch.setitem(sys.modules, name, sys)
    wanted = [name for name in ("onnx", "onnxscript") if name in missing]
    with pytest.raises(
        ExportError, match=f"needs {' and '.join(wanted)}; install with `pip install {' '.join(wanted)}`"
    ):
        export_onnx(calibrated, tmp_path / "model.onnx")
    with pytest.raises(ExportError, match=f"`pip install {' '.join(missing)}`"):
        export_checked(None, tmp_path / "model.onnx", quiet)
    assert not list(tmp_path.iterdir())


def test_an_old_torch_is_told_before_it_fails(calibrated, tmp_path, monkeypatch):
    for name in PACKAGES:
        monkeypatch.setitem(sys.modules, name, sys)
    monkeypatch.setattr(torch, "__version__", "2.5.1+cpu")
    with pytest.raises(ExportError, match=r"torch 2\.5\.1\+cpu cannot export .*use 2\.6 or newer"):
        export_onnx(calibrated, tmp_path / "model.onnx")


@needs_onnx
def test_latency_is_the_median_of_a_picture_for_both(model_file, calibrated, monkeypatch):
    calls = []

    def slow(*_):  # 20 ms a batch, but for one call
        calls.append(1)
        time.sleep(1.0 if len(calls) == 3 else 0.02)
        return torch.zeros(4, 10)

    monkeypatch.setattr(export, "_logits", slow)
    found = latency(model_file, calibrated, batch_sizes=(4,), seconds=0.5)
    assert list(found.columns) == ["batch_size", "pytorch_ms", "onnx_ms", "speedup", "threads", "device"]
    (row,) = found.itertuples()
    assert 5 <= row.pytorch_ms < 15  # neither 20, of the batch, nor the mean with its outlier
    assert row.onnx_ms > 0
    assert row.speedup == pytest.approx(row.pytorch_ms / row.onnx_ms)
    assert (row.batch_size, row.threads, row.device) == (4, torch.get_num_threads(), "cpu")
    assert latency(model_file, calibrated, (1, 3), seconds=0.01).batch_size.tolist() == [1, 3]


@pytest.fixture
def no_run(tmp_path, monkeypatch):
    """No run to find, so that the shipped model is exported, and one quick measurement."""
    monkeypatch.setenv("CIFAR_FT_RUNS", str(tmp_path / "none"))
    monkeypatch.setattr(export, "latency", lambda *given: latency(*given, batch_sizes=(1, 2), seconds=0.1))


@needs_onnx
@pytest.mark.slow
def test_the_shipped_model_is_exported_checked_and_timed(no_run, samples, tmp_path):
    said = []
    path = export_checked(None, tmp_path / "model.onnx", said.append)
    assert list(tmp_path.iterdir()) == [path]
    shipped = Predictor.shipped()
    for n in (1, 7):
        probabilities, _ = run(path, samples.images[:n])
        np.testing.assert_allclose(probabilities, shipped.predict_proba(samples.images[:n]), atol=1e-4)
    assert said[0] == f"Model: {shipped.source}"
    assert said[1].startswith("Checked on 200 pictures: 200 of 200 labels as PyTorch, probabilities differ by at most ")
    assert said[2] == f"Wrote {files.show_path(path)}, {path.stat().st_size / 1e6:.1f} MB"
    assert [line.split(":")[0] for line in said[3:]] == ["A picture, 1 at a time", "A picture, 2 at a time"]
    assert all("ms with ONNX Runtime" in line and "ms with PyTorch" in line for line in said[3:])


@needs_onnx
def test_a_model_that_answers_differently_is_not_written(calibrated, tmp_path, monkeypatch):
    path, matrix = tmp_path / "model.onnx", predictions._resize_matrix
    path.write_bytes(b"the one before")
    monkeypatch.setattr(Predictor, "from_run", lambda run: calibrated)
    monkeypatch.setattr(export, "_resize_matrix", lambda size: matrix(size).flip(0))  # pictures upside down
    with pytest.raises(ExportError, match=r"answers differently \(\d+ of 200 labels.*nothing was written"):
        export_checked("a run", path, quiet)
    assert path.read_bytes() == b"the one before"
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize(("difference", "labels"), [(2e-3, 0), (0.0, 1), (float("nan"), 0)])
def test_every_kind_of_difference_counts(difference, labels, calibrated, tmp_path, monkeypatch):
    found = {"images": 200, "probability_difference": difference, "different_labels": labels}
    for name, stub in {"_require": quiet_all, "_serialized": quiet_all, "check_onnx": lambda *_: found}.items():
        monkeypatch.setattr(export, name, stub)
    monkeypatch.setattr(Predictor, "from_run", lambda run: calibrated)
    with pytest.raises(ExportError, match="answers differently"):
        export_checked("a run", tmp_path / "model.onnx", quiet)
    assert not list(tmp_path.iterdir())


def quiet_all(*_):
    return None
