"""Settings for every test: figures are drawn without a screen; and the shipped images as small data."""

import logging

import matplotlib
import pytest
from hypothesis import settings

matplotlib.use("Agg")
settings.register_profile("cifar_ft", deadline=None)  # a busy machine is no failure
settings.load_profile("cifar_ft")


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
