"""Backbones: one table knows them all; weights are loaded as they are or refused, and nothing is loaded in part."""

import copy
import math
import pickle
from dataclasses import replace

import pytest
import torch
from tiny_models import build, copied, moved, numel

from cifar_ft import models
from cifar_ft.models import BACKBONES, SurgeryError, create_backbone, replace_stem
from cifar_ft.models.backbones import guess_backbone, load_state, strides_of
from cifar_ft.recipes import RecipeError, get_recipe

pytestmark = pytest.mark.usefixtures("one_thread")


def test_recipes_offer_just_the_backbones_of_the_table():
    with pytest.raises(RecipeError, match=", ".join(("auto", *BACKBONES))):
        get_recipe("smoke", "backbone=vgg")


def test_a_backbone_in_the_table_can_be_built_cut_changed_and_frozen(monkeypatch):
    monkeypatch.setitem(BACKBONES, "resnet34", replace(BACKBONES["resnet18"], model="resnet34"))
    model = models.freeze(models.replace_head(models.cut(create_backbone("resnet34"), 2)), "stage1")
    assert model(torch.zeros(2, 3, 32, 32)).shape == (2, 10)
    assert list(models.stages(model)) == ["stem", "stage1", "stage2", "head"]
    assert guess_backbone(create_backbone("resnet34").state_dict()) == "resnet34"


def test_a_network_that_is_none_of_them_is_named():
    with pytest.raises(SurgeryError, match="a Sequential is none of resnet50"):
        models.head(torch.nn.Sequential())


@pytest.mark.parametrize(
    ("backbone", "last_stage", "width"),
    [
        ("resnet18", None, 512), ("resnet18", 1, 64), ("resnet18", 2, 128), ("resnet18", 3, 256),
        ("resnet50", None, 2048), ("resnet50", 1, 256), ("resnet50", 2, 512), ("resnet50", 3, 1024),
        ("efficientnet_lite0", None, 1280),
    ],
)  # fmt: skip
def test_the_head_sees_features_of_the_backbones_width(backbone, last_stage, width):
    model, images = build(backbone=backbone, last_stage=last_stage).eval(), torch.randn(2, 3, 32, 32)
    head = models.head(model)
    found = models.features(model, images)
    assert found.shape == (2, width)
    assert (head.in_features, head.out_features) == (width, 10)
    torch.testing.assert_close(head(found), model(images))
    assert not head._forward_pre_hooks  # nothing is left hanging on the model


@pytest.mark.parametrize(("strides", "first", "second"), [("v1", 2, 1), ("v1.5", 1, 2)])
def test_a_resnet50_halves_the_picture_where_its_release_does_whatever_is_changed(strides, first, second):
    model = models.replace_head(replace_stem(models.cut(create_backbone("resnet50", strides), 3), "cifar_resampled"))
    for changed in (model, models.freeze(copy.deepcopy(model), "stage2"), pickle.loads(pickle.dumps(model))):
        for stage in (changed.layer2, changed.layer3):
            assert [block.conv1.stride[0] for block in stage] == [first] + [1] * (len(stage) - 1)
            assert [block.conv2.stride[0] for block in stage] == [second] + [1] * (len(stage) - 1)
        assert {block.conv1.stride[0] + block.conv2.stride[0] for block in changed.layer1} == {2}
        assert strides_of(changed) == strides
        assert changed(torch.zeros(2, 3, 32, 32)).shape == (2, 10)


def test_strides_are_a_choice_of_resnet50_alone():
    assert strides_of(create_backbone("resnet50")) == "v1.5"
    for other in (create_backbone("resnet18", "v1"), models.cut(create_backbone("resnet50", "v1"), 1)):
        assert strides_of(other) is None
    with pytest.raises(SurgeryError, match=r"unknown strides 'v2'; choose from v1, v1.5"):
        create_backbone("resnet50", "v2")


def test_parameter_counts_are_the_known_ones():
    model = create_backbone("resnet50")
    assert numel(model) == 25_557_032
    assert numel(models.replace_head(model).fc) == 20_490
    assert numel(replace_stem(model, "cifar_random").conv1) == 1_728
    assert numel(model) == 25_557_032 - (2_049_000 - 20_490) - (9_408 - 1_728)


