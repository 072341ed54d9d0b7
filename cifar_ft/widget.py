"""The prediction widget (notebook 06): choose a sample image or upload a picture and see the model's answer.

`PredictionModel` holds what is chosen and says it in HTML; `PredictionWidget` is a thin skin over it, made of
what ipywidgets 7.7 and 8 have in common.
"""

from __future__ import annotations

import base64
import copy
import io
from html import escape

import ipywidgets as widgets
from PIL import Image
from torch import Tensor

from cifar_ft import CifarFtError
from cifar_ft.data import CLASSES, Split, load_samples
from cifar_ft.predictions import ImageError, Prediction, Predictor, read_image, square

WIDTH = 192  # of each picture and of the longest bar, in CSS pixels
BAR = "display:inline-block;height:0.8em;vertical-align:middle;margin-left:8px;background:#0173b2"
CHOOSE = "choose a sample image"
UPLOAD = "Upload a picture (at most 10 MiB)"  # the notebook server drops larger ones without a word
ACCEPT = ".png,.jpg,.jpeg,.gif,.webp,.bmp,.tif,.tiff,.ppm,.avif"


class PredictionModel:
    """What the widget knows: the picture chosen, the answer for it, or what went wrong; without any widget.

    Whatever is chosen, the earlier answer is gone, so that an answer never stands beside another picture.

    Attributes
    ----------
    name : str
        Of the picture chosen, as people know it.
    image : uint8 Tensor [3, H, W] or None
    true_label : str or None
        Known for the sample images only.
    uploaded : bool
        Whether the picture is an upload.
    prediction : Prediction or None
    error : str
    """

    def __init__(self, predictor: Predictor, samples: Split | None = None):
        self.predictor = predictor
        self.samples = load_samples() if samples is None else samples
        self.clear()

    def clear(self) -> None:
        """Forget the picture and all that was said about it."""
        self.name, self.image, self.true_label, self.uploaded = "", None, None, False
        self.prediction, self.error = None, ""

    def sample_names(self) -> list[str]:
        """One line for each sample image, all different."""
        labels, indices = self.samples.labels.tolist(), self.samples.indices.tolist()
        return [
            f"{i}: {CLASSES[label]} (test image {index})"
            for i, (label, index) in enumerate(zip(labels, indices, strict=True), start=1)
        ]

    def choose_sample(self, position: int | None) -> None:
        """Choose a sample image by its position; `None` chooses nothing."""
        self.clear()
        if position is not None:
            self.name = f"sample {self.sample_names()[position]}"
            self.image = self.samples.images[position]
            self.true_label = CLASSES[self.samples.labels[position]]

    def choose_upload(self, name: str, content) -> None:
        """Choose an uploaded file. Raises ImageError when it is no picture."""
        self.clear()
        self.name, self.uploaded = name, True
        try:
            self.image = read_image(content)
        except ImageError as error:
            raise ImageError(str(error).removeprefix("the picture").removeprefix(": ").strip()) from error

    def predict(self) -> None:
        """Predict the picture chosen. Raises ImageError when there is none."""
        self.prediction = None
        if self.image is None:
            raise ImageError(self.error or "no picture is chosen; choose a sample image or upload a picture")
        self.error = ""
        (self.prediction,) = self.predictor.predict([self.image])

    def fail(self, error: Exception) -> None:
        """Keep what went wrong in place of an answer."""
        self.prediction = None
        known = isinstance(error, CifarFtError)
        self.error = str(error) if known else f"unexpected error, {type(error).__name__}: {error}"

    def picture_html(self) -> str:
        """The picture as given and as the network sees it."""
        if self.image is None:
            return ""
        height, width = self.image.shape[1:]
        figures = _figure(self.image, f"{self.name}, as given", f"as given, {width} x {height} pixels")
        figures += _figure(square(self.image), f"{self.name}, as the network sees it", "as the network sees it")
        return f'<div lang="en"><div>{escape(self.name)}</div>{figures}</div>'

    def result_html(self) -> str:
        """The answer, or what went wrong, or nothing yet."""
        if self.error:
            about = f"{self.name}: " if self.name else ""
            return f'<div lang="en" role="alert"><strong>Error:</strong> {escape(about + self.error)}</div>'
        if self.prediction is None:
            return ""
        return _answer_html(self.prediction, self.name, self.true_label, self.predictor.source)


def _answer_html(prediction: Prediction, name: str, true_label: str | None, source: str) -> str:
    """One sentence and a table of all classes; bars only repeat the numbers, so screen readers skip them."""
    said = f"{escape(name)}: predicted <strong>{prediction.label}</strong>, {_percent(prediction.probability)}"
    if true_label is not None:
        said += f"; true label {true_label}, {'correct' if true_label == prediction.label else 'wrong'}"
    rows = ""
    for label, probability in prediction.top(len(CLASSES)):
        bar = f'<span aria-hidden="true" style="{BAR};width:{WIDTH * probability:.0f}px"></span>'
        true = " (true label)" if label == true_label else ""
        number = f'<td style="text-align:right">{_percent(probability)}</td>'
        rows += f'<tr><th scope="row" style="text-align:left">{label}{true}</th>{number}<td>{bar}</td></tr>'
    head = '<tr><th scope="col">class</th><th scope="col">probability</th><td></td></tr>'
    caption = f'<caption style="text-align:left">Model: {escape(source)}</caption>'
    table = f"<table>{caption}<thead>{head}</thead><tbody>{rows}</tbody></table>"
    return f'<div lang="en"><p role="status">{said}</p>{table}</div>'


