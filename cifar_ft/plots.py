"""Every figure of the course in one look: arrays and frames in, a matplotlib `Figure` out.

Figures are made without pyplot, so that a notebook shows each once, with alt text, and none leaks.
"""

from __future__ import annotations

import base64
import html
import io
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import PowerNorm
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from PIL import Image

from cifar_ft.files import write_atomic

PALETTE = ("#0173b2", "#d55e00", "#029e73", "#cc78bc", "#949494")  # colour-blind safe, contrast >= 3:1
GREY, RIGHT, WRONG = "#767676", "#00704f", "#b34700"  # text colours, contrast >= 4.5:1
MARKERS, HATCHES = ("o", "s", "D", "^", "v"), ("", "//", "..", "xx", "\\\\")
DASHES = ("-", "--", "-.", ":")
FULL, WIDE = (8.0, 4.0), (10.0, 4.6)  # inches
DPI, GAP, HEAVY = 120, 6, 120_000  # dots an inch, dots between pictures, bytes


def new_figure(size: tuple[float, float], rows: int = 1, cols: int = 1, **grid: Any) -> tuple[Figure, Any]:
    """A figure of `size` inches in the course's look, with `rows` x `cols` axes (none where `rows` is 0)."""
    rc = {"axes.edgecolor": GREY, "lines.linewidth": 2}
    sns.set_theme("notebook", "whitegrid", PALETTE, "DejaVu Sans", font_scale=1.1, rc=rc)
    fig = Figure(figsize=size, layout="constrained" if rows else None)
    FigureCanvasAgg(fig)
    return fig, fig.subplots(rows, cols, **grid) if rows else None


def _png(fig: Figure) -> bytes:
    """PNG in 256 colours where nobody sees it, or where true colours would make a notebook heavy."""
    fig.savefig(raw := io.BytesIO(), format="png", dpi=min(DPI, 1000 / fig.get_size_inches()[0]), facecolor="white")
    true = Image.open(raw).convert("RGB")
    few = true.quantize(256, kmeans=2, dither=Image.Dither.NONE)
    true.save(whole := io.BytesIO(), "PNG", optimize=True)
    few.save(packed := io.BytesIO(), "PNG", optimize=True)
    harm = np.abs(np.asarray(true, float) - np.asarray(few.convert("RGB"), float)).mean(axis=2)
    use_few = len(whole.getvalue()) > HEAVY or (harm.mean() < 1 and np.quantile(harm, 0.999) < 16)
    return min(whole.getvalue(), packed.getvalue(), key=len) if use_few else whole.getvalue()


def show_figure(fig: Figure, alt: str, caption: str = "") -> None:
    """Display a figure in a notebook as HTML, at most 1,000 dots wide, then close it.

    `alt` says what the figure shows, for those who cannot see it; a ValueError asks for it where it is empty.
    """
    from IPython.display import HTML, display
    from matplotlib import pyplot

    if not alt or not alt.strip():
        raise ValueError("alt is empty; say what the figure shows, for readers who cannot see it")
    data = base64.b64encode(_png(fig)).decode("ascii")
    below = f"<figcaption>{html.escape(caption)}</figcaption>" if caption else ""
    source = f'src="data:image/png;base64,{data}"'
    image = f'<img alt="{html.escape(alt.strip())}" {source} style="max-width:100%">'
    pyplot.close(fig)
    display(HTML(f"<figure>{image}{below}</figure>"))


def save_figure(fig: Figure, path: str | os.PathLike) -> Path:
    """Write a figure as PNG, whole or not at all, and return its path."""
    return write_atomic(path, _png(fig))


# Pictures


def _pictures(images: Any) -> np.ndarray:
    """Tensor or array [N,3,H,W], [N,H,W,3] or [N,H,W] (maps) -> something `imshow` draws in true colours."""
    array = images.detach().cpu().numpy() if hasattr(images, "detach") else np.asarray(images)
    if array.ndim == 4 and array.shape[1] in (1, 3):
        array = array.transpose(0, 2, 3, 1)
    if array.ndim == 3 or (array.ndim == 4 and array.shape[-1] == 1):
        return array.reshape(array.shape[:3])
    if array.ndim != 4 or array.shape[-1] != 3:
        raise ValueError(f"images have shape {array.shape}; expected [N, 3, H, W], [N, H, W, 3] or [N, H, W]")
    if array.dtype == np.uint8:
        return array
    if not (array.min() >= -1e-3 and array.max() <= 1 + 1e-3):
        span = f"{array.min():.3g} to {array.max():.3g}"
        raise ValueError(f"images run from {span}, not 0 to 1; undo normalisation first (transforms.denormalize)")
    return array.astype(np.float32).clip(0, 1)


