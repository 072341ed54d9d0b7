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
from scipy.optimize import minimize_scalar

from cifar_ft import models, results
from cifar_ft.course import NOTEBOOKS
from cifar_ft.files import PACKAGE
from cifar_ft.results import RECORDED

ROOT = Path(__file__).resolve().parents[2]
ABLATIONS = results.recorded_ablations().set_index(["question", "variant"])
REDRAWN = results.recorded_redrawn()
BENCHMARKS = json.loads((RECORDED / "benchmarks.json").read_text("utf-8"))
GPU = json.loads((RECORDED / "gpu" / "speed_course.json").read_text("utf-8"))["found"]["reference_b32"]
SEARCH = pd.read_csv(RECORDED / "search.csv")
PUBLISHED = results.published_log()
LOG = PUBLISHED.test_accuracy
LUCK = np.sqrt(LOG[-20:].mean() * (1 - LOG[-20:].mean()) / 10_000)  # of one score, with 10,000 test images


def text(name: str) -> str:
    """A page, or the Markdown cells and sources of a notebook, with single spaces."""
    content = (ROOT / name).read_text("utf-8")
    if name.endswith(".ipynb"):
        content = "\n".join("".join(cell["source"]) for cell in json.loads(content)["cells"])
    return re.sub(r"\s+", " ", content)


def calibrated(how: str) -> np.ndarray:
    """Probabilities of the shipped run's test images: as trained, with a temperature alone, or as it answers."""
    run = results.load_run(results.SHIPPED_RUN)
    if how == "as trained":
        return run.probabilities
    if how == "answers":
        fitted = run.metrics["calibration"]
        return results.probabilities(torch.tensor(run.logits), fitted["temperature"], fitted["power"]).numpy()
    with np.load(run.path / "val_logits.npz") as file:
        logits, labels = torch.tensor(file["logits"]), torch.tensor(file["labels"])
    loss = torch.nn.functional.cross_entropy
    best = minimize_scalar(lambda t: loss(logits / t, labels).item(), bounds=(0.05, 20), method="bounded").x
    return torch.tensor(run.logits / best).softmax(1).numpy()


def bins(how: str, edges: int | tuple = 15) -> pd.DataFrame:
    """`results.reliability` of the shipped run, with how far accuracy and interval lie from the confidence."""
    found, _ = results.reliability(results.load_run(results.SHIPPED_RUN).labels, calibrated(how), edges)
    found = found[found["count"] > 0]
    return found.assign(gap=found.accuracy - found.confidence, inside=found.confidence.between(found.low, found.high))


def a_temperature_spoils_the_middle() -> bool:
    found, before = bins("temperature"), bins("as trained")
    middle = found[(found.low_edge > 0.46) & (found.high_edge < 0.94)]
    low, top = before[(before["count"] >= 20) & (before.high_edge < 0.74)], found.iloc[-1]
    return (middle.gap < 0).all() and middle.inside.mean() < 0.5 and low.inside.all() and abs(top.gap) < 0.005


def a_power_gains_and_mends_it() -> bool:
    labels = results.load_run(results.SHIPPED_RUN).labels
    nll = {how: -np.log(calibrated(how)[np.arange(len(labels)), labels]) for how in ("temperature", "answers")}
    gain = nll["temperature"] - nll["answers"]
    return gain.mean() > 1.96 * gain.std() / np.sqrt(len(gain)) and bins("answers", (0, 0.5, 0.9, 1)).inside.iloc[1]


def the_margin_ranks_best_and_calibration_hardly_matters() -> bool:
    run = results.load_run(results.SHIPPED_RUN)
    sorted_logits, correct = np.sort(run.logits, axis=1), run.predictions == run.labels
    ranked = {how: calibrated(how).max(1) for how in ("as trained", "temperature", "answers")}
    ranked |= {"logit": sorted_logits[:, -1], "margin": sorted_logits[:, -1] - sorted_logits[:, -2]}
    found = {name: results.selective_accuracy(correct, value).accuracy for name, value in ranked.items()}
    at_90 = [found[how][8999] for how in ("as trained", "temperature", "answers")]
    return max(found, key=lambda name: found[name].mean()) == "margin" and max(at_90) - min(at_90) <= 0.001


