"""The linear probe: fit the head alone on features of a frozen backbone, a baseline and a way to begin."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from cifar_ft import models, transforms
from cifar_ft.data import Split
from cifar_ft.models import evaluating
from cifar_ft.recipes import Recipe


def fit_head(model: nn.Module, train: Split, recipe: Recipe, decay: float = 1e-4) -> float:
    """Fit the head alone, by L-BFGS on the cached features of the frozen backbone: a linear probe.

    Returns
    -------
    float
        Accuracy on the images it was fitted on.
    """
    sample = train.subset(min(len(train), recipe.head_fit_images or len(train)))
    transform, head = transforms.eval_transform(recipe), models.head(model)
    with evaluating(model), torch.no_grad():
        inputs = models.in_batches(lambda batch: models.features(model, transform(batch)).float(), sample.images, 250)
    optimizer = torch.optim.LBFGS(head.parameters(), max_iter=50, line_search_fn="strong_wolfe")

    def closure():
        optimizer.zero_grad()
        loss = F.cross_entropy(F.linear(inputs, head.weight, head.bias), sample.labels)
        loss = loss + decay * head.weight.square().sum()
        loss.backward()
        return loss

    optimizer.step(closure)
    head.zero_grad()
    with torch.no_grad():
        return (F.linear(inputs, head.weight, head.bias).argmax(1) == sample.labels).float().mean().item()
