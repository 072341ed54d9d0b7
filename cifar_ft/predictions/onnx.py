"""The model for use without PyTorch: one ONNX file, from the pixels of a picture to calibrated probabilities.

What the file answers is compared with PyTorch before it is written, and so is the time that it takes.
"""

from __future__ import annotations

import copy
import json
import os
import timeit
from collections.abc import Callable, Sequence
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pandas as pd
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cifar_ft import CifarFtError, __version__, log
from cifar_ft.data import CLASSES, Split, load_samples
from cifar_ft.files import check_target, one_line, show_path, write_atomic
from cifar_ft.models import predict_logits
from cifar_ft.predictions.images import SIZE
from cifar_ft.predictions.predictor import Predictor
from cifar_ft.transforms import eval_transform, normalize, resize

BATCH = 64  # pictures at a time in `check_onnx`
TOLERANCE = 1e-3  # largest difference in any probability that `export_onnx` lets pass
TURNS = 3  # of each contender in `latency`


class ExportError(CifarFtError, RuntimeError):
    """A model that cannot be exported, or an exported one that cannot be run or does not answer as it should."""


def export_checked(run: str | os.PathLike | None, out: str | os.PathLike) -> Path:
    """Export a run's model with `export_onnx`, then measure and log the time that a picture takes.

    Parameters
    ----------
    run : a run folder; None for the newest run, else the shipped model
    out : the file to write
    """
    _require("onnx", "onnxscript", "onnxruntime")
    check_target(out)  # before the work, not after it
    predictor = Predictor.newest_or_shipped(run or "")
    path = export_onnx(predictor, out)
    for row in latency(path, predictor).itertuples():
        times = f"{row.onnx_ms:.2f} ms with ONNX Runtime, {row.pytorch_ms:.2f} ms with PyTorch ({row.device})"
        log.info(f"A picture, {row.batch_size} at a time: {times}, threads: {row.threads}")
    return path


def export_onnx(predictor: Predictor, path: str | os.PathLike) -> Path:
    """Write a predictor's model as ONNX, once it has answered on the 200 shipped images as PyTorch does.

    Everything between the pixels and the probabilities is in the file. Its input is "images", uint8 [N, 3, 32, 32] for
    any N; its outputs are "probabilities", float32 [N, 10] in class order, calibrated as the predictor's, and "logits",
    float32 [N, 10], as the network gives them. A larger picture has to be made 32 pixels wide first, as
    `predictions.square` does. Metadata, JSON where not plain text: classes, source, recipe (its name), calibration,
    normalization, image_size, cifar_ft.

    Parameters
    ----------
    predictor : Predictor
    path : path of the file, in a folder that exists; replaced only by a whole one

    Raises
    ------
    ExportError
        When a package is not installed, torch is older than 2.6, or when any label differs, or any probability by more
        than 0.001; nothing is written then.
    FileError
        When the file cannot be written.
    """
    _require("onnx", "onnxscript", "onnxruntime")
    path = check_target(path)
    data = _serialized(predictor)
    found = check_onnx(data, predictor, load_samples())
    same, n = found["images"] - found["different_labels"], found["images"]
    said = f"{same} of {n} labels as PyTorch, probabilities differ by at most {found['probability_difference']:.1g}"
    if same < n or not found["probability_difference"] <= TOLERANCE:  # not a number is no success
        raise ExportError(f"the exported model answers differently ({said}); nothing was written")
    log.info(f"Checked on {n} pictures: {said}")
    write_atomic(path, data)
    log.info(f"Wrote {show_path(path)}, {len(data) / 1e6:.1f} MB")
    return path


def _require(*packages: str) -> None:
    missing = [name for name in packages if find_spec(name) is None]
    if missing:
        raise ExportError(f"ONNX needs {' and '.join(missing)}; install with `pip install {' '.join(missing)}`")
    if tuple(int(part) for part in torch.__version__.split(".")[:2]) < (2, 6):
        raise ExportError(f"torch {torch.__version__} cannot export with any number of pictures; use 2.6 or newer")


def _serialized(predictor: Predictor) -> bytes:
    """The whole ONNX file."""
    program = torch.onnx.export(
        _Deployed(predictor).eval(),
        (torch.zeros(2, 3, SIZE, SIZE, dtype=torch.uint8),),
        input_names=["images"],
        output_names=["probabilities", "logits"],
        dynamic_shapes={"images": {0: torch.export.Dim("N")}},
        dynamo=True,
        verbose=False,
    )
    recipe = predictor.recipe
    program.model.metadata_props.update(
        classes=json.dumps(CLASSES),
        source=predictor.source,
        recipe=recipe.name,
        calibration=json.dumps(predictor.calibration),
        normalization=recipe.normalization,
        image_size=str(recipe.image_size),
        cifar_ft=__version__,
    )
    proto = program.model_proto
    graph = proto.graph
    # What the exporter notes of each node: lines of code, with the folders of the machine it ran on.
    for part in (graph, *graph.node, *graph.input, *graph.output, *graph.value_info, *graph.initializer):
        part.ClearField("metadata_props")
        part.ClearField("doc_string")
    return proto.SerializeToString()


