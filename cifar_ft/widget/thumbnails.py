"""The gallery of the prediction widget: thumbnails to click, lists that say which, and the controls they share.

Which pictures there are is the business of `state.Gallery`; here they are only shown. ipywidgets 7.7 and 8.
"""

from __future__ import annotations

from collections.abc import Callable
from uuid import uuid4

import ipywidgets as widgets

from cifar_ft.widget.html import alert_html, data_uri
from cifar_ft.widget.state import ORDERS, PAGE, WidgetState, reduced, sayable
from cifar_ft.widget.texts import LABELS

NOTHING = -1  # in a list; ipywidgets would show an empty line for a choice of None
# A thumbnail is a button with its picture above its name.
STYLE = """
.{id} button {{ white-space: normal; line-height: 1.2; padding: 56px 2px 2px; background-repeat: no-repeat;
  background-position: center 4px; background-size: 48px 48px; image-rendering: pixelated }}
"""


class ChoiceList(widgets.Dropdown):
    """A list whose label is never cut off, and that tells what a person chose from what the program did."""

    _filling = False

    def __init__(self):
        super().__init__(style={"description_width": "initial"}, layout=widgets.Layout(width="auto"))

    def fill(self, options: list[tuple[str, object]], value: object) -> None:
        """Set the lines, as (text, value), and the one that is chosen; nobody is told."""
        self._filling = True
        try:
            if self.options != tuple(options):
                self.options = tuple(options)
            self.value = value
        finally:
            self._filling = False

    def on_choice(self, act: Callable[[object], None]) -> None:
        """Call `act` with each value that a person chooses."""
        self.observe(lambda change: None if self._filling else act(change["new"]), "value")


def button(*classes: str, width: str = "auto", height: str | None = None) -> widgets.Button:
    """A button with CSS classes; as wide as its text unless told."""
    made = widgets.Button(layout=widgets.Layout(width=width, height=height))
    for name in classes:
        made.add_class(name)
    return made


def row(*children: widgets.Widget, gap: str = "0 12px") -> widgets.HBox:
    """Controls side by side, on more than one line where there is no room."""
    return widgets.HBox(children, layout=widgets.Layout(flex_flow="row wrap", align_items="center", grid_gap=gap))


class Thumbnails(widgets.VBox):
    """A page of sample pictures to choose from, and the lists that say which pictures these are.

    Parameters
    ----------
    state : WidgetState
        Its gallery is browsed here.
    choose : callable
        Called with the position of the picture that a person clicks.
    browsed : callable
        Called when other pictures are browsed.
    """

    def __init__(self, state: WidgetState, choose: Callable[[int], None], browsed: Callable[[], None]):
        self.state, self.choose, self.browsed, self.draws = state, choose, browsed, 0
        self.unique = f"cifar-ft-{uuid4().hex[:8]}"  # an earlier widget may be on the same page
        self.kind, self.order = ChoiceList(), ChoiceList()
        self.shuffle, self.earlier, self.later = button(), button(), button()
        self.buttons = [button(f"{self.unique}-{k}", width="104px", height="90px") for k in range(PAGE)]
        self.pictures, self.page = widgets.HTML(), widgets.HTML()
        self.kind.on_choice(lambda _: self._browse())
        self.order.on_choice(lambda _: self._browse())
        self.shuffle.on_click(self._on_shuffle)
        self.earlier.on_click(lambda _: self._turn(-1))
        self.later.on_click(lambda _: self._turn(1))
        for k, thumbnail in enumerate(self.buttons):
            thumbnail.on_click(lambda _, k=k: self._on_thumbnail(k))
        shown = row(*self.buttons, gap="0")
        shown.add_class(self.unique)
        lists, pager = row(self.kind, self.order, self.shuffle), row(self.earlier, self.later, self.page)
        super().__init__([lists, self.pictures, shown, pager])

    def relabel(self) -> None:
        """Say everything in the language chosen, and what is browsed."""
        state, gallery = self.state, self.state.gallery
        for name in ("kind", "order", "shuffle", "earlier", "later"):
            getattr(self, name).description = state.say(name)
        kinds = [(name, label) for label, name in enumerate(LABELS[state.lang])]
        label = NOTHING if gallery.label is None else gallery.label
        self.kind.fill([(state.say("all_kinds"), NOTHING), *kinds], label)
        self.order.fill([(state.say(order), order) for order in ORDERS], gallery.order)
        self.show()

    def _on_thumbnail(self, k: int) -> None:
        page = self.state.gallery.page()
        if k < len(page):  # else the click was made on an earlier, longer page
            self.choose(page[k])

    def _on_shuffle(self, _button) -> None:
        self.draws += 1
        self.order.fill(self.order.options, "random")
        self._browse()

    def _turn(self, pages: int) -> None:
        self.state.gallery.turn(pages)
        self.show()

    def _browse(self) -> None:
        """Browse what the lists say; where that fails, say so and stay with what was browsed."""
        state, gallery = self.state, self.state.gallery
        if self.order.value == "mistakes" and gallery.answers is None:
            self._say("searching", total=len(state.samples))
        label = None if self.kind.value == NOTHING else self.kind.value
        self._disable(True)  # a click made now would choose what stands there later
        try:
            gallery.browse(label, self.order.value, self.draws)
        except Exception as error:
            self.relabel()
            self.page.value = alert_html(state.lang, sayable(error))
        else:
            self.browsed()
        finally:
            self._disable(False)

    def _disable(self, disabled: bool) -> None:
        for control in (self.kind, self.order, self.shuffle, *self.buttons):
            control.disabled = disabled

    def show(self) -> None:
        """Show the page: a button for each picture, and the style that puts the pictures on them."""
        state, gallery = self.state, self.state.gallery
        page = gallery.page()
        chosen = state.chosen.sample if state.chosen else None
        style = STYLE.format(id=self.unique)
        for k, thumbnail in enumerate(self.buttons):
            thumbnail.layout.display = "" if k < len(page) else "none"
        for k, position in enumerate(page):
            uri = data_uri(reduced(state.samples.images[position].cpu()))
            outline = "; box-shadow: inset 0 0 0 3px #0173b2" if position == chosen else ""
            style += f'.{self.unique} .{self.unique}-{k} {{ background-image: url("{uri}"){outline} }}\n'
            name = f"{position + 1} {LABELS[state.lang][state.samples.labels[position]]}"
            self.buttons[k].description = f"\u2713 {name}" if position == chosen else name
        self.pictures.value = f"<style>{style}</style>"
        self.earlier.disabled, self.later.disabled = not gallery.has(-1), not gallery.has(1)
        shown, total = len(gallery.positions), gallery.total
        if page:
            numbers = {"first": gallery.start + 1, "last": gallery.start + len(page), "shown": shown, "total": total}
            self._say("page" if shown == total else "page_of_more", **numbers)
        else:
            self._say("no_mistakes" if gallery.order == "mistakes" else "no_pictures")

    def _say(self, key: str, **values) -> None:
        self.page.value = f'<div lang="{self.state.lang}" role="status">{self.state.say(key, **values)}</div>'
