"""Promises of the prediction widget: an answer never stands beside another picture, and no error stays unseen.

The messages are those that a browser sends, for ipywidgets 8 and for 7.7.
"""

import ipywidgets
import numpy as np
import pytest
import torch
from widget_messages import (
    SEVEN,
    Page,
    Told,
    click,
    pick,
    pictures,
    png,
    said,
    select,
    send,
    send_file,
    send_files,
    thumbnails,
)

from cifar_ft.predictions import PredictionError, Predictor
from cifar_ft.widget import prediction_widget
from cifar_ft.widget.state import MOST_FILES, MOST_MIB, PAGE
from cifar_ft.widget.texts import LABELS, TEXTS
from cifar_ft.widget.thumbnails import NOTHING
from cifar_ft.widget.widget import uploaded_files


def test_a_sample_is_shown_at_once_and_predicted_on_the_button_only(widget, predictor, samples):
    select(widget, 6)
    expected = samples.images[5].permute(1, 2, 0).numpy()
    assert all(np.array_equal(picture, expected) for picture in pictures(widget.picture.value))
    assert widget.result.value == ""
    assert predictor.asked == []
    click(widget)
    assert torch.equal(predictor.asked[0][0], samples.images[5])
    assert "predicted truck , 91.0 %" in said(widget)


def test_an_upload_is_shown_and_predicted_on_the_button_only(widget, predictor):
    send_file(widget, "mine.png", png("red", (40, 20)))
    assert len(pictures(widget.picture.value)) == 2
    assert predictor.asked == []
    click(widget)
    assert predictor.asked[0][0][:, 0, 0].tolist() == [255, 0, 0]
    assert "mine.png: predicted truck" in said(widget)


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
    assert "a.png: predicted" in said(widget)
    assert len(predictor.asked) == 2


def test_a_broken_file_is_an_alert_in_place_and_is_never_predicted(widget, predictor):
    send_file(widget, "notes.png", b"not a picture")
    for _ in range(2):
        (alert,) = [a for a in Page(widget.result.value).all("div") if a.get("role") == "alert"]
        assert alert["lang"] == "en"
        assert said(widget).startswith("Error: notes.png: not a picture that can be read")
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


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (PredictionError("the model is <gone>"), ": the model is <gone>"),
        (ZeroDivisionError("by zero"), ": unexpected error, ZeroDivisionError: by zero"),
    ],
)
def test_an_error_of_the_model_is_shown_in_place_of_the_answer(widget, predictor, error, words):
    click(widget)
    predictor.error = error
    click(widget)
    assert said(widget).endswith(words)
    assert 'role="alert"' in widget.result.value
    assert "predicted" not in said(widget)
    assert not widget.button.disabled
    predictor.error = None
    click(widget)
    assert "predicted truck" in said(widget)


def test_an_answer_never_stands_beside_another_picture_not_even_for_a_moment(widget):
    click(widget)
    beside = []
    widget.picture.observe(lambda change: beside.append(widget.result.value), "value")
    select(widget, 3)
    assert beside == [""]


def test_a_picture_that_cannot_be_shown_is_an_alert_and_leaves_no_answer(widget, monkeypatch):
    click(widget)
    monkeypatch.setattr("cifar_ft.widget.widget.picture_html", lambda state: 1 / 0)
    select(widget, 3)
    assert widget.picture.value == ""
    assert 'role="alert"' in widget.result.value
    assert "ZeroDivisionError" in widget.result.value


def test_a_file_that_the_browser_cannot_read_is_an_alert(widget):
    click(widget)
    widget.upload.error = "NotReadableError"
    assert 'role="alert"' in widget.result.value
    assert "the browser could not read the file: NotReadableError" in said(widget)
    assert widget.picture.value == ""


def test_the_button_is_disabled_while_the_model_works(widget, predictor):
    states = []
    predictor.during = lambda: states.append(widget.button.disabled)
    click(widget)
    assert states == [True]
    assert not widget.button.disabled


def test_every_control_has_a_whole_name(widget):
    def controls(box):
        for child in box.children:
            yield from controls(child) if hasattr(child, "children") else [child]

    kinds = (ipywidgets.Button, ipywidgets.Dropdown, ipywidgets.FileUpload, ipywidgets.Checkbox)
    found = [control for control in controls(widget) if isinstance(control, kinds)]
    assert len(found) == 12 + PAGE
    assert all(control.description.strip() for control in found)
    assert all(control.layout.width == "auto" for control in found if control not in widget.thumbnails.buttons)
    assert widget.sample.description == "Sample image"
    assert "10 MiB" in widget.upload.description
    assert widget.button.description == "Predict"
    assert widget.upload.icon == widget.button.icon == ""
    assert widget.upload.multiple
    assert len(widget.sample.options) == 201


def bundle_of(widget):
    from IPython.core.formatters import DisplayFormatter
    from IPython.core.interactiveshell import InteractiveShell

    InteractiveShell.clear_instance()
    return DisplayFormatter().format(widget)[0]


def test_a_page_without_a_kernel_shows_a_preview_in_place_of_the_widget(widget, predictor):
    bundle = bundle_of(widget)
    assert bundle["application/vnd.jupyter.widget-view+json"]["model_id"] == widget.model_id
    page = Page(bundle["text/html"])
    assert all(image["alt"] for image in page.all("img"))
    assert len(pictures(bundle["text/html"])) == 2
    assert "predicted truck" in page.text
    assert "Preview" in page.text
    assert len(bundle["text/plain"]) < 110
    assert widget.result.value == ""  # showing the widget has not pressed its button
    assert widget.state.chosen.answers == []
    predictor.error = PredictionError("no model")
    assert "Error: sample 1" in Page(bundle_of(widget)["text/html"]).text
    pick(widget.language, "français")
    assert "Aperçu" in bundle_of(widget)["text/html"]


