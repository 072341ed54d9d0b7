"""Promises of `widget.texts`: whatever is said is there in both languages, with the same values as each writes them."""

from string import Formatter

import pytest
from widget_messages import Told

from cifar_ft.data import CLASSES
from cifar_ft.predictions import MESSAGES, ImageError, Note, PredictionError
from cifar_ft.widget import prediction_widget
from cifar_ft.widget.texts import LABELS, TEXTS, LanguageError, WidgetError, explained, percent, text


def gaps(sentence):
    """The gaps of a sentence, with how their values are written."""
    return {(name, spec) for _, name, spec, _ in Formatter().parse(sentence) if name}


def test_the_languages_have_the_same_texts_and_gaps():
    english, french = TEXTS["en"], TEXTS["fr"]
    assert english["pictures"] == MESSAGES
    assert LABELS["en"] == CLASSES
    for part in ("pictures", "widget"):
        assert english[part].keys() == french[part].keys()
        pairs = [(english[part][key], french[part][key]) for key in english[part]]
        assert [pair for pair in pairs if gaps(pair[0]) != gaps(pair[1]) or pair[0] == pair[1]] == []
    assert [len(set(labels)) for labels in LABELS.values()] == [10, 10]


@pytest.mark.parametrize(
    ("problem", "english", "french"),
    [
        (
            ImageError("too_large", width=8000, height=9000, allowed=50_000_000),
            "too large: 8,000 x 9,000 pixels; at most 50,000,000 are allowed",
            "trop grande\xa0: 8\u202f000 x 9\u202f000 pixels\xa0; au plus 50\u202f000\u202f000 sont permis",
        ),
        (
            WidgetError("file_too_large", mib=12.5, allowed=10),
            "12.5 MiB; at most 10 MiB are allowed, make it smaller",
            "12,5\xa0Mio\xa0; au plus 10\xa0Mio sont permis, réduisez-la",
        ),
        (
            WidgetError("unexpected", reason="X: 1,000.5"),
            "unexpected error, X: 1,000.5",
            "erreur inattendue, X: 1,000.5",
        ),
        (Note("one_frame", frame=3), "frame 3 of several", "la vue 3 de plusieurs"),
    ],
)
def test_errors_and_notes_are_said_in_each_language_with_its_numbers(problem, english, french):
    assert explained("en", problem) == (english, "en")
    assert explained("fr", problem) == (french, "fr")
    assert str(problem) == english


def test_an_error_without_a_code_is_said_in_english_and_the_name_of_a_picture_is_left_out():
    assert explained("fr", PredictionError("something new")) == ("something new", "en")
    assert explained("en", ImageError("empty", "the picture"))[0].startswith("empty, 0 bytes")


def test_percentages_and_large_numbers_are_written_as_each_language_does():
    assert (percent("en", 0.912), percent("fr", 0.912)) == ("91.2 %", "91,2\xa0%")
    assert text("en", "searching", total=10_000).startswith("asking the model about 10,000")
    assert "10\u202f000 images" in text("fr", "searching", total=10_000)


def test_another_language_is_refused_with_those_that_there_are():
    with pytest.raises(LanguageError, match="'de'; choose from en, fr"):
        prediction_widget(Told(), lang="de")