@pytest.fixture(scope="module")
def state():
    return create_backbone("resnet18").state_dict()


@pytest.mark.parametrize("backbone", BACKBONES)
@pytest.mark.parametrize("part", ["whole", "without its last stage and head"])
def test_weights_say_by_their_names_whose_they_are(backbone, part):
    names = create_backbone(backbone).state_dict()
    gone = ("-",) if part == "whole" else (BACKBONES[backbone].stages[-1], BACKBONES[backbone].head)
    assert guess_backbone({name: names[name] for name in names if not name.startswith(gone)}) == backbone


def test_a_whole_file_is_loaded_whole(state):
    model = create_backbone("resnet18")
    loaded, missing = load_state(model, state, "resnet18")
    assert set(loaded) == {name for name in state if not name.startswith("fc.")}  # the head is replaced anyway
    assert missing == []
    assert not moved({name: state[name] for name in loaded}, model)
    old = {name: t for name, t in state.items() if not name.endswith("num_batches_tracked")}
    assert load_state(model, old, "resnet18")[1] == []  # step counters, which old files lack, count for nothing


def test_a_partial_file_is_loaded_and_what_it_lacks_is_named_and_left_as_it_was(state):
    partial = {name: t for name, t in state.items() if not name.startswith("layer4")}
    del partial["layer3.1.bn2.bias"]
    model = create_backbone("resnet18")
    before = copied(model)
    loaded, missing = load_state(model, partial, "resnet18")
    assert "layer3.1.bn2.bias" in missing
    assert all(name.startswith("layer4") or name == "layer3.1.bn2.bias" for name in missing)
    assert len(missing) == 1 + sum(name.startswith("layer4") and "num_batches" not in name for name in state)
    assert not moved({name: before[name] for name in missing}, model)
    assert not moved({name: partial[name] for name in loaded}, model)


def test_half_precision_weights_load_into_a_float32_model(state):
    model = create_backbone("resnet18")
    load_state(model, {name: t.half() if t.is_floating_point() else t for name, t in state.items()}, "resnet18")
    assert model.conv1.weight.dtype == torch.float32
    torch.testing.assert_close(model.conv1.weight, state["conv1.weight"], rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda s: {**s, "layer1.0.conv1.weight": torch.zeros(64, 64, 1, 1)},
         r"layer1.0.conv1.weight is \[64, 64, 1, 1\] and should be \[64, 64, 3, 3\]"),
        (lambda s: {**s, "bn1.bias": torch.full((64,), math.nan)}, "bn1.bias holds values that are not finite"),
        (lambda s: {**s, "bn1.running_var": torch.full((64,), math.inf)}, "finite; the weights file .*damaged"),
        (lambda s: {**s, "blocks.0.weight": torch.zeros(1)}, "not of a resnet18: .* 'blocks.0.weight'"),
        (lambda s: {"encoder." + name: tensor for name, tensor in s.items()}, "not of a resnet18: 0 of its"),
        (lambda s: {}, "not of a resnet18"),
        (lambda s: {name: s[name] for name in ("fc.weight", "fc.bias")}, "not of a resnet18"),
        (lambda s: create_backbone("efficientnet_lite0").state_dict(), "not of a resnet18: .*torchvision's names"),
        (lambda s: create_backbone("resnet50").state_dict(), "another architecture"),
    ],
)  # fmt: skip
def test_weights_that_do_not_fit_are_refused_and_change_nothing(state, damage, words):
    model = create_backbone("resnet18")
    before = copied(model)
    with pytest.raises(SurgeryError, match=words):
        load_state(model, damage(dict(state)), "resnet18")
    assert not moved(before, model)


def test_weights_loaded_after_a_new_stem_are_refused_before_anything_changes(state):
    model = replace_stem(create_backbone("resnet18"), "cifar_random")
    before = copied(model)
    with pytest.raises(SurgeryError, match=r"conv1.weight is \[64, 3, 7, 7\] and .* \[64, 3, 3, 3\].*before changing"):
        load_state(model, state, "resnet18")
    assert not moved(before, model)