class _Deployed(nn.Module):
    """uint8 [N, 3, 32, 32] to calibrated probabilities and logits, float32 [N, 10] each; a copy, on the CPU."""

    def __init__(self, predictor: Predictor):
        super().__init__()
        self.model = copy.deepcopy(predictor.model).cpu().requires_grad_(False)
        self.normalization, self.temperature = predictor.recipe.normalization, predictor.temperature
        self.register_buffer("matrix", _resize_matrix(predictor.recipe.image_size))

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        inputs = normalize(images, self.normalization)
        if len(self.matrix) != SIZE:
            for _ in range(2):  # along the rows, then along the columns
                inputs = F.linear(inputs, self.matrix).transpose(2, 3)
        logits = self.model(inputs)
        return (logits / self.temperature).softmax(dim=1), logits


def _resize_matrix(size: int) -> Tensor:
    """The matrix M [size, 32] that makes `transforms.resize(picture, size)` the product M @ picture @ M.T.

    Runtimes disagree in ONNX's own Resize, most of all at the borders when pictures are made smaller
    (pytorch/pytorch#183546); none disagrees in a product.
    """
    lines = torch.eye(SIZE)[:, None, :, None].expand(-1, 1, -1, SIZE)  # picture i is lit in row i alone
    return resize(lines, size)[:, 0, :, 0].T.contiguous()


def _session(model: str | os.PathLike | bytes) -> Any:
    """ONNX Runtime on the CPU, with as many threads as PyTorch."""
    _require("onnxruntime")
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    source = model if isinstance(model, bytes) else os.path.expanduser(model)
    try:
        return onnxruntime.InferenceSession(source, options, providers=["CPUExecutionProvider"])
    except Exception as error:  # a damaged file can cause any
        name = "the model" if isinstance(model, bytes) else show_path(source)
        raise ExportError(f"ONNX Runtime cannot load {name} ({one_line(error)[:200]}); export it again") from error


def check_onnx(model: str | os.PathLike | bytes, predictor: Predictor, images: Tensor | Split) -> dict[str, Any]:
    """Compare an exported model, run by ONNX Runtime, with the predictor that it was made from.

    Parameters
    ----------
    model : the ONNX file, or its bytes
    predictor : Predictor
    images : uint8 Tensor [N, 3, 32, 32], or a Split

    Returns
    -------
    dict
        images (N), probability_difference and logit_difference (the largest of all N x 10), different_labels (a
        number) and agreement (the share of equal labels).

    Raises
    ------
    ExportError
        When onnxruntime is not installed, or the file is damaged.
    """
    images = images.images if isinstance(images, Split) else images
    session, wanted = _session(model), ["probabilities", "logits"]
    batches = [session.run(wanted, {"images": batch.cpu().numpy()}) for batch in images.split(BATCH)]
    probabilities, logits = (np.concatenate(parts) for parts in zip(*batches, strict=True))
    expected = predictor.predict_proba(images)
    different = int((probabilities.argmax(1) != expected.argmax(1)).sum())
    return {
        "images": len(images),
        "probability_difference": float(np.abs(probabilities - expected).max()),
        "logit_difference": float(np.abs(logits - predictor.logits(images).numpy()).max()),
        "different_labels": different,
        "agreement": 1 - different / len(images),
    }


def latency(
    model: str | os.PathLike | bytes, predictor: Predictor, batch_sizes: Sequence[int] = (1, 64), seconds: float = 1.0
) -> pd.DataFrame:
    """Time a picture takes from its pixels to its probabilities, in ONNX Runtime on the CPU and in PyTorch.

    Both get the same number of threads and take turns, so that a machine that is busy for a while disturbs both.

    Parameters
    ----------
    model : the ONNX file, or its bytes
    predictor : Predictor
        Measured on the device where its model is.
    batch_sizes : numbers of pictures given at once
    seconds : time for each contender and batch size

    Returns
    -------
    DataFrame
        One row for each batch size: batch_size, pytorch_ms and onnx_ms (median milliseconds a picture), speedup
        (pytorch_ms / onnx_ms), threads and device (of PyTorch).
    """
    session, transform, rows = _session(model), eval_transform(predictor.recipe), []
    for size in batch_sizes:
        images = torch.randint(0, 256, (size, 3, SIZE, SIZE), generator=torch.Generator().manual_seed(0)).byte()
        split, feed = SimpleNamespace(images=images), {"images": images.numpy()}
        contenders = {
            "pytorch_ms": lambda split=split: predict_logits(predictor.model, split, transform).softmax(dim=1),
            "onnx_ms": lambda feed=feed: session.run(["probabilities"], feed),
        }
        times: dict[str, list[float]] = {name: [] for name in contenders}
        for _ in range(TURNS):
            for name, answer in contenders.items():
                times[name] += _times(answer, seconds / TURNS)
        rows.append({"batch_size": size, **{name: 1000 * float(np.median(t)) / size for name, t in times.items()}})
    frame = pd.DataFrame(rows)
    device = str(next(predictor.model.parameters()).device)
    return frame.assign(speedup=frame.pytorch_ms / frame.onnx_ms, threads=torch.get_num_threads(), device=device)


def _times(answer: Callable[[], object], seconds: float) -> list[float]:
    """Seconds of each call, after one that is not counted: as many calls as fit, at least two."""
    answer()
    times: list[float] = []
    while sum(times) < seconds or len(times) < 2:
        times.append(timeit.timeit(answer, number=1))
    return times
