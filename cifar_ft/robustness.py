"""What plain accuracy does not say: corrupted pictures, doubtful test images, and answers that may be withheld.

The corruptions are self-made and simple: each acts on the 32-pixel images, before they are resized.
"""

from __future__ import annotations

import io
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pandas as pd
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from cifar_ft.data import Split
from cifar_ft.evaluation import predict_logits
from cifar_ft.metrics import accuracy_text, calibration, energy, selective_accuracy, wilson_interval
from cifar_ft.predictions import Predictor
from cifar_ft.results import test_issues
from cifar_ft.transforms import eval_transform


def blur(images: Tensor, sigma: float) -> Tensor:
    """Gaussian blur of uint8 images [N, 3, H, W]; `sigma` in pixels, edges continued."""
    if sigma == 0:
        return images
    reach = max(1, round(3 * sigma))
    kernel = torch.exp(-0.5 * (torch.arange(-reach, reach + 1) / sigma) ** 2)
    kernel = (kernel / kernel.sum()).repeat(3, 1)
    padded = F.pad(images.float(), (reach,) * 4, mode="replicate")
    rows = F.conv2d(padded, kernel[:, None, :, None], groups=3)
    return _to_uint8(F.conv2d(rows, kernel[:, None, None, :], groups=3))


def noise(images: Tensor, std: float) -> Tensor:
    """Independent Gaussian noise on every value of uint8 images; `std` in grey levels, the same draw each time."""
    generator = torch.Generator().manual_seed(0)
    return _to_uint8(images.float() + std * torch.randn(images.shape, generator=generator))


def jpeg(images: Tensor, quality: float) -> Tensor:
    """Each image [N, 3, H, W] compressed as JPEG of this quality (1 to 95) and decoded again."""

    def through(image: np.ndarray) -> np.ndarray:
        file = io.BytesIO()
        Image.fromarray(image).save(file, "JPEG", quality=int(quality))
        return np.asarray(Image.open(file))

    pictures = images.permute(0, 2, 3, 1).contiguous().numpy()
    return torch.from_numpy(np.stack([through(each) for each in pictures])).permute(0, 3, 1, 2).contiguous()


def brightness(images: Tensor, factor: float) -> Tensor:
    """All values of uint8 images times `factor`, cut off at 255."""
    return _to_uint8(images.float() * factor)


# Name: the function, its levels from mild to severe, and what a level means.
CORRUPTIONS: dict[str, tuple[Callable[[Tensor, float], Tensor], tuple[float, ...], str]] = {
    "blur": (blur, (0.4, 0.6, 0.8, 1.0, 1.5), "sigma in pixels"),
    "noise": (noise, (4, 8, 12, 16, 24), "deviation in grey levels"),
    "jpeg": (jpeg, (90, 70, 50, 30, 15), "JPEG quality"),
    "darker": (brightness, (0.8, 0.6, 0.4, 0.3, 0.2), "brightness factor"),
    "brighter": (brightness, (1.25, 1.5, 2.0, 2.5, 3.0), "brightness factor"),
}


def corrupted_accuracy(
    logits_of: Callable[[Tensor], Tensor],
    images: Tensor,
    labels: Tensor,
    echo: Callable[[str], object] = lambda _: None,
) -> pd.DataFrame:
    """Accuracy under every corruption and level.

    Parameters
    ----------
    logits_of : callable
        uint8 images [N, 3, 32, 32] to logits [N, 10].

    Returns
    -------
    DataFrame
        Columns corruption, level, unit, accuracy, low, high (95 % Wilson interval).
    """
    rows = []
    for name, (function, levels, unit) in CORRUPTIONS.items():
        for level in levels:
            correct = int((logits_of(function(images, level)).argmax(1) == labels).sum())
            interval = wilson_interval(correct, len(labels))
            echo(f"{name} {level:g}: {accuracy_text(correct, len(labels))}")
            rows.append((name, level, unit, correct / len(labels), *interval))
    return pd.DataFrame(rows, columns=["corruption", "level", "unit", "accuracy", "low", "high"])


