"""Promises of `cifar_ft.results`: scores in order, honest intervals, run directories never half read."""

from __future__ import annotations

import json
import math
import os
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from cifar_ft import CifarFtError, models, results
from cifar_ft.recipes import get_recipe
from cifar_ft.results import ResultError, RunError


def to_float(images):
    return images.float() / 255


class Pixel(nn.Module):
    """Its logits are the image's first and last column: order and mirroring are seen in the answer."""

    def __init__(self):
        super().__init__()
        self.norm = nn.BatchNorm2d(3)
        self.drop = nn.Dropout(0.5)

    def forward(self, x):
        self.seen = x
        y = self.drop(self.norm(x))
        return torch.stack([y[:, 0, 0, 0], y[:, 0, 0, -1]], dim=1)


@pytest.fixture
def split():
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (23, 3, 8, 8), dtype=torch.uint8, generator=generator)
    return SimpleNamespace(images=images, labels=torch.arange(23) % 2)


@pytest.mark.parametrize("batch_size", [1, 5, 23, 500])
def test_every_image_is_scored_once_and_in_order(split, batch_size):
    logits = models.predict_logits(Pixel(), split, to_float, batch_size=batch_size)
    assert logits.dtype == torch.float32
    assert logits.device.type == "cpu"
    expected = split.images[:, 0, 0, [0, -1]].float() / 255
    torch.testing.assert_close(logits, expected, atol=1e-5, rtol=1e-4)


def test_scoring_leaves_modes_and_batchnorm_statistics_alone(split):
    model = nn.Sequential(Pixel(), nn.Sequential(nn.Dropout(), nn.BatchNorm1d(2)))
    model.train()
    model[1][1].eval()  # a frozen layer inside a training model
    flags = [module.training for module in model.modules()]
    state = {name: value.clone() for name, value in model.state_dict().items()}
    first = models.predict_logits(model, split, to_float, batch_size=5)
    assert torch.equal(first, models.predict_logits(model, split, to_float, batch_size=5))  # no dropout
    assert [module.training for module in model.modules()] == flags
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())


def test_modes_come_back_even_when_the_model_fails(split):
    model = nn.Sequential(nn.Dropout(), nn.Linear(1, 1))
    model[0].eval()
    with pytest.raises(RuntimeError):
        models.predict_logits(model, split, to_float)
    assert [module.training for module in model.modules()] == [True, False, True]


def test_flip_averages_the_image_and_its_mirror(split):
    plain = models.predict_logits(Pixel(), split, to_float)
    both = models.predict_logits(Pixel(), split, to_float, flip_tta=True)
    torch.testing.assert_close(both, (plain + plain.flip(1)) / 2)


def test_half_precision_rounds_inside_but_answers_in_float32(split):
    model = nn.Sequential(nn.Flatten(), nn.Linear(192, 10))
    exact = models.predict_logits(model, split, to_float)
    half = models.predict_logits(model, split, to_float, precision="bf16")
    assert half.dtype == torch.float32
    assert 0 < (half - exact).abs().max() < 0.05
    assert torch.equal(models.predict_logits(model, split, to_float, precision="auto"), exact)  # on a CPU


def test_input_is_channels_last_and_progress_ends_at_the_number_of_images(split):
    model, calls = Pixel(), []
    models.predict_logits(model, split, to_float, batch_size=10, progress=lambda *call: calls.append(call))
    assert model.seen.is_contiguous(memory_format=torch.channels_last)
    assert calls == [(10, 23), (20, 23), (23, 23)]


def test_unusable_input_to_scoring_is_refused_by_name(split):
    empty = SimpleNamespace(images=split.images[:0])
    with pytest.raises(ResultError, match=r"\(0, 3, 8, 8\)"):
        models.predict_logits(Pixel(), empty, to_float)
    with pytest.raises(ResultError, match=r"fp8.*bf16"):
        models.predict_logits(Pixel(), split, to_float, precision="fp8")
    with pytest.raises(ResultError, match="batch_size is 0"):
        models.predict_logits(Pixel(), split, to_float, batch_size=0)


@pytest.mark.parametrize(
    ("correct", "total", "low", "high"),
    [(0, 10, 0.0, 0.27754), (10, 10, 0.72246, 1.0), (81, 263, 0.2553, 0.3662), (15, 148, 0.0624, 0.1605)],
)
def test_wilson_interval_gives_the_known_values(correct, total, low, high):
    # without hits the upper end is z^2 / (n + z^2); 81/263, 15/148: table I of Newcombe, Stat. Med. 17 (1998)
    assert results.wilson_interval(correct, total) == pytest.approx((low, high), abs=5.1e-5)


