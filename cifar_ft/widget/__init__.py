"""The prediction widget of chapter 06, and the same as a page of its own."""

from cifar_ft.widget.app import AppError, page, serve
from cifar_ft.widget.state import PredictionModel
from cifar_ft.widget.texts import LANGUAGES, LanguageError
from cifar_ft.widget.widget import PredictionWidget, prediction_widget

__all__ = [
    "AppError",
    "LANGUAGES",
    "LanguageError",
    "PredictionModel",
    "PredictionWidget",
    "page",
    "prediction_widget",
    "serve",
]
