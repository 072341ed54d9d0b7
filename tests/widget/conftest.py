"""A widget around a predictor that answers as it is told."""

import pytest


@pytest.fixture
def predictor():
    from widget_messages import Told

    return Told()


@pytest.fixture
def widget(predictor, samples):
    from cifar_ft.widget import PredictionWidget

    return PredictionWidget(predictor, samples)
