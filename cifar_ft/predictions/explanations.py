"""Why the model said so (notebook 06): where it looked, which pictures it finds alike, what would change its answer.

Everything is done on the 32-pixel square that the network sees, and leaves the model as it was.
"""

from __future__ import annotations

import numpy as np
import pandas as pd
import torch
import torch.nn.functional as F
from matplotlib import colormaps
from torch import Tensor

from cifar_ft import CifarFtError
from cifar_ft.data import CLASSES, Split
from cifar_ft.models import evaluating, features, stages
from cifar_ft.predictions.images import SIZE, checked_fit, middle, read_image, square
from cifar_ft.predictions.predictor import BATCH, Predictor
from cifar_ft.transforms import blur, brightness, eval_transform, random_crop

ROWS = 4096  # of a feature bank, compared at a time
LONGEST = 2048  # pixels: the side of an overlay with black bars, which can be far larger than its picture


class ExplanationError(CifarFtError, ValueError):
    """A class, a stage or a number of pictures that there is not, or a map that is none."""


def grad_cam(
    predictor: Predictor, image, target: int | str | None = None, *, stage: str | None = None, fit: str = "crop"
) -> np.ndarray:
    """Where the network sees a class: Grad-CAM (Selvaraju et al., ICCV 2017), computed by captum's `LayerGradCam`.

    The map is taken at the last layer that still has places: the last stage of a ResNet, the activation after
    `conv_head` of EfficientNet-Lite0. Only the average over all places and the head follow it, so that the map, before
    its negative parts are cut off and it is scaled, sums to the class's logit less its bias. It is coarse (an input of
    112 pixels has 4 x 4 places there) and each place has seen the whole picture: a map is a hint, no proof. Which
    layer agrees best with what covering a patch takes from the logit differs from model to model.

    Parameters
    ----------
    predictor : Predictor
    image : whatever `read_image` reads
        Made square and 32 pixels wide, as for a prediction with the same `fit`.
    target : int or str, optional
        The class, by number or name; by default the one that is predicted.
    stage : str, optional
        Another part of the model, as `models.stages` names them ("stage3", ...); earlier ones have finer maps.

    Returns
    -------
    float32 array [32, 32]
        From 0 to 1, where 1 is the strongest evidence in this picture; all zeros where no place stands out.

    Raises
    ------
    ImageError
        For something that is not a picture.
    ExplanationError
        For an unknown class or stage, or a model whose values are not finite.
    """
    from captum.attr import LayerGradCam

    seen = square(read_image(image), fit)
    index = predictor.predict(seen)[0].index if target is None else _class_index(target)
    parts = {name: layers[-1] for name, layers in stages(predictor.model).items() if name != "head"}
    stage = list(parts)[-1] if stage is None else stage
    if stage not in parts:
        raise ExplanationError(f"unknown stage {stage!r}; choose from {', '.join(parts)}")
    with evaluating(predictor.model):
        explanation = LayerGradCam(predictor.model, parts[stage])
        heat = explanation.attribute(_input(predictor, seen[None]), index, relu_attributions=True)
    heat = F.interpolate(heat.detach().float(), (SIZE, SIZE), mode="bilinear", align_corners=False)[0, 0].cpu()
    if not heat.isfinite().all():
        raise ExplanationError(f"{predictor.source} gives values that are not finite; use another run")
    low, high = heat.aminmax()
    if high - low <= 1e-5 * high:  # the same everywhere, but for rounding
        return np.zeros((SIZE, SIZE), np.float32)
    return ((heat - low) / (high - low)).numpy()


def _class_index(target: int | str) -> int:
    if isinstance(target, str) and target in CLASSES:
        return CLASSES.index(target)
    whole = isinstance(target, (int, np.integer)) and not isinstance(target, bool)
    if not whole or not 0 <= target < len(CLASSES):
        raise ExplanationError(f"unknown class {target!r}; choose from {', '.join(CLASSES)}, or 0 to 9")
    return int(target)


def _input(predictor: Predictor, images: Tensor) -> Tensor:
    """uint8 [N, 3, 32, 32] to the model's input [N, 3, S, S], where the model is."""
    device = next(predictor.model.parameters()).device
    return eval_transform(predictor.recipe)(images.to(device))


