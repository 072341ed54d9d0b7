"""The model that the package ships: written from a run, in half precision, with its origin."""

from __future__ import annotations

import datetime
import json
import os
from pathlib import Path

from safetensors.torch import save as to_safetensors

from cifar_ft import __version__, predictions
from cifar_ft.data import CLASSES
from cifar_ft.files import replacing, show_path
from cifar_ft.predictions import PredictionError, Predictor, not_finite
from cifar_ft.results import load_run, wilson_interval

SHIPPED_BYTES = 10_000_000


def export_shipped(run_dir: str | os.PathLike, target: str | os.PathLike | None = None) -> Path:
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
        calibration (temperature and lowest familiar energy), classes, created, cifar_ft.

    Raises
    ------
    PredictionError
        When the model is too large or does not fit half precision.
    """
    target = Path(os.path.expanduser(target)) if target else predictions.SHIPPED
    run, model = load_run(Path(os.path.expanduser(run_dir))), Predictor.from_run(run_dir).model
    state = {
        name: (values.half() if values.is_floating_point() else values).cpu().contiguous()
        for name, values in model.state_dict().items()
    }
    if large := not_finite(state):
        raise PredictionError(f"{large} has values too large for half precision; this model cannot be shipped")
    data = to_safetensors(state, _metadata(run))
    if len(data) > SHIPPED_BYTES:
        sizes = f"{len(data) / 1e6:.1f} MB and may take {SHIPPED_BYTES / 1e6:.0f}"
        advice = "ship a run with backbone=efficientnet_lite0"
        raise PredictionError(f"the model of {show_path(run.path)} takes {sizes}; {advice}")
    with replacing(target) as temporary:
        temporary.write_bytes(data)
    return target


def _metadata(run) -> dict[str, str]:
    recipe, weights, n = run.recipe, dict(run.config["weights"]), len(run.labels)
    if recipe.weights not in ("imagenet", "none"):  # a path of this machine says nothing elsewhere
        recipe = recipe.replace(weights=Path(recipe.weights).name)
        weights["source"] = f"the file {recipe.weights}"
    metrics = {
        "test_accuracy": run.accuracy,
        "test_accuracy_ci95": wilson_interval(run.correct, n),
        "test_images": n,
    }
    return {
        "format": "pt",
        "recipe": json.dumps(recipe.to_dict()),
        "backbone": weights["backbone"],
        "weights": json.dumps({key: weights.get(key) for key in ("weights", "source", "sha256", "licence")}),
        "data": json.dumps(run.config.get("data", {})),
        "metrics": json.dumps(metrics),
        "calibration": json.dumps(run.metrics.get("calibration")),
        "classes": json.dumps(CLASSES),
        "created": datetime.date.today().isoformat(),
        "cifar_ft": __version__,
    }
