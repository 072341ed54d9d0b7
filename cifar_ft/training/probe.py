"""The linear probe: fit the head alone on features of a frozen backbone, a baseline and a way to begin."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cifar_ft import models, transforms
from cifar_ft.data import Split
from cifar_ft.models import evaluating
from cifar_ft.recipes import Recipe

DECAYS = (1e-3, 1e-2, 1e-1, 1.0)  # of the squared weights; one is chosen on a fifth of the images


def fit_head(model: nn.Module, train: Split, recipe: Recipe) -> float:
    """Fit the head alone, by L-BFGS on the cached features of the frozen backbone: a linear probe.

    How strongly its weights are decayed is chosen by the loss on a fifth of the images, then all are fitted.

    The features are those of evaluation, with BatchNorm's stored statistics. Where training goes on with a batch's own
    statistics, the features are others and the head does not fit them: train the rest with `freeze_batchnorm=true`.

    Returns
    -------
    float
        Accuracy on the images it was fitted on.
    """
    sample = train.subset(min(len(train), recipe.head_fit_images or len(train)))
    transform, head = transforms.eval_transform(recipe), models.head(model)
    with evaluating(model), torch.no_grad():
        inputs = models.in_batches(lambda batch: models.features(model, transform(batch)).float(), sample.images, 250)
    order = torch.randperm(len(sample), generator=torch.Generator().manual_seed(0)).to(inputs.device)
    held, rest = order[: len(sample) // 5], order[len(sample) // 5 :]

    def held_loss(decay: float) -> float:
        weight, bias = _fit(inputs[rest], sample.labels[rest], head, decay)
        return F.cross_entropy(F.linear(inputs[held], weight, bias), sample.labels[held]).item()

    weight, bias = _fit(inputs, sample.labels, head, min(DECAYS, key=held_loss))
    with torch.no_grad():
        head.weight.copy_(weight)
        head.bias.copy_(bias)
        return (F.linear(inputs, weight, bias).argmax(1) == sample.labels).float().mean().item()


def _fit(inputs: Tensor, labels: Tensor, head: nn.Module, decay: float) -> tuple[Tensor, Tensor]:
    """Weight and bias that minimise the mean cross-entropy plus `decay` times the squared weights."""
    weight, bias = (values.detach().clone().requires_grad_() for values in (head.weight, head.bias))
    optimizer = torch.optim.LBFGS([weight, bias], max_iter=50, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = F.cross_entropy(F.linear(inputs, weight, bias), labels) + decay * weight.square().sum()
        loss.backward()
        return loss

    optimizer.step(closure)
    return weight.detach(), bias.detach()
