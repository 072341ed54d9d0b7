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

from cifar_ft import predictions, widget
from cifar_ft.data import CLASSES, Split, load_samples
from cifar_ft.predictions import ImageError, Prediction, PredictionError
from cifar_ft.widget import (
    LONGEST,
    MOST_FILES,
    MOST_MIB,
    NOTHING,
    PAGE,
    UPLOAD,
    Gallery,
    GalleryError,
    PredictionModel,
    PredictionWidget,
    picture_html,
    prediction_widget,
    result_html,
    uploaded_files,
)

SEVEN = ipywidgets.__version__.startswith("7.")


class Told:
    """A predictor that answers as it is told and remembers what it was asked."""

    source = "a model <told> what to say"

    def __init__(self, label="truck", unknown=None):
        self.label, self.asked, self.during, self.error = label, [], lambda: None, None
        self.unknown = unknown

    def predict(self, images):
        self.asked.append(images)
        self.during()
        if self.error:
            raise self.error
        rest = dict.fromkeys(CLASSES, 0.01)
        index = CLASSES.index(self.label)
        return [Prediction(self.label, index, 0.91, {**rest, self.label: 0.91}, self.unknown)] * len(images)


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


def send_files(widget, files):
    """What the browser sends when files have been chosen, as (name, content)."""
    modified = "lastModified" if SEVEN else "last_modified"
    about = [{"name": name, "type": "image/png", "size": len(content), modified: 1} for name, content in files]
    if SEVEN:
        counter = widget.upload._counter + len(files)
        state = {"_counter": counter, "metadata": about, "data": [None] * len(files), "error": ""}
        paths = [["data", i] for i in range(len(files))]
    else:
        state, paths = {"value": about, "error": ""}, [["value", i, "content"] for i in range(len(files))]
    data = {"method": "update", "state": state, "buffer_paths": paths}
    buffers = [memoryview(content) for _, content in files]
    widget.upload._handle_msg({"content": {"data": data}, "buffers": buffers})


def send_file(widget, name, content):
    send_files(widget, [(name, content)])


def send(control, **state):
    """What the browser sends when a control has been changed."""
    data = {"method": "update", "state": state, "buffer_paths": []}
    control._handle_msg({"content": {"data": data}, "buffers": []})


def select(widget, index):
    """Choose a line of the sample images; 0 is "choose a sample image"."""
    send(widget.sample, index=index)


def pick(control, line):
    """Choose a line of a list by its text."""
    send(control, index=[text for text, _ in control.options].index(line))


def press(button):
    data = {"method": "custom", "content": {"event": "click"}}
    button._handle_msg({"content": {"data": data}, "buffers": []})


def click(widget):
    press(widget.button)


def thumbnails(widget):
    """The pictures of the gallery that can be clicked, by their text."""
    return {b.description: b for b in widget.thumbnails.buttons if b.layout.display != "none"}


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
    assert widget.sample.value == NOTHING
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
    assert widget.sample.value == NOTHING
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


def test_an_answer_never_stands_beside_another_picture_not_even_for_a_moment(widget):
    click(widget)
    beside = []
    widget.picture.observe(lambda change: beside.append(widget.result.value), "value")
    select(widget, 3)
    assert beside == [""]


def test_a_picture_that_cannot_be_shown_is_an_alert_and_leaves_no_answer(widget, monkeypatch):
    click(widget)
    monkeypatch.setattr("cifar_ft.widget.picture_html", lambda state: 1 / 0)
    select(widget, 3)
    assert widget.picture.value == ""
    assert 'role="alert"' in widget.result.value
    assert "ZeroDivisionError" in widget.result.value


