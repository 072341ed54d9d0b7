"""Promises of `widget.thumbnails`: pictures are browsed and chosen by a click, and no click hits another picture."""

import re

import numpy as np
import torch
from widget_messages import Page, click, pick, pixels, png, press, said, select, send_file, thumbnails

from cifar_ft.data import CLASSES
from cifar_ft.predictions import PredictionError
from cifar_ft.widget import PredictionWidget
from cifar_ft.widget.state import PAGE


def names(widget):
    return [text.removeprefix("\u2713 ") for text in thumbnails(widget)]


def test_a_picture_is_chosen_by_a_click(widget, samples):
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
        assert np.array_equal(pixels(uri), samples.images[int(k)].permute(1, 2, 0).numpy())
    press(widget.thumbnails.later)
    assert widget.thumbnails.pictures.value != style
    assert "pictures 21 to 40 of 200" in widget.thumbnails.page.value
    press(widget.thumbnails.earlier)
    assert widget.thumbnails.pictures.value == style
    assert (widget.thumbnails.earlier.disabled, widget.thumbnails.later.disabled) == (True, False)


def test_two_widgets_on_one_page_do_not_share_thumbnails(widget, predictor, samples):
    first, second = widget.thumbnails, PredictionWidget(predictor, samples).thumbnails
    assert first.unique != second.unique
    assert second.unique not in first.pictures.value


def test_the_samples_can_be_browsed_by_class(widget, predictor):
    pick(widget.thumbnails.kind, "frog")
    assert len(names(widget)) == 20
    assert all(text.endswith(" frog") for text in names(widget))
    assert len(widget.sample.options) == 21
    assert widget.picture.value == ""  # the ship that was chosen is not among them
    press(next(iter(thumbnails(widget).values())))
    click(widget)
    pick(widget.thumbnails.kind, "all classes")
    assert "frog" in widget.picture.value  # still among them, with its answer
    assert "predicted truck" in said(widget)
    assert len(predictor.asked) == 1


def test_the_samples_can_be_drawn_at_random(widget):
    stored = names(widget)
    press(widget.thumbnails.shuffle)
    assert widget.thumbnails.order.value == "random"
    first = names(widget)
    assert first != stored
    press(widget.thumbnails.shuffle)
    assert names(widget) != first
    pick(widget.thumbnails.order, "as stored")
    assert names(widget) == stored


def test_mistakes_are_browsed_and_nothing_can_be_chosen_while_they_are_looked_for(widget, predictor):
    thumbs, during, told = widget.thumbnails, [], []
    controls = (thumbs.kind, thumbs.order, thumbs.shuffle, *thumbs.buttons)
    predictor.during = lambda: (during.extend(control.disabled for control in controls), told.append(thumbs.page.value))
    pick(thumbs.order, "most confident mistakes first")
    assert during
    assert all(during)
    assert Page(told[0]).text == "asking the model about 200 pictures..."
    assert not any(control.disabled for control in controls)
    assert "taken for truck, 91.0 %" in widget.sample.options[1][0]
    pick(thumbs.kind, "truck")  # no mistake among the trucks, as Told says truck to everything
    assert thumbnails(widget) == {}
    assert "no mistakes here" in thumbs.page.value
    assert len(predictor.asked) == 1
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
    assert not any(button.disabled for button in widget.thumbnails.buttons)


def test_a_split_that_is_too_long_or_empty_is_said_to_be(predictor, samples):
    many = samples.take(torch.arange(250) % 200)
    widget = PredictionWidget(predictor, many)
    assert len(widget.sample.options) == 201
    assert "pictures 1 to 20 of 200, drawn from 250" in widget.thumbnails.page.value
    pick(widget.language, "français")
    assert "images 1 à 20 sur 200, tirées de 250" in widget.thumbnails.page.value
    widget = PredictionWidget(predictor, samples.take(torch.tensor([], dtype=torch.long)))
    assert thumbnails(widget) == {}
    assert "no such picture" in widget.thumbnails.page.value
    assert said(widget) == ""
    send_file(widget, "a.png", png())
    click(widget)
    assert "a.png: predicted truck" in said(widget)
