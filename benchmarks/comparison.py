"""The course beside what a user would pick instead: the plan of runs, and what follows from them."""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable
from pathlib import Path

# Each contender's learning rates: its own default first, then two around the values usual for its optimiser.
LEARNING_RATES = {
    "cifar_ft": (0.001, 0.002, 0.0005),
    "plain": (0.001, 0.01, 0.03),
    "timm": (0.025, 0.01, 0.06),
    "trainer": (5e-5, 3e-4, 1e-3),
    "fastai": (2e-3, 5e-3, 1e-2),
}


def plan() -> list[dict]:
    """The runs in turns: a round with the first learning rate of each contender, then the second, then the third."""
    return [{"name": name, "lr": rates[i]} for i in range(3) for name, rates in LEARNING_RATES.items()]


def run_contender(name: str, lr: float, images: int, size: int, epochs: int) -> dict:
    """Train one contender in a process of its own and give what it wrote."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "out.json"
        command = [sys.executable, "-m", "benchmarks.contenders", name, "--out", str(out), "--test"]
        for option, value in {"lr": lr, "images": images, "size": size, "epochs": epochs}.items():
            command += [f"--{option}", str(value)]
        subprocess.run(command, check=True)
        return json.loads(out.read_text("utf-8"))


def compare(
    images: int,
    size: int,
    epochs: int,
    known: Iterable[dict] = (),
    keep: Callable[[list[dict]], None] = lambda runs: None,
    run: Callable[..., dict] = run_contender,
) -> list[dict]:
    """All runs of the plan, then the course alone for the time of the quickest other; `keep` is called after each.

    Runs among `known` with the same name, learning rate and amount of work are taken over, not repeated.
    """
    known, runs = list(known), []

    def take(name: str, lr: float, epochs: int) -> None:
        task = {"name": name, "lr": lr, "images": images, "size": size, "epochs": epochs}
        same = [old for old in known if task.items() <= old.items()]
        runs.append(same[0] if same else run(**task))
        keep(runs)

    for item in plan():
        take(**item, epochs=epochs)
    best, speeds = tuned(runs), speed(runs)
    quickest = max(each for name, each in speeds.items() if name != "cifar_ft")
    take("cifar_ft", best["cifar_ft"]["lr"], int(epochs * speeds["cifar_ft"] / quickest))
    return runs


def speed(runs: list[dict]) -> dict[str, float]:
    """Images a second of each contender, the median of its runs with the smallest number of epochs."""
    work = min(run["epochs"] for run in runs)
    return {
        name: statistics.median(r["images_per_second"] for r in runs if r["name"] == name and r["epochs"] == work)
        for name in LEARNING_RATES
    }


def tuned(runs: list[dict]) -> dict[str, dict]:
    """Of each contender the run with the best accuracy on validation, among those with equal epochs."""
    work = min(run["epochs"] for run in runs)
    return {
        name: max((r for r in runs if r["name"] == name and r["epochs"] == work), key=lambda run: run["val_accuracy"])
        for name in LEARNING_RATES
    }


def default(runs: list[dict]) -> dict[str, dict]:
    """Of each contender the run with its own learning rate."""
    return {name: next(r for r in runs if r["name"] == name) for name in LEARNING_RATES}


def verdict(runs: list[dict]) -> list[str]:
    """The lines to print: ratios of speed, accuracy as they come and tuned, and after equal wall time."""
    speeds, best, first, longer = speed(runs), tuned(runs), default(runs), runs[-1]
    lines = []
    for name in LEARNING_RATES:
        ratio = f", cifar_ft / {name} {speeds['cifar_ft'] / speeds[name]:.2f}x" if name != "cifar_ft" else ""
        lines.append(
            f"{name}: {speeds[name]:.0f} images/s{ratio}; test {first[name]['test_accuracy']:.1%} with its own "
            f"lr {first[name]['lr']:g}, {best[name]['test_accuracy']:.1%} with lr {best[name]['lr']:g}"
        )
    others = [best[name]["train_seconds"] for name in LEARNING_RATES if name != "cifar_ft"]
    lines.append(
        f"equal wall time: cifar_ft {longer['epochs']} epochs in {longer['train_seconds']:.0f} s, "
        f"test {longer['test_accuracy']:.1%}; the others took {min(others):.0f} to {max(others):.0f} s"
    )
    return lines