def test_a_file_that_the_browser_cannot_read_is_an_alert(widget):
    click(widget)
    widget.upload.error = "NotReadableError"
    assert 'role="alert"' in widget.result.value
    assert "NotReadableError" in widget.result.value
    assert widget.picture.value == ""


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
    assert [a["role"] for _, a in page.tags if "role" in a] == ["status"]
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
    assert widget.upload.multiple
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
    eight = ({"name": "a.png", "type": "", "size": 3, "content": content, "last_modified": None},) * 2
    seven = {"a.png": {"metadata": {"name": "a.png", "size": 3}, "content": b"abc"}}
    assert uploaded_files(eight) == [("a.png", b"abc")] * 2
    assert uploaded_files(seven) == [("a.png", b"abc")]
    assert uploaded_files(()) == uploaded_files({}) == []


def test_the_model_behind_the_widget_works_without_it(predictor, samples):
    model = PredictionModel(predictor, samples)
    assert picture_html(model) == result_html(model) == ""
    model.choose_sample(199)
    model.predict()
    assert model.prediction.label == "truck"
    model.choose_upload("a.png", png())
    assert (model.prediction, model.true_label, model.uploaded) == (None, None, True)
    model.predict()
    model.choose_sample(None)
    assert model.chosen is None
    assert model.prediction is None
    with pytest.raises(ImageError, match="not a picture"):
        model.choose_upload("a.png", b"text")
    with pytest.raises(ImageError, match="choose crop or pad"):
        model.set_fit("stretch")


def test_several_uploads_are_answered_at_once_and_shown_one_by_one(widget, predictor):
    files = [("a.png", png("red")), ("notes.txt", b"no picture"), ("a.png", png("blue", (10, 30)))]
    if SEVEN:  # which keeps one file of a name
        files[2] = ("c.png", files[2][1])
    send_files(widget, files)
    assert widget.file.layout.display == ""
    assert [text.split(": ")[0] for text, _ in widget.file.options] == ["1", "2", "3"]
    click(widget)
    assert len(predictor.asked) == 1
    assert [image[:, 16, 16].tolist() for image in predictor.asked[0]] == [[255, 0, 0], [0, 0, 255]]
    page = Page(widget.result.value)
    assert page.text.startswith("a.png: predicted truck")
    summary = page.text[page.text.index("All uploaded pictures") :]
    assert summary.count("truck, 91.0 %") == 2
    assert "notes.txt not a picture that can be read" in summary
    send(widget.file, index=2)
    assert "10 x 30 pixels" in widget.picture.value
    assert f"{files[2][0]}: predicted truck" in Page(widget.result.value).text
    send(widget.file, index=1)
    assert widget.picture.value == ""
    assert 'role="alert"' in widget.result.value
    assert "predicted" not in widget.result.value
    assert len(predictor.asked) == 1
    select(widget, 3)
    assert widget.file.layout.display == "none"
    assert "All uploaded" not in widget.result.value


def test_only_broken_uploads_are_never_asked_about(widget, predictor):
    send_files(widget, [("a.png", b""), ("b.png", b"x")])
    click(widget)
    assert predictor.asked == []
    assert "Error: a.png:" in Page(widget.result.value).text


def test_a_file_above_the_limit_is_refused_in_words(widget):
    send_file(widget, "large.png", png() + bytes(MOST_MIB * 2**20))
    assert "Error: large.png: 10.0 MiB; at most 10 MiB are allowed" in Page(widget.result.value).text
    assert f"{MOST_MIB} MiB" in UPLOAD


def test_too_many_files_are_refused_and_the_next_choice_works(widget):
    content = png(size=(2, 2))
    send_files(widget, [(f"{i}.png", content) for i in range(MOST_FILES + 1)])
    assert "51 pictures at a time are too many; choose at most 50" in Page(widget.result.value).text
    assert widget.picture.value == ""
    first = widget.upload
    select(widget, 1)
    assert widget.result.value == ""
    assert widget.upload is not first


def test_a_very_large_upload_is_shown_with_its_size_as_given(widget):
    send_file(widget, "photo.png", png("red", (4032, 3024)))
    assert "as given, 4032 x 3024 pixels" in widget.picture.value


