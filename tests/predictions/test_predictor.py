"""Promises of `predictions.predictor`: a model is what it says, and every picture has its own answer in its place."""

from __future__ import annotations

import io
import json
from functools import partial
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from cifar_ft.data import CLASSES
from cifar_ft.models import DeviceError, build_model, predict_logits
from cifar_ft.predictions import ImageError, Note, Prediction, PredictionError, Predictor
from cifar_ft.predictions import predictor as module
from cifar_ft.results import SHIPPED_RUN, RunError, choose_run, energy, fit_calibration, load_run, probabilities
from cifar_ft.transforms import eval_transform
from tools import record

CALIBRATION = {"temperature": 1.5, "highest_energy": -0.25, "false_alarms": 0.02}


@pytest.fixture
def run_dir(tmp_path, tiny_recipe, predictor):
    """A finished run, as training leaves it."""
    folder = tmp_path / "runs" / "smoke-1"
    folder.mkdir(parents=True)
    model, logits = predictor.model, torch.eye(10).repeat(4, 1)
    labels = torch.arange(10).repeat(4)
    labels[:4] = 9  # 36 of 40 are right
    save_file({name: values.contiguous() for name, values in model.state_dict().items()}, folder / "model.safetensors")
    np.savez(folder / "test_logits.npz", logits=logits.numpy(), labels=labels.numpy())
    (folder / "history.csv").write_text("epoch,train_loss,train_accuracy\n1,2.3,0.1\n")
    data = {"source": "npm", "digest": "d" * 64, "train": 40, "val": 10, "test": 40}
    config = {"recipe": tiny_recipe.to_dict(), "weights": {**model.weights_info, "licence": "none"}, "data": data}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "metrics.json").write_text(json.dumps({"recipe": "smoke", "test_accuracy": 0.9}))
    return folder


def changed(file, **values):
    file.write_text(json.dumps(json.loads(file.read_text()) | values))


def test_probabilities_are_those_of_the_model_on_the_evaluation_transform(predictor, tiny_recipe, samples):
    logits = predict_logits(predictor.model, samples, eval_transform(tiny_recipe))
    np.testing.assert_allclose(predictor.predict_proba(samples), logits.softmax(1), atol=1e-5)


def test_one_prediction_for_each_picture_in_order_whatever_the_batch_comes_as(predictor, samples):
    images = samples.images[:130]
    expected = predictor.predict_proba(images)
    assert expected.shape == (130, 10)
    assert len(np.unique(expected.round(5), axis=0)) > 100  # an exchange would be seen
    hwc = images.permute(0, 2, 3, 1).numpy()
    for batch in (hwc, list(images), (Image.fromarray(image) for image in hwc), images.float() / 255, iter(hwc)):
        np.testing.assert_allclose(predictor.predict_proba(batch), expected, atol=1e-5)
    answers = predictor.predict(samples)
    assert len(answers) == 200
    for answer, row in zip(answers, expected, strict=False):
        assert answer.index == row.argmax()
        assert answer.label == CLASSES[answer.index]
        assert answer.probability == pytest.approx(row.max(), abs=1e-5)
        assert list(answer.probabilities) == list(CLASSES)
        assert list(answer.probabilities.values()) == pytest.approx(row.tolist(), abs=1e-5)
    assert predictor.predict(list(samples.images[:5])) == predictor.predict(samples.images[:5])


def test_a_single_picture_gives_a_list_of_one_and_none_gives_none(predictor, samples, tmp_path):
    path = tmp_path / "one.png"
    Image.fromarray(samples.images[5].permute(1, 2, 0).numpy()).save(path)
    expected, content = predictor.predict_proba(samples.images[5:6]), path.read_bytes()
    for one in (samples.images[5], path, str(path), content, io.BytesIO(content), Image.open(path)):
        np.testing.assert_allclose(predictor.predict_proba(one), expected, atol=1e-5)
    for none in ([], torch.zeros(0, 3, 32, 32, dtype=torch.uint8), iter(())):
        assert predictor.predict(none) == []
        assert predictor.predict_proba(none).shape == (0, 10)


def test_a_folder_is_predicted_in_one_call(tmp_path, predictor, samples):
    for i in range(3):
        Image.fromarray(samples.images[i].permute(1, 2, 0).numpy()).save(tmp_path / f"{i}.png")
    answers = predictor.predict(tmp_path)
    assert [a.index for a in answers] == [a.index for a in predictor.predict(samples.images[:3])]
    (tmp_path / "empty").mkdir()
    with pytest.raises(ImageError, match=r"empty: there are no pictures in this folder"):
        predictor.predict(tmp_path / "empty")


