"""The charts of the benchmarks, for README and docs: what else there is beside the course, and how training grows."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import median

import numpy as np
import pandas as pd
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
        best = max(mine, key=lambda run: run["val_accuracy"])
        longer = [run for run in runs if run["name"] == name and run["epochs"] > work]
        for run, face in ((mine[0], "white"), (best, PALETTE[place]), *((run, PALETTE[place]) for run in longer)):
            seconds, accuracy = run["train_seconds"], 100 * run["test_accuracy"]
            style = {"s": 70, "marker": MARKERS[place], "edgecolor": PALETTE[place], "facecolor": face}
            right.scatter(seconds, accuracy, label=label if run is best and face != "white" else None, **style)
            if run in longer:
                offset = {"xytext": (-8, -4), "textcoords": "offset points", "ha": "right"}
                right.annotate(f"{run['epochs']} epochs", (seconds, accuracy), **offset)
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


def growth_chart(found: Mapping) -> Figure:
    """Seconds and memory of training against images, image size and batch size, measured points and fitted lines.

    Parameters
    ----------
    found : section growth of `results/benchmarks.json`, with `cases` and `fits`.
    """
    fig, axes = new_figure((9.5, 6.6), 2, 2)
    cases = pd.DataFrame(found["cases"])
    cases["per_1000"] = 1000 * cases.epoch_seconds / cases.images
    cases["area"], cases["steps"] = (cases.image_size / 64) ** 2, 1000 / cases.batch_size
    # All three series start from the same case: the fewest images of those that vary the size, 64 px, batch 64.
    of_64, batch_64 = cases.image_size == 64, cases.batch_size == 64
    small = cases.images == cases.images[~of_64].min()
    units = {"epoch_seconds": "seconds per epoch", "peak_memory_mb": "peak memory (MB)"}
    panels = (
        (of_64 & batch_64, "images", "epoch_seconds", "epoch_seconds_by_images", "images (64 px, batch 64)"),
        (small & batch_64, "area", "per_1000", "seconds_per_1000_by_area", "area of the image (64 x 64 px = 1)"),
        (small & of_64, "steps", "per_1000", "seconds_per_1000_by_steps", "steps per 1,000 images"),
        (small & of_64, "batch_size", "peak_memory_mb", "memory_mb_by_batch", "batch size (64 px)"),
    )
    for place, (chosen, x, y, name, xlabel) in zip(axes.flat, panels, strict=True):
        rows, fit = cases[chosen], found["fits"][name]
        place.scatter(rows[x], rows[y], color=PALETTE[0], s=45, zorder=3)
        xs = np.linspace(0, rows[x].max(), 50)
        label = f"{fit['slope']:.3g} x {fit['intercept']:+.3g}, R² {fit['r_squared']:.3f}"
        place.plot(xs, fit["slope"] * xs + fit["intercept"], color=GREY, linestyle="--", label=label)
        place.set(xlabel=xlabel, ylabel=units.get(y, "seconds per 1,000 images"), ylim=(0, None))
        place.legend(fontsize="small")
    return fig
