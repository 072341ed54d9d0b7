"""The prediction widget as a person uses it, in any page."""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
SCREENSHOTS = ROOT / "build" / "screenshots"


class Widget:
    """What is on the page and what a person can do with it.

    Parameters
    ----------
    page : Playwright page
    root : Playwright locator
        The part of the page with the widget.
    """

    def __init__(self, page, root):
        self.page, self.root = page, root
        self.button("Predict").wait_for()

    def button(self, name: str):
        return self.root.get_by_role("button", name=name, exact=True)

    def list(self, label: str):
        return self.root.get_by_label(label, exact=True)

    @property
    def status(self):
        """The answer: the last status, as the gallery has one too."""
        return self.root.get_by_role("status").last

    @property
    def alert(self):
        return self.root.get_by_role("alert")

    def answers_of(self, name: str):
        """What was answered, about a picture of this name."""
        return self.root.get_by_text(re.compile(f"{name}: predicted "))

    def upload(self, *files) -> None:
        with self.page.expect_file_chooser() as chooser:
            self.root.get_by_role("button", name=re.compile("^(Upload|Envoyer)")).click()
        chooser.value.set_files(files)

    def thumbnail(self, number: int):
        return self.root.get_by_role("button", name=re.compile(rf"^(✓ )?{number} [a-z]+$"))

    def focused(self) -> str:
        """The name of the control that has the keyboard."""
        return self.page.evaluate(
            "() => { const e = document.activeElement; return (e.labels?.[0] ?? e).textContent.trim() }"
        )

    def tab_to(self, name: str, most: int = 80) -> None:
        """Go on with the Tab key until a control has the keyboard."""
        for _ in range(most):
            self.page.keyboard.press("Tab")
            if self.focused().startswith(name):
                return
        raise AssertionError(f"the Tab key does not lead to {name!r}")
