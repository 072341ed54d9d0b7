"""Settings for every test: figures are drawn without a screen; and the shipped images as small data."""

import logging
import os

import matplotlib
import pytest
from hypothesis import settings

matplotlib.use("Agg")
os.environ["CIFAR_FT_BACKBONE"] = "efficientnet_lite0"  # "auto" asks the network, and may fetch 95 MB
# The tests speak of a CPU, also on a machine with a GPU, whose own promises `python -m benchmarks gpu` checks.
os.environ.setdefault("CIFAR_FT_DEVICE", "cpu")
settings.register_profile("cifar_ft", deadline=None)  # a busy machine is no failure
settings.load_profile("cifar_ft")
if "PYTEST_XDIST_WORKER" in os.environ:  # workers share the cores: one thread each, and for what a test starts
    os.environ.setdefault("OMP_NUM_THREADS", "1")


def pytest_collection_modifyitems(items):
    """Files whose tests take longest come first; with several workers the short ones then fill the gaps."""
    order = ("notebook", "browser", "slow")
    ranks = {}
    for item in items:
        rank = min((order.index(mark.name) for mark in item.iter_markers() if mark.name in order), default=len(order))
        ranks[item.path] = min(rank, ranks.get(item.path, rank))
    items.sort(key=lambda item: ranks[item.path])


@pytest.fixture(scope="session")
def samples():
    """The 200 shipped test images, 20 a class."""
    from cifar_ft.data import load_samples

    return load_samples()


@pytest.fixture(scope="session")
def small_data(samples):
    """The shipped images as a Cifar10 of 120 training, 40 validation and 40 test images, balanced."""
    import torch

    from cifar_ft.data import Cifar10

    def part(start, end, name):
        members = [(samples.labels == label).nonzero().squeeze(1)[start:end] for label in range(10)]
        return samples.take(torch.cat(members).sort().values, name)

    return Cifar10(part(0, 12, "train"), part(12, 16, "val"), part(16, 20, "test"), "samples", "0" * 64)


@pytest.fixture
def said():
    """The lines that the library logs, as a list that grows."""
    lines = []
    handler = logging.Handler()
    handler.emit = lambda record: lines.append(record.getMessage())
    logging.getLogger("cifar_ft").addHandler(handler)
    yield lines
    logging.getLogger("cifar_ft").removeHandler(handler)


@pytest.fixture(scope="module")
def one_thread():
    """Small tensors are quicker on one thread, most of all on a busy machine."""
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def server(tmp_path, monkeypatch):
    """A local web server in place of the hub; the folders of data and weights are new, and `npm` is not there."""
    from local_server import Server

    from cifar_ft.data import downloads

    server = Server()
    for name in ("CIFAR_FT_BACKBONE", *(f"{kind}_proxy" for kind in ("http", "https", "all"))):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.upper(), raising=False)
    folders = {"CIFAR_FT_DATA": "data", "TORCH_HOME": "torch", "HOME": "home", "PATH": "bin"}
    settings = {"HF_ENDPOINT": server.url, "CIFAR_FT_PATIENCE": "0.4", "NO_PROXY": "127.0.0.1"}
    for name, value in {**{key: str(tmp_path / name) for key, name in folders.items()}, **settings}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(downloads, "RETRY_PAUSE", 0.01)
    yield server
    server.close()
