"""Models that the tests of this room share."""

import pytest

from cifar_ft.models import build_model
from cifar_ft.predictions import Predictor
from cifar_ft.recipes import get_recipe


@pytest.fixture(scope="session")
def tiny_recipe():
    return get_recipe("smoke", "weights=none backbone=resnet18 last_stage=1 image_size=16")


@pytest.fixture(scope="session")
def predictor(tiny_recipe):
    """A small random model."""
    return Predictor(build_model(tiny_recipe), tiny_recipe, "a random model")


@pytest.fixture(scope="session")
def shipped():
    return Predictor.shipped()
