"""One model with its real ImageNet weights for all tests of this folder."""

import pytest
from tiny_models import build


@pytest.fixture(scope="session")
def lite0():
    """EfficientNet-Lite0 with the weights that an installed package holds; tests work on copies."""
    return build(backbone="efficientnet_lite0", weights="imagenet")
