"""The model for use without PyTorch: one ONNX file, from the pixels of a picture to calibrated probabilities.

What it answers is compared with PyTorch before it is written, and so is the time that it takes afterwards.
"""

from __future__ import annotations

import copy
import json
import os
import timeit
from collections.abc import Callable, Sequence
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cifar_ft import CifarFtError, __version__, log
from cifar_ft.data import CLASSES, load_samples
from cifar_ft.files import check_target, one_line, show_path, write_atomic
from cifar_ft.models import predict_logits
from cifar_ft.predictions.images import SIZE
from cifar_ft.predictions.predictor import Predictor
from cifar_ft.results import probabilities
from cifar_ft.transforms import eval_transform, normalize, resize

TOLERANCE = 1e-3  # largest difference in any probability that `export_onnx` lets pass
BATCH = 64  # pictures at a time in the comparison
TURNS = 3  # of each contender in `latency`


class ExportError(CifarFtError, RuntimeError):
    """A model that cannot be exported, or an exported one that cannot be run or does not answer as it should."""


def export_checked(run: str | os.PathLike, out: str | os.PathLike) -> Path:
    """Export a run's model with `export_onnx`, then measure and log the time that a picture takes.

    Parameters
    ----------
    run : a run folder, or "shipped"
    out : the file to write
    """
    _require_packages()
    check_target(out)  # before the work, not after it
    predictor = Predictor.load(run)
    path = export_onnx(predictor, out)
    device, threads = next(predictor.model.parameters()).device, torch.get_num_threads()
    for size, (onnx, pytorch) in latency(path, predictor).items():
        times = f"{onnx:.2f} ms with ONNX Runtime, {pytorch:.2f} ms with PyTorch ({device})"
        log.info(f"A picture, {size} at a time: {times}, threads: {threads}")
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
    _require_packages()
    path = check_target(path)
    data, images = _serialized(predictor), load_samples().images
    session = _session(data)
    answers = np.concatenate(
        [session.run(["probabilities"], {"images": batch.numpy()})[0] for batch in images.split(BATCH)]
    )
    expected = predictor.predict_proba(images)
    n, same = len(images), int((answers.argmax(1) == expected.argmax(1)).sum())
    difference = float(np.abs(answers - expected).max())
    said = f"{same} of {n} labels as PyTorch, probabilities differ by at most {difference:.1g}"
    if same < n or not difference <= TOLERANCE:  # not a number is no success
        raise ExportError(f"the exported model answers differently ({said}); nothing was written")
    log.info(f"Checked on {n} pictures: {said}")
    write_atomic(path, data)
    log.info(f"Wrote {show_path(path)}, {len(data) / 1e6:.1f} MB")
    return path


def _require_packages() -> None:
    missing = [name for name in ("onnx", "onnxscript", "onnxruntime") if find_spec(name) is None]
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
        self.normalization, self.scaling = predictor.recipe.normalization, predictor.scaling
        self.register_buffer("matrix", _resize_matrix(predictor.recipe.image_size))

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        inputs = normalize(images, self.normalization)
        if len(self.matrix) != SIZE:
            for _ in range(2):  # along the rows, then along the columns
                inputs = F.linear(inputs, self.matrix).transpose(2, 3)
        logits = self.model(inputs)
        return probabilities(logits, *self.scaling), logits


def _resize_matrix(size: int) -> Tensor:
    """The matrix M [size, 32] that makes `transforms.resize(picture, size)` the product M @ picture @ M.T.

    Runtimes disagree in ONNX's own Resize, most of all at the borders when pictures are made smaller
    (pytorch/pytorch#183546); none disagrees in a product.
    """
    lines = torch.eye(SIZE)[:, None, :, None].expand(-1, 1, -1, SIZE)  # picture i is lit in row i alone
    return resize(lines, size)[:, 0, :, 0].T.contiguous()


def _session(model: bytes) -> Any:
    """ONNX Runtime on the CPU, with as many threads as PyTorch."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    try:
        return onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
    except Exception as error:  # of an older version, any
        raise ExportError(f"ONNX Runtime cannot load the exported model: {one_line(error)[:200]}") from error


def latency(
    path: Path, predictor: Predictor, batch_sizes: Sequence[int] = (1, 64), seconds: float = 1.0
) -> dict[int, tuple[float, float]]:
    """Milliseconds a picture takes from its pixels to its probabilities: in ONNX Runtime on the CPU, and in PyTorch.

    Returns the median of each for every batch size, measured for `seconds` each. Both get the same number of threads
    and take turns, so that a machine that is busy for a while disturbs both.
    """
    session, transform, found = _session(path.read_bytes()), eval_transform(predictor.recipe), {}
    for size in batch_sizes:
        images = torch.randint(0, 256, (size, 3, SIZE, SIZE), generator=torch.Generator().manual_seed(0)).byte()
        split, feed = SimpleNamespace(images=images), {"images": images.numpy()}
        answer_onnx = partial(session.run, ["probabilities"], feed)
        answer_torch = partial(predict_logits, predictor.model, split, transform)
        turns = [(_times(answer_onnx, seconds / TURNS), _times(answer_torch, seconds / TURNS)) for _ in range(TURNS)]
        found[size] = tuple(1000 * float(np.median(np.concatenate(times))) / size for times in zip(*turns, strict=True))
    return found


def _times(answer: Callable[[], object], seconds: float) -> list[float]:
    """Seconds of each call, after one that is not counted: as many calls as fit, at least two."""
    answer()
    times: list[float] = []
    while sum(times) < seconds or len(times) < 2:
        times.append(timeit.timeit(answer, number=1))
    return times
