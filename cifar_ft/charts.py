"""Charts of the measurements in `results/`: speed, and what it costs to grow.

Parsed JSON in, a matplotlib `Figure` out, in the look of `plots`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import median

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from cifar_ft.plots import GREY, HATCHES, MARKERS, PALETTE, new_figure

CONTENDERS = {
    "cifar_ft": "this course",
    "fastai": "fastai",
    "trainer": "HF Trainer",
    "timm": "timm",
    "plain": "plain PyTorch",
}


def comparison_chart(runs: Sequence[Mapping]) -> Figure:
    """What a user would pick instead, beside the course: images a second, and accuracy against training time.

    Parameters
    ----------
    runs : rows of `results/benchmarks.json`, section compare: name, lr, epochs, train_seconds, images_per_second,
        val_accuracy and test_accuracy. The first run of a name has its own learning rate; a filled marker is the one
        that validation picks; a run with more epochs than the others stands for equal wall time.
    """
    fig, (left, right) = new_figure((9.5, 4.2), 1, 2, gridspec_kw={"width_ratios": (1, 1.35)})
    work = min(run["epochs"] for run in runs)
    for place, (name, label) in enumerate(CONTENDERS.items()):
        mine = [run for run in runs if run["name"] == name and run["epochs"] == work]
        speed = median(run["images_per_second"] for run in mine)
        left.barh(label, speed, color=PALETTE[place], hatch=HATCHES[place], edgecolor="white")
        left.text(speed, place, f" {speed:.0f}", va="center")
        best, style = max(mine, key=lambda run: run["val_accuracy"]), {"color": PALETTE[place], "s": 70}
        style["marker"] = MARKERS[place]
        _dot(right, mine[0], **style, facecolor="white")
        _dot(right, best, **style, label=label)
        for longer in (run for run in runs if run["name"] == name and run["epochs"] > work):
            _dot(right, longer, **style)
            place_text = (longer["train_seconds"], 100 * longer["test_accuracy"])
            offset = {"xytext": (-8, -4), "textcoords": "offset points", "ha": "right"}
            right.annotate(f"{longer['epochs']} epochs", place_text, **offset)
    left.invert_yaxis()
    left.margins(x=0.18)
    left.set(xlabel="images per second in training")
    left.grid(visible=False, axis="y")
    right.set(xlabel="training time (s)", ylabel="test accuracy (%)", xlim=(0, None))
    right.margins(y=0.12)
    right.legend(
        title="open: default learning rate\nfilled: the best of three", fontsize="small", title_fontsize="small"
    )
    return fig


def _dot(axes: Axes, run: Mapping, color: str, facecolor: str | None = None, **style) -> None:
    axes.scatter(
        run["train_seconds"], 100 * run["test_accuracy"], edgecolor=color, facecolor=facecolor or color, **style
    )


def growth_chart(found: Mapping) -> Figure:
    """Seconds and memory of training against images, image size and batch size, measured points and fitted lines.

    Parameters
    ----------
    found : section growth of `results/benchmarks.json`, with `cases` and `fits`.
    """
    fig, axes = new_figure((9.5, 6.6), 2, 2)
    cases, fits = found["cases"], found["fits"]

    def panel(place: Axes, kept, x, y, fit: str, xlabel: str, ylabel: str) -> None:
        rows = [case for case in cases if kept(case)]
        place.scatter([x(case) for case in rows], [y(case) for case in rows], color=PALETTE[0], s=45, zorder=3)
        slope, intercept = fits[fit]["slope"], fits[fit]["intercept"]
        xs = np.linspace(0, max(x(case) for case in rows), 50)
        label = f"{slope:.3g} x {intercept:+.3g}, R² {fits[fit]['r_squared']:.3f}"
        place.plot(xs, slope * xs + intercept, color=GREY, linestyle="--", label=label)
        place.set(xlabel=xlabel, ylabel=ylabel, ylim=(0, None))
        place.legend(fontsize="small")

    def per_1000(case) -> float:
        return 1000 * case["epoch_seconds"] / case["images"]

    small = min(case["images"] for case in cases if case["image_size"] != 64)
    panel(
        axes[0, 0], lambda c: (c["image_size"], c["batch_size"]) == (64, 64), lambda c: c["images"],
        lambda c: c["epoch_seconds"], "epoch_seconds_by_images", "images (64 px, batch 64)", "seconds per epoch",
    )  # fmt: skip
    panel(
        axes[0, 1], lambda c: (c["images"], c["batch_size"]) == (small, 64), lambda c: (c["image_size"] / 64) ** 2,
        per_1000, "seconds_per_1000_by_area", "area of the image (64 x 64 px = 1)", "seconds per 1,000 images",
    )  # fmt: skip
    panel(
        axes[1, 0], lambda c: (c["images"], c["image_size"]) == (small, 64), lambda c: 1000 / c["batch_size"],
        per_1000, "seconds_per_1000_by_steps", "steps per 1,000 images (1,000 / batch size)",
        "seconds per 1,000 images",
    )  # fmt: skip
    panel(
        axes[1, 1], lambda c: (c["images"], c["image_size"]) == (small, 64), lambda c: c["batch_size"],
        lambda c: c["peak_memory_mb"], "memory_mb_by_batch", "batch size (64 px)", "peak memory (MB)",
    )  # fmt: skip
    return fig


def ablation_chart(summary: pd.DataFrame) -> Figure:
    """Validation accuracy of every variant, mean and standard deviation over seeds, in blocks of a question each.

    Parameters
    ----------
    summary : `studies.summarize`.
    """
    rows = [*summary.to_dict("records")]
    places, ticks, y, last = [], [], 0.0, None
    for row in rows:
        y += 1 if row["question"] == last else 1.9
        last = row["question"]
        places.append(y)
    fig, ax = new_figure((9.0, 1.0 + 0.27 * places[-1]))
    for y, row in zip(places, rows, strict=True):
        base = row["changes"] == ""
        color = PALETTE[0] if row["distinguishable"] or base else GREY
        look = {"marker": "s" if base else "o", "markerfacecolor": color if row["distinguishable"] or base else "white"}
        ax.errorbar(100 * row["mean"], y, xerr=100 * row["std"], color=color, capsize=3, markersize=7, **look)
        ax.annotate(f"{100 * row['mean']:.1f}", (1.01, y), xycoords=("axes fraction", "data"), va="center", fontsize=10)
        ticks.append(row["variant"])
    for y, row, before in zip(places, rows, [None, *rows], strict=False):
        if before is None or before["question"] != row["question"]:
            ax.annotate(
                row["question"], (0, y - 0.9), xycoords=("axes fraction", "data"), va="center", fontsize=10, color=GREY,
                xytext=(4, 0), textcoords="offset points", style="italic",
            )  # fmt: skip
    ax.set_yticks(places, ticks, fontsize=10)
    ax.set(ylim=(places[-1] + 0.8, places[0] - 1.5), xlabel="validation accuracy (%), mean and deviation over seeds")
    ax.grid(visible=False, axis="y")
    return fig


def corruption_chart(frame: pd.DataFrame, clean: float) -> Figure:
    """Accuracy under each corruption against its level, one panel each, with the clean accuracy as a dashed line.

    Parameters
    ----------
    frame : `robustness.corrupted_accuracy`.
    clean : accuracy without corruption, a fraction.
    """
    kinds = list(dict.fromkeys(frame.corruption))
    fig, axes = new_figure((10.0, 2.9), 1, len(kinds), sharey=True)
    for ax, name in zip(axes, kinds, strict=True):
        part = frame[frame.corruption == name]
        ax.axhline(100 * clean, color=GREY, linestyle="--", linewidth=1.2)
        ax.plot(range(len(part)), 100 * part.accuracy, color=PALETTE[0], marker="o")
        ax.fill_between(range(len(part)), 100 * part.low, 100 * part.high, color=PALETTE[0], alpha=0.2)
        ax.set_xticks(range(len(part)), [f"{level:g}" for level in part.level], fontsize=9)
        ax.set(title=name, xlabel=part.unit.iloc[0], ylim=(0, 102))
        ax.xaxis.label.set_size(9)
    axes[0].set(ylabel="test accuracy (%)")
    return fig


def coverage_chart(frame: pd.DataFrame) -> Figure:
    """Accuracy on the images answered against the share answered, the surest first (`metrics.selective_accuracy`)."""
    fig, ax = new_figure((6.4, 3.8))
    rows = frame[frame.coverage >= 0.2]
    ax.plot(100 * rows.coverage, 100 * rows.accuracy, color=PALETTE[0])
    for share in (0.8, 0.9, 1):
        row = frame.loc[(frame.coverage - share).abs().idxmin()]
        ax.plot(100 * row.coverage, 100 * row.accuracy, "o", color=PALETTE[0])
        text, place = f"{100 * row.accuracy:.1f} % of {row.coverage:.0%}", (100 * row.coverage, 100 * row.accuracy)
        ax.annotate(text, place, xytext=(-8, -14), textcoords="offset points", ha="right")
    ax.margins(y=0.15)
    ax.set(xlabel="images answered (%), the surest first", ylabel="accuracy on them (%)")
    return fig


def redrawn_chart(runs: Mapping[str, pd.DataFrame], published: pd.DataFrame) -> Figure:
    """Test accuracy and test loss by epoch of runs that were scored each epoch, beside the published log.

    Parameters
    ----------
    runs : label -> history with the columns epoch, test_accuracy (fraction) and test_loss (nats).
    published : `results.published_log`, drawn in grey as far as the longest run goes.
    """
    fig, axes = new_figure((10.0, 4.6), 1, 2)
    longest, colors = max(frame.epoch.max() for frame in runs.values()), (*PALETTE[:4], "black")  # grey is published
    start = published[published.epoch <= longest]
    for ax, column, factor in zip(axes, ("test_accuracy", "test_loss"), (100, 1), strict=True):
        label = "published log (whole ResNet-50)"
        ax.plot(start.epoch, factor * start[column], color=GREY, linestyle=":", marker="x", label=label)
        for place, (label, frame) in enumerate(runs.items()):
            style = {"color": colors[place % len(colors)], "marker": MARKERS[place % len(MARKERS)]}
            ax.plot(frame.epoch, factor * frame[column], markevery=-(-len(frame) // 12), label=label, **style)
        ax.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes[0].set(xlabel="epoch", ylabel="test accuracy (%)")
    axes[1].set(xlabel="epoch", ylabel="test loss (nats)", ylim=(0, None))
    fig.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", frameon=False, ncols=2)
    return fig
