"""What the prediction widget knows: pictures chosen, what the models said, what went wrong; without any widget.

`answers` shows it as HTML, `widget.PredictionWidget` is a thin skin over both; tests drive the model itself.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass, field, replace

import numpy as np
from PIL import Image
from torch import Tensor

from cifar_ft import CifarFtError
from cifar_ft.data import CLASSES, Split, load_samples
from cifar_ft.predictions import ImageError, Picture, Prediction, Predictor, read_picture, square
from cifar_ft.widget.gallery import Gallery, reduced
from cifar_ft.widget.texts import LABELS, NOTHING_CHOSEN, checked_language, percent, text

FITS = ("crop", "pad")
MOST_MIB = 10  # for each upload; the server of a notebook drops larger messages without a word
MOST_FILES = 50  # in one upload


@dataclass
class Choice:
    """One picture that the models can be asked about, and what they said.

    A large upload is not kept: only a small picture to show and the two squares that a network may see.

    Attributes
    ----------
    name : str
        Of an uploaded file; empty for a sample image.
    sample : int or None
        Position of a sample image.
    shown : PIL image or None
        At most `WIDTH` pixels wide and high.
    size : (int, int)
        Width and height as given.
    squares : dict of str to uint8 Tensor [3, 32, 32]
        What the network sees, for each of `FITS`.
    notes : tuple of str
        What was done to the picture in reading it, in English.
    problem : str
        Why it cannot be read, if so.
    answers : list of Prediction
        One for each model; empty until asked.
    heats : list of (float array [32, 32], PIL image)
        The heat map of each model, bare and over its picture; empty until asked.
    """

    name: str = ""
    sample: int | None = None
    shown: Image.Image | None = None
    size: tuple[int, int] = (0, 0)
    squares: dict[str, Tensor] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    problem: str = ""
    answers: list[Prediction] = field(default_factory=list)
    heats: list[tuple[np.ndarray, Image.Image]] = field(default_factory=list)

    @classmethod
    def of(cls, picture: Picture, **about) -> Choice:
        """For a picture that has been read."""
        squares = {fit: square(picture.image, fit) for fit in FITS}
        return cls(shown=reduced(picture.image), size=picture.size, squares=squares, notes=picture.notes, **about)

    @classmethod
    def upload(cls, name: str, content: bytes) -> Choice:
        """For an uploaded file, readable or not."""
        try:
            if len(content) > MOST_MIB * 2**20:
                mib = len(content) / 2**20
                raise ImageError(f"{mib:.1f} MiB; at most {MOST_MIB} MiB are allowed, make it smaller")
            picture = read_picture(bytes(content))
        except ImageError as error:
            return cls(name, problem=str(error).removeprefix("the picture").removeprefix(": ").strip())
        return cls.of(picture, name=name)

    def forget(self) -> None:
        """Drop all that the models said."""
        self.answers, self.heats = [], []


class PredictionModel:
    """What is chosen, what the models said about it, or what went wrong; without any widget.

    Whatever is chosen, the earlier answer is gone, so that an answer never stands beside another picture.

    Parameters
    ----------
    predictor : Predictor
        Or anything with its `predict` and `source`.
    samples : Split, optional
        The pictures to browse; by default the 200 that the package ships.
    other : Predictor, optional
        A second model to compare with.
    lang : {"en", "fr"}

    Attributes
    ----------
    choices : list of Choice
        A sample image, or the files of one upload.
    position : int
        The one of them that is shown.
    fit : {"crop", "pad"}
        How a picture becomes square.
    heat_map : bool
        Whether answers come with a heat map.
    error : str
        What went wrong last, in English.
    """

    def __init__(
        self,
        predictor: Predictor,
        samples: Split | None = None,
        other: Predictor | None = None,
        lang: str = "en",
    ):
        self.models = [predictor] if other is None else [predictor, other]
        self.samples = load_samples() if samples is None else samples
        self.gallery = Gallery(self.samples, lambda: predictor.predict(self.samples.images))
        self.lang, self.fit, self.heat_map = checked_language(lang), "crop", False
        self.clear()

    def clear(self) -> None:
        """Forget the pictures and all that was said about them."""
        self.choices, self.position, self.error, self.heat_error = [], 0, "", ""

    @property
    def predictor(self) -> Predictor:
        """The first model."""
        return self.models[0]

    @property
    def chosen(self) -> Choice | None:
        """The picture shown, if any."""
        return self.choices[self.position] if self.choices else None

    @property
    def name(self) -> str:
        """Of the picture shown, as people know it."""
        if self.chosen is None or self.chosen.sample is None:
            return self.chosen.name if self.chosen else ""
        return self.say("sample_name", line=self.sample_name(self.chosen.sample))

    @property
    def uploaded(self) -> bool:
        """Whether the picture shown is an upload."""
        return self.chosen is not None and self.chosen.sample is None

    @property
    def true_label(self) -> str | None:
        """The class of the picture shown, in English; known for sample images only."""
        if self.chosen is None or self.chosen.sample is None:
            return None
        return CLASSES[self.samples.labels[self.chosen.sample]]

    @property
    def prediction(self) -> Prediction | None:
        """What the first model said about the picture shown."""
        return self.chosen.answers[0] if self.chosen and self.chosen.answers else None

    def say(self, key: str, **values) -> str:
        """A text in the language chosen."""
        return text(self.lang, key, **values)

    def sample_name(self, position: int) -> str:
        """Which sample image this is, in a few words."""
        label = LABELS[self.lang][self.samples.labels[position]]
        index = self.samples.indices[position].item()
        return self.say("sample_line", number=position + 1, label=label, index=index)

    def sample_names(self) -> list[str]:
        """A line for each sample image that can be browsed now, all different; mistakes with what was said."""
        names = [self.sample_name(position) for position in self.gallery.positions]
        if self.gallery.order != "mistakes":
            return names
        said = [self.gallery.answers[position] for position in self.gallery.positions]
        return [f"{name}, {self._taken_for(answer)}" for name, answer in zip(names, said, strict=True)]

    def _taken_for(self, answer: Prediction) -> str:
        label, sure = LABELS[self.lang][answer.index], percent(self.lang, answer.probability)
        return self.say("taken_for", label=label, percent=sure)

    def choose_sample(self, position: int | None) -> None:
        """Choose a sample image by its position in the split; `None` chooses nothing."""
        self.clear()
        if position is not None:
            self.choices = [Choice.of(read_picture(self.samples.images[position]), sample=position)]

    def choose_uploads(self, files: list[tuple[str, bytes]]) -> None:
        """Choose uploaded files by name and content. Raises ImageError when there are too many.

        A file that is no picture keeps its problem, and the others can still be asked about.
        """
        self.clear()
        if len(files) > MOST_FILES:
            raise ImageError(f"{len(files):,} pictures at a time are too many; choose at most {MOST_FILES}")
        self.choices = [Choice.upload(name, content) for name, content in files]

    def choose_upload(self, name: str, content: bytes) -> None:
        """Choose one uploaded file. Raises ImageError when it is no picture."""
        self.choose_uploads([(name, content)])
        if self.chosen.problem:
            raise ImageError(self.chosen.problem)

    def show(self, position: int) -> None:
        """Show another file of the same upload, with its own answer where it has one."""
        self.position, self.error = position, ""
        self._explain()

    def set_language(self, lang: str) -> None:
        """Say everything in this language from now on. Raises LanguageError."""
        self.lang = checked_language(lang)

    def set_fit(self, fit: str) -> None:
        """Make pictures square in another way; answers for the former way are gone. Raises ImageError."""
        if fit not in FITS:
            raise ImageError(f"unknown fit {fit!r}; choose {' or '.join(FITS)}")
        self.fit, self.error, self.heat_error = fit, "", ""
        for choice in self.choices:
            choice.forget()

    def set_heat_map(self, wanted: bool) -> None:
        """Show heat maps with answers, or not."""
        self.heat_map = wanted
        self._explain()

    def predict(self) -> None:
        """Ask the models about every picture chosen. Raises ImageError when there is none to ask about."""
        self.error = ""
        for choice in self.choices:
            choice.forget()
        readable = [choice for choice in self.choices if not choice.problem]
        if not readable:
            raise ImageError(self.chosen.problem if self.chosen else NOTHING_CHOSEN)
        squares = [choice.squares[self.fit] for choice in readable]
        answered = [model.predict(squares) for model in self.models]
        for choice, *said in zip(readable, *answered, strict=True):
            choice.answers = said
        self._explain()

    def _explain(self) -> None:
        """Add heat maps to the answer shown if they are wanted; the answer stays if that fails."""
        self.heat_error = ""
        chosen = self.chosen
        if not self.heat_map or chosen is None or not chosen.answers or chosen.heats:
            return
        try:
            from cifar_ft.predictions import grad_cam, overlay

            seen = chosen.squares[self.fit]
            heats = [grad_cam(model, seen) for model in self.models]
            chosen.heats = [(heat, Image.fromarray(overlay(seen, heat))) for heat in heats]
        except Exception as error:
            self.heat_error = message(error)

    def fail(self, error: Exception) -> None:
        """Keep what went wrong in place of an answer."""
        for choice in self.choices:
            choice.forget()
        self.error = message(error)

    def preview(self) -> PredictionModel:
        """A copy that has been asked about the picture shown, or has failed at it; this one stays as it is."""
        preview = copy.copy(self)
        preview.choices = [replace(choice) for choice in self.choices]
        try:
            preview.predict()
        except Exception as error:
            preview.fail(error)
        return preview


def message(error: Exception) -> str:
    """What went wrong, in words for people."""
    known = isinstance(error, CifarFtError)
    return str(error) if known else f"unexpected error, {type(error).__name__}: {error}"