def test_a_generator_is_read_a_batch_at_a_time_and_a_ready_batch_goes_through_whole(predictor, samples, monkeypatch):
    read, seen, plain = [], [], Predictor._batch_logits
    monkeypatch.setattr(Predictor, "_batch_logits", lambda self, x: seen.append((len(x), len(read))) or plain(self, x))
    predictor.predict(read.append(i) or samples.images[i] for i in range(150))
    assert seen == [(32, 32), (32, 64), (32, 96), (32, 128), (22, 150)]
    predictor.predict(samples.images)
    assert seen[5:] == [(200, 150)]  # what evaluation does with it, and nothing else


def test_top_k_keeps_the_best_classes_best_first(predictor, samples):
    whole, short = predictor.predict(samples.images[:1])[0], predictor.predict(samples.images[:1], top_k=3)[0]
    assert list(short.probabilities.items()) == whole.top(3) == short.top(10)
    assert [p for _, p in whole.top(10)] == sorted(whole.probabilities.values(), reverse=True)
    assert whole.top(1) == [(whole.label, whole.probability)]
    for k in (0, 11, -1, 2.5, "3", True):
        with pytest.raises(PredictionError, match="choose 1 to 10"):
            predictor.predict([], top_k=k)
        with pytest.raises(PredictionError, match="choose 1 to 10"):
            whole.top(k)


def test_a_bad_picture_in_a_batch_is_named_by_its_position(predictor, samples):
    with pytest.raises(ImageError, match=r"image 2 of the batch .*nope.png"):
        predictor.predict([samples.images[0], samples.images[1], "nope.png"])
    with pytest.raises(ImageError, match=r"image 0 of the batch \(counted from 0\): the picture: not a picture"):
        predictor.predict([b"hello"])
    with pytest.raises(ImageError, match=r"^cannot read int"):
        predictor.predict(3)
    for one in (np.zeros(5, np.uint8), torch.zeros(5), np.zeros(0)):
        with pytest.raises(ImageError, match=rf"the picture: shape \[{len(one)}\] is not a picture"):
            predictor.predict(one)
    for images in (samples.images[0], samples.images[:2], []):
        with pytest.raises(ImageError, match="unknown fit 'squeeze'; choose crop or pad"):
            predictor.predict(images, fit="squeeze")


def test_an_answer_tells_what_was_done_to_the_picture(predictor):
    wide = Image.new("RGB", (20, 10))
    assert predictor.predict(wide)[0].notes == (Note("cropped", side=10, width=20, height=10),)
    assert [str(note) for note in predictor.predict([wide], fit="pad")[0].notes] == [
        "all of 20 x 10 pixels, with black bars"
    ]


def test_values_that_are_not_finite_are_never_an_answer(tiny_recipe, samples):
    model = build_model(tiny_recipe)
    model.fc.bias.data[0] = torch.nan
    with pytest.raises(PredictionError, match="not finite"):
        Predictor(model, tiny_recipe, "a broken model").predict(samples.images[0])


def test_a_prediction_reads_as_a_sentence(tiny_recipe):
    assert str(Prediction("truck", 9, 0.9312, {"truck": 0.9312})) == "truck (93.1 %)"
    assert repr(Predictor(SimpleNamespace(eval=lambda: None), tiny_recipe, "the run x")) == "Predictor(the run x)"


# Runs and the shipped model


def test_a_run_is_rebuilt_to_the_same_answers_in_silence_without_a_network(run_dir, predictor, samples, said):
    """Whatever weights the recipe names: all are in the run's own file."""
    recipe = json.loads((run_dir / "config.json").read_text())["recipe"]
    changed(run_dir / "config.json", recipe=recipe | {"weights": "no such file", "backbone": "auto"})
    state = torch.random.get_rng_state()
    rebuilt = Predictor.from_run(run_dir)
    assert torch.equal(torch.random.get_rng_state(), state)
    np.testing.assert_allclose(rebuilt.predict_proba(samples), predictor.predict_proba(samples), atol=1e-5)
    assert "smoke-1 (90.0 % [76.9, 96.0] on 40 test images)" in rebuilt.source
    assert not rebuilt.model.training
    assert said == []