def test_numbers_in_french_errors_are_written_as_french_does():
    message = "too large: 8,000 x 9,000 pixels; at most 50,000,000 are allowed"
    said, lang = widget.translated("fr", message)
    assert (said, lang) == (
        "trop grande\xa0: 8\u202f000 x 9\u202f000 pixels\xa0; au plus 50\u202f000\u202f000 sont permis",
        "fr",
    )
    assert widget.translated("fr", "12.5 MiB; at most 10 MiB are allowed, make it smaller")[0].startswith("12,5 Mio")
    assert "1,000.5" in widget.translated("fr", "unexpected error, X: 1,000.5")[0]  # somebody else's words


def test_large_uploads_are_not_kept(predictor, samples):
    model = PredictionModel(predictor, samples)
    model.choose_upload("large.png", png(size=(3000, 1000)))
    assert model.chosen.shown.size == (192, 64)
    assert [tuple(square.shape) for square in model.chosen.squares.values()] == [(3, 32, 32)] * 2


def test_how_a_picture_becomes_square_can_be_chosen_and_is_shown(widget, predictor):
    send_file(widget, "wide.png", png("red", (40, 20)))
    assert "as the network sees it, cut to its middle" in widget.picture.value
    click(widget)
    pick(widget.fit, "is shown whole, with black borders")
    assert widget.result.value == ""  # it was the answer to another square
    assert "as the network sees it, whole with black borders" in widget.picture.value
    _, as_seen = Page(widget.picture.value).all("img")
    assert shown(as_seen)[0].max() == 0
    click(widget)
    assert predictor.asked[1][0][:, 0, 0].tolist() == [0, 0, 0]
    assert predictor.asked[1][0][:, 16, 0].tolist() == [255, 0, 0]


def test_notes_about_a_picture_are_shown_in_words(widget):
    file = io.BytesIO()
    Image.new("RGBA", (8, 8), (255, 0, 0, 100)).save(file, "PNG")
    send_file(widget, "glass.png", file.getvalue())
    assert "This picture: transparent parts shown on white." in widget.picture.value
    pick(widget.language, "français")
    assert "Cette image\xa0: parties transparentes sur fond blanc." in widget.picture.value


@pytest.mark.parametrize(("unknown", "said"), [(True, True), (False, False), (None, False)])
def test_a_picture_unlike_cifar10_is_said_to_be(samples, unknown, said):
    widget = PredictionWidget(Told(unknown=unknown), samples)
    click(widget)
    text = Page(widget.result.value).text
    assert ("Unlike anything in CIFAR-10." in text) is said
    assert ("do not trust" in text) is said
    assert "predicted truck" in text


def test_the_warning_says_how_often_it_is_false(samples):
    told = Told(unknown=True)
    told.calibration = {"temperature": 1.0, "lowest_energy": 0.0, "false_alarms": 0.02}
    widget = PredictionWidget(told, samples)
    click(widget)
    assert "About 2 % of CIFAR-10's own pictures get this warning too." in Page(widget.result.value).text
    pick(widget.language, "français")
    assert "Environ 2 % des images" in Page(widget.result.value).text


def test_two_models_are_compared(samples):
    first, second = Told("truck"), Told("cat", unknown=True)
    second.source = "the second"
    widget = PredictionWidget(first, samples, other=second)
    click(widget)
    page = Page(widget.result.value)
    assert "model 1, sample 1" in page.text
    assert "predicted truck" in page.text
    assert "model 2, sample 1" in page.text
    assert "predicted cat" in page.text
    assert "The two models disagree." in page.text
    assert len(page.all("table")) == 2
    assert "Model: the second" in page.text
    assert torch.equal(first.asked[0][0], second.asked[0][0])
    second.label = "truck"
    click(widget)
    assert "The two models agree." in Page(widget.result.value).text
    send_files(widget, [("a.png", png()), ("b.png", png("blue"))])
    click(widget)
    assert "picture model 1 model 2 a.png truck, 91.0 %" in Page(widget.result.value).text


