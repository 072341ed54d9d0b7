"""The prediction widget of chapter 06, and the same as a page of its own."""

from cifar_ft.widget.app import AppError, page, serve

__all__ = ["AppError", "PredictionWidget", "page", "prediction_widget", "serve"]


def __getattr__(name: str):
    """The widget, once it is asked for: whoever only serves the page needs neither torch nor ipywidgets."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from cifar_ft.widget.widget import PredictionWidget, prediction_widget

    return {"PredictionWidget": PredictionWidget, "prediction_widget": prediction_widget}[name]