def _percent(probability: float) -> str:
    return f"{100 * probability:.1f} %"


def _figure(image: Tensor, alt: str, caption: str) -> str:
    """A picture inside the page, `WIDTH` pixels at its longer side; small ones show their pixels."""
    picture = Image.fromarray(image.permute(1, 2, 0).contiguous().numpy())
    longer = max(picture.size)
    width, height = (max(1, round(WIDTH * length / longer)) for length in picture.size)
    if longer > WIDTH:
        picture = picture.resize((width, height), Image.Resampling.BOX)
    file = io.BytesIO()
    picture.save(file, "PNG")
    data = base64.b64encode(file.getvalue()).decode()
    style = f"width:{width}px;height:{height}px;image-rendering:pixelated"
    figure = f'<img alt="{escape(alt)}" src="data:image/png;base64,{data}" style="{style}">'
    caption = f"<figcaption>{escape(caption)}</figcaption>"
    return f'<figure style="display:inline-block;margin:4px 16px 4px 0">{figure}{caption}</figure>'


def uploaded_file(value) -> tuple[str, bytes] | None:
    """Name and content of an uploaded file from a tuple of dicts (ipywidgets 8) or a dict of them (7)."""
    files = list(value.values()) if isinstance(value, dict) else list(value)
    if not files:
        return None
    return files[-1].get("metadata", files[-1])["name"], bytes(files[-1]["content"])


class PredictionWidget(widgets.VBox):
    """Choose a sample image or upload a picture, and see what the model says.

    Parameters
    ----------
    predictor : Predictor
        Or anything with its `predict` and `source`.
    samples : Split, optional
        By default the 200 that the package ships.
    """

    # ipywidgets 7 displays itself by this method, without the static preview of `_repr_mimebundle_`.
    _ipython_display_ = None

    def __init__(self, predictor: Predictor, samples: Split | None = None):
        self.state = PredictionModel(predictor, samples)
        options = [(CHOOSE, None), *((name, i) for i, name in enumerate(self.state.sample_names()))]
        self.sample = widgets.Dropdown(
            options=options,
            value=0,
            description="Sample image",
            style={"description_width": "initial"},
            layout=widgets.Layout(width="auto"),
        )
        self.upload = self._new_upload()
        self.button = widgets.Button(description="Predict", button_style="primary", layout=widgets.Layout(width="auto"))
        self.picture, self.result = widgets.HTML(), widgets.HTML()
        self.controls = widgets.HBox(
            [self.sample, self.upload, self.button], layout=widgets.Layout(flex_flow="row wrap")
        )
        self.sample.observe(self._on_sample, "value")
        self.button.on_click(self._on_predict)
        self._do(lambda: self.state.choose_sample(0))
        super().__init__([self.controls, self.picture, self.result])

    def _new_upload(self) -> widgets.FileUpload:
        layout = widgets.Layout(width="auto")
        upload = widgets.FileUpload(accept=ACCEPT, multiple=False, description=UPLOAD, icon="", layout=layout)
        upload.observe(self._on_upload, "value")
        return upload

    def _on_sample(self, change) -> None:
        if change["new"] is None and self.state.uploaded:
            return  # reset by the upload
        if self.state.uploaded:  # an upload is emptied by a new one: in ipywidgets 7 its value is read-only
            old, self.upload = self.upload, self._new_upload()
            self.controls.children = (self.sample, self.upload, self.button)
            old.close()
        self._do(lambda: self.state.choose_sample(change["new"]))

    def _on_upload(self, change) -> None:
        def choose():
            if file := uploaded_file(change["new"]):
                self.state.choose_upload(*file)

        self._do(choose)
        if self.state.uploaded:
            self.sample.value = None

    def _on_predict(self, _button) -> None:
        self.button.disabled = True  # further clicks would queue up
        try:
            self._do(self.state.predict)
        finally:
            self.button.disabled = False

    def _do(self, action) -> None:
        """Act and show the outcome, errors too: one that left a callback would only be logged."""
        try:
            action()
            self.picture.value, self.result.value = self.state.picture_html(), self.state.result_html()
        except Exception as error:
            self.state.fail(error)
            self.picture.value = "" if self.state.image is None else self.picture.value
            self.result.value = self.state.result_html()

    def _repr_mimebundle_(self, **_) -> dict:
        """The live widget, and for pages without a kernel a static preview of what is chosen now."""
        preview = copy.copy(self.state)  # to show it changes nothing
        try:
            preview.predict()
        except Exception as error:
            preview.fail(error)
        note = "<p>Preview; run the notebook to choose other pictures.</p>"
        return {
            "text/plain": f"PredictionWidget({self.state.predictor.source})",
            "text/html": f'<div lang="en">{note}{preview.picture_html()}{preview.result_html()}</div>',
            "application/vnd.jupyter.widget-view+json": {
                "version_major": 2,
                "version_minor": 0,
                "model_id": self.model_id,
            },
        }


def prediction_widget(predictor: Predictor | None = None) -> PredictionWidget:
    """The widget for a model; without one, for the newest finished run or else the shipped model.

    Raises
    ------
    RunError, PredictionError
        When there is no model, or it is damaged.
    """
    return PredictionWidget(predictor or Predictor.newest_or_shipped(echo=lambda *_: None))