def right(issue_is_twin: bool) -> tuple[int, int]:
    run, issues = results.load_run(results.SHIPPED_RUN), results.test_issues()
    chosen = issues[(issues.issue == "twin in train") == issue_is_twin].test_index.unique()
    return int((run.predictions == run.labels)[chosen].sum()), len(chosen)


def leaving_out_moves_little() -> bool:
    run, issues = results.load_run(results.SHIPPED_RUN), results.test_issues()
    found = results.accuracy_without(issues, run.predictions == run.labels)
    low, high = found["all"]["ci95"]
    return all(abs(each["accuracy"] - found["all"]["accuracy"]) < (high - low) / 2 for each in found.values())


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


def three_ways_to_the_same_maps() -> bool:
    """The enlarged image, the pretrained kernel at stride 1 and the new stem, in ResNet-50."""
    slow = models.create_backbone("resnet50")
    slow.conv1.stride = (1, 1)
    new = models.replace_stem(models.create_backbone("resnet50"), "cifar_random")
    cases = (models.create_backbone("resnet50"), 64), (slow, 32), (new, 32)
    tables = [models.summarize(network, size) for network, size in cases]
    enlarged, kept, third = (table.gmac.sum() for table in tables)
    maps = {tuple(table.output) for table in tables}
    return len(maps) == 1 and enlarged == kept and abs(third / kept - 1) < 0.03


def weights_of(name: str, last_stage: int | None = None, num_classes: int = 1000) -> pd.Series:
    network = models.replace_head(models.cut(models.create_backbone(name), last_stage), num_classes)
    return models.summarize(network, 64)[["parameters", "gmac"]].sum()


def cut_off() -> pd.Series:
    return 1 - weights_of("resnet50", 3) / weights_of("resnet50")


def share_between_images() -> np.ndarray:
    """Of what the mean of the images' deviations lacks, the share that is the spread of their means; a channel each."""
    images = np.load(PACKAGE / "assets" / "samples.npz")["images"] / 255
    within = images.var((1, 2))
    whole = images.var((0, 1, 2))
    return (whole - within.mean(0)) / (whole - np.sqrt(within).mean(0) ** 2)


def on_two_cores() -> list[float]:
    runs = [results.load_run(RECORDED / name).metrics["images_per_second"] for name in ("cpu", "quick")]
    return [*runs, BENCHMARKS["steps"]["batch_32"]["course"]["images_per_second"], 189, 222]


def times_as_long() -> float:
    """ResNet-50 beside EfficientNet-Lite0, training on maps of the same size on two CPU cores."""
    seconds = BENCHMARKS["growth"]["fits"]["epoch_seconds_by_images"]["slope"]
    return 1 / BENCHMARKS["steps"]["batch_64_images_per_second"] / seconds


def ten_times_the_work_in_less_than_twice_the_time() -> bool:
    work = work_of("resnet50", 32, "cifar_random") / work_of("efficientnet_lite0", 64)
    return 9.5 < work < 10.5 and times_as_long() < 2


def seconds_by_batch() -> dict[int, float]:
    cases = pd.DataFrame(BENCHMARKS["growth"]["cases"]).query("images == 2048 and image_size == 64")
    return cases.set_index("batch_size").epoch_seconds.to_dict()


def compared(name: str) -> pd.DataFrame:
    return pd.DataFrame(BENCHMARKS["compare"]["runs"]).query(f"name == '{name}'")


def of(question: str, variant: str) -> pd.Series:
    return ABLATIONS.loc[(question, variant)]


def told(question: str, *variants: str) -> list[int]:
    """Of each variant 1 or -1 where its interval is above or below zero, else 0."""
    return [int(of(question, each).low > 0) - int(of(question, each).high < 0) for each in variants]


