"""`python -m benchmarks gpu --minutes 12 --out FOLDER`: what a GPU does, checked and measured, the most valuable first.

Needs no network: the runs take CIFAR-10 and weights from the caches that CIFAR_FT_DATA names, everything before them
random images. Each part is a process of its own, is begun only if its time is left, and leaves FOLDER/<part>.json; run
again, also with the folder copied elsewhere, the parts that are done are not repeated.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

from benchmarks.gpu_checks import exact, faulty, half, new_size, no_waiting, resume
from benchmarks.gpu_loops import speed
from benchmarks.gpu_works import device
from cifar_ft import log
from cifar_ft.data import load_cifar10
from cifar_ft.files import write_atomic
from cifar_ft.recipes import get_recipe
from cifar_ft.results import REDRAWN
from cifar_ft.training import describe_machine, fit, own_stream


def run(name: str, out: Path) -> dict:
    """A recipe, or one of the redrawn runs, trained by `fit`; an interrupted one is resumed."""
    recipe, changes, _ = REDRAWN.get(name, (name, "", ""))
    start = time.perf_counter()
    done = fit(get_recipe(recipe, changes), load_cifar10(), out / "runs" / name, resume=True)
    keys = ("test_accuracy", "test_accuracy_ci95", "val_accuracy", "train_seconds", "images_per_second", "weights")
    row = {key: done.metrics.get(key) for key in keys}
    return {**row, "wall_seconds": time.perf_counter() - start, "history": done.history.to_dict("list")}


RUNS = ("modern", "quick", "reference_b32", "reference_b64", "reference_b32_cosine", "untouched_one_cycle")
PARTS: dict[str, tuple[Callable[[Path], dict], int]] = {  # with the seconds that each takes on an H100
    "exact": (lambda out: exact(), 60),
    "no_waiting": (lambda out: no_waiting(), 40),
    "resume": (lambda out: resume(), 60),
    "faulty": (lambda out: faulty(), 30),
    "half": (lambda out: half(), 20),
    "new_size": (lambda out: new_size(), 40),
    "speed_course": (lambda out: speed("course,ceiling"), 60),
    "modern": (lambda out: run("modern", out), 120),
    "quick": (lambda out: run("quick", out), 90),
    "reference_b32": (lambda out: run("reference_b32", out), 60),
    "speed": (lambda out: speed(images=5760, rounds=2), 120),
    "reference_b64": (lambda out: run("reference_b64", out), 60),
    "reference_b32_cosine": (lambda out: run("reference_b32_cosine", out), 60),
    "untouched_one_cycle": (lambda out: run("untouched_one_cycle", out), 60),
}


def everything(minutes: float, out: Path, only: str = "") -> None:
    """All parts that are not done yet, in order, each if its time is left and until the time is over."""
    end = time.monotonic() + 60 * minutes
    out.mkdir(parents=True, exist_ok=True)
    for part in only.split(",") if only else PARTS:
        left = end - time.monotonic()
        if (out / f"{part}.json").exists() or left < PARTS[part][1]:
            print(f"{part}: {'done' if (out / f'{part}.json').exists() else 'no time left'}", flush=True)
            continue
        command = [sys.executable, "-m", "benchmarks.gpu", part, str(out)]
        try:
            subprocess.run(command, check=False, timeout=left)
        except subprocess.TimeoutExpired:
            print(f"{part}: out of time", flush=True)


def main(part: str, out: Path) -> None:
    """One part in this process: print and store what it finds."""
    function, start = PARTS[part][0], time.perf_counter()
    if part not in RUNS:
        log.setLevel("WARNING")
    with own_stream(device()):
        found = function(out)
    found = {"machine": describe_machine(), "seconds": round(time.perf_counter() - start, 1), "found": found}
    write_atomic(out / f"{part}.json", (json.dumps(found, indent=1) + "\n").encode())
    shown = {key: value for key, value in found["found"].items() if key != "history"}
    print(f"{part}, {found['seconds']} s: {json.dumps(shown)}", flush=True)


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
