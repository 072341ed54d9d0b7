"""TODO tools.appraisal"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
from torch import Tensor

from cifar_ft import log
from cifar_ft.data import Split
from cifar_ft.models import predict_logits
from cifar_ft.predictions import Predictor
from cifar_ft.results import (
    accuracy_text,
    accuracy_without,
    calibration,
    corrupted_accuracy,
    energy,
    selective_accuracy,
    test_issues,
    wilson_interval,
)
from cifar_ft.transforms import eval_transform


def appraise(predictor: Predictor, test: Split, *, corrupted_images: int = 2000) -> dict:
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
    log.info(f"clean: {accuracy_text(int(correct.sum()), len(correct))}")
    corrupted = corrupted_accuracy(logits_of, sample.images, sample.labels)
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
