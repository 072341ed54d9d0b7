"""Promise: what a text says of a result is what the recorded files say.

Each claim is a sentence of the texts and what the records must show for it. A sentence that changes, or a record that
no longer carries it, turns its test red: read both again.
"""

from __future__ import annotations

import itertools
import json
import re
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch

from cifar_ft import models, results
from cifar_ft.results import RECORDED, wilson_interval

ROOT = Path(__file__).resolve().parents[2]
ABLATIONS = results.recorded_ablations().set_index(["question", "variant"])
REDRAWN = results.recorded_redrawn()
BENCHMARKS = json.loads((RECORDED / "benchmarks.json").read_text("utf-8"))
SEARCH = pd.read_csv(RECORDED / "search.csv")
LOG = results.published_log().test_accuracy


def text(name: str) -> str:
    """A page, or the Markdown cells and sources of a notebook, with single spaces."""
    content = (ROOT / name).read_text("utf-8")
    if name.endswith(".ipynb"):
        content = "\n".join("".join(cell["source"]) for cell in json.loads(content)["cells"])
    return re.sub(r"\s+", " ", content)


def where_it_says(low: float, high: float, temperature: float) -> tuple[float, float, float, float]:
    """Mean confidence of the shipped run's test images from `low` to below `high`, their accuracy and its interval."""
    run = results.load_run(results.SHIPPED_RUN)
    probabilities = torch.tensor(run.logits / temperature).softmax(1).numpy()
    sure = probabilities.max(1)
    chosen = (sure >= low) & (sure < high)
    right = (probabilities.argmax(1) == run.labels)[chosen]
    return float(sure[chosen].mean()), float(right.mean()), *wilson_interval(int(right.sum()), len(right))


def temperature() -> float:
    return results.load_run(results.SHIPPED_RUN).metrics["calibration"]["temperature"]


def too_sure_at_80_and_right_at_the_top() -> bool:
    said, _, _, high = where_it_says(0.75, 0.85, temperature())
    at_top, right_at_top, _, _ = where_it_says(14 / 15, 1, temperature())
    return high < said - 0.04 and abs(at_top - right_at_top) < 0.005


def too_modest_before() -> bool:
    said, _, low, _ = where_it_says(0.75, 0.85, 1)
    return low > said


def right(issue_is_twin: bool) -> tuple[int, int]:
    run, issues = results.load_run(results.SHIPPED_RUN), results.test_issues()
    chosen = issues[(issues.issue == "twin in train") == issue_is_twin].test_index.unique()
    return int((run.predictions == run.labels)[chosen].sum()), len(chosen)


def same_kernel() -> bool:
    """Whether the ablation "pretrained stem of stride 1" ran with the very kernel of the network."""
    torch.manual_seed(0)
    network = models.create_backbone("efficientnet_lite0")
    kernel = models.stages(network)["stem"][0].weight.detach().clone()
    stem = models.stages(models.replace_stem(network, "cifar_resampled"))["stem"][0]
    return torch.allclose(kernel, stem.weight) and stem.stride == (1, 1)


def work_of(name: str, size: int, stem: str = "pretrained") -> float:
    network = models.create_backbone(name)
    return models.summarize(models.replace_stem(network, stem), size).gmac.sum()


def ten_times_the_work_in_less_than_twice_the_time() -> bool:
    work = work_of("resnet50", 32, "cifar_random") / work_of("efficientnet_lite0", 64)
    seconds = BENCHMARKS["growth"]["fits"]["epoch_seconds_by_images"]["slope"]
    time = 1 / BENCHMARKS["steps"]["batch_64_images_per_second"] / seconds
    return 9.5 < work < 10.5 and time < 2


def seconds_by_batch() -> dict[int, float]:
    cases = pd.DataFrame(BENCHMARKS["growth"]["cases"]).query("images == 2048 and image_size == 64")
    return cases.set_index("batch_size").epoch_seconds.to_dict()


def compared(name: str) -> pd.DataFrame:
    return pd.DataFrame(BENCHMARKS["compare"]["runs"]).query(f"name == '{name}'")


def of(question: str, variant: str) -> pd.Series:
    return ABLATIONS.loc[(question, variant)]


def differ(question: str, *variants: str) -> list[bool]:
    return [bool(of(question, variant).distinguishable) for variant in variants]


def scores(name: str) -> np.ndarray:
    return REDRAWN[name][0].test_accuracy.to_numpy()


def learnt_by_heart() -> bool:
    plain = of("Which augmentation?", "none")
    base = of("Which augmentation?", "crop and flip")
    return plain.train - plain["mean"] > 0.1 > base.train - base["mean"]


def every_step_of_size_is_better() -> bool:
    sizes = [of("Which input size?", f"{size} px") for size in (32, 64, 96, 128)]
    gaps = [after["mean"] - before["mean"] for before, after in itertools.pairwise(sizes)]
    return min(gaps) > results.studies.CRITICAL_T * max(size.standard_error for size in sizes)


