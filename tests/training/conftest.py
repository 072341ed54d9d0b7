"""A run that the tests of training share."""

import pytest
from tiny_runs import recipe

from cifar_ft.training import fit


@pytest.fixture(scope="session")
def whole(small_data, tmp_path_factory):
    """The folder of an uninterrupted run of `recipe()`, on one thread."""
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    path = tmp_path_factory.mktemp("whole") / "run"
    fit(recipe(), small_data, path)
    torch.set_num_threads(threads)
    return path
