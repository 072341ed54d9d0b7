"""The prediction widget's HTML: pictures, answers and errors, in the language chosen.

Every function reads a `WidgetState` and changes nothing.
"""

from __future__ import annotations

import base64
import io
from html import escape

import numpy as np
from PIL import Image

from cifar_ft.data import CLASSES
from cifar_ft.predictions import Prediction
from cifar_ft.widget.state import WIDTH, WidgetState, reduced
from cifar_ft.widget.texts import LABELS, explained, percent, text

BAR = "display:inline-block;height:0.8em;vertical-align:middle;margin-left:8px;background:#0173b2"
TIGHT = "line-height:1.5"  # notebooks space the lines of widgets for controls, not for text
WIDE = f'style="text-align:left;min-width:{WIDTH + 12}px"'
LEFT, RIGHT = 'style="text-align:left"', 'style="text-align:right"'


def picture_html(state: WidgetState) -> str:
    """The picture as given and as the network sees it; empty without one."""
    chosen = state.chosen
    if chosen is None or chosen.problem:
        return ""
    (width, height), seen = chosen.size, state.say("as_seen")
    given = state.say("given_size", width=width, height=height)
    squared = seen if width == height else state.say(f"seen_{state.fit}", seen=seen)
    parts = f"<div>{escape(state.name)}</div>"
    parts += _figure(chosen.shown, f"{state.name}, {state.say('as_given')}", given)
    parts += _figure(reduced(chosen.squares[state.fit]), f"{state.name}, {seen}", squared)
    if chosen.notes:
        notes = "; ".join(_explained_html(state.lang, note) for note in chosen.notes)
        parts += f"<p>{state.say('notes', notes=notes)}</p>"
    return f'<div lang="{state.lang}" style="{TIGHT}">{parts}</div>'


def result_html(state: WidgetState) -> str:
    """The answer, or what went wrong, or nothing yet."""
    parts, chosen = "", state.chosen
    if problem := state.error or (chosen and chosen.problem):
        parts = alert_html(state.lang, problem, f"{state.name}{state.say('colon')}" if state.name else "")
    elif chosen and chosen.answers:
        parts = _answer_html(state) + _heat_html(state)
    if len(state.choices) > 1 and any(choice.answers for choice in state.choices):
        parts += _summary_html(state)
    return f'<div lang="{state.lang}" style="{TIGHT}">{parts}</div>' if parts else ""


def alert_html(lang: str, problem: object, about: str = "") -> str:
    """An error, as screen readers announce it at once."""
    message = escape(about) + _explained_html(lang, problem)
    return f'<div lang="{lang}" role="alert"><strong>{text(lang, "error")}</strong> {message}</div>'


def _explained_html(lang: str, problem: object) -> str:
    """An error or a note in `lang`, or marked as English."""
    said, spoken = explained(lang, problem)
    return escape(said) if spoken == lang else f'<span lang="{spoken}">{escape(said)}</span>'


def data_uri(picture: Image.Image) -> str:
    """A picture inside a page."""
    file = io.BytesIO()
    picture.save(file, "PNG")
    return f"data:image/png;base64,{base64.b64encode(file.getvalue()).decode()}"


def _figure(picture: Image.Image, alt: str, caption: str) -> str:
    """A picture with its caption, `WIDTH` CSS pixels at its longer side; small ones show their pixels."""
    width, height = (max(1, round(WIDTH * length / max(picture.size))) for length in picture.size)
    style = f"width:{width}px;height:{height}px;max-width:none;margin:0;image-rendering:pixelated"
    image = f'<img alt="{escape(alt)}" src="{data_uri(picture)}" style="{style}">'
    # As wide as the picture, so that a long caption wraps below it.
    style = f"display:inline-block;vertical-align:top;width:{WIDTH}px;margin:4px 16px 4px 0;line-height:1.3"
    return f'<figure style="{style}">{image}<figcaption>{escape(caption)}</figcaption></figure>'


def _answer_html(state: WidgetState) -> str:
    """A sentence and a table of all classes for each model."""
    said = "".join(f"<p>{_sentence(state, i)}</p>" for i in range(len(state.models)))
    if len(state.models) > 1:
        labels = {answer.index for answer in state.chosen.answers}
        said += f"<p>{state.say('agree' if len(labels) == 1 else 'disagree')}</p>"
    tables = "".join(_table(state, i) for i in range(len(state.models)))
    return f'<div role="status">{said}</div><div style="display:flex;flex-wrap:wrap;gap:8px 32px">{tables}</div>'


