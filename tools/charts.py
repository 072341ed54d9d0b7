"""TODO tools.charts"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import median

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

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