@given(st.integers(1, 10**6).flatmap(lambda n: st.tuples(st.integers(0, n), st.just(n))), st.floats(0, 10))
def test_wilson_interval_holds_the_fraction_and_stays_a_fraction(counts, z):
    correct, total = counts
    low, high = results.wilson_interval(correct, total, z)
    assert 0 <= low <= correct / total <= high <= 1
    assert results.wilson_interval(total - correct, total, z) == pytest.approx((1 - high, 1 - low), abs=1e-9)


@pytest.mark.parametrize("counts", [(-1, 10), (11, 10), (0, 0), (0.9, 1), (math.nan, 10), ("9", 10)])
def test_impossible_counts_are_refused_and_named(counts):
    with pytest.raises(ResultError, match=f"correct=.*{counts[0]}"):
        results.wilson_interval(*counts)


def test_accuracy_is_printed_with_its_interval():
    assert results.accuracy_text(912, 1000) == "91.2 % [89.3, 92.8]"
    assert results.accuracy_text(9120, 10000) == "91.2 % [90.6, 91.7]"


def test_difference_of_the_published_figures():
    far = results.difference_test(0.9312, 0.8834, 10_000)  # headline against the last line of the log
    assert far.z == pytest.approx(11.7, abs=0.05)
    assert far.p < 1e-20
    near = results.difference_test(0.9345, 0.9312, 10_000)  # batch 64 against batch 32
    assert near.difference == pytest.approx(0.0033)
    assert near.p > 0.3
    assert results.difference_test(0.5, 0.5, 10).p == 1
    assert results.difference_test(1, 1, 10).p == 1
    half = 1.959964 * math.sqrt(0.5 / 1000) / 2
    assert results.difference_test(0.5 + half, 0.5 - half, 1000).p == pytest.approx(0.05, abs=1e-4)
    with pytest.raises(ResultError, match=r"93\.12"):
        results.difference_test(93.12, 88.34, 10_000)  # per cent instead of fractions


@pytest.fixture
def scored():
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 10, 500)
    logits = rng.normal(0, 1, (500, 10))
    logits[np.arange(500), labels] += 2
    return labels, torch.from_numpy(logits).softmax(1).numpy()


def test_confusion_counts_each_image_in_the_row_of_its_true_class(scored):
    labels, probabilities = scored
    predictions = probabilities.argmax(1)
    matrix = results.confusion(labels, predictions)
    assert matrix.sum(axis=1).tolist() == np.bincount(labels, minlength=10).tolist()
    assert matrix.sum(axis=0).tolist() == np.bincount(predictions, minlength=10).tolist()
    assert results.confusion([0, 0, 1], [2, 2, 1])[0, 2] == 2


def test_per_class_accuracy_reads_the_diagonal_and_leaves_absent_classes_open():
    frame = results.per_class_accuracy([0, 0, 1], [0, 1, 1], ["a", "b", "c"])
    assert frame["class"].tolist() == ["a", "b", "c"]
    assert frame["n"].tolist() == [2, 1, 0]
    assert frame["accuracy"].tolist()[:2] == [0.5, 1.0]
    assert frame.loc[2, ["accuracy", "low", "high"]].isna().all()
    assert (frame["low"][0], frame["high"][0]) == results.wilson_interval(1, 2)
    assert results.per_class_accuracy([9], [9])["class"].iloc[-1] == "truck"


@pytest.mark.parametrize("bins", [1, 10, 15])
def test_calibration_error_is_that_of_torchmetrics_and_of_its_own_table(scored, bins):
    from torchmetrics.functional.classification import multiclass_calibration_error

    labels, probabilities = scored
    frame, ece = results.calibration(labels, probabilities, bins)
    scores, targets = torch.from_numpy(probabilities), torch.from_numpy(labels)
    expected = multiclass_calibration_error(scores, targets, num_classes=10, n_bins=bins)
    assert ece == pytest.approx(expected.item(), abs=1e-6)
    gaps = (frame["accuracy"] - frame["confidence"]).abs().fillna(0)
    assert (gaps * frame["count"]).sum() / len(labels) == pytest.approx(ece, abs=1e-5)
    full = frame[frame["count"] > 0]
    assert full["confidence"].between(full["low_edge"], full["high_edge"]).all()
    assert frame["count"].sum() == 500