def test_both_forms_of_an_upload_are_understood():
    content = memoryview(b"abc")
    eight = ({"name": "a.png", "type": "", "size": 3, "content": content, "last_modified": None},) * 2
    seven = {"a.png": {"metadata": {"name": "a.png", "size": 3}, "content": b"abc"}}
    assert uploaded_files(eight) == [("a.png", b"abc")] * 2
    assert uploaded_files(seven) == [("a.png", b"abc")]
    assert uploaded_files(()) == uploaded_files({}) == []


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
    assert said(widget).startswith("a.png: predicted truck")
    summary = said(widget)[said(widget).index("All uploaded pictures") :]
    assert summary.count("truck, 91.0 %") == 2
    assert "notes.txt not a picture that can be read" in summary
    send(widget.file, index=2)
    assert "10 x 30 pixels" in widget.picture.value
    assert f"{files[2][0]}: predicted truck" in said(widget)
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
    assert "Error: a.png: empty" in said(widget)


def test_a_file_above_the_limit_is_refused_in_words(widget):
    send_file(widget, "large.png", png() + bytes(MOST_MIB * 2**20))
    assert "Error: large.png: 10.0 MiB; at most 10 MiB are allowed" in said(widget)
    pick(widget.language, "français")
    assert "Erreur : large.png : 10,0 Mio ; au plus 10 Mio sont permis" in said(widget)


def test_too_many_files_are_refused_and_the_next_choice_works(widget):
    content = png(size=(2, 2))
    send_files(widget, [(f"{i}.png", content) for i in range(MOST_FILES + 1)])
    assert "51 pictures at a time are too many; choose at most 50" in said(widget)
    assert widget.picture.value == ""
    first = widget.upload
    select(widget, 1)
    assert widget.result.value == ""
    assert widget.upload is not first


def test_how_a_picture_becomes_square_can_be_chosen_and_is_shown(widget, predictor):
    send_file(widget, "wide.png", png("red", (40, 20)))
    click(widget)
    pick(widget.fit, "is shown whole, with black borders")
    assert widget.result.value == ""  # it was the answer to another square
    assert "whole with black borders" in widget.picture.value
    click(widget)
    assert predictor.asked[1][0][:, 0, 0].tolist() == [0, 0, 0]
    assert predictor.asked[1][0][:, 16, 0].tolist() == [255, 0, 0]


def test_a_heat_map_comes_with_the_answer_on_demand(widget, monkeypatch):
    asked = []
    monkeypatch.setattr("cifar_ft.widget.state.grad_cam", lambda *_: asked.append(1) or np.eye(32, dtype=np.float32))
    click(widget)
    assert asked == []
    send(widget.heat_map, value=True)
    assert len(pictures(widget.result.value)) == 1
    send(widget.heat_map, value=False)
    assert "<img" not in widget.result.value
    assert "predicted truck" in said(widget)
    send(widget.heat_map, value=True)
    assert len(asked) == 1
    select(widget, 2)
    assert widget.result.value == ""
    click(widget)
    assert len(asked) == 2


def test_a_heat_map_that_fails_is_an_alert_below_the_answer(widget, monkeypatch):
    monkeypatch.setattr("cifar_ft.widget.state.grad_cam", lambda *_: 1 / 0)
    send(widget.heat_map, value=True)
    click(widget)
    assert "predicted truck" in said(widget)
    assert "Error: Heat map: unexpected error, ZeroDivisionError" in said(widget)
    send(widget.heat_map, value=False)
    assert "Error" not in widget.result.value


def test_every_text_is_there_in_french(widget, predictor):
    predictor.unknown = True
    click(widget)
    pick(widget.language, "français")
    texts = Page(widget.picture.value + widget.result.value).text
    assert "prédiction camion , 91,0 %" in texts
    for words in (*LABELS["fr"], "vraie classe", "Ne ressemble à rien de CIFAR-10."):
        assert words in texts
    english = {text for text in TEXTS["en"]["widget"].values() if "{" not in text}
    gallery = widget.thumbnails
    controls = [widget.language, widget.sample, widget.upload, widget.file, widget.fit, widget.heat_map, widget.button]
    controls += [gallery.kind, gallery.order, gallery.shuffle, gallery.earlier, gallery.later]
    assert not english & {control.description for control in controls}
    lists = [widget.sample, widget.fit, gallery.kind, gallery.order]
    assert not english & {text for control in lists for text, _ in control.options}
    assert "Choisir une image" in widget.choosing.value
    assert "images 1 à 20 sur 200" in gallery.page.value
    assert "\u2713 1 bateau" in thumbnails(widget)
    assert "sample" not in texts
    assert len(predictor.asked) == 1  # the answer stayed
    pick(widget.language, "English")
    assert "predicted truck" in said(widget)
    assert widget.button.description == "Predict"


def test_a_change_of_language_keeps_what_was_chosen_and_answered(widget, predictor):
    send_file(widget, "mine.png", png())
    click(widget)
    pick(widget.language, "français")
    assert "mine.png\xa0: prédiction" in widget.result.value
    assert len(predictor.asked) == 1
    assert widget.sample.value == NOTHING


def test_prediction_widget_takes_the_model_given_or_the_shipped_one(predictor, monkeypatch):
    assert prediction_widget(predictor).state.models == [predictor]
    monkeypatch.setattr(Predictor, "shipped", classmethod(lambda cls, *_: Told("frog")))
    widget = prediction_widget()
    click(widget)
    assert "predicted frog" in said(widget)
