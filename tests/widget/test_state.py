"""Promises of `widget.state`, without any widget: what is chosen, what was said about it, what can be browsed."""

import pytest
import torch
from widget_messages import Told, png

from cifar_ft.data import CLASSES, Split
from cifar_ft.predictions import ImageError, Prediction, PredictionError
from cifar_ft.widget.state import LONGEST, MOST_FILES, MOST_MIB, PAGE, Gallery, WidgetState
from cifar_ft.widget.texts import TEXTS, WidgetError


@pytest.fixture
def state(predictor, samples):
    return WidgetState(predictor, samples)


def test_whatever_is_chosen_the_earlier_answer_is_gone(state):
    choices = (
        lambda: state.choose_sample(199),
        lambda: state.choose_uploads([("a.png", png())]),
        lambda: state.choose_uploads([("b.png", png()), ("c.png", png())]),
        lambda: state.set_fit("pad"),
        lambda: state.choose_sample(3),
    )
    for choose in choices:
        choose()
        assert state.chosen.answers == []
        state.predict()
        assert state.chosen.answers[0].label == "truck"
    state.choose_sample(None)
    assert state.chosen is None


def test_the_true_class_is_known_for_samples_only(state, samples):
    state.choose_sample(5)
    assert state.true_index == samples.labels[5]
    state.choose_uploads([("a.png", png())])
    assert state.true_index is None


@pytest.mark.parametrize(
    ("content", "code"),
    [
        (b"", "empty"),
        (b"text", "not_a_picture"),
        (png()[:60], "damaged"),
        (b"\x89PNG\r\n\x1a\n" + bytes(40), "not_a_picture"),
        (png() + bytes(MOST_MIB * 2**20), "file_too_large"),
    ],
    ids=["empty", "text", "cut off", "damaged", "large"],
)
def test_an_upload_that_is_no_picture_keeps_its_problem(state, predictor, content, code):
    state.choose_uploads([("a.png", content)])
    assert state.chosen.problem.code == code
    with pytest.raises((ImageError, WidgetError)):
        state.predict()
    assert predictor.asked == []


def test_what_cannot_be_asked_is_an_error(state):
    with pytest.raises(WidgetError, match="choose a sample image or upload"):
        state.predict()
    with pytest.raises(WidgetError, match=f"51 pictures at a time are too many; choose at most {MOST_FILES}"):
        state.choose_uploads([("a.png", b"")] * (MOST_FILES + 1))
    assert state.chosen is None
    with pytest.raises(ImageError, match="choose crop or pad"):
        state.set_fit("stretch")


def test_the_label_of_the_upload_names_the_limit():
    assert all(f"{MOST_MIB}" in texts["widget"]["upload"] for texts in TEXTS.values())


def test_large_uploads_are_not_kept(state):
    state.choose_uploads([("large.png", png(size=(3000, 1000)))])
    assert state.chosen.shown.size == (192, 64)
    assert state.chosen.size == (3000, 1000)
    assert [tuple(square.shape) for square in state.chosen.squares.values()] == [(3, 32, 32)] * 2


def test_a_preview_is_answered_without_a_trace_in_the_state(state, predictor):
    state.choose_sample(0)
    assert state.preview().chosen.answers
    assert state.chosen.answers == []
    predictor.error = PredictionError("no model")
    assert str(state.preview().error) == "no model"
    assert state.error is None


def test_a_gallery_pages_to_both_ends_and_no_further(samples):
    gallery = Gallery(samples, lambda: [])
    assert (gallery.has(-1), gallery.has(1)) == (False, True)
    gallery.turn(-1)
    assert gallery.page()[0] == 0
    for _ in range(100):
        gallery.turn(1)
    assert gallery.page() == list(range(180, 200))
    assert (gallery.has(-1), gallery.has(1)) == (True, False)
    with pytest.raises(ValueError, match="choose from stored, random, mistakes"):
        gallery.browse(order="size")
    assert gallery.page() == list(range(180, 200))


def test_a_gallery_draws_at_random_the_same_for_a_seed(samples):
    gallery = Gallery(samples, lambda: [])
    stored = gallery.positions
    gallery.browse(order="random", seed=1)
    first = gallery.positions
    assert first != stored
    assert sorted(first) == stored
    gallery.browse(order="random", seed=2)
    assert gallery.positions != first
    gallery.browse(order="random", seed=1)
    assert gallery.positions == first


class Sure:
    """A predictor that takes every picture for a frog, the more confidently the redder it is."""

    source = "frogs"

    def predict(self, images):
        redness = [0.5 + float(image[0].float().mean()) / 600 for image in images]
        return [Prediction("frog", 6, red, {**dict.fromkeys(CLASSES, 0.0), "frog": red}) for red in redness]


def test_the_most_confident_mistakes_come_first_with_what_was_said(samples):
    state = WidgetState(Sure(), samples)
    state.gallery.browse(order="mistakes")
    sure = [answer.probability for answer in Sure().predict(samples.images)]
    assert state.gallery.positions == sorted((i for i in range(200) if samples.labels[i] != 6), key=lambda i: -sure[i])
    assert all("taken for frog, " in line for line in state.sample_lines())
    state.gallery.browse(label=CLASSES.index("frog"), order="mistakes")
    assert state.sample_lines() == []
    state.gallery.browse(label=CLASSES.index("cat"), order="mistakes")
    assert len(state.sample_lines()) == 20


def test_every_sample_has_a_line_of_its_own_that_names_it(state, samples):
    lines = state.sample_lines()
    assert len(set(lines)) == 200
    for i, line in enumerate(lines):
        assert line == f"{i + 1}: {CLASSES[samples.labels[i]]} (test image {samples.indices[i]})"


def test_a_whole_test_set_is_browsed_in_part():
    n = LONGEST + 50
    split = Split(torch.zeros(n, 3, 32, 32, dtype=torch.uint8), torch.arange(n) % 10)
    gallery = WidgetState(Told(), split).gallery
    assert (len(gallery.positions), gallery.total) == (LONGEST, n)
    gallery.browse(label=3)
    assert (len(gallery.positions), gallery.total) == (25, 25)
    assert len(gallery.page()) == PAGE
