"""Promises of `cifar_ft.widget`: an answer never stands beside another picture, and no error stays unseen.

The messages are those that a browser sends, for ipywidgets 8 and for 7.7.
"""

from __future__ import annotations

import base64
import io
import re
from html.parser import HTMLParser

import ipywidgets
import numpy as np
import pytest
import torch
from PIL import Image

from cifar_ft.data import CLASSES, load_samples
from cifar_ft.predictions import Prediction, PredictionError
from cifar_ft.widget import UPLOAD, PredictionModel, PredictionWidget, prediction_widget, uploaded_file

SEVEN = ipywidgets.__version__.startswith("7.")


class Told:
    """A predictor that answers as it is told and remembers what it was asked."""

    source = "a model <told> what to say"

    def __init__(self, label="truck"):
        self.label, self.asked, self.during, self.error = label, [], lambda: None, None

    def predict(self, images):
        self.asked.append(images)
        self.during()
        if self.error:
            raise self.error
        rest = dict.fromkeys(CLASSES, 0.01)
        index = CLASSES.index(self.label)
        return [Prediction(self.label, index, 0.91, {**rest, self.label: 0.91})] * len(images)


@pytest.fixture(scope="module")
def samples():
    return load_samples()


@pytest.fixture
def predictor():
    return Told()


@pytest.fixture
def widget(predictor, samples):
    return PredictionWidget(predictor, samples)


def png(colour="red", size=(40, 20)):
    file = io.BytesIO()
    Image.new("RGB", size, colour).save(file, "PNG")
    return file.getvalue()


def send_file(widget, name, content):
    """What the browser sends when a file has been chosen."""
    about = {"name": name, "type": "image/png", "size": len(content), "lastModified": 1}
    if SEVEN:
        counter = widget.upload._counter + 1
        state = {"_counter": counter, "metadata": [about], "data": [None], "error": ""}
        paths = [["data", 0]]
    else:
        about["last_modified"] = about.pop("lastModified")
        state, paths = {"value": [about], "error": ""}, [["value", 0, "content"]]
    data = {"method": "update", "state": state, "buffer_paths": paths}
    widget.upload._handle_msg({"content": {"data": data}, "buffers": [memoryview(content)]})


def select(widget, index):
    """What the browser sends when a line of the list has been chosen; 0 is "choose a sample image"."""
    data = {"method": "update", "state": {"index": index}, "buffer_paths": []}
    widget.sample._handle_msg({"content": {"data": data}, "buffers": []})


def click(widget):
    data = {"method": "custom", "content": {"event": "click"}}
    widget.button._handle_msg({"content": {"data": data}, "buffers": []})


class Page(HTMLParser):
    """Tags with their attributes, and the text that a screen reader would say."""

    def __init__(self, html):
        super().__init__()
        self.tags, self.text, self.hidden = [], "", []
        self.feed(html)
        self.close()
        self.text = " ".join(self.text.split())

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        if tag not in ("img", "br"):
            self.hidden.append("aria-hidden" in dict(attributes))

    def handle_endtag(self, tag):
        self.hidden.pop()

    def handle_data(self, data):
        if not any(self.hidden):
            self.text += f" {data}"

    def all(self, tag):
        return [attributes for name, attributes in self.tags if name == tag]


def shown(image):
    """The pixels of an <img>."""
    assert image["src"].startswith("data:image/png;base64,")
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(image["src"].partition(",")[2]))))


def test_a_sample_is_shown_at_once_and_predicted_on_the_button_only(widget, predictor, samples):
    select(widget, 6)
    as_given, as_seen = Page(widget.picture.value).all("img")
    pixels = samples.images[5].permute(1, 2, 0).numpy()
    assert np.array_equal(shown(as_given), pixels)
    assert np.array_equal(shown(as_seen), pixels)
    assert "pixelated" in as_given["style"]
    assert widget.result.value == ""
    assert predictor.asked == []
    click(widget)
    assert torch.equal(predictor.asked[0][0], samples.images[5])
    assert "predicted truck , 91.0 %" in Page(widget.result.value).text


