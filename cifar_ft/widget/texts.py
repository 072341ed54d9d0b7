"""What the prediction widget says, in each language that has a file assets/texts_*.json.

A file holds the language's name, the names of the ten classes, the widget's own texts and the sentences about pictures:
errors and notes carry a code and values, and the English sentence of each code is `predictions.MESSAGES`.
"""

from __future__ import annotations

import json
from numbers import Real
from string import Formatter

from cifar_ft import CifarFtError
from cifar_ft.files import ASSETS
from cifar_ft.predictions import ImageError, Note

FILES = sorted(ASSETS.glob("texts_*.json"))
TEXTS = {file.stem[6:]: json.loads(file.read_text(encoding="utf-8")) for file in FILES}
LANGUAGES = {lang: texts["name"] for lang, texts in TEXTS.items()}
LABELS = {lang: tuple(texts["labels"]) for lang, texts in TEXTS.items()}


class LanguageError(CifarFtError, ValueError):
    """A language that the widget does not speak."""


class WidgetError(CifarFtError, ValueError):
    """Something that the widget cannot do; `code` and `values` say it in either language."""

    def __init__(self, code: str, /, **values):
        super().__init__(text("en", code, **values))
        self.code, self.values = code, values


class _French(Formatter):
    """Fills gaps with 1,234.5 as French writes it, with a narrow space and a comma."""

    def format_field(self, value, spec):
        said = super().format_field(value, spec)
        return said.translate({ord(","): "\u202f", ord("."): ","}) if isinstance(value, Real) else said


def text(lang: str, key: str, **values) -> str:
    """One of the widget's texts, with its gaps filled."""
    return _filled(lang, TEXTS[lang]["widget"][key], values)


def _filled(lang: str, sentence: str, values: dict) -> str:
    formatter = _French() if lang == "fr" else Formatter()
    return formatter.vformat(sentence, (), values)


def percent(lang: str, probability: float) -> str:
    """0.912 as "91.2 %", in French "91,2 %" with a space that does not break."""
    return text(lang, "percent", number=100 * probability)


def explained(lang: str, problem: object) -> tuple[str, str]:
    """An error or a note in `lang`, or in English where it has no code; and the language that it is in."""
    if isinstance(problem, WidgetError):
        return text(lang, problem.code, **problem.values), lang
    if isinstance(problem, (ImageError, Note)):
        return _filled(lang, TEXTS[lang]["pictures"][problem.code], problem.values), lang
    return str(problem), "en"
