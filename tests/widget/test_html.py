"""Promises of `widget.html`: complete for those who see and those who listen, and safe whatever a file is called."""

import re

import numpy as np
import pytest
import torch
from widget_messages import Page, Told, pictures, png

from cifar_ft.data import CLASSES
from cifar_ft.predictions import PredictionError
from cifar_ft.widget.html import alert_html, picture_html, result_html
from cifar_ft.widget.state import WidgetState


@pytest.fixture
def state(predictor, samples):
    state = WidgetState(predictor, samples)
    state.choose_sample(0)
    return state


@pytest.fixture
def heat(monkeypatch):
    """A heat map that is brightest in the upper right, in place of the real one; what it was asked."""
    asked = []

    def told(predictor, image):
        asked.append(image)
        values = np.zeros((32, 32), np.float32)
        values[2, 29] = 1
        return values

    monkeypatch.setattr("cifar_ft.widget.state.grad_cam", told)
    return asked


def answer(state):
    state.predict()
    return Page(result_html(state))


def test_nothing_chosen_is_nothing_shown(predictor, samples):
    state = WidgetState(predictor, samples)
    assert picture_html(state) == result_html(state) == ""


def test_a_picture_is_shown_as_given_and_as_the_network_sees_it(state, samples):
    given, seen = pictures(picture_html(state))
    expected = samples.images[0].permute(1, 2, 0).numpy()
    assert np.array_equal(given, expected)
    assert np.array_equal(seen, expected)
    assert "pixelated" in picture_html(state)
    state.choose_uploads([("mine.png", png("red", (40, 20)))])
    as_given, as_seen = Page(picture_html(state)).all("img")
    assert [image.shape for image in pictures(picture_html(state))] == [(20, 40, 3), (32, 32, 3)]
    assert as_given["alt"] == "mine.png, as given"
    assert as_seen["alt"] == "mine.png, as the network sees it"


def test_how_a_picture_became_square_is_said(state):
    state.choose_uploads([("wide.png", png("red", (40, 20)))])
    assert "as the network sees it, cut to its middle" in picture_html(state)
    state.set_fit("pad")
    assert "as the network sees it, whole with black borders" in picture_html(state)
    assert pictures(picture_html(state))[1][0].max() == 0
    state.choose_uploads([("square.png", png("red", (40, 40)))])
    assert "whole" not in picture_html(state)


def test_a_large_picture_is_shown_small_with_its_size_as_given(state):
    state.choose_uploads([("large.png", png(size=(3000, 1000)))])
    assert pictures(picture_html(state))[0].shape == (64, 192, 3)
    assert "as given, 3000 x 1000 pixels" in picture_html(state)
    assert len(picture_html(state)) < 20_000
    state.choose_uploads([("photo.png", png(size=(4032, 3024)))])  # which is halved in reading it
    assert "as given, 4032 x 3024 pixels" in picture_html(state)


def test_notes_about_a_picture_are_shown_in_words(state):
    state.choose_uploads([("glass.png", png((255, 0, 0, 100), (8, 8), "RGBA"))])
    assert "This picture: transparent parts shown on white." in picture_html(state)
    state.set_language("fr")
    assert "Cette image\xa0: parties transparentes sur fond blanc." in picture_html(state)


def test_a_file_name_is_text_and_never_markup(state):
    name = '"><script>alert(1)</script>.png'
    state.choose_uploads([(name, png()), (name, b"")])
    html = picture_html(state) + result_html(state)
    state.predict()
    html += result_html(state)
    state.show(1)
    html += result_html(state)
    assert "<script" not in html
    assert f"{name}, as given" in [image["alt"] for image in Page(html).all("img")]
    assert "&lt;told&gt;" in html


def test_the_table_says_every_class_in_text_best_first(state):
    page = answer(state)
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
    assert [attributes["role"] for _, attributes in page.tags if "role" in attributes] == ["status"]
    assert len([head for head in page.all("th") if head["scope"] == "row"]) == 10


