"""Pictures for the prediction widget: browsing a split, and pictures as HTML; no widget and no model here."""

from __future__ import annotations

import base64
import io
from collections.abc import Callable
from html import escape

import numpy as np
from PIL import Image
from torch import Tensor

from cifar_ft import CifarFtError
from cifar_ft.data import Split
from cifar_ft.widget.texts import NOWHERE, PLACES

WIDTH = 192  # of each picture and of the longest bar, in CSS pixels
PAGE = 20  # pictures that the gallery shows at once
LONGEST = 200  # pictures that can be browsed at once: a list of 10,000 lines helps nobody
ORDERS = ("stored", "random", "mistakes")


class GalleryError(CifarFtError, ValueError):
    """An order or a class that pictures cannot be browsed by."""


class Gallery:
    """Some pictures of a split, in some order, a page at a time.

    Parameters
    ----------
    split : Split
    ask : callable
        Gives the answers for the whole split, one `Prediction` each; called at most once, for the mistakes.

    Attributes
    ----------
    positions : list of int
        The pictures to browse, as positions in the split; at most `LONGEST`.
    total : int
        How many fit the choice, shown or not.
    answers : list of Prediction or None
        Known once the mistakes have been asked for.
    """

    def __init__(self, split: Split, ask: Callable[[], list]):
        self.split, self.ask, self.answers = split, ask, None
        self.browse()

    def browse(self, label: int | None = None, order: str = "stored", seed: int = 0) -> None:
        """Choose what to browse: a class or all of them (`None`), and in which of `ORDERS`.

        Nothing changes if it fails. Raises GalleryError for an unknown order, and whatever `ask` raises.
        """
        if order not in ORDERS:
            raise GalleryError(f"unknown order {order!r}; choose from {', '.join(ORDERS)}")
        labels = self.split.labels.cpu().numpy()
        found = np.arange(len(labels)) if label is None else np.flatnonzero(labels == label)
        if order == "random":
            found = np.random.default_rng(seed).permutation(found)
        if order == "mistakes":
            found = self._mistakes(found, labels)
        self.label, self.order, self.start = label, order, 0
        self.total, self.positions = len(found), [int(position) for position in found[:LONGEST]]

    def _mistakes(self, found: np.ndarray, labels: np.ndarray) -> list[int]:
        """Those of `found` that the model gets wrong, the most confident first."""
        if self.answers is None:
            self.answers = self.ask()
        wrong = [position for position in found if self.answers[position].index != labels[position]]
        return sorted(wrong, key=lambda position: -self.answers[position].probability)

    def page(self) -> list[int]:
        """The positions shown now, at most `PAGE`."""
        return self.positions[self.start : self.start + PAGE]

    def turn(self, pages: int) -> None:
        """Go on by so many pages, or back if negative; never past either end."""
        last = max(0, len(self.positions) - 1) // PAGE * PAGE
        self.start = min(max(self.start + pages * PAGE, 0), last)

    def has(self, pages: int) -> bool:
        """Whether there is a page so many pages on."""
        return 0 <= self.start + pages * PAGE < len(self.positions)


def reduced(image: Tensor) -> Image.Image:
    """A picture [3, H, W] as it is shown: at most `WIDTH` pixels at its longer side."""
    picture = Image.fromarray(image.permute(1, 2, 0).contiguous().numpy())
    if max(picture.size) > WIDTH:
        picture = picture.resize(_shown_size(picture), Image.Resampling.BOX)
    return picture


def _shown_size(picture: Image.Image) -> tuple[int, int]:
    longer = max(picture.size)
    return tuple(max(1, round(WIDTH * length / longer)) for length in picture.size)


def data_uri(picture: Image.Image) -> str:
    """A picture inside a page."""
    file = io.BytesIO()
    picture.save(file, "PNG")
    return f"data:image/png;base64,{base64.b64encode(file.getvalue()).decode()}"


def figure(picture: Image.Image, alt: str, caption: str) -> str:
    """A picture with its caption, `WIDTH` CSS pixels at its longer side; small ones show their pixels."""
    width, height = _shown_size(picture)
    style = f"width:{width}px;height:{height}px;max-width:none;margin:0;image-rendering:pixelated"
    image = f'<img alt="{escape(alt)}" src="{data_uri(picture)}" style="{style}">'
    # As wide as the picture, so that a long caption wraps below it.
    style = f"display:inline-block;vertical-align:top;width:{WIDTH}px;margin:4px 16px 4px 0;line-height:1.3"
    return f'<figure style="{style}">{image}<figcaption>{escape(caption)}</figcaption></figure>'


def place(heat: np.ndarray, lang: str) -> str:
    """Where a heat map [h, w] is brightest, in words."""
    if not heat.any():
        return NOWHERE[lang]
    row, column = np.unravel_index(np.argmax(heat), heat.shape)
    return PLACES[lang][3 * row // heat.shape[0]][3 * column // heat.shape[1]]