def test_without_a_path_the_newest_run_is_taken(run_dir, monkeypatch):
    changed(run_dir / "metrics.json", train_images=45_000, test_images=10_000)
    monkeypatch.setenv("CIFAR_FT_RUNS", str(run_dir.parent))
    assert "smoke-1" in Predictor.from_run().source
    monkeypatch.setenv("CIFAR_FT_RUNS", str(run_dir.parent / "none"))
    with pytest.raises(PredictionError, match=r"no finished run in .*; train one with"):
        Predictor.from_run()


def damage(run_dir, how):
    file = run_dir / "model.safetensors"
    content, state = file.read_bytes(), load_file(file)
    if how == "missing":
        file.unlink()
    elif how in ("not described", "unknown key"):
        recipe = json.loads((run_dir / "config.json").read_text())["recipe"] | {"colour": "red"}
        changed(run_dir / "config.json", **({"weights": {}} if how == "not described" else {"recipe": recipe}))
    elif how in ("truncated", "header", "empty"):
        broken = {"truncated": content[: len(content) // 2], "header": b"\xff" * 100 + content[100:], "empty": b""}
        file.write_bytes(broken[how])
    else:
        if how == "one tensor short":
            del state["conv1.weight"]
        values = {"another shape": torch.zeros(7, 64), "not finite": torch.full((10, 64), torch.nan)}
        save_file(state | ({"fc.weight": values[how]} if how in values else {}), file)


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ("truncated", "the run .*smoke-1 is damaged or incomplete .*; restore it or train this run again"),
        ("header", "is damaged or incomplete"),
        ("empty", "is damaged or incomplete"),
        ("missing", r"damaged or incomplete \(FileNotFoundError: .*model.safetensors"),
        ("one tensor short", "Missing key.*conv1.weight"),
        ("another shape", "size mismatch for fc.weight"),
        ("not finite", "fc.weight in model.safetensors holds values that are not finite"),
        ("not described", "KeyError: 'backbone'"),
        ("unknown key", "colour"),
    ],
)
def test_a_damaged_run_is_refused_in_one_line(run_dir, how, message):
    damage(run_dir, how)
    with pytest.raises(PredictionError, match=message) as caught:
        Predictor.from_run(run_dir)
    assert "\n" not in str(caught.value)


def test_an_unfinished_run_is_refused(run_dir):
    (run_dir / "metrics.json").unlink()
    with pytest.raises(RunError, match="has not finished"):
        Predictor.from_run(run_dir)


def test_the_shipped_model_predicts_as_its_run_and_says_what_made_it(run_dir, samples, tmp_path, monkeypatch):
    changed(run_dir / "metrics.json", calibration=CALIBRATION)
    config, path = json.loads((run_dir / "config.json").read_text()), "/home/somebody/secret/r18.pth"
    changed(
        run_dir / "config.json",
        recipe=config["recipe"] | {"weights": path},
        weights=config["weights"] | {"source": f"the file {path}"},
    )
    target = tmp_path / "shipped.safetensors"
    assert record.export_shipped(run_dir, target) == target
    assert {file.name for file in tmp_path.iterdir()} == {"runs", target.name}
    assert {values.dtype for values in load_file(target).values()} == {torch.float16, torch.int64}
    with safe_open(target, "pt") as file:
        metadata = file.metadata()
    assert json.loads(metadata["recipe"]) == config["recipe"] | {"weights": "r18.pth"}
    assert json.loads(metadata["metrics"])["test_accuracy"] == 0.9
    assert json.loads(metadata["metrics"])["test_accuracy_ci95"] == pytest.approx([0.7695, 0.9604], abs=1e-3)
    assert json.loads(metadata["data"])["digest"] == "d" * 64
    assert json.loads(metadata["classes"]) == list(CLASSES)
    assert set(json.loads(metadata["weights"])) == {"weights", "source", "sha256", "licence"}
    assert metadata["backbone"] == "resnet18"
    content = target.read_bytes()
    assert b"r18.pth" in content  # where the weights came from, but no path of that machine
    assert b"somebody" not in content
    assert str(tmp_path).encode() not in content
    monkeypatch.setattr(module, "SHIPPED", target)
    shipped, whole = Predictor.shipped(), Predictor.from_run(run_dir)
    assert "recipe smoke, resnet18, 90.0 % [76.9, 96.0] on 40 test images" in shipped.source
    assert next(shipped.model.parameters()).dtype == torch.float32
    assert shipped.calibration == whole.calibration == CALIBRATION
    np.testing.assert_allclose(shipped.predict_proba(samples), whole.predict_proba(samples), atol=2e-3)


