"""The messages that a browser sends to the prediction widget, for ipywidgets 8 and 7.7, and what its HTML says."""

from __future__ import annotations

import base64
import io
from html.parser import HTMLParser

import ipywidgets
import numpy as np
from PIL import Image

from cifar_ft.data import CLASSES
from cifar_ft.predictions import Prediction

SEVEN = ipywidgets.__version__.startswith("7.")


class Told:
    """A predictor that answers as it is told and remembers what it was asked."""

    source = "a model <told> what to say"

    def __init__(self, label="truck", unknown=None):
        self.label, self.unknown, self.asked = label, unknown, []
        self.during, self.error, self.known = lambda: None, None, None

    def how_often_right(self, probability):
        return self.known

    def predict(self, images):
        self.asked.append(images)
        self.during()
        if self.error:
            raise self.error
        probabilities = {**dict.fromkeys(CLASSES, 0.01), self.label: 0.91}
        return [Prediction(self.label, CLASSES.index(self.label), 0.91, probabilities, self.unknown)] * len(images)


def png(colour="red", size=(40, 20), mode="RGB"):
    file = io.BytesIO()
    Image.new(mode, size, colour).save(file, "PNG")
    return file.getvalue()


def send_files(widget, files):
    """What the browser sends when files have been chosen, as (name, content)."""
    modified = "lastModified" if SEVEN else "last_modified"
    about = [{"name": name, "type": "image/png", "size": len(content), modified: 1} for name, content in files]
    if SEVEN:
        counter = widget.upload._counter + len(files)
        state = {"_counter": counter, "metadata": about, "data": [None] * len(files), "error": ""}
        paths = [["data", i] for i in range(len(files))]
    else:
        state, paths = {"value": about, "error": ""}, [["value", i, "content"] for i in range(len(files))]
    data = {"method": "update", "state": state, "buffer_paths": paths}
    buffers = [memoryview(content) for _, content in files]
    widget.upload._handle_msg({"content": {"data": data}, "buffers": buffers})


def send_file(widget, name, content):
    send_files(widget, [(name, content)])


def send(control, **state):
    """What the browser sends when a control has been changed."""
    data = {"method": "update", "state": state, "buffer_paths": []}
    control._handle_msg({"content": {"data": data}, "buffers": []})


def select(widget, index):
    """Choose a line of the sample images; 0 is "choose a sample image"."""
    send(widget.sample, index=index)


def pick(control, line):
    """Choose a line of a list by its text."""
    send(control, index=[text for text, _ in control.options].index(line))


def press(button):
    data = {"method": "custom", "content": {"event": "click"}}
    button._handle_msg({"content": {"data": data}, "buffers": []})


def click(widget):
    press(widget.button)


def thumbnails(widget):
    """The pictures of the gallery that can be clicked, by their text."""
    return {b.description: b for b in widget.thumbnails.buttons if b.layout.display != "none"}


class Page(HTMLParser):
    """Tags with their attributes, and the text that a screen reader would say."""

    def __init__(self, html):
        super().__init__()
        self.tags, self.text, self.hidden = [], "", []
        self.feed(html)
        self.close()
        self.text = " ".join(self.text.split())

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        if tag not in ("img", "br"):
            self.hidden.append("aria-hidden" in dict(attributes))

    def handle_endtag(self, tag):
        self.hidden.pop()

    def handle_data(self, data):
        if not any(self.hidden):
            self.text += f" {data}"

    def all(self, tag):
        return [attributes for name, attributes in self.tags if name == tag]


def said(widget):
    """What stands in place of the answer."""
    return Page(widget.result.value).text


def pixels(uri):
    """The pixels of a picture inside a page, uint8 [H, W, 3]."""
    assert uri.startswith("data:image/png;base64,")
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(uri.partition(",")[2]))))


def pictures(html):
    """The pixels of each <img>."""
    return [pixels(image["src"]) for image in Page(html).all("img")]