def test_the_true_label_is_said_for_samples_and_not_for_uploads(widget, predictor, samples):
    truth = CLASSES[samples.labels[0]]
    predictor.label = truth
    click(widget)
    assert f"true label {truth}, correct" in Page(widget.result.value).text
    predictor.label = next(name for name in CLASSES if name != truth)
    click(widget)
    assert f"true label {truth}, wrong" in Page(widget.result.value).text
    assert f"{truth} (true label)" in Page(widget.result.value).text
    send_file(widget, "mine.png", png())
    click(widget)
    assert "true label" not in widget.result.value


def test_an_upload_is_shown_as_given_and_as_the_network_sees_it(widget, predictor):
    send_file(widget, "mine.png", png("red", (40, 20)))
    as_given, as_seen = Page(widget.picture.value).all("img")
    assert shown(as_given).shape == (20, 40, 3)
    assert shown(as_seen).shape == (32, 32, 3)
    assert as_given["alt"] == "mine.png, as given"
    assert as_seen["alt"] == "mine.png, as the network sees it"
    click(widget)
    assert predictor.asked[0][0][:, 0, 0].tolist() == [255, 0, 0]
    assert "mine.png: predicted truck" in Page(widget.result.value).text


def test_a_new_source_always_clears_the_old_answer(widget):
    steps = (
        lambda: select(widget, 3),
        lambda: send_file(widget, "a.png", png()),
        lambda: send_file(widget, "b.png", png("blue")),
        lambda: send_file(widget, "c.png", b"broken"),
        lambda: select(widget, 2),
        lambda: select(widget, 0),
    )
    for step in steps:
        click(widget)
        step()
        assert "predicted" not in widget.result.value


def test_upload_and_list_reset_each_other(widget, predictor):
    send_file(widget, "a.png", png())
    assert widget.sample.value is None
    assert "a.png" in widget.picture.value
    first = widget.upload
    select(widget, 4)
    assert not widget.upload.value
    assert widget.upload is not first
    assert widget.upload in widget.controls.children
    assert first not in widget.controls.children
    assert "sample 4" in widget.picture.value
    click(widget)
    assert "sample 4" in widget.result.value
    send_file(widget, "a.png", png())  # the same file once more
    assert widget.sample.value is None
    click(widget)
    assert "a.png: predicted" in Page(widget.result.value).text
    assert len(predictor.asked) == 2


def test_a_broken_file_is_an_alert_in_place_and_is_never_predicted(widget, predictor):
    send_file(widget, "notes.png", b"not a picture")
    for _ in range(2):
        (alert,) = [a for a in Page(widget.result.value).all("div") if a.get("role") == "alert"]
        assert alert["lang"] == "en"
        assert Page(widget.result.value).text.startswith("Error: notes.png: not a picture that can be read")
        assert widget.picture.value == ""
        click(widget)
    assert predictor.asked == []
    send_file(widget, "good.png", png())
    assert widget.result.value == ""


def test_without_a_picture_the_button_says_what_to_do(widget, predictor):
    select(widget, 0)
    assert widget.picture.value == ""
    click(widget)
    assert 'role="alert"' in widget.result.value
    assert "choose a sample image or upload a picture" in widget.result.value
    assert predictor.asked == []


@pytest.mark.parametrize("error", [PredictionError("the model is <gone>"), ZeroDivisionError("by zero")])
def test_an_error_of_the_model_is_shown_in_place_of_the_answer(widget, predictor, error):
    click(widget)
    predictor.error = error
    click(widget)
    text = Page(widget.result.value).text
    assert text.endswith(
        ": the model is <gone>" if isinstance(error, PredictionError) else "ZeroDivisionError: by zero"
    )
    assert 'role="alert"' in widget.result.value
    assert "predicted" not in text
    assert not widget.button.disabled
    predictor.error = None
    click(widget)
    assert "predicted truck" in Page(widget.result.value).text


def test_the_button_is_disabled_while_the_model_works(widget, predictor):
    states = []
    predictor.during = lambda: states.append(widget.button.disabled)
    click(widget)
    assert states == [True]
    assert not widget.button.disabled