def test_a_model_that_is_too_large_or_out_of_range_is_not_shipped(run_dir, tmp_path, monkeypatch):
    target = tmp_path / "m.safetensors"
    target.write_bytes(b"the one before")
    monkeypatch.setattr(record, "SHIPPED_BYTES", 100_000)
    with pytest.raises(PredictionError, match=r"takes 0\.3 MB and may take 0; ship a run with backbone="):
        record.export_shipped(run_dir, target)
    state = load_file(run_dir / "model.safetensors")
    save_file({**state, "fc.bias": torch.full((10,), 1e6)}, run_dir / "model.safetensors")
    with pytest.raises(PredictionError, match=r"fc.bias has values too large for half precision"):
        record.export_shipped(run_dir, target)
    assert target.read_bytes() == b"the one before"


def test_the_shipped_model_answers_or_the_run_that_is_named_and_the_log_says_which(run_dir, monkeypatch, said):
    monkeypatch.setenv("CIFAR_FT_RUNS", str(run_dir.parent))  # the newest run is none of the default's business
    named = "Predicting with the run smoke-1 (90.0 % [76.9, 96.0] on 40 test images)"
    for arguments, words in (
        ((), "the shipped model (recipe cpu"),
        (("shipped",), "the shipped model"),
        ((run_dir,), named),
    ):
        predictor = Predictor.load(*arguments)
        assert len(said) == 1
        assert words in said[0]
        assert predictor.source in said.pop()
    assert str(run_dir.parent) not in predictor.source  # which files and pages carry to others


def test_a_run_is_named_from_any_folder(run_dir, monkeypatch):
    monkeypatch.setenv("HOME", str(run_dir.parent.parent))
    monkeypatch.chdir(run_dir)
    paths = ("~/runs/smoke-1", ".", "../smoke-1", run_dir)
    assert {Predictor.from_run(path).source.split(" (")[0] for path in paths} == {"the run smoke-1"}


def test_the_newest_run_that_is_no_trial_first_then_the_shipped_model_then_a_clear_error(
    run_dir, tmp_path, monkeypatch, said
):
    monkeypatch.setenv("CIFAR_FT_RUNS", str(run_dir.parent))
    assert "the shipped model" in Predictor.load(choose_run()).source
    assert "smoke-1, is a trial" in said[0]
    changed(run_dir / "metrics.json", train_images=45_000, test_images=10_000)
    assert Predictor.load(choose_run()).source in said[-1]
    assert "the run smoke-1" in said[-1]
    assert "the shipped model" in Predictor.load(choose_run("shipped")).source
    monkeypatch.setenv("CIFAR_FT_RUNS", str(tmp_path / "none"))
    assert "smoke-1" in Predictor.load(choose_run(str(run_dir))).source
    assert "the shipped model" in Predictor.load(choose_run()).source
    assert "the shipped model" in said[-1]
    broken = tmp_path / "model.safetensors"
    monkeypatch.setattr(module, "SHIPPED", broken)
    with pytest.raises(PredictionError, match="no shipped model; train one with"):
        Predictor.load(choose_run())
    broken.write_bytes((run_dir / "model.safetensors").read_bytes())
    with pytest.raises(PredictionError, match=r"the shipped model .* damaged.*install the package again"):
        Predictor.shipped()


# Calibration


def calibrated(predictor, **values):
    calibration = {"temperature": 1.0, "highest_energy": 1e9, "false_alarms": 0.02, **values}
    return Predictor(predictor.model, predictor.recipe, "a model", calibration)


@pytest.mark.parametrize("damaged", [{"power": 0}, {"stated": [[0.9, 1]]}, {"stated": [[0.9, 1, 5, 6]]}, {"stated": 3}])
def test_a_damaged_power_or_record_is_refused(predictor, damaged):
    with pytest.raises(PredictionError, match="calibration of a model is damaged"):
        calibrated(predictor, **damaged)


def test_a_percentage_is_explained_by_the_test_images_that_got_it(predictor):
    known = calibrated(predictor, stated=[[0.8, 0.9, 251, 216], [0.99, 1.0, 7345, 7322]])
    assert known.how_often_right(0.8) == (0.8, 0.9, 251, 216)
    assert known.how_often_right(1.0) == (0.99, 1.0, 7345, 7322)
    assert known.how_often_right(0.9) is None  # too few images got so much
    assert predictor.how_often_right(0.8) is None
    assert known.track_record.endswith("by the probability given: 0.8 to 0.9: 86.1% of 251, 0.99 to 1: 99.7% of 7,345")
    assert predictor.track_record == ""


