"""Promises of `predictions.onnx`: the file answers as the predictor does, whole or not at all, and says what it is."""

from __future__ import annotations

import json
import time
import warnings
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import tiny_runs
import torch
from tiny_models import v1_file

from cifar_ft import results
from cifar_ft.data import CLASSES, load_samples
from cifar_ft.files import FileError, show_path
from cifar_ft.models import build_model, features
from cifar_ft.predictions import ExportError, Predictor, export_checked, export_onnx
from cifar_ft.predictions import onnx as module
from cifar_ft.training import speed_up
from cifar_ft.transforms import eval_transform, resize

PACKAGES = ("onnx", "onnxscript", "onnxruntime")
needs_onnx = pytest.mark.skipif(
    any(find_spec(name) is None for name in PACKAGES), reason=f"pip install {' '.join(PACKAGES)}"
)
pytestmark = pytest.mark.usefixtures("one_thread")


def tiny(calibration=None, **settings):
    """A tiny ResNet with decided answers and statistics that are not 0 and 1, the same each time."""
    recipe = tiny_runs.recipe(**settings)
    model, generator = build_model(recipe), torch.Generator().manual_seed(1)
    for layer in model.modules():
        if isinstance(layer, torch.nn.BatchNorm2d):
            layer.running_mean.normal_(0, 0.2, generator=generator)
            layer.running_var.uniform_(0.5, 2, generator=generator)
    seen = features(model.eval(), eval_transform(recipe)(load_samples().images)).detach()
    torch.nn.init.normal_(model.fc.weight, std=2, generator=generator)
    model.fc.bias.data = -model.fc.weight.detach() @ seen.mean(0)  # so that no class is ahead on average
    return Predictor(model, recipe, "a random model", calibration)


def run(path, images):
    """Probabilities and logits of ONNX Runtime, as a user without this library gets them."""
    import onnxruntime

    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    return session.run(["probabilities", "logits"], {"images": images.numpy()})


@pytest.fixture(scope="module")
def calibrated():
    return tiny({"temperature": 2.5, "power": 1.7, "highest_energy": -1.0, "false_alarms": 0.02})


@pytest.fixture(scope="module")
def model_file(calibrated, tmp_path_factory):
    return export_onnx(calibrated, tmp_path_factory.mktemp("export") / "model.onnx")


@needs_onnx
def test_one_file_answers_one_picture_and_seven_as_the_predictor_does(model_file, calibrated, samples):
    for n in (1, 7):
        probabilities, logits = run(model_file, samples.images[:n])
        assert probabilities.dtype == logits.dtype == np.float32
        assert probabilities.shape == logits.shape == (n, 10)
        np.testing.assert_allclose(probabilities, calibrated.predict_proba(samples.images[:n]), atol=1e-5)
    logits = torch.from_numpy(logits)
    assert logits.softmax(1).max() > 0.5  # decided, so that the comparison means something
    assert len(set(probabilities.argmax(1))) > 1
    np.testing.assert_allclose(probabilities, results.probabilities(logits, 2.5, 1.7), atol=1e-6)
    assert (torch.from_numpy(probabilities) - logits.softmax(1)).abs().max() > 0.05


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
def test_exporting_warns_of_nothing_and_leaves_the_predictor_as_it_was(samples, tmp_path, capfd, said):
    """With the convolutions of training, and without a resize, which the other file has."""
    predictor = tiny(image_size=32)
    expected = predictor.predict_proba(samples.images)
    model = speed_up(predictor.model).to(memory_format=torch.channels_last)
    assert any(type(layer) is not torch.nn.Conv2d for layer in model.modules() if isinstance(layer, torch.nn.Conv2d))
    model.layer1.train()
    model.fc.requires_grad_(False)
    before = {name: values.clone() for name, values in model.state_dict().items()}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        path = export_onnx(predictor, tmp_path / "model.onnx")
    assert capfd.readouterr() == ("".join(f"{line}\n" for line in said), "")
    assert predictor.model is model
    assert model.layer1.training
    assert not model.fc.training
    assert [p.requires_grad for p in model.fc.parameters()] == [False, False]
    assert model.conv1.weight.requires_grad
    assert model.conv1.weight.is_contiguous(memory_format=torch.channels_last)
    assert all(torch.equal(values, before[name]) for name, values in model.state_dict().items())
    np.testing.assert_allclose(run(path, samples.images)[0], expected, atol=1e-5)


@needs_onnx
def test_a_network_of_2015_is_exported_with_its_strides(samples, tmp_path):
    weights = str(v1_file(tmp_path / "v1.safetensors"))
    predictor = tiny(backbone="resnet50", last_stage=2, weights=weights)
    path = export_onnx(predictor, tmp_path / "model.onnx")  # which compares the answers
    assert predictor.model.layer2[0].conv1.stride == (2, 2)
    np.testing.assert_allclose(run(path, samples.images)[0], predictor.predict_proba(samples.images), atol=1e-4)


@pytest.mark.parametrize("size", [16, 31, 32, 33, 45, 112])
def test_two_products_are_the_resize_of_the_transforms(size, samples):
    matrix, pictures = module._resize_matrix(size), samples.images[:5].float()
    assert matrix.shape == (size, 32)
    torch.testing.assert_close(matrix @ pictures @ matrix.T, resize(pictures, size), atol=1e-3, rtol=0)


@pytest.fixture
def other_file(model_file, tmp_path, monkeypatch):
    """A file from before, in a folder of its own; whatever is exported is `model_file` again."""
    monkeypatch.setattr(module, "_serialized", lambda _: model_file.read_bytes())
    path = tmp_path / "model.onnx"
    path.write_bytes(b"the one before")
    yield path
    assert path.read_bytes() == b"the one before"
    assert list(tmp_path.iterdir()) == [path]


