"""The benchmarks of a GPU, with a CPU and a stand-in for recording in its place."""

import json
from types import SimpleNamespace

import pandas as pd
import pytest
import torch
from tiny_runs import recipe

from benchmarks import gpu, gpu_checks, gpu_works
from cifar_ft import CifarFtError
from cifar_ft.recipes import get_recipe
from cifar_ft.training import Replay


class FakeGraph:
    def __init__(self, work):
        self.replay = work


@pytest.fixture
def small(monkeypatch, one_thread):
    """One small case, on the CPU, recorded by the stand-in."""
    monkeypatch.setattr(gpu_works, "device", lambda: torch.device("cpu"))
    for name in ("synchronize", "empty_cache", "set_sync_debug_mode"):
        monkeypatch.setattr(torch.cuda, name, lambda *_: None)
    monkeypatch.setattr(Replay, "capture", staticmethod(FakeGraph))
    monkeypatch.setattr(gpu_checks, "CASES", {"small": recipe(batch_size=8, train_sizes=(16, 24), checkpoint_steps=0)})
    begin = gpu_works.begin

    def begin_recording(mine, record=True):
        training = begin(mine, record)
        training.replay.batch_size = mine.batch_size if record else 0
        return training

    monkeypatch.setattr(gpu_checks, "begin", begin_recording)


def test_the_checks_hold_where_steps_are_only_repeated(small):
    assert gpu_checks.exact()["small"] == {
        "recorded": True,
        "replayed_equals_eager": True,
        "replayed_equals_itself": True,
    }
    assert set(gpu_checks.resume().values()) == {True}
    assert gpu_checks.no_waiting() == {"small": "none"}


def test_a_difference_of_a_bit_is_seen(small):
    one, other = gpu_checks.begin(gpu_checks.CASES["small"]), gpu_checks.begin(gpu_checks.CASES["small"])
    assert gpu_checks.same(one, other)
    with torch.no_grad():
        next(other.model.parameters()).mul_(1.0001)
    assert not gpu_checks.same(one, other)


def test_parts_are_done_once_in_order_while_there_is_time(tmp_path, monkeypatch, capsys):
    begun = []
    monkeypatch.setattr(gpu, "PARTS", {"a": (None, 10), "b": (None, 1000), "c": (None, 10)})
    monkeypatch.setattr(gpu.subprocess, "run", lambda command, **_: begun.append(command[3]))
    (tmp_path / "a.json").write_text(json.dumps({}))
    gpu.everything(1, tmp_path)
    assert begun == ["c"]  # a is done, and for b too little is left
    assert capsys.readouterr().out.splitlines() == ["a: done", "b: no time left"]


def test_each_run_is_the_recipe_of_its_name_or_the_redrawn_run(tmp_path, monkeypatch):
    trained = {}

    def fit(mine, data, path, resume):
        trained[path.name] = mine
        return SimpleNamespace(metrics={}, history=pd.DataFrame())

    monkeypatch.setattr(gpu, "fit", fit)
    monkeypatch.setattr(gpu, "load_cifar10", lambda: None)
    for name in gpu.RUNS:
        gpu.PARTS[name][0](tmp_path)
    assert list(trained) == list(gpu.RUNS)
    assert trained["modern"] == get_recipe("modern")
    assert trained["untouched_one_cycle"].image_size == 64
    assert trained["untouched_one_cycle"].schedule == "one_cycle"


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_that_is_said():
    with pytest.raises(CifarFtError, match="no NVIDIA GPU"):
        gpu_works.device()