STEM, PART = "Which stem, at equal cost?", "Which part should be trained?"
SMALL, RANDOM = "pretrained stem of stride 1, 32 px", "random stem of stride 1, 32 px"
SURE = "In the middle it makes them too sure: of the test images that get about 80 %, clearly fewer are right"
N3, N4, N5, N6 = (
    f"notebooks/{name}.ipynb" for name in ("03_model_surgery", "04_training", "05_results", "06_predictions")
)
CLAIMS = [
    (N6, SURE, too_sure_at_80_and_right_at_the_top),
    (N5, "in the top bin, which is right now. Below, the model now is too sure", too_sure_at_80_and_right_at_the_top),
    ("docs/results.md", "too modest without the temperature, too sure with it", too_modest_before),
    ("docs/questions.md", "to which the shipped model gives about 80 %, fewer are right",
     too_sure_at_80_and_right_at_the_top),
    (N5, "gets all twins right and over half of the doubtful labels wrong", lambda: (
        right(True)[0] == right(True)[1] and right(False)[0] < right(False)[1] / 2)),
    (N3, "ten times the multiply-adds of EfficientNet-Lite0, the small network of this course, and not even twice the "
     "time", ten_times_the_work_in_less_than_twice_the_time),
    (N3, "within 3 % of the multiply-adds of an **untouched** network on the image enlarged to 64", lambda: (
        abs(work_of("resnet50", 32, "cifar_random") / work_of("resnet50", 64) - 1) < 0.03)),
    (N3, "EfficientNet-Lite0's filters are 3x3 already, and only their stride changes", same_kernel),
    (N5, "With the pretrained kernel, which is 3x3 here, the two are not distinguishable", lambda: (
        same_kernel() and differ(STEM, SMALL, RANDOM) == [False, True])),
    (N5, "Stride 1 on 32-pixel images needs the same work as stride 2 on 64", lambda: (
        work_of("efficientnet_lite0", 64) == work_of("efficientnet_lite0", 32, "cifar_resampled"))),
    (N5, "Every step up is better, and takes longer", every_step_of_size_is_better),
    (N5, "images seen before are partly learnt by heart", learnt_by_heart),
    (N5, "Without shifted crops the same training is better, just above the line; without both it is just", lambda: (
        differ("Which augmentation?", "flip", "none", "crop") == [True, False, False])),
    (N5, "from random weights the same training does not reach half of its accuracy", lambda: (
        of("What are the ImageNet weights worth?", "random weights")["mean"] < of(PART, "everything")["mean"] / 2)),
    (N5, "Freezing the early stages costs nothing that can be told apart. The head alone is far worse. Fitting the "
     "head first and then training everything is no better than that here", lambda: (
        differ(PART, "all but the early stages", "head only", "head fitted first, then everything")
        == [False, True, True])),
    (N5, "A constant rate comes out higher, not distinguishable", lambda: (
        of("Constant or decayed learning rate?", "constant").difference > 0
        and not any(differ("Constant or decayed learning rate?", "constant")))),
    (N5, "A head at ten times the rate is worse here", lambda: (
        of("One learning rate or two?", "head at 10 times").difference < 0
        and all(differ("One learning rate or two?", "head at 10 times")))),
    (N5, "Letting it fall, to a quarter in the last epoch (column `last_lr`), is clearly better", lambda: (
        REDRAWN["reference_b32_cosine"][0].lr.tolist() == pytest.approx([0.01, 0.0075, 0.0025])
        and wilson_interval(round(10_000 * scores("reference_b32_cosine")[-1]), 10_000)[0]
        > scores("reference_b32").max())),
    (N5, "about as far as the whole network's log by then", lambda: abs(scores("reference_b32")[-1] - LOG[2]) < 0.01),
    (N5, "A little better, with one seed; its last two epochs differ as much", lambda: (
        abs(abs(scores("reference_b64")[-1] - scores("reference_b64")[-2]) - scores("reference_b64")[-1]
            + scores("reference_b32")[-1]) < 0.002)),
    (N5, "the log's best epoch lies further above its last", lambda: (
        LOG.max() - LOG.iloc[-1]
        > np.random.default_rng(0).binomial(10_000, 0.877, (2000, 60)).max(1).mean() / 10_000 - 0.877)),
    (N5, "From one epoch to the next the score jumps by more than a point on average", lambda: (
        LOG.iloc[-20:].diff().abs().mean() > 0.01)),
    (N4, "The recorded run of `quick` ends above the published log", lambda: (
        results.load_run(RECORDED / "quick").accuracy > LOG.max())),
    ("docs/speed.md", "beyond 64 images a larger batch saves no time", lambda: (
        seconds_by_batch()[64] < min(seconds_by_batch()[128], seconds_by_batch()[256]))),
    ("docs/speed.md", "in equal time the course is ahead of all", lambda: (
        compared("cifar_ft").query("epochs > 3").test_accuracy.item()
        > max(compared(name).test_accuracy.max() for name in ("fastai", "trainer", "timm", "plain")))),
    ("notebooks/02_transforms.ipynb", "paid about a point of validation accuracy", lambda: (
        0.005 < SEARCH.val_accuracy[3] - SEARCH.val_accuracy[2] < 0.015 and SEARCH.recipe[3] == "quick")),
]  # fmt: skip


@pytest.mark.parametrize(
    ("page", "sentence", "holds"), CLAIMS, ids=[f"{page}: {sentence[:40]}" for page, sentence, _ in CLAIMS]
)
def test_what_a_text_says_is_what_the_records_say(page, sentence, holds):
    assert sentence in text(page)
    assert holds()