def overlay(image, heat: np.ndarray, *, fit: str = "crop") -> np.ndarray:
    """A heat map over its picture: the picture in grey, the heat from dark blue (0) to yellow (1).

    The colours (cividis) differ in brightness too, and can be told apart whatever colours one sees.

    Parameters
    ----------
    image : whatever `read_image` reads
    heat : array [h, w] from 0 to 1, as `grad_cam` gives it

    Returns
    -------
    uint8 array [H, W, 3]
        As large as what the network was shown: the middle square of the picture, or with `fit="pad"` all of it, at
        most `LONGEST` pixels wide and high.
    """
    values = torch.as_tensor(np.asarray(heat, dtype=np.float32))
    if values.ndim != 2 or not values.numel() or not ((values >= 0) & (values <= 1)).all():
        raise ExplanationError(f"heat of shape {list(values.shape)} is not a map [h, w] of values from 0 to 1")
    picture = read_image(image)
    if checked_fit(fit) == "pad":
        side = max(picture.shape[1:])
        if side > LONGEST:
            size = tuple(max(1, round(length * LONGEST / side)) for length in picture.shape[1:])
            picture = F.interpolate(picture[None], size, mode="bilinear", align_corners=False, antialias=True)[0]
            side = LONGEST
        down, right = (side - length for length in picture.shape[1:])
        picture = F.pad(picture, (right // 2, right - right // 2, down // 2, down - down // 2))
    side, top, left = middle(*picture.shape[1:])
    grey = picture[:, top : top + side, left : left + side].float().mean(0)
    values = F.interpolate(values[None, None], (side, side), mode="bilinear", align_corners=False)[0, 0]
    colours = 255 * colormaps["cividis"](values.numpy())[..., :3]
    return ((grey.numpy()[..., None] + colours) / 2).round().astype(np.uint8)


class FeatureBank:
    """The pictures of a split as the network describes them to its head, to find the most similar ones.

    Attributes
    ----------
    features : float16 Tensor [N, D]
        What enters the head, scaled to length 1, on the CPU: 2 * N * D bytes, 115 MB for 45,000 pictures and D = 1,280
        (EfficientNet-Lite0). Half precision moves a similarity by less than 0.001.
    split : Split

    Examples
    --------
    >>> FeatureBank(predictor, data.train).nearest("truck.jpg", k=3)  # doctest: +SKIP
    """

    def __init__(self, predictor: Predictor, split: Split):
        if not len(split):
            raise ExplanationError("there are no pictures in this split; at least 1 is needed")
        self.predictor, self.split = predictor, split
        self.features = torch.cat([_directions(predictor, images).half() for images in split.images.split(BATCH)])

    def __len__(self) -> int:
        return len(self.split)

    def nearest(self, image, k: int = 5, *, fit: str = "crop") -> pd.DataFrame:
        """The `k` pictures of the split that are most similar to `image`, whatever `read_image` reads, best first.

        Returns
        -------
        DataFrame
            Columns position (in the split), index (in the official order), label (the name of the true class) and
            similarity (cosine of the features, at most 1).
        """
        if isinstance(k, bool) or not isinstance(k, (int, np.integer)) or not 1 <= k <= len(self):
            raise ExplanationError(f"{k!r} nearest pictures cannot be given; choose 1 to {len(self)}")
        query = _directions(self.predictor, square(read_image(image), fit)[None])[0]
        similarity = torch.cat([rows.float() @ query for rows in self.features.split(ROWS)]).clamp(-1, 1)
        best = similarity.argsort(descending=True, stable=True)[: int(k)]
        return pd.DataFrame(
            {
                "position": best.numpy(),
                "index": self.split.indices.cpu()[best].numpy(),
                "label": [CLASSES[label] for label in self.split.labels.cpu()[best]],
                "similarity": similarity[best].numpy(),
            }
        )


def _directions(predictor: Predictor, images: Tensor) -> Tensor:
    """Features of uint8 images [N, 3, 32, 32], scaled to length 1: float32 [N, D] on the CPU."""
    with evaluating(predictor.model), torch.inference_mode():
        seen = features(predictor.model, _input(predictor, images))
    return F.normalize(seen.flatten(1).float(), dim=1).cpu()


def variants(image, *, fit: str = "crop") -> dict[str, Tensor]:
    """A picture and its small changes, by name: what `sensitivity` asks about, uint8 [3, 32, 32] each.

    Shifted by 2 and 4 pixels as in training (black where nothing is left), zoomed, blurred, mirrored, darker, brighter
    and without colours. The first, "unchanged", is the picture as the network sees it.
    """
    seen = square(read_image(image), fit)
    one = seen[None]
    changed = {"unchanged": one}
    directions = {"left": (0, 1), "right": (0, -1), "up": (1, 0), "down": (-1, 0)}
    for pixels in (2, 4):
        for name, (row, column) in directions.items():
            offset = torch.tensor([[4 + pixels * row, 4 + pixels * column]])
            changed[f"{pixels} pixels {name}"] = random_crop(one, offset, padding=4)
    changed |= {
        "zoomed in by 4/3": square(seen[:, 4:28, 4:28])[None],
        "zoomed out by 4/5": square(F.pad(seen, (4,) * 4))[None],
        "blurred, 0.5 pixels": blur(one, 0.5),
        "blurred, 1.0 pixels": blur(one, 1.0),
        "mirrored": one.flip(3),
        "darker, x 0.6": brightness(one, 0.6),
        "brighter, x 1.5": brightness(one, 1.5),
        "grey": one.float().mean(1, keepdim=True).round().byte().expand(-1, 3, -1, -1),
    }
    return {name: picture[0].contiguous() for name, picture in changed.items()}


def sensitivity(predictor: Predictor, image, *, fit: str = "crop") -> pd.DataFrame:
    """How the answer moves under small changes of a picture that would hardly mislead a person.

    Parameters
    ----------
    predictor : Predictor
    image : whatever `read_image` reads

    Returns
    -------
    DataFrame
        One row for each picture of `variants(image)`, in that order, "unchanged" first. Columns change, label (what is
        predicted now), probability (now, of the label predicted for the unchanged picture) and difference (of that
        probability to the unchanged picture's).
    """
    pictures = variants(image, fit=fit)
    answers = predictor.predict(torch.stack(list(pictures.values())))
    first = answers[0].label
    probability = np.array([answer.probabilities[first] for answer in answers])
    return pd.DataFrame(
        {
            "change": list(pictures),
            "label": [answer.label for answer in answers],
            "probability": probability,
            "difference": probability - probability[0],
        }
    )