@pytest.fixture
def heat(monkeypatch):
    """A heat map that is brightest in the upper right, in place of the real one."""

    asked = []

    def told(predictor, image, target=None):
        asked.append((predictor, image))
        values = np.zeros((32, 32), np.float32)
        values[2, 29] = 1
        return values

    monkeypatch.setattr(explanations, "grad_cam", told)
    return asked


def test_a_heat_map_comes_with_the_answer_on_demand(widget, samples, heat):
    click(widget)
    assert heat == []
    send(widget.heat_map, value=True)
    (image,) = Page(widget.result.value).all("img")
    assert image["alt"].startswith("Heat map of sample 1")
    assert image["alt"].endswith("for truck, brightest in the upper right")
    assert shown(image).shape == (32, 32, 3)
    assert torch.equal(heat[0][1], samples.images[0])
    send(widget.heat_map, value=False)
    assert "<img" not in widget.result.value
    assert "predicted truck" in Page(widget.result.value).text
    send(widget.heat_map, value=True)
    assert len(heat) == 1
    select(widget, 2)
    assert widget.result.value == ""
    click(widget)
    assert len(heat) == 2


def test_a_heat_map_that_fails_is_an_alert_below_the_answer(widget, monkeypatch):
    from cifar_ft import widget

    monkeypatch.setattr(explanations, "grad_cam", lambda *_: 1 / 0)
    send(widget.heat_map, value=True)
    click(widget)
    text = Page(widget.result.value).text
    assert "predicted truck" in text
    assert "Error: Heat map: unexpected error, ZeroDivisionError" in text
    send(widget.heat_map, value=False)
    assert "Error" not in widget.result.value


def test_every_text_is_there_in_french(widget, predictor):
    predictor.unknown = True
    click(widget)
    pick(widget.language, "français")
    texts = Page(widget.picture.value + widget.result.value).text
    assert "prédiction camion , 91,0 %" in texts
    for name in widget.LABELS["fr"]:
        assert name in texts
    assert "vraie classe" in texts
    assert "Ne ressemble à rien de CIFAR-10." in texts
    english = {text for text in widget.ENGLISH.values() if "{" not in text}
    controls = [widget.language, widget.sample, widget.upload, widget.file, widget.fit, widget.heat_map, widget.button]
    gallery = widget.thumbnails
    controls += [gallery.kind, gallery.order, gallery.shuffle, gallery.earlier, gallery.later]
    assert not english & {control.description for control in controls}
    lists = [widget.sample, widget.fit, gallery.kind, gallery.order]
    assert not english & {text for control in lists for text, _ in control.options}
    assert "images 1 à 20 sur 200" in gallery.page.value
    assert "\u2713 1 bateau" in thumbnails(widget)
    assert "sample" not in texts
    send_file(widget, "notes.png", b"not a picture")
    said = Page(widget.result.value).text
    assert "Erreur : notes.png : ce n'est pas une image lisible ici ; utilisez" in said
    assert "Aperçu" in bundle_of(widget)["text/html"]
    pick(widget.language, "English")
    assert "Error: notes.png: not a picture" in Page(widget.result.value).text
    assert widget.button.description == "Predict"


def test_a_change_of_language_keeps_what_was_answered(widget, predictor):
    send_file(widget, "mine.png", png())
    click(widget)
    pick(widget.language, "français")
    assert "mine.png\xa0: prédiction" in widget.result.value
    assert len(predictor.asked) == 1
    assert widget.sample.value == NOTHING


def test_the_languages_have_the_same_texts_and_gaps():
    def gaps(text):
        return set(re.findall(r"{(\w+)}", text))

    assert widget.ENGLISH.keys() == widget.FRENCH.keys()
    assert [key for key, text in widget.ENGLISH.items() if gaps(text) != gaps(widget.FRENCH[key])] == []
    assert [len(set(labels)) for labels in widget.LABELS.values()] == [10, 10]
    with pytest.raises(widget.LanguageError, match="'de'; choose from en, fr"):
        prediction_widget(Told(), lang="de")