def test_the_true_label_is_said_for_samples_and_not_for_uploads(state, predictor):
    truth = predictor.label = CLASSES[state.true_index]
    assert f"true label {truth}, correct" in answer(state).text
    predictor.label = next(name for name in CLASSES if name != truth)
    assert f"true label {truth}, wrong" in answer(state).text
    assert f"{truth} (true label)" in answer(state).text
    state.choose_uploads([("mine.png", png())])
    assert "true label" not in answer(state).text


@pytest.mark.parametrize(("unknown", "warned"), [(True, True), (False, False), (None, False)])
def test_a_picture_unlike_cifar10_is_said_to_be(state, predictor, unknown, warned):
    predictor.unknown = unknown
    text = answer(state).text
    assert ("Unlike anything in CIFAR-10." in text) is warned
    assert ("do not trust" in text) is warned
    assert "predicted truck" in text


def test_the_warning_says_how_often_it_is_false(state, predictor):
    predictor.unknown, predictor.calibration = True, {"temperature": 1.0, "highest_energy": 0.0, "false_alarms": 0.02}
    assert "About 2 % of CIFAR-10's own pictures get this warning too." in answer(state).text
    state.set_language("fr")
    assert "Environ 2\xa0% des images" in result_html(state)


def test_the_answer_says_what_its_percentage_has_meant_unless_the_picture_is_unlike_all(state, predictor):
    assert "test images to which" not in answer(state).text
    predictor.known = (0.9, 0.99, 1688, 1623)
    said = "Of the 1,688 CIFAR-10 test images to which it gave 90 to 99 %, it was right on 96.1 %."
    assert said in answer(state).text
    state.set_language("fr")
    assert "Sur les 1\u202f688 images de test" in result_html(state)
    state.set_language("en")
    predictor.unknown = True
    assert said not in answer(state).text


def test_two_models_are_compared(samples):
    first, second = Told("truck"), Told("cat", unknown=True)
    second.source = "the second"
    state = WidgetState(first, samples, second)
    state.choose_sample(0)
    page = answer(state)
    assert re.search("model 1, sample 1.* predicted truck .*model 2, sample 1.* predicted cat", page.text)
    assert "The two models disagree." in page.text
    assert len(page.all("table")) == 2
    assert "Model: the second" in page.text
    assert torch.equal(first.asked[0][0], second.asked[0][0])
    second.label = "truck"
    assert "The two models agree." in answer(state).text
    state.choose_uploads([("a.png", png()), ("b.png", png("blue"))])
    assert (
        "picture model 1 model 2 a.png truck, 91.0 % truck, 91.0 % (Unlike anything in CIFAR-10)" in answer(state).text
    )


def test_a_heat_map_says_where_it_is_brightest(state, heat, samples):
    state.set_heat_map(True)
    page = answer(state)
    (image,) = page.all("img")
    assert image["alt"].startswith("Heat map of sample 1")
    assert image["alt"].endswith("for truck, brightest in the upper right")
    assert pictures(result_html(state))[0].shape == (32, 32, 3)
    assert torch.equal(heat[0], samples.images[0])
    state.set_language("fr")
    assert "la plus claire en haut à droite" in result_html(state)


@pytest.mark.parametrize(
    ("at", "where"),
    [((0, 0), "in the upper left"), ((16, 16), "in the middle"), ((31, 12), "at the bottom"), (None, "nowhere")],
)
def test_every_place_of_a_heat_map_has_a_name(state, monkeypatch, at, where):
    values = np.zeros((32, 32), np.float32)
    values[at or 0] = 1 if at else 0
    monkeypatch.setattr("cifar_ft.widget.state.grad_cam", lambda *_: values)
    state.set_heat_map(True)
    assert answer(state).all("img")[0]["alt"].endswith(f"brightest {where}")


def test_an_error_is_an_alert_in_its_own_language(state):
    html = alert_html("fr", PredictionError("the model is <gone>"))
    assert 'lang="fr" role="alert"' in html
    assert '<span lang="en">the model is &lt;gone&gt;</span>' in html
    state.choose_uploads([("notes.png", b"no picture")])
    assert Page(result_html(state)).text.startswith("Error: notes.png: not a picture that can be read here; use")
    state.set_language("fr")
    said = Page(result_html(state)).text
    assert "Erreur : notes.png : ce n'est pas une image lisible ici ; utilisez" in said
    assert 'lang="en"' not in result_html(state)