def accuracy_without(issues: pd.DataFrame, correct: np.ndarray, indices: np.ndarray | None = None) -> dict[str, dict]:
    """Accuracy on the test set, and without images that have a twin or a label that raters did not confirm.

    Parameters
    ----------
    issues : DataFrame
        `results.test_issues()`: test_index, issue.
    correct : bool array [N]
        Whether each test image is predicted right.
    indices : int array [N], optional
        Their places in the official order of the test set; default: all 10,000, in that order.

    Returns
    -------
    dict
        "all", "without twins", "without unconfirmed labels" and "without both", each with images, accuracy and ci95.
    """
    indices = np.arange(len(correct)) if indices is None else indices
    twins, doubtful = (_marked(issues, kind, indices) for kind in ("twin", "label"))
    kept = {"all": np.ones(len(correct), bool), "without twins": ~twins, "without unconfirmed labels": ~doubtful}
    kept["without both"] = ~twins & ~doubtful
    return {
        name: {
            "images": int(mask.sum()),
            "accuracy": float(correct[mask].mean()),
            "ci95": wilson_interval(int(correct[mask].sum()), int(mask.sum())),
        }
        for name, mask in kept.items()
    }


def appraise(
    predictor: Predictor, test: Split, echo: Callable[[str], object] = print, *, corrupted_images: int = 2000
) -> dict:
    """All that this module measures, for one calibrated model on the test images.

    Parameters
    ----------
    predictor : Predictor
        With a `calibration`; its temperature and threshold come from validation, not from these images.
    test : Split
        The 10,000 test images in the official order.
    corrupted_images : int
        How many of them, a stratified sample, are scored under each corruption and level.

    Returns
    -------
    dict
        JSON-ready: model, accuracy, ci95, temperature, ece_before, ece_after, false_alarms (share of test images
        called unknown), without (see `accuracy_without`), corruptions (rows), their number of images and clean
        accuracy, and coverage (rows).
    """
    transform, sample = eval_transform(predictor.recipe), test.subset(min(corrupted_images, len(test)))

    def logits_of(images: Tensor, split: Split = sample) -> Tensor:
        return predict_logits(predictor.model, replace(split, images=images), transform, precision=predictor.precision)

    logits = logits_of(test.images, test)
    labels, correct = test.labels.numpy(), (logits.argmax(1) == test.labels).numpy()
    calibrated = (logits / predictor.calibration["temperature"]).softmax(1).numpy()
    echo(f"clean: {accuracy_text(int(correct.sum()), len(correct))}")
    corrupted = corrupted_accuracy(logits_of, sample.images, sample.labels, echo)
    coverage = selective_accuracy(labels, calibrated)
    kept = [round(share * len(coverage)) - 1 for share in np.arange(0.2, 1.001, 0.02)]
    return {
        "model": predictor.source,
        "accuracy": float(correct.mean()),
        "ci95": wilson_interval(int(correct.sum()), len(correct)),
        "temperature": predictor.calibration["temperature"],
        "ece_before": calibration(labels, logits.softmax(1).numpy())[1],
        "ece_after": calibration(labels, calibrated)[1],
        "false_alarms": float((energy(logits) < predictor.calibration["lowest_energy"]).mean()),
        "without": accuracy_without(test_issues(), correct),
        "corrupted_images": len(sample),
        "corrupted_clean": float(correct[sample.indices.numpy()].mean()),
        "corruptions": corrupted.to_dict("records"),
        "coverage": coverage.iloc[kept].to_dict("records"),
    }


def _marked(issues: pd.DataFrame, kind: str, indices: np.ndarray) -> np.ndarray:
    return np.isin(indices, issues.test_index[issues.issue.str.contains(kind)])


def _to_uint8(images: Tensor) -> Tensor:
    return images.round().clamp(0, 255).to(torch.uint8)