@needs_onnx
@pytest.mark.parametrize("labels", [True, False])
def test_a_model_that_answers_differently_is_not_written(other_file, calibrated, labels):
    """Other labels; or the same labels and other probabilities."""
    other = tiny(calibrated.calibration if labels else calibrated.calibration | {"temperature": 2.4})
    with torch.no_grad():
        other.model.fc.bias[4] += 3 * labels
    message = r"answers differently \(1?\d?\d of 200" if labels else r"answers differently \(200 of 200"
    with pytest.raises(ExportError, match=rf"{message} labels.*nothing was written"):
        export_onnx(other, other_file)


@pytest.mark.parametrize("wrong", [0, 2e-3, np.nan])
def test_a_small_difference_and_one_that_is_no_number_count(wrong, calibrated, tmp_path, monkeypatch):
    answers = calibrated.predict_proba(load_samples())
    answers[7, answers[7].argmax()] += wrong
    parts = iter(np.split(answers, range(module.BATCH, len(answers), module.BATCH)))
    monkeypatch.setattr(module, "_require_packages", lambda: None)
    monkeypatch.setattr(module, "_serialized", lambda _: b"a model")
    monkeypatch.setattr(module, "_session", lambda _: SimpleNamespace(run=lambda *_: [next(parts)]))
    if not wrong:
        assert export_onnx(calibrated, tmp_path / "model.onnx").read_bytes() == b"a model"
        return
    with pytest.raises(ExportError, match="answers differently"):
        export_onnx(calibrated, tmp_path / "model.onnx")
    assert not list(tmp_path.iterdir())


@needs_onnx
def test_an_interrupted_export_leaves_the_earlier_file(other_file, calibrated, monkeypatch):
    monkeypatch.setattr(module, "_serialized", lambda _: tiny_runs.raise_(KeyboardInterrupt()))
    with pytest.raises(KeyboardInterrupt):
        export_onnx(calibrated, other_file)


@needs_onnx
def test_what_onnx_runtime_cannot_load_is_told_in_one_line(other_file, calibrated, model_file, monkeypatch):
    monkeypatch.setattr(module, "_serialized", lambda _: model_file.read_bytes()[:1000])
    with pytest.raises(ExportError, match=r"ONNX Runtime cannot load the exported model: .+") as caught:
        export_onnx(calibrated, other_file)
    assert "\n" not in str(caught.value)


@needs_onnx
@pytest.mark.parametrize(
    ("path", "message"), [("none/model.onnx", "there is no folder .*none; choose another"), (".", "it is a folder")]
)
@pytest.mark.parametrize("export", [export_onnx, export_checked])
def test_a_target_that_cannot_be_written_is_refused_before_the_work(export, path, message, tmp_path):
    with pytest.raises(FileError, match=message):
        export(None, tmp_path / path)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("missing", [["onnxscript"], ["onnx", "onnxscript", "onnxruntime"]])
@pytest.mark.parametrize("export", [export_onnx, export_checked])
def test_missing_packages_are_named_with_what_to_install(export, missing, tmp_path, monkeypatch):
    monkeypatch.setattr(module, "find_spec", lambda name: None if name in missing else name)
    message = f"needs {' and '.join(missing)}; install with `pip install {' '.join(missing)}`"
    with pytest.raises(ExportError, match=message):
        export(None, tmp_path / "model.onnx")
    assert not list(tmp_path.iterdir())


def test_an_old_torch_is_told_before_it_fails(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "find_spec", lambda name: name)
    monkeypatch.setattr(torch, "__version__", "2.5.1+cpu")
    with pytest.raises(ExportError, match=r"torch 2\.5\.1\+cpu cannot export .*use 2\.6 or newer"):
        export_onnx(None, tmp_path / "model.onnx")


@needs_onnx
def test_latency_is_the_median_of_a_picture_for_both(model_file, calibrated, monkeypatch):
    calls = []

    def slow(*_):  # 20 ms a batch, but for one call
        calls.append(1)
        time.sleep(0.5 if len(calls) == 3 else 0.02)

    monkeypatch.setattr(module, "predict_logits", slow)
    ((size, (onnx, pytorch)),) = module.latency(model_file, calibrated, batch_sizes=(4,), seconds=0.3).items()
    assert size == 4
    assert 5 <= pytorch < 15  # neither 20, of the batch, nor the mean with its outlier
    assert onnx > 0


@needs_onnx
@pytest.mark.slow
def test_the_shipped_model_is_exported_checked_and_timed(shipped, samples, tmp_path, monkeypatch, said):
    timed = module.latency
    monkeypatch.setattr(module, "latency", lambda *given: timed(*given, batch_sizes=(1, 2), seconds=0.1))
    path = export_checked("shipped", tmp_path / "model.onnx")
    assert list(tmp_path.iterdir()) == [path]
    for n in (1, 7):
        probabilities, _ = run(path, samples.images[:n])
        np.testing.assert_allclose(probabilities, shipped.predict_proba(samples.images[:n]), atol=1e-4)
    assert said[0] == f"Predicting with {shipped.source}"
    assert said[1].startswith("Checked on 200 pictures: 200 of 200 labels as PyTorch, probabilities differ by at most ")
    assert said[2] == f"Wrote {show_path(path)}, {path.stat().st_size / 1e6:.1f} MB"
    assert [line.split(":")[0] for line in said[3:]] == ["A picture, 1 at a time", "A picture, 2 at a time"]
    assert all("ms with ONNX Runtime" in line and "ms with PyTorch" in line for line in said[3:])
