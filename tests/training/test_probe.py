"""The linear probe: the head alone is fitted, on features of a frozen backbone."""

import pytest
import torch
from tiny_runs import recipe

from cifar_ft import models, transforms
from cifar_ft.models import evaluating
from cifar_ft.training import (
    fit_head,
)

pytestmark = pytest.mark.usefixtures("one_thread")


def test_fitting_the_head_moves_the_head_alone_and_reports_its_accuracy(small_data):
    mine = recipe(head_fit_images=60, image_size=32)
    model = models.build_model(mine).train()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    reported = fit_head(model, small_data.train, mine)
    after = model.state_dict()
    assert {name for name in before if not torch.equal(before[name], after[name])} == {"fc.weight", "fc.bias"}
    assert all(module.training for module in model.modules())
    sample = small_data.train.subset(60)
    with evaluating(model), torch.no_grad():
        found = (model(transforms.eval_transform(mine)(sample.images)).argmax(1) == sample.labels).float().mean().item()
    assert reported == pytest.approx(found)
    assert reported > 0.3  # chance is 0.1