def _sentence(state: WidgetState, i: int) -> str:
    """What a model said about the picture shown, and whether that is right."""
    answer = state.chosen.answers[i]
    label, sure = f"<strong>{_label(state, answer)}</strong>", percent(state.lang, answer.probability)
    said = state.say("predicted", name=escape(state.name), label=label, percent=sure)
    if len(state.models) > 1:
        said = f"{state.say('model_number', number=i + 1)}, {said}"
    if state.true_index is not None:
        verdict = state.say("correct" if answer.index == state.true_index else "wrong")
        said += state.say("true_label", label=LABELS[state.lang][state.true_index], verdict=verdict)
    if answer.unknown:
        said += f".<br><strong>{state.say('unknown')}</strong> {state.say('unknown_why')}"
        if calibration := getattr(state.models[i], "calibration", None):
            said += " " + state.say("false_alarms", percent=100 * calibration["false_alarms"])
    elif known := state.models[i].how_often_right(answer.probability):
        low, high, images, right = known
        bounds = {"low": 100 * low, "high": 100 * high, "images": images}
        said += f".<br>{state.say('how_often', **bounds, percent=percent(state.lang, right / images))}"
    return said


def _table(state: WidgetState, i: int) -> str:
    """All classes, best first; bars only repeat the numbers, so screen readers skip them."""
    rows = ""
    for label, probability in state.chosen.answers[i].top(len(CLASSES)):
        index = CLASSES.index(label)
        name = LABELS[state.lang][index]
        name = state.say("is_true", label=name) if index == state.true_index else name
        bar = f'<span aria-hidden="true" style="{BAR};width:{WIDTH * probability:.0f}px"></span>'
        cells = f"<td {RIGHT}>{percent(state.lang, probability)}</td><td {WIDE}>{bar}</td>"
        rows += f'<tr><th scope="row" {LEFT}>{name}</th>{cells}</tr>'
    source = _explained_html(state.lang, state.models[i].source)
    caption = f"<caption {LEFT}>{state.say('model', source=source)}</caption>"
    columns = f'<th scope="col" {LEFT}>{state.say("class")}</th><th scope="col">{state.say("probability")}</th>'
    return f"<table>{caption}<thead><tr>{columns}<td></td></tr></thead><tbody>{rows}</tbody></table>"


def _heat_html(state: WidgetState) -> str:
    """The heat map of each model, or why there is none."""
    if not state.heat_map:
        return ""
    if state.heat_error:
        return alert_html(state.lang, state.heat_error, state.say("heat_map") + state.say("colon"))
    parts = ""
    for answer, (heat, picture) in zip(state.chosen.answers, state.chosen.heats, strict=True):
        row, column = (3 * i // n for i, n in zip(np.unravel_index(heat.argmax(), heat.shape), heat.shape, strict=True))
        where = state.say(
            f"place_{row}{column}" if heat.max() > 1.00001 * heat.min() else "place_none"
        )  # not all alike
        alt = state.say("heat_alt", name=state.name, label=_label(state, answer), where=where)
        parts += _figure(picture, alt, state.say("heat_caption", label=_label(state, answer)))
    return f"<div>{parts}</div>"


def _summary_html(state: WidgetState) -> str:
    """A row for each file of an upload."""
    columns = [state.say("picture"), state.say("answer")]
    if len(state.models) > 1:
        columns[1:] = [state.say("model_number", number=i + 1) for i in range(len(state.models))]
    head = "".join(f'<th scope="col" {LEFT}>{column}</th>' for column in columns)
    rows = ""
    for choice in state.choices:
        cells = "".join(f"<td {LEFT}>{_short(state, answer)}</td>" for answer in choice.answers)
        if choice.problem:
            cells = f'<td colspan="{len(state.models)}" {LEFT}>{_explained_html(state.lang, choice.problem)}</td>'
        rows += f'<tr><th scope="row" {LEFT}>{escape(choice.name)}</th>{cells}</tr>'
    caption = f"<caption {LEFT}>{state.say('summary')}</caption>"
    return f"<table style='margin-top:16px'>{caption}<thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table>"


def _short(state: WidgetState, answer: Prediction) -> str:
    unknown = f" ({state.say('unknown').rstrip('.')})" if answer.unknown else ""
    return f"{_label(state, answer)}, {percent(state.lang, answer.probability)}{unknown}"


def _label(state: WidgetState, answer: Prediction) -> str:
    return LABELS[state.lang][answer.index]