def test_certain_predictions_fall_into_the_last_bin():
    probabilities = np.array([[1.0, 0.0], [1.0, 0.0], [0.05, 0.95]], dtype=np.float32)
    frame, ece = results.calibration([0, 1, 1], probabilities, bins=10)
    assert len(frame) == 10
    assert frame["count"].tolist() == [0] * 9 + [3]
    assert ece == pytest.approx(2.95 / 3 - 2 / 3, abs=1e-5)


def test_mistakes_come_most_confident_first(scored):
    labels, probabilities = scored
    frame = results.most_confident_mistakes(labels, probabilities, k=5)
    wrong = probabilities.argmax(1) != labels
    assert len(frame) == 5
    assert (frame["label"] != frame["prediction"]).all()
    assert frame["probability"].tolist() == pytest.approx(sorted(probabilities.max(1)[wrong])[:-6:-1])
    assert (labels[frame["index"]] == frame["label"]).all()
    assert results.most_confident_mistakes([0], [[0.9, 0.1]]).empty


def test_unusable_scores_are_refused_with_the_reason(scored):
    labels, probabilities = scored
    broken = probabilities.copy()
    broken[7, 3] = np.nan
    for function in (results.calibration, results.most_confident_mistakes):
        with pytest.raises(ResultError, match="image 7 are not finite"):
            function(labels, broken)
        with pytest.raises(ResultError, match="499 labels for 500 images"):
            function(labels[1:], probabilities)
        with pytest.raises(ResultError, match="softmax"):
            function(labels, np.log(probabilities))
    with pytest.raises(ResultError, match="499 predictions for 500 images"):
        results.confusion(labels, labels[1:])
    with pytest.raises(ResultError, match="0 to 9"):
        results.confusion([10], [0])
    with pytest.raises(ResultError, match="float64"):
        results.confusion([0.0], [0])


def write_run(path, *, recipe=None, seed=0, shift=3.0, seconds=120.0):
    rng = np.random.default_rng(seed)
    recipe = recipe or get_recipe("quick", {"seed": seed})
    labels = np.arange(200) % 10
    logits = rng.normal(0, 1, (200, 10)).astype(np.float32)
    logits[np.arange(200), labels] += shift
    path.mkdir(parents=True)
    (path / "config.json").write_text(json.dumps({"recipe": recipe.to_dict()}))
    columns = "epoch,train_loss,train_accuracy,val_loss,val_accuracy,test_loss,test_accuracy,lr,seconds"
    (path / "history.csv").write_text(f"{columns}\n1,1.2,0.6,0.9,0.7,,,0.1,9\n2,0.8,0.7,0.7,0.8,,,0.05,9\n")
    np.savez(path / "test_logits.npz", logits=logits, labels=labels)
    metrics = {
        "recipe": recipe.name,
        "backbone": "resnet50",
        "epochs": 2,
        "seed": seed,
        "train_seconds": seconds,
    }
    (path / "metrics.json").write_text(json.dumps(metrics))
    return path


def test_a_run_is_read_back_whole(tmp_path):
    run = results.load_run(write_run(tmp_path / "run"))
    assert run.recipe == get_recipe("quick", {"seed": 0})
    assert run.history["epoch"].tolist() == [1, 2]
    assert run.history["test_loss"].isna().all()
    assert run.accuracy == (run.predictions == run.labels).mean()
    np.testing.assert_allclose(run.probabilities.sum(1), 1, rtol=1e-5)
    assert (run.probabilities.argmax(1) == run.predictions).all()


def test_an_unfinished_run_says_how_to_resume_it(tmp_path):
    path = write_run(tmp_path / "run")
    (path / "metrics.json").unlink()
    with pytest.raises(RunError, match=r"not finished.*train --out .*run --resume"):
        results.load_run(path)


def test_a_folder_that_is_no_run_is_told_apart(tmp_path):
    with pytest.raises(RunError, match=r"no run directory at .*absent"):
        results.load_run(tmp_path / "absent")
    with pytest.raises(RunError, match=r"no config\.json"):
        results.load_run(tmp_path)
    assert issubclass(RunError, CifarFtError)


def pickled(path):
    np.savez(path, logits=np.array([{"a": 1}], dtype=object), labels=np.arange(1))


def short_labels(path):
    np.savez(path, logits=np.zeros((3, 10), np.float32), labels=np.arange(2))


def diverged(path):
    np.savez(path, logits=np.full((3, 10), np.nan, np.float32), labels=np.arange(3))