@pytest.mark.parametrize(
    "content",
    [b"", b"text", png()[:60], b"\x89PNG\r\n\x1a\n" + bytes(40)],
    ids=["empty", "text", "cut off", "damaged"],
)
def test_what_is_wrong_with_a_file_is_said_in_french_too(predictor, samples, content):
    model = PredictionModel(predictor, samples, lang="fr")
    model.choose_uploads([("a.png", content)])
    said, lang = widget.translated("fr", model.chosen.problem)
    assert lang == "fr", model.chosen.problem
    assert said != model.chosen.problem
    assert widget.translated("fr", "something new") == ("something new", "en")


def test_a_picture_is_chosen_by_a_click_in_the_gallery(widget, samples):
    assert len(thumbnails(widget)) == PAGE
    name = f"4 {CLASSES[samples.labels[3]]}"
    press(thumbnails(widget)[name])
    assert widget.sample.value == 3
    assert "sample 4" in widget.picture.value
    assert f"\u2713 {name}" in thumbnails(widget)
    assert len([text for text in thumbnails(widget) if "\u2713" in text]) == 1
    select(widget, 6)
    assert f"\u2713 6 {CLASSES[samples.labels[5]]}" in thumbnails(widget)
    send_file(widget, "a.png", png())
    assert not [text for text in thumbnails(widget) if "\u2713" in text]


def test_each_thumbnail_is_its_own_picture(widget, samples):
    style = widget.thumbnails.pictures.value
    uris = re.findall(r'-(\d+) { background-image: url\("(data:[^"]+)"', style)
    assert [int(k) for k, _ in uris] == list(range(PAGE))
    for k, uri in uris:
        assert np.array_equal(shown({"src": uri}), samples.images[int(k)].permute(1, 2, 0).numpy())
    press(widget.thumbnails.later)
    assert widget.thumbnails.pictures.value != style
    assert "pictures 21 to 40 of 200" in widget.thumbnails.page.value


def test_two_widgets_on_one_page_do_not_share_thumbnails(predictor, samples):
    first, second = (PredictionWidget(predictor, samples).thumbnails for _ in range(2))
    assert first.unique != second.unique
    assert second.unique not in first.pictures.value


def test_the_samples_can_be_browsed_by_class(widget, predictor):
    pick(widget.thumbnails.kind, "frog")
    assert len(thumbnails(widget)) == 20
    assert all(text.endswith(" frog") for text in thumbnails(widget))
    assert len(widget.sample.options) == 21
    assert widget.picture.value == ""  # the ship that was chosen is not among them
    press(next(iter(thumbnails(widget).values())))
    click(widget)
    pick(widget.thumbnails.kind, "all classes")
    assert "frog" in widget.picture.value  # still among them, with its answer
    assert "predicted truck" in Page(widget.result.value).text
    assert len(predictor.asked) == 1


def test_the_samples_can_be_drawn_at_random(widget):
    stored = list(thumbnails(widget))
    press(widget.thumbnails.shuffle)
    assert widget.thumbnails.order.value == "random"
    first = list(thumbnails(widget))
    assert first != stored
    press(widget.thumbnails.shuffle)
    assert list(thumbnails(widget)) != first
    pick(widget.thumbnails.order, "as stored")
    assert {text.removeprefix("\u2713 ") for text in thumbnails(widget)} == {
        text.removeprefix("\u2713 ") for text in stored
    }


class Sure:
    """A predictor that takes every picture for a frog, the more confidently the redder it is."""

    source = "frogs"

    def predict(self, images):
        redness = [0.5 + float(image[0].float().mean()) / 600 for image in images]
        return [Prediction("frog", 6, red, {**dict.fromkeys(CLASSES, 0.0), "frog": red}) for red in redness]


