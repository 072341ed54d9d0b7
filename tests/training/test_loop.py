"""The loop: what is trained on, how it is measured, and that it learns."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from tiny_runs import recipe, weights

from cifar_ft import models, transforms
from cifar_ft.training import choose_plan, fit, prepare
from cifar_ft.training.loop import train_step

pytestmark = pytest.mark.usefixtures("one_thread")


def test_progressive_resizing_trains_at_each_epochs_size(small_data, tmp_path, monkeypatch):
    sizes, draw = [], transforms.TrainTransform.__call__

    def spy(self, images, *arguments, **options):
        sizes.append(draw(self, images, *arguments, **options).shape[-1])
        return draw(self, images, *arguments, **options)

    monkeypatch.setattr(transforms.TrainTransform, "__call__", spy)
    fit(recipe(train_sizes=(16, 24), image_size=32, checkpoint_steps=0), small_data, tmp_path / "run")
    assert sizes == [16] * 5 + [24] * 5


def test_each_epoch_and_each_step_augments_anew_and_each_run_alike(small_data, tmp_path, monkeypatch):
    draws, call = [], transforms.TrainTransform.__call__

    def spy(self, images, *arguments, **options):
        draws.append(tuple(options["draws"][0].flatten().tolist()))
        return call(self, images, *arguments, **options)

    monkeypatch.setattr(transforms.TrainTransform, "__call__", spy)
    for name in ("one", "two"):
        fit(recipe(checkpoint_steps=0), small_data, tmp_path / name)
    assert len(set(draws)) == 10
    assert draws[:10] == draws[10:]


def test_a_small_network_learns(small_data, tmp_path):
    size = {"epochs": 12, "last_stage": 2, "image_size": 24}
    plain = {"checkpoint_steps": 0, "ema_decay": 0.0, "select": "last", "flip": False, "crop_padding": 0}
    run = fit(recipe(**size, **plain, head_lr_factor=1), small_data, tmp_path / "run")
    assert run.history.train_loss.iloc[0] > 2
    assert run.history.train_loss.iloc[-1] < 1
    assert run.history.train_accuracy.iloc[-1] > 0.7


def test_the_reported_training_loss_is_plain_cross_entropy_whatever_the_smoothing(small_data, tmp_path):
    # A fitted head makes confident predictions; with lr near 0 the network stays the same, smoothed or not.
    still = {"head_fit_images": 120, "lr": 1e-8, "epochs": 1, "flip": False, "crop_padding": 0, "checkpoint_steps": 0}
    losses = {}
    for smoothing in (0.0, 0.3):
        mine = recipe(**still, head_lr_factor=1, label_smoothing=smoothing, freeze="backbone")
        losses[smoothing] = fit(mine, small_data, tmp_path / str(smoothing)).history.train_loss[0]
    assert losses[0.3] == pytest.approx(losses[0.0], rel=1e-3)
    model = models.build_model(mine)
    model.load_state_dict(weights(tmp_path / "0.0"))
    with torch.no_grad():
        logits = model.eval()(transforms.eval_transform(mine)(small_data.train.images))
    assert losses[0.0] == pytest.approx(F.cross_entropy(logits, small_data.train.labels).item(), rel=1e-3)
    smoothed = F.cross_entropy(logits, small_data.train.labels, label_smoothing=0.3).item()
    assert smoothed - losses[0.0] > 0.1  # so the two could be told apart


def test_label_smoothing_changes_what_is_learned(whole, small_data, tmp_path):
    fit(recipe(label_smoothing=0.2), small_data, tmp_path / "run")
    assert not torch.equal(weights(tmp_path / "run")["fc.weight"], weights(whole)["fc.weight"])


@pytest.mark.parametrize("overrides", [{}, {"head_fit_images": 50, "ema_decay": 0.0}])
def test_a_frozen_backbone_is_bit_for_bit_the_same_after_fit(small_data, tmp_path, overrides):
    mine = recipe(freeze="backbone", checkpoint_steps=0, select="last", **overrides)
    fit(mine, small_data, tmp_path / "run")
    before, after = models.build_model(mine).state_dict(), weights(tmp_path / "run")
    assert {name for name in before if not torch.equal(before[name], after[name])} == {"fc.weight", "fc.bias"}


@pytest.mark.parametrize(("images", "cuts"), [(24, [5, 5, 5, 5, 4]), (7, [3, 2, 2]), (2, [2])])
def test_micro_batches_have_at_least_two_images(small_data, monkeypatch, images, cuts):
    mine = recipe(batch_size=max(2, images), accumulation=5)
    training, seen = prepare(mine, models.build_model(mine), choose_plan(mine, "resnet18", torch.device("cpu"))), []
    monkeypatch.setattr(
        training.model, "forward", lambda x: seen.append(len(x)) or torch.zeros(len(x), 10, requires_grad=True)
    )
    train_step(training, images, torch.zeros(images, 3, 16, 16), torch.zeros(images, dtype=torch.long))
    assert seen == cuts


def test_micro_batches_that_are_asked_for_are_the_same_steps(small_data, tmp_path):
    one = fit(recipe(freeze_batchnorm=True, checkpoint_steps=0), small_data, tmp_path / "one")
    for number in (5, 24, 1000):
        mine = recipe(freeze_batchnorm=True, checkpoint_steps=0, accumulation=number)
        run = fit(mine, small_data, tmp_path / str(number))
        np.testing.assert_allclose(run.history.train_loss, one.history.train_loss, rtol=1e-4)
        assert list(run.history.train_accuracy) == pytest.approx(list(one.history.train_accuracy), abs=0.02)