DAMAGE = {
    "cut": lambda path: path.write_bytes(path.read_bytes()[: path.stat().st_size // 2]),
    "empty": lambda path: path.write_bytes(b""),
    "noise": lambda path: path.write_bytes(bytes(range(256)) * 4),
    "deleted": lambda path: path.unlink(),
}


@pytest.mark.parametrize("damage", DAMAGE)
@pytest.mark.parametrize("name", ["config.json", "metrics.json", "test_logits.npz", "history.csv"])
def test_a_damaged_file_is_named(tmp_path, name, damage):
    path = write_run(tmp_path / "run")
    DAMAGE[damage](path / name)
    if (name, damage) == ("history.csv", "cut"):  # a cut table can still be a table; cut it within its header
        (path / name).write_text("epoch,train_lo")
    wanted = "metrics.json" if (name, damage) == ("metrics.json", "deleted") else name
    with pytest.raises(RunError, match=wanted.replace(".", r"\.")):
        results.load_run(path)


@pytest.mark.parametrize(
    ("write", "reason"),
    [(pickled, "allow_pickle"), (short_labels, "2 labels for 3 images"), (diverged, "not finite")],
)
def test_logits_that_cannot_be_trusted_are_refused(tmp_path, write, reason):
    path = write_run(tmp_path / "run")
    write(path / "test_logits.npz")
    with pytest.raises(RunError, match=rf"test_logits\.npz.*{reason}"):
        results.load_run(path)


def test_a_flipped_bit_inside_the_logits_is_found(tmp_path):
    path = write_run(tmp_path / "run") / "test_logits.npz"
    data = bytearray(path.read_bytes())
    data[1000] ^= 0x10
    path.write_bytes(data)
    with pytest.raises(RunError, match=r"test_logits\.npz"):
        results.load_run(path.parent)


def test_runs_are_found_newest_first_and_only_when_finished(tmp_path, monkeypatch):
    for age, name in enumerate(["new", "middle", "old"]):
        os.utime(write_run(tmp_path / name) / "metrics.json", (1e9 - age, 1e9 - age))
    (write_run(tmp_path / "unfinished") / "metrics.json").unlink()
    assert [path.name for path in results.find_runs(tmp_path)] == ["new", "middle", "old"]
    monkeypatch.setenv("CIFAR_FT_RUNS", str(tmp_path))
    assert results.newest_run() == tmp_path / "new"
    assert results.newest_run(tmp_path / "absent") is None


def test_comparison_averages_seeds_and_names_changed_settings(tmp_path):
    paths = [write_run(tmp_path / f"seed{seed}", seed=seed, seconds=60.0 * (seed + 1)) for seed in range(3)]
    paths.append(write_run(tmp_path / "changed", recipe=get_recipe("quick", "batch_size=77"), shift=1.0))
    frame = results.compare_runs(paths)
    assert list(frame.columns[:5]) == ["recipe", "backbone", "epochs", "seeds", "test_accuracy"]
    assert frame["seeds"].tolist() == [3, 1]
    assert "batch_size=77" in frame["recipe"][1]
    scores = [results.load_run(path).accuracy for path in paths]
    assert frame["test_accuracy"][0] == pytest.approx(np.mean(scores[:3]))
    assert frame["std"][0] == pytest.approx(np.std(scores[:3], ddof=1))
    assert frame["minutes"][0] == pytest.approx(2)
    # the seeds share their test images: three of them do not make the interval narrower than one would be
    assert (frame["low"][0], frame["high"][0]) == results.wilson_interval(round(np.mean(scores[:3]) * 200), 200)
    alone = results.compare_runs([results.load_run(paths[0])])
    assert alone["recipe"][0] == "quick"
    assert results.compare_runs([]).empty


def test_a_run_from_before_a_setting_existed_is_one_of_its_default(tmp_path):
    paths = [write_run(tmp_path / name, seed=seed) for seed, name in enumerate(("earlier", "later"))]
    config = json.loads((paths[0] / "config.json").read_text())
    del config["recipe"]["cutout"]
    (paths[0] / "config.json").write_text(json.dumps(config))
    assert results.compare_runs(paths)["seeds"].tolist() == [2]


def test_shipped_tables_hold_the_published_figures():
    log, issues = results.published_log(), results.test_issues()
    assert len(log) == 60
    assert log.loc[log["epoch"] == 60, "test_accuracy"].item() == 0.8768
    assert log["test_accuracy"].idxmax() + 1 == 54
    assert issues["test_index"].between(0, 9999).all()
    assert isinstance(issues, pd.DataFrame)
