"""Promises of `cifar_ft.plots`: true colours, readable marks, alt text, small files, no figure left open."""

from __future__ import annotations

import base64
import html
import io
import re
from html.parser import HTMLParser
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
from matplotlib.figure import Figure
from PIL import Image

from cifar_ft import plots

NAMES = ["airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"]
HISTORY = pd.DataFrame(
    {"epoch": range(1, 6), "train_loss": [1.2, 0.9, 0.7, 0.6, 0.5], "val_loss": [1.0, 0.8, 0.7, 0.65, 0.6]}
).assign(train_accuracy=[0.5, 0.6, 0.7, 0.8, 0.9], val_accuracy=0.6, test_loss=np.nan, test_accuracy=np.nan)
TESTED = HISTORY.assign(test_accuracy=np.linspace(0.5, 0.7, 5), test_loss=0.5)
STEPS = pd.DataFrame({"epoch": np.arange(1, 101) / 20, "loss": np.linspace(2.3, 0.5, 100)})
RNG = np.random.default_rng(0)
PICTURES = RNG.integers(0, 256, (12, 3, 32, 32), dtype=np.uint8)
CLASS_FRAME = pd.DataFrame({"class": NAMES, "accuracy": np.linspace(0.5, 0.95, 10)})
CLASS_FRAME = CLASS_FRAME.assign(low=CLASS_FRAME.accuracy - 0.1, high=CLASS_FRAME.accuracy + 0.04, n=100)
BINS = pd.DataFrame({"confidence": [np.nan, 0.4, 0.9], "accuracy": [np.nan, 0.3, 0.95], "count": [0, 20, 80]})
BINS = BINS.assign(
    low_edge=[0, 1 / 3, 2 / 3], high_edge=[1 / 3, 2 / 3, 1], low=[np.nan, 0.15, 0.88], high=[np.nan, 0.5, 1]
)
TABLE = pd.DataFrame({"stem": ["a", "b", "c"], "cost": [0.33, 1.3, 1.31], "kind": ["x", "y", "y"]})
SUMMARY = pd.DataFrame(
    [
        ("Which size?", "64 px", 0.0, 0.0, 0.0),
        ("Which size?", "96 px", 0.06, 0.05, 0.0625),
        ("Which stem?", "pretrained", 0.0, 0.0, 0.0),
        ("Which stem?", "random", -0.137, -0.2, -0.08),
    ],
    columns=["question", "variant", "difference", "low", "high"],
)
CORRUPTED = pd.DataFrame(
    [("none", 0, 0.96), *((name, s, 0.96 - s / 10) for name in ("gaussian blur", "fog") for s in range(1, 6))],
    columns=["corruption", "severity", "accuracy"],
)
CORRUPTED = CORRUPTED.assign(low=CORRUPTED.accuracy - 0.02, high=CORRUPTED.accuracy + 0.02)
COVERAGE = pd.DataFrame({"coverage": np.arange(1, 1001) / 1000, "accuracy": np.linspace(1, 0.9, 1000)})
FIGURES = {
    "image_grid": lambda: plots.image_grid(PICTURES, [*NAMES, "x", "y"]),
    "maps": lambda: plots.image_grid(RNG.normal(size=(5, 7, 7)), ncols=3),
    "prediction_grid": lambda: plots.prediction_grid(PICTURES[:2], [3, 5], [3, 3], [0.9, 0.8], NAMES),
    "prediction_figure": lambda: plots.prediction_figure(PICTURES[0], np.full(10, 0.1), NAMES, "truck"),
    "histogram_channels": lambda: plots.histogram_channels(PICTURES),
    "loss_curves": lambda: plots.loss_curves(
        {"quick": HISTORY, "cpu": HISTORY}, published=HISTORY, steps={"quick": STEPS}
    ),
    "accuracy_curves": lambda: plots.accuracy_curves({"quick": HISTORY}),
    "lines": lambda: plots.lines(TABLE, "stem", "cost", hue="kind"),
    "bars": lambda: plots.bars(TABLE, "cost", "stem", xlabel="cost (GMAC)"),
    "confusion_matrix": lambda: plots.confusion_matrix(np.eye(10, dtype=int) * 900 + 3, NAMES),
    "calibration_curve": lambda: plots.calibration_curve({"before": BINS, "after": BINS}),
    "per_class_bars": lambda: plots.per_class_bars(CLASS_FRAME),
    "ablation_chart": lambda: plots.ablation_chart(SUMMARY),
    "corruption_chart": lambda: plots.corruption_chart({"quick": CORRUPTED, "other": CORRUPTED}),
    "coverage_chart": lambda: plots.coverage_chart({"a": COVERAGE, "b": COVERAGE.assign(low=0.85, high=1)}),
    "redrawn_chart": lambda: plots.redrawn_chart({"a": TESTED[:2], "b": TESTED[:3]}, TESTED),
}


