"""Run the course or train the shipped model on this machine, and keep what came out in the repository.

`python -m tools.record quick` runs the course with `quick` and keeps notebooks 01 to 04 and the run; `ship` trains
`cpu`, makes it the shipped model, measures it, and goes on with `notebooks`, which runs and keeps 05 to 07, the
notebooks that read the shipped model.
"""

from __future__ import annotations

import datetime
import json
import os
import shutil
import tempfile
from pathlib import Path
from typing import Annotated
from unittest import mock

import torch
import typer
from safetensors.torch import save as to_safetensors

from cifar_ft import __version__, predictions, results
from cifar_ft.course import NOTEBOOKS, find_notebooks, run_course
from cifar_ft.data import CLASSES, load_cifar10
from cifar_ft.files import full_path, show_path, write_atomic
from cifar_ft.predictions import PredictionError, Predictor
from cifar_ft.recipes import get_recipe
from cifar_ft.training import fit
from tools.publish import publish, publish_run, without_paths
from tools.report import ROOT, write_report
from tools.study import measure_shipped

TRAINING, READING = NOTEBOOKS[:4], NOTEBOOKS[4:]  # notebooks up to the training, and those that read a run
SHIPPED_BYTES = 10_000_000
Build = Annotated[
    Path, typer.Option("--out", parser=full_path, help="Folder of the run; a finished one is not repeated.")
]

app = typer.Typer(help=__doc__, no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False)


@app.command()
def quick() -> None:
    """Run the course with `quick` on an idle machine; keep notebooks 01 to 04, the run and the report."""
    out = ROOT / "build" / "course"
    shutil.rmtree(out, ignore_errors=True)
    run_course(out, {"RECIPE": "quick"})
    keep_course(out)


@app.command()
def ship(out: Build = ROOT / "build" / "cpu") -> None:
    """Train `cpu` on an idle machine; keep it as the shipped model, its measurements, notebooks 05 to 07."""
    run, data = results.load_run(out) if (out / "metrics.json").exists() else None, load_cifar10()
    run = run or fit(get_recipe("cpu"), data, out, resume=(out / "config.json").exists())
    publish_run(run, results.SHIPPED_RUN)
    export_shipped(out)
    measure_shipped(ROOT / "results" / "shipped.json", data.test)
    notebooks()


@app.command()
def notebooks() -> None:
    """Run the notebooks that read a run, on the shipped one, and keep their outputs."""
    keep_reading(ROOT)


def keep_course(out: Path, root: Path = ROOT) -> list[Path]:
    """Keep what a finished course run in `out` made up to its training, and its run in results/<recipe>."""
    run = results.load_run(out / "run")
    publish(out, root / "notebooks", TRAINING)
    folder = root / "results" / run.recipe.name
    publish_run(run, folder)
    course = json.loads((out / "course.json").read_text("utf-8"))
    seconds = {key: course[key] for key in ("seconds", "total_seconds")}
    write_atomic(folder / "course.json", (json.dumps(seconds, indent=2) + "\n").encode())
    return write_report(root)


def keep_reading(root: Path) -> list[Path]:
    """Run the notebooks that read a run, where there is none but the shipped one, and keep their outputs."""
    paths = [path for path in find_notebooks(root / "notebooks") if path.stem in READING]
    with tempfile.TemporaryDirectory() as empty:
        with mock.patch.dict(os.environ, CIFAR_FT_RUNS=str(Path(empty) / "runs")):
            run_course(Path(empty) / "course", notebooks=paths)
        publish(Path(empty) / "course", root / "notebooks", READING)
    return write_report(root)


def export_shipped(run_dir: str | Path, target: str | Path | None = None) -> Path:
    """Write a run's model as the one that the package ships: half precision, below 10 MB, with its origin.

    Parameters
    ----------
    run_dir : path of a finished run
    target : path, optional
        By default the package's own `assets/model.safetensors`.

    Returns
    -------
    Path
        The file. Its metadata, JSON where not plain text: recipe, backbone, weights (what training started
        from, with digest and licence), data (digest), metrics (test accuracy with its 95 % interval),
        calibration (as in metrics.json), classes, created, cifar_ft.

    Raises
    ------
    PredictionError
        When the model is too large or does not fit half precision.
    """
    run, state = results.load_run(run_dir), {}
    for name, values in Predictor.from_run(run_dir).model.state_dict().items():
        state[name] = (values.half() if values.is_floating_point() else values).cpu().contiguous()
        if values.is_floating_point() and not torch.isfinite(state[name]).all():
            raise PredictionError(f"{name} has values too large for half precision; this model cannot be shipped")
    recipe, weights = without_paths(run)
    metrics = {
        "test_accuracy": run.accuracy,
        "test_accuracy_ci95": results.wilson_interval(run.correct, len(run.labels)),
        "test_images": len(run.labels),
    }
    described = {
        "recipe": recipe,
        "weights": {key: weights.get(key) for key in ("weights", "source", "sha256", "licence")},
        "data": run.config.get("data", {}),
        "metrics": metrics,
        "calibration": run.metrics.get("calibration"),
        "classes": CLASSES,
    }
    plain = {"format": "pt", "backbone": weights["backbone"], "cifar_ft": __version__}
    plain |= {"strides": weights["strides"]} if weights.get("strides") else {}
    plain["created"] = datetime.date.today().isoformat()
    content = to_safetensors(state, plain | {key: json.dumps(value) for key, value in described.items()})
    if len(content) > SHIPPED_BYTES:
        raise PredictionError(
            f"the model of {show_path(run.path)} takes {len(content) / 1e6:.1f} MB and may take "
            f"{SHIPPED_BYTES / 1e6:.0f}; ship a run with backbone=efficientnet_lite0"
        )
    return write_atomic(Path(target or predictions.SHIPPED), content)


if __name__ == "__main__":
    app()
