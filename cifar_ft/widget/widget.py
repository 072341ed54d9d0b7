"""The prediction widget (notebook 06): choose a sample image or upload pictures and see the model's answer.

`PredictionWidget` is a thin skin over `state.WidgetState`, made of what ipywidgets 7.7 and 8 have in common.
"""

from __future__ import annotations

from collections.abc import Callable

import ipywidgets as widgets

from cifar_ft.data import Split
from cifar_ft.predictions import SUFFIXES, Predictor
from cifar_ft.widget.html import alert_html, picture_html, result_html
from cifar_ft.widget.state import FITS, WidgetState
from cifar_ft.widget.texts import LANGUAGES, WidgetError
from cifar_ft.widget.thumbnails import NOTHING, ChoiceList, Thumbnails, button, row


def uploaded_files(value) -> list[tuple[str, bytes]]:
    """Names and contents of uploaded files from a tuple of dicts (ipywidgets 8) or a dict of them (7)."""
    files = value.values() if isinstance(value, dict) else value
    return [(file.get("metadata", file)["name"], bytes(file["content"])) for file in files]


class PredictionWidget(widgets.VBox):
    """Choose a sample image or upload pictures, and see what the model says.

    Parameters
    ----------
    predictor : Predictor
        Or anything with its `predict` and `source`.
    samples : Split, optional
        The pictures to browse; by default the 200 that the package ships.
    other : Predictor, optional
        A second model, whose answers stand beside those of the first.
    lang : {"en", "fr"}
        The language to begin with.
    """

    # ipywidgets 7 displays itself by this method, without the static preview of `_repr_mimebundle_`.
    _ipython_display_ = None

    def __init__(
        self, predictor: Predictor, samples: Split | None = None, other: Predictor | None = None, lang: str = "en"
    ):
        self.state = WidgetState(predictor, samples, other, lang)
        self._make_controls()
        self.controls = row(self.upload, self.file, self.sample)
        questions = row(self.fit, self.heat_map, self.button)
        choosing = [row(self.language), self.choosing, self.controls, self.thumbnails]
        # From top to bottom, as a keyboard goes through them.
        super().__init__([*choosing, self.asking, questions, self.picture, self.result])
        self._relabel()
        self._do(lambda: self.state.choose_sample(next(iter(self.state.gallery.positions), None)))

    def _make_controls(self) -> None:
        """Every control, without its texts, and what it does."""
        self.language, self.sample, self.file, self.fit = (ChoiceList() for _ in range(4))
        self.heat_map = widgets.Checkbox(indent=False, layout=widgets.Layout(width="auto"))
        self.button = button()
        self.button.button_style = "primary"
        self.upload = self._new_upload()
        self.thumbnails = Thumbnails(self.state, self._on_sample, self._on_browsed)
        self.choosing, self.asking, self.picture, self.result = (widgets.HTML() for _ in range(4))
        self.language.on_choice(self._on_language)
        self.sample.on_choice(self._on_sample)
        self.file.on_choice(lambda position: self._do(lambda: self.state.show(position)))
        self.fit.on_choice(lambda fit: self._do(lambda: self.state.set_fit(fit)))
        self.heat_map.observe(self._on_heat_map, "value")
        self.button.on_click(self._on_predict)

    def _new_upload(self) -> widgets.FileUpload:
        layout = widgets.Layout(width="auto")
        upload = widgets.FileUpload(accept=",".join(SUFFIXES), multiple=True, icon="", layout=layout)
        upload.description = self.state.say("upload")
        upload.observe(self._on_upload, "value")
        upload.observe(self._on_upload_error, "error")
        return upload

    def _relabel(self) -> None:
        """Say everything in the language chosen."""
        state, say = self.state, self.state.say
        for name in ("language", "sample", "upload", "file", "fit", "heat_map"):
            getattr(self, name).description = say(name)
        self.button.description = say("predict")
        self.choosing.value, self.asking.value = (self._heading(key) for key in ("heading_choose", "heading_ask"))
        self.language.fill([(name, lang) for lang, name in LANGUAGES.items()], state.lang)
        self.fit.fill([(say(fit), fit) for fit in FITS], state.fit)
        self.thumbnails.relabel()

    def _heading(self, key: str) -> str:
        return f'<h3 lang="{self.state.lang}" style="margin:8px 0 0">{self.state.say(key)}</h3>'

    def _on_language(self, lang: str) -> None:
        self._do(lambda: self.state.set_language(lang))
        self._relabel()

    def _on_sample(self, position: int) -> None:
        if self.upload.value:  # an upload is emptied by a new one: in ipywidgets 7 its value is read-only
            old, self.upload = self.upload, self._new_upload()
            self.controls.children = (self.upload, self.file, self.sample)
            old.close()
        self._do(lambda: self.state.choose_sample(None if position == NOTHING else position))

    def _on_browsed(self) -> None:
        """A sample that is no longer among those browsed is not chosen any more."""
        sample = self.state.chosen.sample if self.state.chosen else None
        gone = sample is not None and sample not in self.state.gallery.positions
        self._do(self.state.clear if gone else lambda: None)

    def _on_upload(self, change) -> None:
        if change["new"]:
            self._do(lambda: self.state.choose_uploads(uploaded_files(change["new"])))

    def _on_upload_error(self, change) -> None:
        """The browser could not read a file."""
        if change["new"]:
            self.state.clear()
            self._do(lambda: self.state.fail(WidgetError("browser_failed", reason=change["new"])))

    def _on_heat_map(self, change) -> None:
        self._do(lambda: self.state.set_heat_map(change["new"]))

    def _on_predict(self, _button) -> None:
        self.button.disabled = True  # further clicks would queue up
        try:
            self._do(self.state.predict)
        finally:
            self.button.disabled = False

    def _do(self, action: Callable) -> None:
        """Act and show the outcome, errors too: one that left a callback would only be logged."""
        state = self.state
        try:
            action()
            said = picture_html(state), result_html(state)
        except Exception as error:
            state.fail(error)
            try:
                said = picture_html(state), result_html(state)
            except Exception:  # the picture itself cannot be shown
                said = "", alert_html(state.lang, state.error)
        if said[0] != self.picture.value:
            self.result.value = ""  # not for a moment beside another picture
        self.picture.value, self.result.value = said
        self._show_lists()
        self.thumbnails.show()

    def _show_lists(self) -> None:
        """The lists of sample images and of uploaded files, with what is chosen."""
        state = self.state
        lines = [(state.say("choose"), NOTHING)]
        lines += zip(state.sample_lines(), state.gallery.positions, strict=True)
        sample = None if state.chosen is None else state.chosen.sample
        self.sample.fill(lines, NOTHING if sample is None else sample)
        files = [(f"{i + 1}{state.say('colon')}{choice.name}", i) for i, choice in enumerate(state.choices)]
        several = len(files) > 1
        self.file.layout.display = "" if several else "none"
        self.file.fill(files if several else [], state.position if several else None)

    def _repr_mimebundle_(self, **_) -> dict:
        """The live widget, and for pages without a kernel a static preview of what is chosen now."""
        preview = self.state.preview()
        note = f"<p>{preview.say('preview')}</p>"
        return {
            "text/plain": f"PredictionWidget({self.state.models[0].source})",
            "text/html": f'<div lang="{preview.lang}">{note}{picture_html(preview)}{result_html(preview)}</div>',
            "application/vnd.jupyter.widget-view+json": {
                "version_major": 2,
                "version_minor": 0,
                "model_id": self.model_id,
            },
        }


def prediction_widget(
    predictor: Predictor | None = None,
    samples: Split | None = None,
    other: Predictor | None = None,
    lang: str = "en",
) -> PredictionWidget:
    """The widget for a model; without one, for the shipped model.

    Parameters are those of `PredictionWidget`.

    Raises
    ------
    RunError, PredictionError
        When there is no model, or it is damaged.
    LanguageError
        For a language other than "en" and "fr".
    """
    return PredictionWidget(predictor or Predictor.load(), samples, other, lang)
