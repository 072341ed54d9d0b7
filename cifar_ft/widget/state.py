"""What the prediction widget knows: pictures to browse, those chosen, what the models said, what went wrong.

There is no widget here: `html` shows a state, `widget` is a thin skin over both.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass, field, replace

import numpy as np
from PIL import Image
from torch import Tensor

from cifar_ft import CifarFtError
from cifar_ft.data import Split, load_samples
from cifar_ft.files import unknown
from cifar_ft.predictions import (
    ImageError,
    Note,
    Prediction,
    Predictor,
    checked_fit,
    grad_cam,
    overlay,
    read_picture,
    square,
)
from cifar_ft.widget.texts import LABELS, LANGUAGES, LanguageError, WidgetError, percent, text

FITS = ("crop", "pad")
ORDERS = ("stored", "random", "mistakes")
PAGE = 20  # pictures that the gallery shows at once
LONGEST = 200  # pictures that can be browsed at once: a list of 10,000 lines helps nobody
WIDTH = 192  # pixels, of a picture as it is shown
MOST_MIB = 10  # for each upload; the server of a notebook drops larger messages without a word
MOST_FILES = 50  # in one upload


class Gallery:
    """Some pictures of a split, in some order, a page at a time.

    `ask` gives the answers for the whole split, one `Prediction` each; it is called once, for the mistakes.
    """

    def __init__(self, split: Split, ask: Callable[[], list[Prediction]]):
        self.split, self.ask = split, ask
        self.answers: list[Prediction] | None = None
        self.browse()

    def browse(self, label: int | None = None, order: str = "stored", seed: int = 0) -> None:
        """Choose what to browse: a class or all of them (`None`), and in which of `ORDERS`.

        Nothing changes if it fails, as it does when `ask` fails.
        """
        if order not in ORDERS:
            raise ValueError(unknown("order", order, ORDERS))
        labels = self.split.labels.cpu().numpy()
        found = np.arange(len(labels)) if label is None else np.flatnonzero(labels == label)
        if order == "random":
            found = np.random.default_rng(seed).permutation(found)
        if order == "mistakes":
            self.answers = self.answers or self.ask()
            wrong = [position for position in found if self.answers[position].index != labels[position]]
            found = sorted(wrong, key=lambda position: -self.answers[position].probability)
        self.label, self.order, self.start = label, order, 0
        self.total = len(found)  # shown or not
        self.positions = [int(position) for position in found[:LONGEST]]

    def page(self) -> list[int]:
        """The positions shown now, at most `PAGE`."""
        return self.positions[self.start : self.start + PAGE]

    def has(self, pages: int) -> bool:
        """Whether there is a page so many pages on, or back if negative."""
        return 0 <= self.start + pages * PAGE < len(self.positions)

    def turn(self, pages: int) -> None:
        """Go on by so many pages, or back if negative, unless there are none there."""
        if self.has(pages):
            self.start += pages * PAGE


def reduced(image: Tensor) -> Image.Image:
    """A picture [3, H, W] as it is shown: at most `WIDTH` pixels at its longer side."""
    picture = Image.fromarray(image.permute(1, 2, 0).contiguous().numpy())
    picture.thumbnail((WIDTH, WIDTH), Image.Resampling.BOX)
    return picture


@dataclass
class Choice:
    """One picture that the models can be asked about, and what they said.

    A large upload is not kept: only a small picture to show and the two squares that a network may see.
    """

    name: str = ""  # of an uploaded file
    sample: int | None = None  # position of a sample image
    problem: CifarFtError | None = None  # why it cannot be read, if so; then nothing below is known
    shown: Image.Image | None = None  # at most `WIDTH` pixels wide and high
    size: tuple[int, int] = (0, 0)  # width and height as given
    squares: dict[str, Tensor] = field(default_factory=dict)  # for each of `FITS`, uint8 [3, 32, 32]
    notes: tuple[Note, ...] = ()  # what was done in reading it
    answers: list[Prediction] = field(default_factory=list)  # one for each model; empty until asked
    # For each model the heat map, float [32, 32], and the same over the picture; empty until wanted.
    heats: list[tuple[np.ndarray, Image.Image]] = field(default_factory=list)

    @classmethod
    def read(cls, source: Tensor | bytes, name: str = "", sample: int | None = None) -> Choice:
        """For a sample image or an uploaded file, readable or not."""
        try:
            if isinstance(source, bytes) and len(source) > MOST_MIB * 2**20:
                raise WidgetError("file_too_large", mib=len(source) / 2**20, allowed=MOST_MIB)
            picture = read_picture(source)
        except (ImageError, WidgetError) as error:
            return cls(name, sample, error)
        squares = {fit: square(picture.image, fit) for fit in FITS}
        return cls(name, sample, None, reduced(picture.image), picture.size, squares, picture.notes)

    def forget(self) -> None:
        """Drop all that the models said."""
        self.answers, self.heats = [], []


class WidgetState:
    """What is chosen, what the models said about it, or what went wrong.

    Whatever is chosen, the earlier answer is gone, so that an answer never stands beside another picture.
    Parameters are those of `PredictionWidget`.
    """

    def __init__(
        self, predictor: Predictor, samples: Split | None = None, other: Predictor | None = None, lang: str = "en"
    ):
        self.models = [predictor] if other is None else [predictor, other]
        self.samples = load_samples() if samples is None else samples
        self.gallery = Gallery(self.samples, lambda: predictor.predict(self.samples.images))
        self.fit, self.heat_map = "crop", False
        self.set_language(lang)
        self.clear()

    def clear(self) -> None:
        """Forget the pictures and all that was said about them."""
        self.choices: list[Choice] = []  # a sample image, or the files of one upload
        self.position = 0  # the one of them that is shown
        self.error: CifarFtError | None = None  # what went wrong last
        self.heat_error: CifarFtError | None = None  # why there is no heat map

    @property
    def chosen(self) -> Choice | None:
        """The picture shown, if any."""
        return self.choices[self.position] if self.choices else None

    @property
    def name(self) -> str:
        """Of the picture shown, as people know it."""
        if self.chosen is None:
            return ""
        sample = self.chosen.sample
        return self.chosen.name if sample is None else self.say("sample_name", line=self._line(sample))

    @property
    def true_index(self) -> int | None:
        """The class of the picture shown, 0 to 9; known for sample images only."""
        sample = self.chosen.sample if self.chosen else None
        return None if sample is None else int(self.samples.labels[sample])

    def say(self, key: str, **values) -> str:
        """A text in the language chosen."""
        return text(self.lang, key, **values)

    def sample_lines(self) -> list[str]:
        """A line for each sample image that can be browsed now, all different; mistakes with what was said."""
        lines = [self._line(position) for position in self.gallery.positions]
        if self.gallery.order != "mistakes":
            return lines
        said = [self.gallery.answers[position] for position in self.gallery.positions]
        sure = [{"label": LABELS[self.lang][a.index], "percent": percent(self.lang, a.probability)} for a in said]
        return [f"{line}, {self.say('taken_for', **values)}" for line, values in zip(lines, sure, strict=True)]

    def _line(self, position: int) -> str:
        label, index = LABELS[self.lang][self.samples.labels[position]], self.samples.indices[position].item()
        return self.say("sample_line", number=position + 1, label=label, index=index)

    def choose_sample(self, position: int | None) -> None:
        """Choose a sample image by its position in the split; `None` chooses nothing."""
        self.clear()
        if position is not None:
            self.choices = [Choice.read(self.samples.images[position], sample=position)]

    def choose_uploads(self, files: list[tuple[str, bytes]]) -> None:
        """Choose uploaded files by name and content. Raises WidgetError when there are too many.

        A file that is no picture keeps its problem, and the others can still be asked about.
        """
        self.clear()
        if len(files) > MOST_FILES:
            raise WidgetError("too_many_files", number=len(files), allowed=MOST_FILES)
        self.choices = [Choice.read(content, name) for name, content in files]

    def show(self, position: int) -> None:
        """Show another file of the same upload, with its own answer where it has one."""
        self.position, self.error = position, None
        self._explain()

    def set_language(self, lang: str) -> None:
        """Say everything in this language from now on. Raises LanguageError."""
        if lang not in LANGUAGES:
            raise LanguageError(unknown("language", lang, LANGUAGES))
        self.lang = lang

    def set_fit(self, fit: str) -> None:
        """Make pictures square in another way; answers for the former way are gone. Raises ImageError."""
        self.fit, self.error, self.heat_error = checked_fit(fit), None, None
        for choice in self.choices:
            choice.forget()

    def set_heat_map(self, wanted: bool) -> None:
        """Show heat maps with answers, or not."""
        self.heat_map = wanted
        self._explain()

    def predict(self) -> None:
        """Ask the models about every picture chosen. Raises the error to show when there is none to ask about."""
        self.error = None
        for choice in self.choices:
            choice.forget()
        readable = [choice for choice in self.choices if not choice.problem]
        if not readable:
            raise self.chosen.problem if self.chosen else WidgetError("nothing_chosen")
        squares = [choice.squares[self.fit] for choice in readable]
        answered = [model.predict(squares) for model in self.models]
        for choice, *said in zip(readable, *answered, strict=True):
            choice.answers = said
        self._explain()

    def _explain(self) -> None:
        """Add heat maps to the answer shown if they are wanted; the answer stays if that fails."""
        self.heat_error, chosen = None, self.chosen
        if not self.heat_map or chosen is None or not chosen.answers or chosen.heats:
            return
        try:
            seen = chosen.squares[self.fit]
            heats = [grad_cam(model, seen) for model in self.models]
            chosen.heats = [(heat, Image.fromarray(overlay(seen, heat))) for heat in heats]
        except Exception as error:
            self.heat_error = sayable(error)

    def fail(self, error: Exception) -> None:
        """Keep what went wrong in place of an answer."""
        for choice in self.choices:
            choice.forget()
        self.error = sayable(error)

    def preview(self) -> WidgetState:
        """A copy that has been asked about the picture shown, or has failed at it; this one stays as it is."""
        preview = copy.copy(self)
        preview.choices = [replace(choice) for choice in self.choices]
        try:
            preview.predict()
        except Exception as error:
            preview.fail(error)
        return preview


def sayable(error: Exception) -> CifarFtError:
    """An error that has words for people: itself, or one that says it was not expected."""
    if isinstance(error, CifarFtError):
        return error
    return WidgetError("unexpected", reason=f"{type(error).__name__}: {error}")
