"""Promise: scores of the unfamiliar are compared on the same pictures, and the record says what the course repeats."""

from __future__ import annotations

import io
import json
import tarfile
import zipfile

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image
from sklearn.metrics import roc_auc_score

from tools import unfamiliar
from tools.unfamiliar import compare_scores, drawn_pictures, fit_scores, foreign_pictures, separation


def test_separation_has_the_known_values():
    known = np.arange(100.0)
    assert separation(known, known + 1000) == (1, 1, 0)
    assert separation(known, known) == pytest.approx((0.5, 0.02, 0.95))
    assert separation(known, np.array([98.5, 99.5, 50.0, 50.0]))[1] == 0.5
    both = np.random.default_rng(0).integers(0, 9, (2, 50))
    expected = roc_auc_score(np.repeat([0, 1], 50), both.ravel())  # many ties
    assert separation(*both)[0] == pytest.approx(expected)


@pytest.fixture(scope="module")
def seen():
    """Ten classes along ten of 300 axes; the strange lie along another, the weak near the middle."""
    draw, labels = np.random.default_rng(0), np.arange(400) % 10

    def near(places, size=400):
        return (0.1 * draw.normal(size=(size, 300)) + places).clip(0).astype(np.float32)

    axes = 3 * np.eye(300)
    kinds = {"weak": near(0.3 * axes[labels], 400), "strange": near(axes[labels] + axes[12])}
    kinds |= {"known": near(axes[labels]), "weak too": near(0.3 * axes[labels])}
    return labels, {"train": near(axes[labels]), "val": near(axes[labels])} | kinds


def test_every_score_is_measured_on_the_same_pictures(seen):
    labels, pictures = seen
    weight, bias = np.eye(10, 300, dtype=np.float32), np.zeros(10, np.float32)
    found = compare_scores(pictures, labels, weight, bias, resamples=20)
    rows = pd.DataFrame(found["rows"]).set_index(["score", "kind"])
    assert len(rows) == 5 * len(fit_scores(pictures["train"], labels, weight, bias))
    assert rows.auroc["energy", "weak"] == 1
    assert rows.auroc["energy", "strange"] == pytest.approx(0.5, abs=0.1)  # the head looks along no such axis
    for score in ("Mahalanobis", "10 nearest of 5,000", "nearest of 390"):
        assert rows.caught[score, "strange"] == 1
        assert rows.auroc_gain[score, "strange"] == pytest.approx(1 - rows.auroc["energy", "strange"])
    assert (rows[["auroc_gain", "caught_gain"]].loc["energy"] == 0).all(axis=None)
    for score, kind in rows.index:
        assert rows.auroc[score, "known"] == pytest.approx(0.5, abs=0.1)
        low, high = rows.auroc_ci95[score, kind]
        assert low <= rows.auroc[score, kind] <= high
    four = ["weak", "strange", "known", "weak too"]
    assert rows.auroc["energy", "photographs"] == pytest.approx(rows.auroc["energy"][four].mean())
    assert rows.bytes["nearest of 390", "weak"] == 2 * 300 * 390


def test_foreign_pictures_are_read_from_what_was_fetched(tmp_path, monkeypatch):
    monkeypatch.setattr(unfamiliar, "THINGS", [2, 0])
    monkeypatch.setattr(unfamiliar, "ANIMALS", [1])
    for number, colour in enumerate(("red", "green", "blue")):
        Image.new("RGB", (60, 40), colour).save(tmp_path / f"n{number}.JPEG", quality=95)
    faces = np.full((200, 25, 25), 0.5)
    faces[100:] = 0
    with zipfile.ZipFile(tmp_path / "wheel.whl", "w") as archive:
        np.save(file := io.BytesIO(), faces)
        archive.writestr("skimage/data/lfw_subset.npy", file.getvalue())
    with tarfile.open(tmp_path / "clothes.tgz", "w:gz") as archive:
        for kind in range(10):
            content = json.dumps({"data": [[10 * kind] * 784] * 40}).encode()
            info = tarfile.TarInfo(f"package/src/clothes/{kind}.json")
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    made = foreign_pictures(tmp_path, tmp_path / "wheel.whl", tmp_path / "clothes.tgz")
    assert [(name, len(images)) for name, images in made.items()] == [
        ("things", 2), ("other animals", 1), ("faces", 100), ("clothes", 300), ("noise", 100), ("plain colours", 100),
        ("gradients", 100),
    ]  # fmt: skip
    assert all(images.shape[1:] == (3, 32, 32) and images.dtype == torch.uint8 for images in made.values())
    assert made["things"].float().mean((2, 3)).argmax(1).tolist() == [2, 0]  # blue and red
    assert made["faces"].unique().tolist() == [128]
    assert made["clothes"][270, 0, 16, 16] == 90
    assert made["clothes"][270, 0, 0, 0] == 0


def test_drawn_pictures_are_the_same_each_time_and_what_they_are_called():
    made, again = drawn_pictures(5), drawn_pictures(5)
    assert all(torch.equal(images, again[name]) for name, images in made.items())
    assert (made["plain colours"] == made["plain colours"][..., :1, :1]).all()
    assert len(made["noise"][0].unique()) > 200
    steps = made["gradients"].int().diff(dim=3)
    assert ((steps >= 0).all((2, 3)) | (steps <= 0).all((2, 3))).all()


def test_no_class_of_cifar10_is_among_the_foreign():
    animals = set(unfamiliar.ANIMALS)
    assert not animals & {*range(7, 25), *range(30, 33), *range(80, 101), *range(127, 147), *range(151, 294), 339, 340}
    assert not set(unfamiliar.THINGS) & {404, 407, 468, 510, 511, 555, 609, 627, 675, 751, 817, 864, 867, 895}
    assert (len(animals), len(unfamiliar.THINGS)) == (135, 515)


def test_the_record_carries_what_chapter_06_says():
    found = json.loads((unfamiliar.ROOT / "results" / "unfamiliar.json").read_text("utf-8"))
    rows = pd.DataFrame(found["rows"]).set_index(["score", "kind"])
    for score in ("Mahalanobis", "10 nearest of 5,000", "nearest of 390", "ViM, 256 directions"):
        assert rows.auroc_gain_ci95[score, "photographs"][0] > 0
    assert all(low <= 0 for low, _ in rows.caught_gain_ci95.xs("photographs", level="kind"))
    vim, energy = rows.caught["ViM, 256 directions"], rows.caught["energy"]
    assert vim["things"] > energy["things"]
    assert vim["faces"] < energy["faces"]
    assert rows.bytes["ViM, 256 directions", "things"] == pytest.approx(2e6 / 3, rel=0.05)
    caught = energy.round(2).loc[["things", "other animals", "faces", "noise", "plain colours", "gradients"]]
    assert caught.to_list() == pytest.approx([0.4, 1 / 3, 1 / 3, 1, 1, 0.9], abs=0.05)
    assert rows.auroc["energy", "photographs"] == pytest.approx(0.89, abs=0.005)
    react = rows.caught["energy, ReAct"]
    assert react["faces"] > 0.5
    assert react["noise"] == 0