def standard_errors() -> tuple[float, float]:
    """Of the difference between the recorded runs `cpu` and `quick`: paired, unpaired."""
    cpu, quick = (results.load_run(RECORDED / name) for name in ("cpu", "quick"))
    paired = results.paired_test(cpu.predictions == cpu.labels, quick.predictions == quick.labels)
    return paired.standard_error, results.difference_test(cpu.accuracy, quick.accuracy, 10_000).standard_error


def cat_or_dog() -> float:
    run = results.load_run(results.SHIPPED_RUN)
    first = results.most_confused(results.confusion(run.labels, run.predictions)).loc[0]
    assert first[["class", "other"]].tolist() == ["cat", "dog"]
    return first.share


def luck_of_the_best() -> float:
    """What luck adds to the best of the log's last twenty epochs, where their luck is independent: the most."""
    late = LOG[-20:].to_numpy()
    truth = late.mean() + np.sqrt(1 - LUCK**2 / late.var(ddof=1)) * (late - late.mean())
    luck = LUCK * np.random.default_rng(0).standard_normal((20_000, 20))
    return luck[np.arange(20_000), (truth + luck).argmax(1)].mean()


def learnt_by_heart() -> bool:
    plain, base = (of("Which augmentation, in 3 epochs?", name) for name in ("none", "crop and flip"))
    return plain.train - plain["mean"] > 0.1 > base.train - base["mean"]


def every_step_of_size_is_better() -> bool:
    sizes = [of("Which input size?", f"{size} px") for size in (32, 64, 96, 128)]
    gaps = [after["mean"] - before["mean"] for before, after in itertools.pairwise(sizes)]
    return min(gaps) > 0.015 and told("Which input size?", "32 px", "96 px", "128 px") == [-1, 1, 1]


def quickest(changes: str) -> float:
    runs = pd.read_csv(RECORDED / "ablations.csv").fillna("")
    return runs.minutes[runs.changes == changes].min()


