"""Freezing: what is frozen stays bit for bit, its BatchNorm statistics too; those of the rest can be renewed."""

import copy
import pickle

import pytest
import torch
from tiny_models import build, copied, moved, train_steps
from torch import nn

from cifar_ft import models
from cifar_ft.models import SurgeryError, freeze, is_frozen_batchnorm
from cifar_ft.models.freezing import _frozen
from cifar_ft.transforms import normalize

pytestmark = pytest.mark.usefixtures("one_thread")
PARTS = ["conv1", "bn1", "layer1", "layer2", "layer3", "layer4", "fc"]
UPTO = {"none": 0, "stem": 2, "stage1": 3, "stage3": 5, "backbone": 6}
STATISTICS = ("running_mean", "running_var", "num_batches_tracked")


@pytest.mark.parametrize("upto", UPTO)
def test_a_frozen_part_stays_bit_for_bit_through_real_training(upto):
    model = build(freeze=upto)
    before, frozen = copied(model), tuple(f"{part}." for part in PARTS[: UPTO[upto]])
    train_steps(model)
    # parameters and BatchNorm statistics of the rest move
    assert moved(before, model) == {name for name in before if not name.startswith(frozen)}
    for name, parameter in model.named_parameters():
        assert parameter.requires_grad is not name.startswith(frozen)


@pytest.mark.parametrize(("upto", "first_free"), [("stage3", "blocks.3."), ("backbone", "classifier.")])
def test_lite0_freezes_the_same_way(lite0, upto, first_free):
    model = freeze(copy.deepcopy(lite0), upto)
    before, names = copied(model), list(lite0.state_dict())
    train_steps(model)
    border = next(i for i, name in enumerate(names) if name.startswith(first_free))
    top = {name for name in names if name.startswith(("conv_head.", "bn2."))}  # listed after the stages
    assert moved(before, model) == {*names[border:]} | (top if upto == "stage3" else set())
    assert border > 10


def test_requires_grad_false_alone_does_not_freeze_batchnorm():
    model = build(last_stage=1)
    for part in (model.conv1, model.bn1, model.layer1):
        part.requires_grad_(False)
    before = copied(model)
    train_steps(model, only="trainable")
    names = moved(before, model, ["conv1", "bn1", "layer1"])
    assert "bn1.running_mean" in names  # the trap that `freeze` is there for
    assert all(name.endswith(STATISTICS) for name in names)


def in_another_process(model):
    """As pickle hands it to another process, which has made no classes of its own yet."""
    data = pickle.dumps(model)
    _frozen.cache_clear()
    return pickle.loads(data)


@pytest.mark.parametrize("copy_of", [copy.deepcopy, in_another_process])
@pytest.mark.parametrize("backbone", ["resnet18", "efficientnet_lite0"])
def test_freezing_survives_a_copy(copy_of, backbone):
    original = build(backbone=backbone, freeze="stage2")
    model = copy_of(original)
    before = copied(model)
    assert list(before) == list(original.state_dict())
    assert not moved(before, original)
    assert [is_frozen_batchnorm(m) for m in model.modules()] == [is_frozen_batchnorm(m) for m in original.modules()]
    train_steps(model)
    frozen = [name for name in models.stages(model) if name in ("stem", "stage1", "stage2")]
    parts = [m for name in frozen for m in models.stages(model)[name]]
    names = [f"{name}." for name, m in model.named_modules() if any(m is part for part in parts)]
    assert not moved(before, model, names)
    assert len(moved(before, model)) == sum(not name.startswith(tuple(names)) for name in before)
    thawed = freeze(model, "none")
    assert not any(is_frozen_batchnorm(m) for m in thawed.modules())