def test_the_table_says_every_class_in_text_best_first(widget):
    click(widget)
    page = Page(widget.result.value)
    assert page.text.count(" %") == 11
    names = re.findall("|".join(CLASSES), page.text[page.text.index("class probability") :])
    assert names[0] == "truck"
    assert sorted(names) == sorted(CLASSES)
    assert "truck 91.0 %" in page.text
    bars = page.all("span")
    assert len(bars) == 10
    assert all(bar["aria-hidden"] == "true" for bar in bars)
    widths = [int(re.search(r"width:(\d+)px", bar["style"])[1]) for bar in bars]
    assert widths[0] > 80 * widths[1] > 0
    assert page.all("div")[0]["lang"] == "en"
    assert [a["role"] for a in page.all("p")] == ["status"]
    assert len([a for a in page.all("th") if a["scope"] == "row"]) == 10


def test_a_file_name_is_text_and_never_markup(widget):
    name = '"><script>alert(1)</script>.png'
    send_file(widget, name, png())
    click(widget)
    html = widget.picture.value + widget.result.value
    assert "<script" not in html
    assert f"{name}, as given" in [image["alt"] for image in Page(html).all("img")]
    assert "&lt;told&gt;" in html


def test_a_large_picture_is_shown_small(widget):
    send_file(widget, "large.png", png(size=(3000, 1000)))
    as_given, _ = Page(widget.picture.value).all("img")
    assert shown(as_given).shape == (64, 192, 3)
    assert "3000 x 1000 pixels" in widget.picture.value
    assert len(widget.picture.value) < 20_000


def test_the_controls_have_whole_names_and_tell_the_limit(widget, samples):
    assert widget.sample.description == "Sample image"
    assert widget.upload.description == UPLOAD
    assert "10 MiB" in UPLOAD
    assert widget.button.description == "Predict"
    for control in (widget.upload, widget.button, widget.sample):
        assert control.layout.width == "auto"
    assert widget.upload.icon == widget.button.icon == ""
    assert not widget.upload.multiple
    assert len(widget.sample.options) == len({label for label, _ in widget.sample.options}) == 201
    for label, i in widget.sample.options[1:]:
        assert f"{CLASSES[samples.labels[i]]} (test image {samples.indices[i]})" in label


def bundle_of(widget):
    from IPython.core.formatters import DisplayFormatter
    from IPython.core.interactiveshell import InteractiveShell

    InteractiveShell.clear_instance()
    return DisplayFormatter().format(widget)[0]


def test_a_page_without_a_kernel_shows_a_preview_in_place_of_the_widget(widget, predictor, samples):
    bundle = bundle_of(widget)
    assert bundle["application/vnd.jupyter.widget-view+json"]["model_id"] == widget.model_id
    page = Page(bundle["text/html"])
    assert all(image["alt"] and len(shown(image)) for image in page.all("img"))
    assert "predicted truck" in page.text
    assert "Preview" in page.text
    assert len(bundle["text/plain"]) < 110
    assert widget.result.value == ""  # showing the widget has not pressed its button
    assert widget.state.prediction is None
    predictor.error = PredictionError("no model")
    assert "Error: sample 1" in Page(bundle_of(widget)["text/html"]).text


def test_both_forms_of_an_upload_are_understood():
    content = memoryview(b"abc")
    eight = ({"name": "a.png", "type": "", "size": 3, "content": content, "last_modified": None},)
    seven = {"a.png": {"metadata": {"name": "a.png", "size": 3}, "content": b"abc"}}
    assert uploaded_file(eight) == uploaded_file(seven) == ("a.png", b"abc")
    assert uploaded_file(()) is None
    assert uploaded_file({}) is None


def test_the_model_behind_the_widget_works_without_it(predictor, samples):
    model = PredictionModel(predictor, samples)
    assert model.picture_html() == model.result_html() == ""
    model.choose_sample(199)
    model.predict()
    assert model.prediction.label == "truck"
    model.choose_upload("a.png", png())
    assert (model.prediction, model.true_label, model.uploaded) == (None, None, True)
    model.predict()
    model.choose_sample(None)
    assert model.image is None
    assert model.prediction is None


def test_prediction_widget_takes_the_model_given_or_the_newest(predictor, monkeypatch):
    from cifar_ft import widget as module

    assert prediction_widget(predictor).state.predictor is predictor
    monkeypatch.setattr(module.Predictor, "newest_or_shipped", classmethod(lambda cls, **_: Told("frog")))
    widget = prediction_widget()
    click(widget)
    assert "predicted frog" in Page(widget.result.value).text