def _draw(ax: Axes, picture: np.ndarray) -> None:
    ax.imshow(picture, interpolation="nearest", cmap="cividis")
    ax.set_axis_off()


def image_grid(
    images: Any, titles: Sequence[str] | None = None, ncols: int = 8, colors: Sequence[str] | None = None
) -> Figure:
    """Draw pictures in true colours, or [N, H, W] maps in cividis, in rows of `ncols`, with titles."""
    pictures = _pictures(images)
    if titles is not None and len(titles) != len(pictures):
        raise ValueError(f"{len(pictures)} images but {len(titles)} titles; give one title an image")
    ncols = max(1, min(ncols, len(pictures)))
    rows = max(1, -(-len(pictures) // ncols))
    height, width = pictures.shape[1:3]
    room = min(FULL[0] * DPI / ncols, 260) - GAP
    zoom = max(1, int(2 * room / width)) / 2 if width <= room else room / width  # whole or half dots a pixel
    lines = [line for title in titles or () for line in title.split("\n")]
    depth = max((title.count("\n") + 1 for title in titles or ()), default=0)
    step_x, step_y = zoom * width + GAP, zoom * height + GAP + 20 * depth
    fig, _ = new_figure(((ncols * step_x + GAP) / DPI, (rows * step_y + GAP) / DPI), 0, 0)
    fontsize = np.clip(step_x / max((len(line) for line in lines), default=1), 7, 10)  # 10 dots a letter at 10 pt
    full = np.array([ncols * step_x + GAP, rows * step_y + GAP] * 2)
    for i, picture in enumerate(pictures):
        left, bottom = GAP + i % ncols * step_x, full[1] - (i // ncols + 1) * step_y
        ax = fig.add_axes(np.array([left, bottom, zoom * width, zoom * height]) / full)
        _draw(ax, picture)
        if titles is not None:
            ax.set_title(titles[i], fontsize=fontsize, pad=3, color=colors[i] if colors is not None else "black")
    return fig


def prediction_grid(
    images: Any, predictions: Any, labels: Any, probabilities: Any, class_names: Sequence[str], ncols: int = 6
) -> Figure:
    """Pictures with their predicted class and its probability ([N] or [N, C]); errors name the true class."""
    probabilities = np.asarray(probabilities)
    if probabilities.ndim == 2:
        probabilities = probabilities[np.arange(len(predictions)), np.asarray(predictions)]
    titles, colors = [], []
    for said, true, p in zip(predictions, labels, probabilities, strict=True):
        good = int(said) == int(true)
        truth = "" if good else f"\nis {class_names[int(true)]}"
        titles.append(f"{'✓' if good else '✗'} {100 * p:.0f} %\n{class_names[int(said)]}{truth}")
        colors.append(RIGHT if good else WRONG)
    return image_grid(images, titles, ncols, colors)


def prediction_figure(
    image: Any, probabilities: Any, class_names: Sequence[str], true_label: str | int | None = None, top: int = 5
) -> Figure:
    """One picture in true colours beside the bars of its `top` most probable classes.

    `image` is uint8 [3, H, W] or [H, W, 3], `probabilities` [C]; `true_label` a class name or number.
    """
    probabilities = np.asarray(probabilities, dtype=float)
    order = np.argsort(-probabilities, kind="stable")[:top]
    names = [class_names[i] for i in order]
    true = class_names[true_label] if isinstance(true_label, (int, np.integer)) else true_label
    fig, (left, right) = new_figure((FULL[0], 3.4), 1, 2, width_ratios=(3, 4))
    _draw(left, _pictures(image[None])[0])
    truth = "" if true is None else f", true label {true} {'✓' if true == names[0] else '✗'}"
    fig.suptitle(f"predicted {names[0]}{truth}", fontsize=14)
    drawn = right.barh(names, 100 * probabilities[order], color=[PALETTE[0], *[PALETTE[4]] * (len(names) - 1)])
    right.bar_label(drawn, fmt="{:.1f} %", padding=4, fontsize=11)
    right.invert_yaxis()
    right.set(xlabel="probability (%)", xlim=(0, 118), xticks=range(0, 101, 25))
    right.grid(False, axis="y")
    return fig


def histogram_channels(images: Any) -> Figure:
    """How often each brightness occurs in the red, green and blue channel of uint8 images."""
    pictures = _pictures(images)
    if pictures.dtype != np.uint8 or pictures.ndim != 4:
        raise ValueError(f"images are {pictures.dtype} {pictures.shape}; give uint8 colour images")
    fig, ax = new_figure(FULL)
    value = np.arange(256) / 255
    for channel, (name, color, dash) in enumerate((("red", 1, "-"), ("green", 2, "--"), ("blue", 0, ":"))):
        counts = np.bincount(pictures[..., channel].ravel(), minlength=256)
        mean = np.average(value, weights=counts)
        std = np.average((value - mean) ** 2, weights=counts) ** 0.5
        label = f"{name}: mean {mean:.3f}, std {std:.3f}"
        share = 100 * counts.reshape(-1, 8).sum(axis=1) / counts.sum()
        ax.stairs(share, range(0, 257, 8), color=PALETTE[color], linewidth=2, linestyle=dash, label=label)
    ax.set(xlabel="pixel value (0 dark, 255 bright)", ylabel="share of pixels (%)", xlim=(0, 256), ylim=(0, None))
    ax.legend()
    return fig


# Training


def _curve(ax: Axes, frame: pd.DataFrame, column: str, **look: Any) -> None:
    """Draw a column of a history by epoch, losses in nats, accuracies in per cent; what it lacks is left out."""
    points = frame.reindex(columns=["epoch", column]).apply(pd.to_numeric, errors="coerce").dropna().to_numpy(float)
    if len(points):
        look["marker"] = look["marker"] or ("x" if len(points) == 1 else None)
        values = (100 if column.endswith("accuracy") else 1) * points[:, 1]
        ax.plot(points[:, 0], values, markevery=-(-len(points) // 12), **look)
    ax.xaxis.set_major_locator(MaxNLocator(integer=True, steps=[1, 2, 5, 10], min_n_ticks=1))


def _curves(
    histories: Mapping[str, pd.DataFrame],
    published: pd.DataFrame | None,
    what: str,
    ylabel: str,
    steps: Mapping[str, pd.DataFrame] | None = None,
) -> Figure:
    """Draw `train_`, `val_` and `test_` + `what` of every history that has them; train is solid, `steps` replace it."""
    fig, ax = new_figure(FULL)
    looks = [("published", published, GREY, None)] if published is not None else []
    looks += [(name, frame, PALETTE[i % 4], MARKERS[i % 4]) for i, (name, frame) in enumerate(histories.items())]
    for label, frame, color, marker in looks:
        for part, name, dash in (("train", "train", "-"), ("val", "validation", "--"), ("test", "test", ":")):
            look = {"color": color, "marker": marker, "markerfacecolor": color if part == "train" else "white"}
            if part == "train" and steps and len(steps.get(label, ())):
                _step_curve(ax, steps[label], color=color, label=f"{label}, train")
            else:
                _curve(ax, frame, f"{part}_{what}", linestyle=dash, label=f"{label}, {name}", **look)
    ax.set(xlabel="epoch", ylabel=ylabel)
    if ax.lines:
        if ax.dataLim.width == 0:
            ax.set_xlim(ax.dataLim.x0 - 1, ax.dataLim.x0 + 1)
        fig.legend(loc="outside right upper", frameon=False)
    else:
        ax.set(xticks=[], yticks=[])
        ax.text(0.5, 0.5, "no epochs recorded", transform=ax.transAxes, ha="center", color=GREY)
    return fig


def _step_curve(ax: Axes, frame: pd.DataFrame, **look: Any) -> None:
    """Draw the loss at each step, thin, and its running mean over a 25th of the rows, thick."""
    smooth = frame.loss.rolling(max(1, len(frame) // 25), min_periods=1, center=True).mean()
    ax.plot(frame.epoch, frame.loss, color=look["color"], linewidth=0.6, alpha=0.35)
    ax.plot(frame.epoch, smooth, **look)


def loss_curves(
    histories: Mapping[str, pd.DataFrame],
    published: pd.DataFrame | None = None,
    steps: Mapping[str, pd.DataFrame] | None = None,
) -> Figure:
    """Loss by epoch.

    Parameters
    ----------
    histories : label -> frame with column epoch and any of train_loss, val_loss, test_loss; absent or empty
        columns are left out, a single epoch is drawn as a point.
    published : the published log, drawn in grey.
    steps : label -> `Run.steps`; where it has rows, the training loss is drawn at each step, thin, and its running
        mean over a 25th of them, thick, in place of its mean over each epoch.
    """
    return _curves(histories, published, "loss", "cross-entropy loss (nats)", steps)


def accuracy_curves(histories: Mapping[str, pd.DataFrame], published: pd.DataFrame | None = None) -> Figure:
    """Accuracy in per cent by epoch, from what `loss_curves` takes with columns train_accuracy and so on."""
    return _curves(histories, published, "accuracy", "accuracy (%)")


def redrawn_chart(runs: Mapping[str, pd.DataFrame], published: pd.DataFrame) -> Figure:
    """Test accuracy and test loss by epoch of runs that were evaluated each epoch, beside the published log.

    Parameters
    ----------
    runs : label -> history with the columns epoch, test_accuracy (fraction) and test_loss (nats).
    published : `results.published_log`, drawn in grey as far as the longest run goes.
    """
    fig, axes = new_figure(WIDE, 1, 2)
    longest, colors = max(frame.epoch.max() for frame in runs.values()), (*PALETTE[:4], "black")  # grey is published
    start, label = published[published.epoch <= longest], "published log"
    for ax, column in zip(axes, ("test_accuracy", "test_loss"), strict=True):
        _curve(ax, start, column, color=GREY, linestyle=":", marker="x", label=label)
        for i, (name, frame) in enumerate(runs.items()):
            _curve(ax, frame, column, color=colors[i % 5], marker=MARKERS[i % 5], label=name)
    axes[0].set(xlabel="epoch", ylabel="test accuracy (%)")
    axes[1].set(xlabel="epoch", ylabel="test loss (nats)", ylim=(0, None))
    fig.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", frameon=False, ncols=2)
    return fig


# Any frame


def lines(frame: pd.DataFrame, x: str, y: str, *, hue: str | None = None, size=FULL, **axes: Any) -> Figure:
    """Draw `y` over `x`, a marked line for each `hue`; `axes` are xlabel, ylabel, title, xscale, ..."""
    fig, ax = new_figure(size)
    style: dict[str, Any] = {"marker": "o", "color": PALETTE[0]}
    if hue:
        n = frame[hue].nunique()
        style = {"hue": hue, "style": hue, "palette": list(PALETTE[:n]), "markers": list(MARKERS[:n])}
    sns.lineplot(frame, x=x, y=y, errorbar=None, ax=ax, **style)
    if hue:
        sns.move_legend(ax, "upper left", bbox_to_anchor=(1.01, 1), frameon=False, title=None)
    ax.set(**axes)
    return fig


def bars(frame: pd.DataFrame, x: str, y: str, *, fmt: str = "{:.3g}", **axes: Any) -> Figure:
    """Lying bars of the numbers `x` with their values, one for each name in `y`; `axes` as for `lines`."""
    fig, ax = new_figure((FULL[0], max(2.4, 0.8 + 0.45 * len(frame))))
    sns.barplot(frame, x=x, y=y, errorbar=None, saturation=1, color=PALETTE[0], ax=ax)
    ax.bar_label(ax.containers[0], fmt=fmt, padding=4, fontsize=11)
    ax.margins(x=0.12)
    ax.set(**axes)
    ax.grid(False, axis="y")
    return fig


# Results


def confusion_matrix(matrix: Any, class_names: Sequence[str]) -> Figure:
    """Heat map of counts, rows true and columns predicted; the colour is the share of the row."""
    matrix = np.asarray(matrix).astype(int)
    share = 100 * matrix / np.maximum(matrix.sum(axis=1, keepdims=True), 1)
    fig, ax = new_figure((FULL[0], 6.6))
    bar = {"label": "share of the true class (%)", "ticks": [0, 1, 5, 20, 50, 100]}
    look = {"cmap": "cividis", "norm": PowerNorm(0.5, 0, 100), "square": True, "linewidths": 0.5, "cbar_kws": bar}
    sns.heatmap(share, annot=matrix, fmt="d", annot_kws={"fontsize": 11}, ax=ax, **look)
    ax.set(xlabel="predicted class", ylabel="true class")
    places = np.arange(len(class_names)) + 0.5
    ax.set_xticks(places, class_names, rotation=45, ha="right", rotation_mode="anchor")
    ax.set_yticks(places, class_names, rotation=0)
    return fig


def calibration_curve(curves: Mapping[str, pd.DataFrame], few: int = 20) -> Figure:
    """Accuracy over confidence with 95 % intervals above the number of images in each bin, on a logarithmic scale.

    `curves` maps labels to frames of `results.reliability`. Bins with fewer than `few` images have no point: the
    interval around one half is then wider than 40 points.
    """
    fig, (top, low) = new_figure((FULL[0], 5.6), 2, 1, sharex=True, height_ratios=(3, 1))
    top.plot([0, 100], [0, 100], color=GREY, linestyle="--", label="perfectly calibrated")
    for i, (label, bins) in enumerate(curves.items()):
        full = 100 * bins.loc[bins["count"] >= few, ["confidence", "accuracy", "low", "high"]]
        reach = np.abs(full[["low", "high"]].T - full.accuracy).to_numpy(float)
        look = {"color": PALETTE[i % 5], "marker": MARKERS[i % 5], "markersize": 6, "capsize": 3, "elinewidth": 1}
        top.errorbar(full.confidence, full.accuracy, reach, label=label, linewidth=1.5, **look)
        edges = [*100 * bins.low_edge, 100 * bins.high_edge.iloc[-1]]
        low.stairs(bins["count"], edges, color=PALETTE[i % 5], linewidth=2, baseline=None)
    top.set(ylabel="accuracy (%)", ylim=(0, 104))
    top.legend(loc="lower right")
    low.set(xlabel="confidence: probability of the predicted class (%)", ylabel="images", yscale="log", ylim=(1, None))
    low.set(xlim=(0, 102), yticks=[1, 10, 100, 1000, 10_000], yticklabels=["1", "10", "100", "1,000", "10,000"])
    return fig


def per_class_bars(frame: pd.DataFrame) -> Figure:
    """Accuracy of each class, best first, with its 95 % interval (columns class, accuracy, low, high)."""
    frame = frame.dropna(subset=["accuracy"]).sort_values("accuracy", ascending=False)
    fig, ax = new_figure((FULL[0], max(2.4, 0.9 + 0.36 * len(frame))))
    reach = 100 * np.abs(frame[["low", "high"]].T - frame.accuracy).to_numpy(float)
    ax.barh(frame["class"], 100 * frame.accuracy, xerr=reach, color=PALETTE[0], capsize=4)
    for row, (value, high) in enumerate(zip(frame.accuracy, frame.high, strict=True)):
        ax.annotate(f"{100 * value:.1f}", (100 * high, row), (6, 0), textcoords="offset points", va="center")
    ax.invert_yaxis()
    ax.set(xlabel="accuracy (%), with 95 % interval", xlim=(0, 109), xticks=range(0, 101, 20))
    ax.grid(False, axis="y")
    return fig


def ablation_chart(summary: pd.DataFrame, reach: float = 10) -> Figure:
    """Difference of every variant of `results.summarize` to its question's first, in points, with its 95 % interval.

    A long summary takes two columns. What is more than `reach` points away is an arrow at the edge.
    """
    first = ~summary.question.duplicated()
    middle = first[: len(summary) // 2 + 1][::-1].idxmax() if len(summary) > 24 else len(summary)
    parts = [part for part in (summary[:middle], summary[middle:]) if len(part)]
    height = 0.9 + 0.2 * max(map(len, parts))
    fig, axes = new_figure((WIDE[0], height), 1, len(parts), sharex=True, squeeze=False)
    aside = {"xycoords": ("axes fraction", "data"), "va": "center", "fontsize": 10}
    over = {"boxstyle": "square,pad=0.1", "facecolor": "white", "edgecolor": "none"}  # the line at 0
    for ax, part in zip(axes[0], parts, strict=True):
        ax.axvline(0, color=GREY, linewidth=1.2)
        names = part.question.where(first, part.variant)
        ax.set_yticks(range(len(part)), names, fontsize=10)
        for y, (row, begins, name) in enumerate(
            zip(part.itertuples(), first[part.index], ax.get_yticklabels(), strict=True)
        ):
            if begins:
                name.set(style="italic", color=GREY)
                ax.annotate(f"0: {row.variant}", (0.02, y), color=GREY, style="italic", bbox=over, **aside)
                continue
            ends = 100 * np.array([row.low, row.difference, row.high])
            ax.plot(ends[[0, 2]].clip(-reach, reach), [y, y], color=PALETTE[0])
            inside = abs(ends[1]) <= reach
            ax.plot(ends[1].clip(-reach, reach), y, color=PALETTE[0], marker="o" if inside else "<>"[int(ends[1] > 0)])
            ax.annotate(f"{ends[1]:+.1f}", (1.02, y), **aside)
        ax.set(ylim=(len(part) - 0.4, -0.6))
        ax.grid(False, axis="y")
    fig.supxlabel("difference in validation accuracy (points), with 95 % interval", fontsize=12)
    return fig


def corruption_chart(runs: Mapping[str, pd.DataFrame]) -> Figure:
    """Accuracy by severity, a panel for each corruption; severity 0 is the clean images.

    `runs` maps labels to frames of `results.corrupted_accuracy`; a band is the 95 % interval.
    """
    names = [name for name in next(iter(runs.values())).corruption.unique() if name != "none"]
    rows = -(-len(names) // 5)
    fig, _ = new_figure((WIDE[0], 0.7 + 1.7 * rows), rows, -(-len(names) // rows), sharex=True, sharey=True)
    panels = fig.axes[: len(names)]
    for i, (label, frame) in enumerate(runs.items()):
        for name, ax in zip(names, panels, strict=True):
            part = frame[frame.corruption.isin(("none", name))].sort_values("severity")
            look = {"color": PALETTE[i], "marker": MARKERS[i], "markersize": 4, "linestyle": DASHES[i], "label": label}
            ax.plot(part.severity, 100 * part.accuracy, **look)
            ax.fill_between(part.severity, 100 * part.low, 100 * part.high, color=PALETTE[i], alpha=0.2, linewidth=0)
            ax.set_title(name, fontsize=11)
            ax.set(ylim=(0, 100), xticks=range(6), yticks=(0, 50, 100))
            ax.tick_params(labelsize=10)
    fig.supxlabel("severity; 0 is clean", fontsize=12)
    fig.supylabel("accuracy (%)", fontsize=12)
    if len(runs) > 1:
        fig.legend(*panels[0].get_legend_handles_labels(), loc="outside upper center", ncols=len(runs))
    return fig


def coverage_chart(curves: Mapping[str, pd.DataFrame]) -> Figure:
    """Risk against coverage: the error on the images answered, the surest first, by the share answered.

    `curves` maps labels to frames of `results.selective_accuracy`; their bands low and high are drawn where there are.
    """
    fig, ax = new_figure((FULL[0], 3.8))
    for i, (label, frame) in enumerate(curves.items()):
        rows = 100 * frame[frame.coverage >= 0.2].iloc[::20]
        ax.plot(rows.coverage, 100 - rows.accuracy, color=PALETTE[i % 5], label=label, linestyle=DASHES[i % 4])
        if "low" in rows:
            band = {"color": PALETTE[i % 5], "alpha": 0.2, "linewidth": 0}
            ax.fill_between(rows.coverage, 100 - rows.high, 100 - rows.low, **band)
    ax.set(xlabel="images answered (%), the surest first", ylabel="errors among them (%)", ylim=(0, None))
    ax.legend(loc="upper left")
    return fig