def test_the_most_confident_mistakes_come_first(samples):
    widget = PredictionWidget(Sure(), samples)
    pick(widget.thumbnails.order, "most confident mistakes first")
    expected = [answer.probability for answer in Sure().predict(samples.images)]
    expected = sorted((i for i in range(200) if samples.labels[i] != 6), key=lambda i: -expected[i])
    assert [i for _, i in widget.sample.options[1:]] == expected
    assert "taken for frog, " in widget.sample.options[1][0]
    pick(widget.thumbnails.kind, "frog")
    assert thumbnails(widget) == {}
    assert "no mistakes here" in widget.thumbnails.page.value
    pick(widget.thumbnails.kind, "cat")
    assert len(widget.sample.options) == 21


def test_while_mistakes_are_looked_for_nothing_can_be_chosen(widget, predictor):
    thumbs, during = widget.thumbnails, []
    controls = (thumbs.kind, thumbs.order, thumbs.shuffle, *thumbs.buttons)
    predictor.during = lambda: during.extend(control.disabled for control in controls)
    pick(thumbs.order, "most confident mistakes first")
    assert during
    assert all(during)
    assert not any(control.disabled for control in controls)
    pick(thumbs.kind, "truck")  # no mistake among the trucks, as Told says truck to everything
    chosen = widget.state.chosen
    thumbs.buttons[5].click()  # was on its way when the page became shorter
    assert widget.state.chosen is chosen


def test_mistakes_that_cannot_be_found_are_an_alert_and_change_nothing(widget, predictor):
    before = list(thumbnails(widget))
    predictor.error = PredictionError("the model is gone")
    pick(widget.thumbnails.order, "most confident mistakes first")
    assert 'role="alert"' in widget.thumbnails.page.value
    assert "the model is gone" in widget.thumbnails.page.value
    assert widget.thumbnails.order.value == "stored"
    assert list(thumbnails(widget)) == before


def test_a_gallery_pages_to_both_ends_and_no_further(samples):
    gallery = Gallery(samples, lambda: [])
    assert (gallery.has(-1), gallery.has(1)) == (False, True)
    gallery.turn(-3)
    assert gallery.page()[0] == 0
    gallery.turn(100)
    assert gallery.page() == list(range(180, 200))
    assert (gallery.has(-1), gallery.has(1)) == (True, False)
    with pytest.raises(GalleryError, match="choose from stored, random, mistakes"):
        gallery.browse(order="size")


def test_a_whole_test_set_is_browsed_in_part(predictor):
    n = LONGEST + 50
    split = Split(torch.zeros(n, 3, 32, 32, dtype=torch.uint8), torch.arange(n) % 10)
    widget = PredictionWidget(predictor, split)
    assert len(widget.sample.options) == LONGEST + 1
    assert "pictures 1 to 20 of 200, drawn from 250" in widget.thumbnails.page.value
    pick(widget.thumbnails.kind, "cat")
    assert "pictures 1 to 20 of 25<" in widget.thumbnails.page.value


def test_a_split_without_pictures_still_takes_uploads(predictor, samples):
    widget = PredictionWidget(predictor, samples.take(torch.tensor([], dtype=torch.long)))
    assert thumbnails(widget) == {}
    assert widget.result.value == ""
    send_file(widget, "a.png", png())
    click(widget)
    assert "a.png: predicted truck" in Page(widget.result.value).text


def test_every_control_has_a_name(widget):
    def controls(box):
        for child in box.children:
            yield from controls(child) if hasattr(child, "children") else [child]

    kinds = (ipywidgets.Button, ipywidgets.Dropdown, ipywidgets.FileUpload, ipywidgets.Checkbox)
    found = [control for control in controls(widget) if isinstance(control, kinds)]
    assert len(found) == 12 + PAGE
    assert all(control.description.strip() for control in found)


def test_prediction_widget_takes_the_model_given_or_the_newest(predictor, monkeypatch):
    from cifar_ft import widget

    assert prediction_widget(predictor).state.predictor is predictor
    monkeypatch.setattr(predictions.Predictor, "newest_or_shipped", classmethod(lambda cls, **_: Told("frog")))
    widget = prediction_widget()
    click(widget)
    assert "predicted frog" in Page(widget.result.value).text