@pytest.mark.parametrize(("first", "second"), [("stage1", "stage3"), ("stage3", "stage1"), ("backbone", "none")])
def test_freezing_again_with_another_depth_is_freezing_to_that_depth(first, second):
    again, once = freeze(build(freeze=first), second), build(freeze=second)
    assert [p.requires_grad for p in again.parameters()] == [p.requires_grad for p in once.parameters()]
    assert [type(m).__name__ for m in again.modules()] == [type(m).__name__ for m in once.modules()]
    assert [m.training for m in again.train().modules()] == [m.training for m in once.train().modules()]
    assert not moved(copied(once), again)


def test_all_batchnorm_can_be_stopped_while_weights_are_trained():
    model = freeze(build(last_stage=1), "none", batchnorm=True)
    before = copied(model)
    train_steps(model)
    assert moved(before, model) == {name for name in before if not name.endswith(STATISTICS)}


def test_unfreezing_a_model_in_eval_mode_leaves_it_in_eval_mode():
    model = freeze(build(freeze="backbone").eval(), "none")
    assert not any(module.training for module in model.modules())
    assert all(module.training for module in model.train().modules())


def test_a_frozen_model_computes_what_it_did_in_eval_mode(lite0):
    images = torch.randn(2, 3, 32, 32)
    frozen = freeze(copy.deepcopy(lite0), "backbone").train()
    torch.testing.assert_close(frozen(images), copy.deepcopy(lite0).eval()(images))


@pytest.mark.parametrize(("backbone", "last"), [("resnet18", "stage2"), ("efficientnet_lite0", "stage3")])
def test_early_freezes_the_stages_of_an_eighth_of_the_width_or_more(backbone, last):
    table = models.summarize(freeze(models.create_backbone(backbone), "early"), 128)
    table = table[table.part.str.startswith("st")]
    width = table.output.str.split("x").str[-1].astype(int)
    assert (table.trainable[width >= 128 // 8] == 0).all()
    assert (table.trainable[width < 128 // 8] > 0).all()
    assert table.part[width >= 128 // 8].iloc[-1] == last


@pytest.mark.parametrize(("last_stage", "upto"), [(None, "stage7"), (1, "stage3"), (None, "head")])
def test_a_part_that_the_model_has_not_is_refused_with_those_it_has(last_stage, upto):
    with pytest.raises(SurgeryError, match=f"cannot freeze up to '{upto}'; this model has none, stem, stage1"):
        freeze(build(last_stage=last_stage), upto)


def stem_statistics(model, images):
    with torch.no_grad():
        output = model.bn1(model.conv1(images))
    return output.mean((0, 2, 3)), output.std((0, 2, 3))


def test_refreshed_batchnorm_gives_mean_0_and_std_1_after_a_new_stem(samples):
    model, images = build(stem="cifar_resampled", last_stage=1).eval(), normalize(samples.images)
    mean, std = stem_statistics(model, images)
    assert max(mean.abs().max(), (std - 1).abs().max()) > 0.2  # before: the statistics of nothing
    models.refresh_batchnorm(model, images.split(50))
    mean, std = stem_statistics(model, images)
    torch.testing.assert_close(mean, torch.zeros(64), rtol=0, atol=0.02)
    torch.testing.assert_close(std, torch.ones(64), rtol=0, atol=0.05)


@pytest.mark.parametrize("fails", [False, True])
def test_refreshing_batchnorm_changes_statistics_only_and_restores_every_mode_and_momentum(samples, fails):
    model = freeze(build(stem="cifar_resampled"), "stem").eval()
    model.layer1.train()
    before, modes = copied(model), {name: m.training for name, m in model.named_modules()}

    def batches():
        yield normalize(samples.images[:16])
        if fails:
            raise MemoryError

    if fails:
        with pytest.raises(MemoryError):
            models.refresh_batchnorm(model, batches())
    else:
        models.refresh_batchnorm(model, batches())
    names = moved(before, model)
    assert names
    assert all(name.endswith(STATISTICS) for name in names)
    assert not any(name.startswith("bn1") for name in names)  # frozen
    assert {name: m.training for name, m in model.named_modules()} == modes
    assert {m.momentum for m in model.modules() if isinstance(m, nn.BatchNorm2d)} == {0.1}