STEM, PART = "Which stem, at equal cost?", "Which part should be trained?"
SMALL, RANDOM = "stride 1, 32 px", "stride 1, 32 px, random weights"
N1, N2, N3, N4, N5, N5B, N5C, N6, N7 = (f"notebooks/{name}.ipynb" for name in NOTEBOOKS)
CLAIMS = [
    (N5B, "the top bin lies on the diagonal, and all bins from the middle of the scale up to it lie below, most of "
     "them by more than their interval. As trained, the lower bins were right within theirs",
     a_temperature_spoils_the_middle),
    (N5B, "by far most images are in the top bin", lambda: bins("temperature")["count"].iloc[-1] > 9000),
    (N5B, "on the test images the interval of its difference to the temperature alone lies below zero. Of the images "
     "that get 50 to 90 %, about as many are right as it says", a_power_gains_and_mends_it),
    (N5B, "the margin has the smallest AURC, and calibration changes the accuracy at 90 % coverage by a tenth of a "
     "point at most",
     the_margin_ranks_best_and_calibration_hardly_matters),
    ("docs/results.md", "as trained the model is too modest in all upper rows", lambda: (
        (bins("as trained", results.STATED).query("low_edge >= 0.7").eval("low - confidence") > 0).all())),
    ("docs/questions.md", "differ by less than seven points everywhere, and by less than one above 80 %", lambda: (
        (bins("answers", results.STATED).gap.abs() < 0.07).all()
        and (bins("answers", results.STATED).query("low_edge >= 0.8").gap.abs() < 0.01).all())),
    (N5, "gets all 286 twins right, and of the 54 doubtful labels 25", lambda: (
        right(True) == (286, 286) and right(False) == (25, 54))),
    (N5, "a quarter of all its errors", lambda: 0.24 < cat_or_dog() < 0.28),
    (N5, "The first published epoch alone, at the left end of its curve, has done more multiply-adds than the whole "
     "recorded run of `quick`", lambda: (
        50_000 * work_of("resnet50", 32, "cifar_random")
        > 45_000 * (work_of("efficientnet_lite0", 80) + work_of("efficientnet_lite0", 112)))),
    (N5, "less than a point, and about a quarter less if paired", lambda: (
        2.8 * max(standard_errors()) < 0.01 and 0.70 < standard_errors()[0] / standard_errors()[1] < 0.78)),
    (N5, "leaving them out moves the score by less than half the width of its interval", leaving_out_moves_little),
    (N7, "in chapter 05 pairing two runs lowered the standard error by a quarter", lambda: (
        0.70 < standard_errors()[0] / standard_errors()[1] < 0.78)),
    (N3, "ten times the multiply-adds of EfficientNet-Lite0, the small network of this course, and not even twice the "
     "time", ten_times_the_work_in_less_than_twice_the_time),
    (N1, "mostly because it leaves out that some images are bright and others dark", lambda: (
        share_between_images().min() > 0.7)),
    (N1, "for about three test images in a hundred", lambda: 0.025 < right(True)[1] / 10_000 < 0.035),
    (N2, "Two CPU cores train on a few hundred images a second at most", lambda: max(on_two_cores()) < 500),
    (N2, "A large GPU trains on several thousand", lambda: GPU["course"][2] > 3000),
    (N3, "a seventh of the weights (each with ten outputs)", lambda: (
        weights_of("resnet50", None, 10).parameters / weights_of("efficientnet_lite0", None, 10).parameters
        == pytest.approx(7, abs=0.5))),
    (N3, "The third needs within 3 % of the multiply-adds of the others", three_ways_to_the_same_maps),
    (N3, "the two ways that keep the pretrained kernel are about a point apart at most, while random weights cost much",
     lambda: same_kernel() and abs(of(STEM, "stride 1, 32 px").difference) < 0.015
        and of(STEM, "stride 1, 32 px, random weights").high < -0.03),
    (N3, "freezing them makes no difference that can be told", lambda: (
        of(PART, "all but the early stages").low < 0 < of(PART, "all but the early stages").high)),
    (N3, "hold nearly two thirds of the parameters, but only about a fifth of the multiply-adds", lambda: (
        0.6 < cut_off().parameters < 2 / 3 and 0.18 < cut_off().gmac < 0.22)),
    (N3, "EfficientNet-Lite0's filters are 3x3 already, and only their stride changes", same_kernel),
    (N5C, "the two are close. With a random kernel, as in the published recipe, it is far worse", lambda: (
        same_kernel() and abs(of(STEM, SMALL).difference) < 0.02 and of(STEM, RANDOM).high < -0.05)),
    (N5C, "on the 32-pixel original costs the same as the pretrained one of stride 2 on 64 px", lambda: (
        work_of("efficientnet_lite0", 64) == work_of("efficientnet_lite0", 32, "cifar_resampled"))),
    (N5C, "Larger images are better at every step, and they cost more", every_step_of_size_is_better),
    (N5C, "images that are seen three times are partly learnt by heart already", learnt_by_heart),
    (N5C, "the score is not lower than with augmentation", lambda: (
        told("Which augmentation, in 3 epochs?", "none", "crop", "flip") in ([0, 0, 0], [1, 0, 1], [0, 0, 1]))),
    (N5C, "from random weights the same training does not reach half of the accuracy", lambda: (
        of("What are the ImageNet weights worth?", "random weights")["mean"] < of(PART, "everything")["mean"] / 2)),
    (N5C, "saves a third of the time", lambda: 0.3 < 1 - quickest("freeze=early") / quickest("") < 0.4),
    (N5C, "**The head alone** is far worse", lambda: of(PART, "head alone").high < -0.05),
    (N5C, "A constant rate came out no worse than one cycle here", lambda: (
        told("Constant or decayed rate?", "constant") != [-1])),
    (N5C, "**A head at ten times the rate** is worse here", lambda: (
        told("One rate or two?", "body 0.001, head 0.01") == [-1])),
    (N5C, "no difference that these seeds can show", lambda: (
        told("Label smoothing?", "none") + told("Which normalisation?", "CIFAR-10's std", "the published std")
        == [0, 0, 0])),
    (N7, "its rates are 0.01, 0.0075 and 0.0025", lambda: (
        REDRAWN["reference_b32_cosine"][0].lr.tolist() == pytest.approx([0.01, 0.0075, 0.0025]))),
    (N7, "in no line of the log; more than three points above its best", lambda: 0.9234 - LOG.max() > 0.03),
    (N7, "Its test accuracy falls in more epochs than it rises", lambda: (
        (LOG.diff() < 0).sum() > (LOG.diff() > 0).sum())),
    (N7, "it falls in 17 of 59 steps", lambda: (PUBLISHED.train_accuracy.diff() < 0).sum() == 17),
    (N7, "it rises in 14 of 59 steps, by less than 0.01", lambda: (
        (PUBLISHED.train_loss.diff() > 0).sum() == 14 and PUBLISHED.train_loss.diff().max() < 0.01)),
    (N7, "it falls in 31 of 59 steps, and its mean over epochs 41 to 60 is three tenths of a point above that over 21 "
     "to 40", lambda: (LOG.diff() < 0).sum() == 31 and round(LOG[40:].mean() - LOG[20:40].mean(), 3) == 0.003),
    (N7, "from 0.34 to 0.46 in the last twenty epochs", lambda: (
        (round(PUBLISHED.test_loss[40:].min(), 2), round(PUBLISHED.test_loss[40:].max(), 2)) == (0.34, 0.46))),
    (N7, "from one epoch to the next the score jumps by more than a point on average, and luck with the test images "
     "explains at most a tenth of the variance", lambda: (
        LOG[-20:].diff().abs().mean() > 0.01 and LUCK**2 / LOG[-20:].var() < 0.1)),
    (N7, "Sixty independent draws would flatter by more than three quarters of a point", lambda: (
        0.0075 < LUCK * np.random.default_rng(0).standard_normal((20_000, 60)).max(1).mean() < 0.008)),
    (N7, "Its best epoch is more than a point above its last and above the average of the last twenty", lambda: (
        LOG.max() - max(LOG[59], LOG[-20:].mean()) > 0.01)),
    (N7, "Less than a quarter of the gain is luck", lambda: (
        luck_of_the_best() < 0.25 * (LOG.max() - LOG[-20:].mean()))),
    (N4, "The recorded run of `quick` ends above the published log", lambda: (
        results.load_run(RECORDED / "quick").accuracy > LOG.max())),
    (N4, "NVIDIA H100, fp32 (TF32)\": 8715", lambda: np.median(GPU["course"][1:]) == 8715),
    (N4, "\"two CPU cores, fp32\": 189, \"two CPU cores, bf16\": 222", lambda: (
        "189 images/s in fp32 and 222 in bf16" in text("docs/speed.md"))),
    (N4, "at a seventh of its speed now", lambda: (
        "trained `reference_b32` at <!-- by hand -->1,231" in text("docs/speed.md")
        and 6.5 < np.median(GPU["course"][1:]) / 1231 < 7.5)),
    (N4, "the rate would end at about 80 % of its start", lambda: (
        0.5 * (1 + np.cos(np.pi * 59 / 200)) == pytest.approx(0.8, abs=0.01))),
    ("README.md", "trains in little more than half the time there", lambda: 1.7 < times_as_long() < 2),
    ("docs/speed.md", "beyond 64 images a larger batch saves no time", lambda: (
        seconds_by_batch()[64] < min(seconds_by_batch()[128], seconds_by_batch()[256]))),
    ("docs/speed.md", "in equal time the course is ahead of all", lambda: (
        compared("cifar_ft").query("epochs > 3").test_accuracy.item()
        > max(compared(name).test_accuracy.max() for name in ("fastai", "trainer", "timm", "plain")))),
    (N2, "paid about a point of validation accuracy", lambda: (
        0.005 < SEARCH.val_accuracy[3] - SEARCH.val_accuracy[2] < 0.015 and SEARCH.recipe[3] == "quick")),
]  # fmt: skip


@pytest.mark.parametrize(
    ("page", "sentence", "holds"), CLAIMS, ids=[f"{page}: {sentence[:40]}" for page, sentence, _ in CLAIMS]
)
def test_what_a_text_says_is_what_the_records_say(page, sentence, holds):
    assert sentence in text(page)
    assert holds()
