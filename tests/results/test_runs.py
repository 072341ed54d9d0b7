"""Runs on disk: read back whole, and never half read."""

import json
import os
import re
import shutil

import numpy as np
import pandas as pd
import pytest
from tiny_runs import write_run

from cifar_ft import CifarFtError, results
from cifar_ft.recipes import get_recipe
from cifar_ft.results import RunError


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


@pytest.mark.parametrize("damage", ["empty", "noise"])
def test_the_loss_by_step_is_read_where_it_is_and_damage_is_named(tmp_path, damage):
    run = results.load_run(write_run(tmp_path / "run"))
    assert run.steps.empty  # of a run that kept none
    assert list(run.steps) == ["step", "epoch", "lr", "loss", "images", "image_size"]
    file = run.path / "steps.csv"
    file.write_text("step,epoch,lr,loss,images,image_size\n1,0.5,0.1,2.25,64,48\n2,1,0.05,1.5,100,48\n")
    steps = results.load_run(run.path).steps
    assert steps.values.tolist() == [[1, 0.5, 0.1, 2.25, 64, 48], [2, 1.0, 0.05, 1.5, 100, 48]]
    assert steps.images.dtype == int
    DAMAGE[damage](file)
    with pytest.raises(RunError, match=r"steps\.csv is damaged"):
        results.load_run(run.path).steps  # noqa: B018


@pytest.mark.parametrize(
    ("write", "reason"), [(pickled, "allow_pickle"), (short_labels, "2 labels for 3 images"), (diverged, "not finite")]
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
    chosen = {"": tmp_path / "new", str(tmp_path / "old"): tmp_path / "old", "shipped": results.SHIPPED_RUN}
    assert {run: results.choose_run(run) for run in chosen} == chosen
    monkeypatch.setenv("CIFAR_FT_RUNS", str(tmp_path / "absent"))
    assert results.choose_run() == results.SHIPPED_RUN


def test_the_newest_run_is_no_trial_and_one_that_is_newer_is_named(tmp_path, said):
    trials = {"whole": {}, "few-trained": {"train_images": 512}, "few-scored": {"test_images": 500}}
    for age, (name, sizes) in enumerate(trials.items()):
        file = write_run(tmp_path / name) / "metrics.json"
        file.write_text(
            json.dumps({**json.loads(file.read_text()), "train_images": 45_000, "test_images": 10_000, **sizes})
        )
        os.utime(file, (1e9 + age, 1e9 + age))
    assert results.newest_run(tmp_path) == tmp_path / "whole"
    assert said == ["The newest run, few-scored, is a trial on a part of the images and passed over; name it to use it"]
    shutil.rmtree(tmp_path / "whole")
    assert results.newest_run(tmp_path) is None
    (tmp_path / "few-scored" / "metrics.json").write_text("damaged")  # is not passed over in silence
    assert results.newest_run(tmp_path) == tmp_path / "few-scored"


def test_a_run_is_found_from_any_folder_and_names_no_folder_but_its_own(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    write_run(tmp_path / "home" / "my run")
    run = results.load_run("~/my run")
    assert run.path == tmp_path / "home" / "my run"
    monkeypatch.chdir(run.path)
    assert results.load_run(".").path == run.path
    assert re.fullmatch(r"the run my run \(\d.* on 200 test images\)", str(run))
    assert str(results.load_run(results.SHIPPED_RUN)).startswith("the run that comes with the course (9")


def test_an_unfinished_run_is_told_with_a_command_that_can_be_typed(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    (write_run(tmp_path / "my run") / "metrics.json").unlink()
    with pytest.raises(RunError) as caught:
        results.load_run(tmp_path / "my run")
    assert str(caught.value).endswith(f"`python -m cifar_ft train --out '{tmp_path}/my run' --resume`")


def test_shipped_tables_hold_the_published_figures():
    log, issues = results.published_log(), results.test_issues()
    assert len(log) == 60
    assert log.loc[log["epoch"] == 60, "test_accuracy"].item() == 0.8768
    assert log["test_accuracy"].idxmax() + 1 == 54
    assert issues["test_index"].between(0, 9999).all()
    assert isinstance(issues, pd.DataFrame)
