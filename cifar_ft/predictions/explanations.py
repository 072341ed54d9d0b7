"""What an answer depends on (notebook 06): heat maps, the most similar pictures, changes that move it.

Everything is done on the 32-pixel square that the network sees, and leaves the model as it was.
"""

from __future__ import annotations

import math

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
    """Which places of a late layer raise the logit of a class: Grad-CAM (Selvaraju et al., ICCV 2017), by captum.

    By default the layer is the last one that still has places: the last stage of a ResNet, the activation after
    `conv_head` of EfficientNet-Lite0. Only the average over all places and the head follow it, so that the map before
    its ReLU, summed over the places, is the class's logit less its bias. The ReLU then sets to zero what speaks
    against the class. The map is coarse (an input of 112 pixels has 4 x 4 places there), and each place has seen far
    more of the picture than it covers: it tells how the logit is composed, and neither which pixels the answer depends
    on (see `occlusion`) nor whether they are a good reason.

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
        What each place adds to the logit, 0 or more, enlarged to the picture; maps of several classes of one picture
        have one scale.

    Raises
    ------
    ImageError
        For something that is not a picture.
    ExplanationError
        For an unknown class or stage, or a model whose values are not finite.
    """
    from captum.attr import LayerGradCam

    seen, index = _question(predictor, image, target, fit)
    parts = {name: layers[-1] for name, layers in stages(predictor.model).items() if name != "head"}
    stage = list(parts)[-1] if stage is None else stage
    if stage not in parts:
        raise ExplanationError(f"unknown stage {stage!r}; choose from {', '.join(parts)}")
    with evaluating(predictor.model):
        explanation = LayerGradCam(predictor.model, parts[stage])
        heat = explanation.attribute(_input(predictor, seen[None]), index, relu_attributions=True)
    heat = F.interpolate(heat.detach().float(), (SIZE, SIZE), mode="bilinear", align_corners=False)[0, 0]
    return _finite(predictor, heat)


def occlusion(
    predictor: Predictor, image, target: int | str | None = None, *, side: int = 8, fit: str = "crop"
) -> np.ndarray:
    """What covering a part of the picture takes from the logit of a class (Zeiler and Fergus, ECCV 2014), by captum.

    A square of the picture's mean colour is laid over every place, half its side apart; the model is asked each time.
    Unlike Grad-CAM it looks at no layer and changes what the model sees, into a picture unlike those it was trained on.

    Parameters
    ----------
    predictor, image, target, fit
        As for `grad_cam`.
    side : int
        Of the square that covers, in pixels, 2 to 32.

    Returns
    -------
    float32 array [32, 32]
        How much the logit falls when a pixel is covered, the mean over all squares that cover it; negative where the
        class is found more likely without it.
    """
    from captum.attr import Occlusion

    if isinstance(side, bool) or not isinstance(side, (int, np.integer)) or not 2 <= side <= SIZE:
        raise ExplanationError(f"a square of side {side!r} cannot cover a part; choose 2 to {SIZE} pixels")
    seen, index = _question(predictor, image, target, fit)
    with evaluating(predictor.model), torch.inference_mode():
        falls = Occlusion(lambda images: predictor.model(_input(predictor, images.byte()))).attribute(
            seen[None].float(),
            target=index,
            sliding_window_shapes=(3, side, side),
            strides=(3, side // 2, side // 2),
            baselines=seen.float().mean((1, 2)).round()[None, :, None, None].expand(1, 3, SIZE, SIZE),
            perturbations_per_eval=BATCH,
        )
    return _finite(predictor, falls[0, 0])


def _question(predictor: Predictor, image, target: int | str | None, fit: str) -> tuple[Tensor, int]:
    """The picture as the network sees it, uint8 [3, 32, 32], and the number of the class that is asked about."""
    seen = square(read_image(image), fit)
    return seen, predictor.predict(seen)[0].index if target is None else _class_index(target)


def _finite(predictor: Predictor, values: Tensor) -> np.ndarray:
    if not values.isfinite().all():
        raise ExplanationError(f"{predictor.source} gives values that are not finite; use another run")
    return values.float().cpu().numpy()


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


def overlay(image, heat: np.ndarray, *, highest: float | None = None, fit: str = "crop") -> np.ndarray:
    """A heat map over its picture: the picture in grey, the heat from dark blue (0) to yellow (`highest`).

    The colours (cividis) differ in brightness too, and can be told apart whatever colours one sees.

    Parameters
    ----------
    image : whatever `read_image` reads
    heat : array [h, w], 0 or more, as `grad_cam` gives it
    highest : float, optional
        The heat that is drawn yellow, by default the map's own maximum; one for all maps makes them comparable.

    Returns
    -------
    uint8 array [H, W, 3]
        As large as what the network was shown: the middle square of the picture, or with `fit="pad"` all of it, at
        most `LONGEST` pixels wide and high.
    """
    values = torch.as_tensor(np.asarray(heat, dtype=np.float32))
    if values.ndim != 2 or not values.numel() or not (values.isfinite() & (values >= 0)).all():
        raise ExplanationError(f"heat of shape {list(values.shape)} is not a map [h, w] of finite values, 0 or more")
    top = values.max().item() if highest is None else highest
    if not (math.isfinite(top) and top >= 0):
        raise ExplanationError(f"highest={highest!r}; give the heat to be drawn yellow, a number of 0 or more")
    values = (values / top).clamp(max=1) if top else values
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