def test_the_shipped_model_answers_as_its_run_was_calibrated():
    shipped, run = Predictor.shipped(), load_run(SHIPPED_RUN)
    assert shipped.calibration == run.metrics["calibration"]
    low, high, images, right = shipped.how_often_right(0.85)
    sure = probabilities(torch.tensor(run.logits), *shipped.scaling).amax(1).numpy()
    chosen = (sure >= low) & (sure < high)
    assert (chosen.sum(), (run.predictions == run.labels)[chosen].sum()) == (images, right)


@pytest.mark.parametrize("damaged", [{"temperature": 0.0}, {"temperature": float("nan")}, {"highest_energy": None}])
def test_a_damaged_calibration_is_refused(predictor, damaged):
    with pytest.raises(PredictionError, match="calibration of a model is damaged"):
        calibrated(predictor, **damaged)


@pytest.mark.parametrize("damaged", [[1.5], "1.5", 1.5, {}, True])
def test_a_runs_calibration_that_is_no_dictionary_is_refused(run_dir, damaged):
    changed(run_dir / "metrics.json", calibration=damaged)
    with pytest.raises(PredictionError, match=r"the calibration of the run smoke-1 .* is damaged"):
        Predictor.from_run(run_dir)


def test_probabilities_are_divided_by_the_temperature(predictor, samples):
    logits = predict_logits(predictor.model, samples, eval_transform(predictor.recipe))
    mild = calibrated(predictor, temperature=4.0).predict_proba(samples)
    assert np.allclose(mild, (logits / 4).softmax(1).numpy(), atol=1e-6)
    powered = calibrated(predictor, temperature=4.0, power=2.0).predict_proba(samples)
    assert np.allclose(powered, probabilities(logits, 4.0, 2.0).numpy(), atol=1e-6)
    assert not np.allclose(powered, mild, atol=1e-4)
    assert not np.allclose(mild, predictor.predict_proba(samples), atol=1e-4)


def test_pictures_of_high_energy_are_called_unknown(predictor, samples):
    assert predictor.predict(samples.images[0])[0].unknown is None  # nobody knows without a calibration
    energies = energy(predict_logits(predictor.model, samples, eval_transform(predictor.recipe)))
    middle = float(np.median(energies))
    answers = calibrated(predictor, highest_energy=middle).predict(samples)
    assert [a.unknown for a in answers] == (energies > middle).tolist()
    assert sum(a.unknown for a in answers) == 100


def test_a_run_of_before_energies_had_the_sign_of_the_literature_flags_the_same(predictor, samples):
    middle = float(np.median(energy(predict_logits(predictor.model, samples, eval_transform(predictor.recipe)))))
    old = {"temperature": 1.5, "lowest_energy": -middle, "false_alarms": 0.02}
    new = {"temperature": 1.5, "highest_energy": middle, "false_alarms": 0.02}
    of = predictor.model, predictor.recipe, "a model"
    said = [[a.unknown for a in Predictor(*of, calibration).predict(samples)] for calibration in (old, new)]
    assert said[0] == said[1]
    assert set(said[0]) == {True, False}


def test_energy_threshold_leaves_the_stated_share_of_validation_above():
    logits = 3 * torch.randn(5000, 10, generator=torch.Generator().manual_seed(0))
    found = fit_calibration(logits, logits.argmax(1), false_alarms=0.03)
    assert (energy(logits) > found["highest_energy"]).mean() == pytest.approx(0.03, abs=1e-3)
    assert found["temperature"] < 1  # always right, and never sure enough


def test_the_device_is_the_one_that_is_named_or_a_gpu(run_dir, monkeypatch):
    """Stand-ins: a model is only told where to go."""
    monkeypatch.delenv("CIFAR_FT_DEVICE", raising=False)
    placed = []
    monkeypatch.setattr(module, "_placed", lambda model, device: placed.append(device) or model)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    for make in (Predictor.shipped, partial(Predictor.from_run, run_dir), Predictor.load):
        make()
        make(device="cpu")
        with pytest.raises(DeviceError, match="no device 'cuda' here; choose from auto, mps, cpu"):
            make(device="cuda")
    assert placed == [torch.device(name) for name in ("mps", "cpu") * 3]
