"""Keep what was run here: notebooks with their outputs, runs without their weights, and the shipped model.

`make record` trains with `quick` and keeps notebooks 01 to 04; `make ship` trains with `cpu`, makes that run the
shipped model, and keeps notebooks 05 and 06, which read it.
"""

from __future__ import annotations

import json
import os
import tempfile
from pathlib import Path

from cifar_ft import log, results
from cifar_ft.course import NOTEBOOKS, CourseError, find_notebooks, run_course
from cifar_ft.data import Split, load_cifar10
from cifar_ft.files import checkout, write_atomic
from cifar_ft.predictions import PredictionError, Predictor
from cifar_ft.training import keep_figures
from tools.appraisal import appraise
from tools.publish import publish
from tools.report import recorded_copies, write_report
from tools.ship import export_shipped

MAKING, READING = NOTEBOOKS[:4], NOTEBOOKS[4:]  # notebooks up to the training, and those that read a run


TOLERANCE = 0.0005  # between the accuracy of a run and that of its weights in 16 bits


def record(out: str | Path, root: str | Path | None = None) -> list[Path]:
    """Keep what a finished course run in `out` made up to its training, and its run in results/<recipe>."""
    root, run = _root(root), results.load_run(Path(out) / "run")
    publish(out, root / "notebooks", MAKING)
    folder = root / "results" / run.recipe.name
    keep_figures(run, folder)
    course = json.loads((Path(out) / "course.json").read_text("utf-8"))
    seconds = {key: course[key] for key in ("seconds", "total_seconds")}
    write_atomic(folder / "course.json", (json.dumps(seconds, indent=2) + "\n").encode())
    return write_report(root)


def ship(run_dir: str | Path, root: str | Path | None = None) -> list[Path]:
    """Make a finished run the shipped one, appraise its 16-bit weights, and run and keep the notebooks that read it."""
    root, run = _root(root), results.load_run(run_dir)
    for folder in (root / "results" / run.recipe.name, results.SHIPPED_RUN):
        keep_figures(run, folder)
    export_shipped(run_dir)
    appraise_shipped(root / "results" / "shipped.json", load_cifar10().test)
    return record_reading(root)


def record_reading(root: str | Path | None = None) -> list[Path]:
    """Run the notebooks that read a run, on the shipped one, and keep their outputs."""
    root = _root(root)
    recorded_copies(root)  # which notebook 05 reads
    paths = [path for path in find_notebooks(root / "notebooks") if path.stem in READING]
    kept = os.environ.get("CIFAR_FT_RUNS")
    with tempfile.TemporaryDirectory() as empty:
        os.environ["CIFAR_FT_RUNS"] = str(Path(empty) / "runs")  # no run of this machine is read
        try:
            run_course(Path(empty) / "course", notebooks=paths)
            publish(Path(empty) / "course", root / "notebooks")
        finally:
            os.environ.pop("CIFAR_FT_RUNS")
            if kept is not None:
                os.environ["CIFAR_FT_RUNS"] = kept
    return write_report(root)


def appraise_shipped(out: str | Path, test: Split) -> dict:
    """Measure the shipped model (see `robustness.appraise`), write it to `out`, and compare with its record.

    Raises
    ------
    PredictionError
        When its accuracy is more than 0.05 points off that of its run.
    """
    found = appraise(Predictor.shipped(), test)
    recorded = results.load_run(results.SHIPPED_RUN).accuracy
    write_atomic(Path(out), (json.dumps(found, indent=1) + "\n").encode())
    off = abs(found["accuracy"] - recorded)
    log.info(
        f"recorded {recorded:.2%}, measured now {found['accuracy']:.2%}: "
        f"{100 * off:.3f} points apart (at most {100 * TOLERANCE})"
    )
    if off > TOLERANCE:
        raise PredictionError("the shipped model is not as accurate as its run; ship the run again (make ship)")
    return found


def _root(root: str | Path | None) -> Path:
    root = Path(root) if root else checkout()
    if root is None:
        raise CourseError("recording needs a checkout of the repository; run this from one")
    return root