def texts(fig):
    """Every text of a figure, after it has been drawn."""
    fig.canvas.draw()
    return [text.get_text() for text in fig.findobj(plt.Text) if text.get_text() and text.get_visible()]


def shown(monkeypatch, fig, *args):
    """The HTML that `show_figure` displays."""
    seen = []
    monkeypatch.setattr("IPython.display.display", seen.append)
    plots.show_figure(fig, *args)
    assert len(seen) == 1
    return seen[0].data


def contrast_to_white(color):
    channels = [int(color[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
    return 1.05 / (np.dot(linear, [0.2126, 0.7152, 0.0722]) + 0.05)


@pytest.mark.parametrize("name", FIGURES)
def test_every_figure_is_shown_small_and_whole_with_readable_text_and_none_stays_open(name, monkeypatch):
    fig = FIGURES[name]()
    assert isinstance(fig, Figure)
    page = shown(monkeypatch, fig, "what it shows")
    assert plt.get_fignums() == []
    data = base64.b64decode(re.search(r"base64,([^\"]+)", page)[1])
    picture = Image.open(io.BytesIO(data))
    assert picture.format == "PNG"
    assert 200 <= picture.width <= 1000
    assert len(data) < 120_000
    used, (width, height) = fig.get_tightbbox(), fig.get_size_inches()  # nothing is cut
    assert min(used.x0, used.y0, width - used.x1, height - used.y1) >= -0.02
    assert all(text.get_fontsize() >= 10 for text in fig.findobj(plt.Text) if text.get_text())


@pytest.mark.parametrize("ncols", [4, 8, 10])
def test_titles_of_neighbouring_pictures_do_not_touch(ncols):
    fig = plots.image_grid(PICTURES[:10], ["automobile"] * 10, ncols)
    fig.canvas.draw()
    boxes = [ax.title.get_window_extent() for ax in fig.axes]
    assert all(not one.overlaps(other) for i, one in enumerate(boxes) for other in boxes[:i])
    assert min(box.x0 for box in boxes) >= 0


@pytest.mark.parametrize(
    ("name", "wanted"),
    [
        ("loss_curves", {"epoch", "cross-entropy loss (nats)"}),
        ("accuracy_curves", {"epoch", "accuracy (%)"}),
        ("histogram_channels", {"pixel value (0 dark, 255 bright)", "share of pixels (%)"}),
        ("confusion_matrix", {"predicted class", "true class", "share of the true class (%)"}),
        ("calibration_curve", {"accuracy (%)", "confidence: probability of the predicted class (%)"}),
        ("per_class_bars", {"accuracy (%), with 95 % interval"}),
        ("prediction_figure", {"probability (%)"}),
        ("ablation_chart", {"difference in validation accuracy (points), with 95 % interval"}),
        ("corruption_chart", {"accuracy (%)", "severity; 0 is clean"}),
        ("coverage_chart", {"images answered (%), the surest first", "errors among them (%)"}),
        ("redrawn_chart", {"epoch", "test accuracy (%)", "test loss (nats)"}),
        ("bars", {"cost (GMAC)"}),
    ],
)
def test_axes_are_labelled_with_units(name, wanted):
    assert wanted <= set(texts(FIGURES[name]()))


def test_colours_stand_out_from_white():
    assert min(contrast_to_white(color) for color in plots.PALETTE) >= 3
    assert min(contrast_to_white(color) for color in (plots.GREY, plots.RIGHT, plots.WRONG)) >= 4.5


@pytest.mark.parametrize("alt", ["", "   ", None])
def test_a_figure_without_alt_text_is_refused(alt):
    with pytest.raises(ValueError, match="alt is empty"):
        plots.show_figure(FIGURES["bars"](), alt)


def test_alt_text_and_caption_survive_any_character(monkeypatch):
    alt, caption = 'a "cat" & <b>dog</b>\'s', "5 < 6 & <script>"
    page = shown(monkeypatch, FIGURES["bars"](), alt, caption)
    found = {}

    class Reader(HTMLParser):
        def handle_starttag(self, tag, attrs):
            found[tag] = dict(attrs)

    Reader().feed(page)
    assert found["img"]["alt"] == alt
    assert set(found) == {"figure", "img", "figcaption"}
    assert f"<figcaption>{html.escape(caption)}</figcaption>" in page


def test_alt_text_reaches_the_page_that_nbconvert_writes(monkeypatch):
    nbformat = pytest.importorskip("nbformat")
    nbconvert = pytest.importorskip("nbconvert")
    page = shown(monkeypatch, FIGURES["bars"](), "three bars", "cost")
    output = nbformat.v4.new_output("display_data", {"text/html": page})
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell("show()", outputs=[output])])
    body, _ = nbconvert.HTMLExporter().from_notebook_node(notebook)
    assert 'alt="three bars"' in body
    assert "No description has been provided" not in body


def test_pyplot_figures_are_closed_too(monkeypatch):
    fig, ax = plt.subplots()
    ax.plot([1, 2])
    shown(monkeypatch, fig, "a line")
    assert plt.get_fignums() == []


def test_saving_replaces_the_file_whole_or_leaves_the_old_one(tmp_path):
    path = plots.save_figure(FIGURES["bars"](), tmp_path / "new" / "figure.png")
    before = path.read_bytes()
    assert Image.open(path).size[0] <= 1000
    with pytest.raises(AttributeError):
        plots.save_figure(object(), path)
    assert path.read_bytes() == before
    assert [file.name for file in path.parent.iterdir()] == ["figure.png"]


def pixels(fig):
    return np.asarray(Image.open(io.BytesIO(plots._png(fig))).convert("RGB"))


@pytest.mark.parametrize("layout", ["chw", "hwc", "float", "tensor"])
def test_pictures_keep_their_colours_whatever_their_layout(layout):
    torch = pytest.importorskip("torch")
    image = np.zeros((1, 3, 32, 32), np.uint8)
    image[:, 0] = 200  # plain red
    given = {"hwc": image.transpose(0, 2, 3, 1), "float": image / 255, "tensor": torch.from_numpy(image)}
    drawn = pixels(plots.image_grid(given.get(layout, image)))
    middle = drawn[drawn.shape[0] // 2, drawn.shape[1] // 2]
    assert np.abs(middle.astype(int) - [200, 0, 0]).max() <= 1


def test_every_pixel_of_a_picture_is_seen_unblurred():
    fig = plots.image_grid(PICTURES[:1])
    drawn = pixels(fig)[plots.GAP : -plots.GAP, plots.GAP : -plots.GAP]
    size = drawn.shape[0]
    centres = ((np.arange(32) + 0.5) * size / 32).astype(int)
    assert np.array_equal(drawn[np.ix_(centres, centres)], PICTURES[0].transpose(1, 2, 0))


def test_a_heavy_grid_is_packed_and_still_looks_the_same():
    photographs = np.load(Path(plots.__file__).parent / "assets" / "samples.npz")["images"][:48]
    fig = plots.image_grid(photographs)
    fig.savefig(whole := io.BytesIO(), dpi=plots.DPI)
    packed = plots._png(fig)
    assert len(packed) < plots.HEAVY < len(whole.getvalue())
    true, seen = (np.asarray(Image.open(data).convert("RGB"), float) for data in (whole, io.BytesIO(packed)))
    assert np.abs(true - seen).mean() < 5  # of 255


def test_normalised_or_misshapen_pictures_are_refused():
    with pytest.raises(ValueError, match="denormalize"):
        plots.image_grid(PICTURES / 127.5 - 1)
    with pytest.raises(ValueError, match=r"\(2, 5, 32, 32\)"):
        plots.image_grid(np.zeros((2, 5, 32, 32), np.uint8))
    with pytest.raises(ValueError, match="12 images but 1 titles"):
        plots.image_grid(PICTURES, ["one"])
    with pytest.raises(ValueError, match="uint8"):
        plots.histogram_channels(PICTURES / 255)


def test_predictions_are_marked_by_text_not_by_colour_alone():
    fig = plots.prediction_grid(PICTURES[:2], [3, 5], [3, 3], np.eye(10)[[3, 5]], NAMES)
    assert [ax.get_title() for ax in fig.axes] == ["✓ 100 %\ncat", "✗ 100 %\ndog\nis cat"]


def test_the_predicted_picture_is_titled_and_ranked():
    probabilities = np.full(10, 0.02)
    probabilities[9], probabilities[1] = 0.7, 0.14
    found = texts(plots.prediction_figure(PICTURES[0], probabilities, NAMES, "truck"))
    assert "predicted truck, true label truck ✓" in found
    assert found.index("truck") < found.index("automobile")
    assert "70.0 %" in found
    assert "predicted truck, true label ship ✗" in texts(plots.prediction_figure(PICTURES[0], probabilities, NAMES, 8))
    assert "predicted truck" in texts(plots.prediction_figure(PICTURES[0], probabilities, NAMES))


def drawn_lines(fig):
    return {line.get_label(): line for line in fig.axes[0].lines}


def test_curves_draw_what_is_there_and_nothing_else():
    lines = drawn_lines(plots.accuracy_curves({"quick": HISTORY}, published=HISTORY.drop(columns="val_accuracy")))
    assert set(lines) == {"published, train", "quick, train", "quick, validation"}  # test is all NaN
    assert lines["quick, train"].get_ydata().tolist() == pytest.approx([50, 60, 70, 80, 90])  # per cent
    assert lines["quick, train"].get_linestyle() == "-"
    assert lines["quick, validation"].get_linestyle() == "--"
    assert lines["published, train"].get_color() == plots.GREY
    assert set(drawn_lines(plots.loss_curves({"quick": HISTORY}))) == {"quick, train", "quick, validation"}


def test_the_training_loss_is_drawn_by_step_where_it_is_known():
    steps = pd.DataFrame({"epoch": np.arange(1, 101) / 20, "loss": np.tile([1.0, 3.0], 50)})
    fig = plots.loss_curves({"quick": HISTORY, "old": HISTORY}, steps={"quick": steps, "old": steps[:0]})
    lines = drawn_lines(fig)
    assert set(lines) >= {"quick, train", "quick, validation", "old, train", "old, validation"}
    assert lines["old, train"].get_ydata().tolist() == HISTORY.train_loss.tolist()
    smooth = lines["quick, train"].get_ydata()
    assert len(smooth) == 100
    assert smooth[10:90] == pytest.approx(2, abs=0.01)  # the mean of 4 rows
    (thin,) = [line for line in fig.axes[0].lines if line.get_linewidth() < 1]
    assert thin.get_ydata().tolist() == steps.loss.tolist()
    assert [text.get_text() for text in fig.legends[0].get_texts()] == [
        "quick, train", "quick, validation", "old, train", "old, validation",
    ]  # fmt: skip


def test_a_single_epoch_is_drawn_as_a_point_at_a_whole_epoch():
    fig = plots.loss_curves({"quick": HISTORY[:1]}, published=HISTORY[:1])
    assert all(line.get_marker() not in (None, "", "None") for line in drawn_lines(fig).values())
    fig.canvas.draw()
    assert all(float(tick).is_integer() for tick in fig.axes[0].get_xticks())


@pytest.mark.parametrize("history", [HISTORY[:0], HISTORY[["epoch"]], HISTORY.assign(train_loss="", val_loss=None)])
def test_a_history_without_values_says_so(history):
    assert "no epochs recorded" in texts(plots.loss_curves({"quick": history}))


def test_gaps_in_a_history_are_left_out():
    history = HISTORY.assign(val_loss=[1.0, np.nan, 0.8, np.nan, 0.7])
    line = drawn_lines(plots.loss_curves({"quick": history}))["quick, validation"]
    assert line.get_xdata().tolist() == [1, 3, 5]


def test_confusion_matrix_shows_every_count_with_true_classes_in_rows():
    matrix = np.arange(100).reshape(10, 10) + 1000
    fig = plots.confusion_matrix(matrix, NAMES)
    assert {str(value) for value in matrix.ravel()} <= set(texts(fig))
    assert fig.axes[0].get_ylabel() == "true class"
    assert fig.axes[0].collections[0].get_cmap().name == "cividis"
    at = {text.get_position(): text.get_text() for text in fig.axes[0].texts}
    assert at[(0.5, 1.5)] == "1010"  # row 1, column 0


def test_bars_carry_their_values():
    assert {"0.33", "1.3", "1.31"} <= set(texts(plots.bars(TABLE, "cost", "stem")))


def test_channel_histogram_reports_the_true_mean_and_std():
    found = " ".join(texts(plots.histogram_channels(PICTURES)))
    for c, name in enumerate(("red", "green", "blue")):
        channel = PICTURES[:, c] / 255
        assert f"{name}: mean {channel.mean():.3f}, std {channel.std():.3f}" in found


def test_an_ablation_stands_under_its_question_and_beside_what_it_is_compared_with():
    (ax,) = plots.ablation_chart(SUMMARY, reach=10).axes
    assert [tick.get_text() for tick in ax.get_yticklabels()] == ["Which size?", "96 px", "Which stem?", "random"]
    assert {text.get_text(): text.xy[1] for text in ax.texts} == {
        "0: 64 px": 0, "+6.0": 1, "0: pretrained": 2, "-13.7": 3
    }  # fmt: skip
    _, near, point, far, arrow = ax.lines  # the first is the line at 0
    assert (near.get_xdata().tolist(), point.get_xdata().tolist(), point.get_marker()) == ([5, 6.25], [6], "o")
    assert (far.get_xdata().tolist(), arrow.get_xdata().tolist(), arrow.get_marker()) == ([-10, -8], [-10], "<")


def test_many_ablations_stand_in_two_columns_each_question_whole():
    many = pd.concat([SUMMARY.assign(question=SUMMARY.question + str(i)) for i in range(7)], ignore_index=True)
    columns = [[tick.get_text() for tick in ax.get_yticklabels()] for ax in plots.ablation_chart(many).axes]
    assert [len(column) for column in columns] == [14, 14]
    assert [column[0] for column in columns] == ["Which size?0", "Which stem?3"]


def test_each_corruption_has_its_own_panel_that_begins_with_the_clean_images():
    worse = CORRUPTED.assign(accuracy=0.5)
    fig = plots.corruption_chart({"quick": CORRUPTED, "other": worse})
    assert [ax.get_title() for ax in fig.axes] == ["gaussian blur", "fog"]
    for ax in fig.axes:
        first, second = ax.lines
        assert first.get_xdata().tolist() == [0, 1, 2, 3, 4, 5]
        assert first.get_ydata().tolist() == pytest.approx([96, 86, 76, 66, 56, 46])
        assert second.get_ydata().tolist() == [50] * 6
    assert [text.get_text() for text in fig.legends[0].get_texts()] == ["quick", "other"]
    assert not plots.corruption_chart({"quick": CORRUPTED}).legends


def test_coverage_is_drawn_as_the_errors_among_the_images_answered_with_a_band_where_there_is_one():
    ax = FIGURES["coverage_chart"]().axes[0]
    assert [line.get_label() for line in ax.lines] == ["a", "b"]
    places, errors = ax.lines[0].get_data()
    assert places[0] == pytest.approx(20)  # among fewer images one error is much
    assert errors == pytest.approx(np.interp(places, 100 * COVERAGE.coverage, 100 - 100 * COVERAGE.accuracy))
    assert len(ax.collections) == 1


def test_the_chart_of_redrawn_runs_draws_accuracy_and_loss_of_each_as_far_as_the_longest():
    accuracy, loss = FIGURES["redrawn_chart"]().axes
    drawn = {line.get_label(): line.get_ydata().tolist() for line in accuracy.lines}
    assert list(drawn) == ["published log", "a", "b"]
    assert drawn["b"] == drawn["published log"] == pytest.approx([50, 55, 60])
    assert [line.get_ydata().tolist() for line in loss.lines] == [[0.5] * 3, [0.5] * 2, [0.5] * 3]


def test_a_bin_of_a_few_images_has_no_point():
    bins = BINS.assign(count=[0, 19, 80])
    top = plots.calibration_curve({"a": bins}).axes[0]
    assert [line.get_xdata().tolist() for line in top.lines if line.get_marker() == "o"] == [[90.0]]
