"""Model surgery: what is loaded, changed, cut and frozen is exactly what was asked, and said so."""

import copy
import math
from pathlib import Path

import pandas as pd
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from cifar_ft import models
from cifar_ft.data import SourceError
from cifar_ft.models import (
    SurgeryError,
    build_model,
    create_backbone,
    cut,
    fetch_weights,
    freeze,
    head,
    load_state,
    replace_stem,
)
from cifar_ft.recipes import get_recipe
from cifar_ft.transforms import eval_transform, normalize

pytestmark = pytest.mark.usefixtures("one_thread")
PARTIAL = Path(__file__).parents[2] / "shared/weights/resnet50_imagenet_conv1_to_layer3.safetensors"
needs_partial = pytest.mark.skipif(not PARTIAL.exists(), reason="the local partial ResNet-50 weights are not here")


def recipe(**overrides):
    return get_recipe("smoke", {"backbone": "resnet18", "weights": "none", **overrides})


def build(echo=lambda line: None, **overrides):
    return build_model(recipe(**overrides), echo)


def copied(model):
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def moved(before, model, prefixes=("",)):
    """Names of tensors under the prefixes that are no longer bit for bit what they were."""
    after = model.state_dict()
    return {name for name in before if name.startswith(tuple(prefixes)) and not torch.equal(before[name], after[name])}


def train_steps(model, steps=3, size=32, only=None):
    """Real steps of SGD with weight decay, after `model.train()`."""
    model.train()
    parameters = [p for p in model.parameters() if only is None or p.requires_grad]
    optimizer = torch.optim.SGD(parameters, lr=0.05, momentum=0.9, weight_decay=1e-2)
    generator = torch.Generator().manual_seed(0)
    for _ in range(steps):
        images = torch.randn(8, 3, size, size, generator=generator) * 2 + 1
        optimizer.zero_grad()
        F.cross_entropy(model(images), torch.arange(8)).backward()
        optimizer.step()


@pytest.fixture(scope="module")
def lite0():
    """EfficientNet-Lite0 with its real ImageNet weights, which an installed package holds; tests work on copies."""
    return build(backbone="efficientnet_lite0", weights="imagenet")


# shapes


@pytest.mark.parametrize(
    ("backbone", "last_stage", "width"),
    [
        ("resnet18", None, 512), ("resnet18", 1, 64), ("resnet18", 2, 128), ("resnet18", 3, 256),
        ("resnet50", None, 2048), ("resnet50", 1, 256), ("resnet50", 2, 512), ("resnet50", 3, 1024),
        ("efficientnet_lite0", None, 1280),
    ],
)  # fmt: skip
def test_the_head_sees_features_of_the_backbones_width(backbone, last_stage, width):
    model, images = build(backbone=backbone, last_stage=last_stage), torch.randn(2, 3, 32, 32)
    assert models.features(model, images).shape == (2, width)
    assert model(images).shape == (2, 10)
    assert (head(model).in_features, head(model).out_features) == (width, 10)
    torch.testing.assert_close(head(model.eval())(models.features(model, images)), model(images))
    assert not head(model)._forward_pre_hooks  # nothing is left hanging on the model


@pytest.mark.parametrize(
    ("stem", "max_pool", "pixels"),
    [
        ("pretrained", True, 8), ("pretrained", False, 16), ("cifar_random", True, 16), ("cifar_random", False, 32),
        ("cifar_resampled", True, 16), ("cifar_resampled", False, 32),
    ],
)  # fmt: skip
@pytest.mark.parametrize("last_stage", [None, 2])
def test_stem_and_max_pool_set_the_size_of_the_maps_behind_them(stem, max_pool, pixels, last_stage):
    model = build(stem=stem, max_pool=max_pool, last_stage=last_stage)
    seen = []
    model.layer1.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].shape))
    assert model(torch.randn(2, 3, 32, 32)).shape == (2, 10)
    assert seen == [(2, 64, pixels, pixels)]


@pytest.mark.parametrize("stem", ["cifar_random", "cifar_resampled"])
def test_lite0_takes_a_new_stem_too(lite0, stem):
    model = replace_stem(copy.deepcopy(lite0), stem).eval()
    seen = []
    model.blocks.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].shape))
    assert model(torch.randn(2, 3, 32, 32)).shape == (2, 10)
    assert seen == [(2, 32, 32, 32)]


def numel(module):
    return sum(p.numel() for p in module.parameters())


def test_parameter_counts_are_the_known_ones():
    model = create_backbone("resnet50")
    assert numel(model) == 25_557_032
    assert numel(models.replace_head(model).fc) == 20_490
    assert numel(replace_stem(model, "cifar_random").conv1) == 1_728
    assert numel(model) == 25_557_032 - (2_049_000 - 20_490) - (9_408 - 1_728)


def test_the_published_stem_is_a_3x3_convolution_of_stride_1():
    conv = build(stem="cifar_random").conv1
    assert (conv.kernel_size, conv.stride, conv.padding, conv.bias) == ((3, 3), (1, 1), (1, 1), None)


def test_a_cut_drops_what_is_behind_it_and_nothing_before_it():
    whole, short = create_backbone("resnet18"), create_backbone("resnet18")
    short.load_state_dict(whole.state_dict())
    cut(short, 2)
    kept = [name for name in whole.state_dict() if not name.startswith(("layer3", "layer4", "fc"))]
    assert [name for name in short.state_dict() if not name.startswith("fc")] == kept
    assert not moved({name: whole.state_dict()[name] for name in kept}, short)
    assert cut(whole, None) is whole


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda: create_backbone("vgg"), "unknown backbone 'vgg'; choose from resnet50"),
        (lambda: replace_stem(build(), "tiny"), "unknown stem 'tiny'; choose from pretrained"),
        (lambda: cut(create_backbone("resnet18"), 5), "last_stage=5 is out of range"),
        (lambda: cut(create_backbone("efficientnet_lite0"), 2), "only ResNets can be cut"),
        (lambda: replace_stem(create_backbone("efficientnet_lite0"), max_pool=False), "no max-pool"),
        (lambda: freeze(build(), "stage7"), "cannot freeze up to 'stage7'; this model has none, stem, stage1"),
        (lambda: build(last_stage=1, freeze="stage3"), "cannot freeze up to 'stage3'"),
    ],
)
def test_an_impossible_change_is_refused_with_what_is_possible(change, words):
    with pytest.raises(SurgeryError, match=words):
        change()


# a stem resampled


def test_a_resampled_kernel_keeps_the_sum_of_each_kernels_weights():
    kernel = torch.randn(64, 3, 7, 7, generator=torch.Generator().manual_seed(0))
    small = models.resample_kernel(kernel, 3)
    assert small.shape == (64, 3, 3, 3)
    torch.testing.assert_close(small.sum((2, 3)), kernel.sum((2, 3)), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(models.resample_kernel(kernel.flip(3), 3), small.flip(3))
    corner = torch.zeros(1, 1, 7, 7)
    corner[..., 0, 0] = 1
    assert models.resample_kernel(corner, 3).argmax() == 0
    torch.testing.assert_close(models.resample_kernel(small, 3), small)


def test_a_resampled_stem_comes_from_the_pretrained_kernel():
    before, after = build(stem="pretrained"), build(stem="cifar_resampled")
    torch.testing.assert_close(after.conv1.weight, models.resample_kernel(before.conv1.weight, 3))
    assert moved(copied(before), after) <= {"conv1.weight", "fc.weight"}


def stem_statistics(model, images):
    with torch.no_grad():
        output = model.bn1(model.conv1(images))
    return output.mean((0, 2, 3)), output.std((0, 2, 3))


def test_refreshed_batchnorm_gives_mean_0_and_std_1_behind_a_new_stem(samples):
    model, images = build(stem="cifar_resampled").eval(), normalize(samples.images)
    mean, std = stem_statistics(model, images)
    assert max(mean.abs().max(), (std - 1).abs().max()) > 0.2  # before: the statistics of nothing
    models.refresh_batchnorm(model, images.split(50))
    mean, std = stem_statistics(model, images)
    torch.testing.assert_close(mean, torch.zeros(64), rtol=0, atol=0.02)
    torch.testing.assert_close(std, torch.ones(64), rtol=0, atol=0.05)


def test_refreshing_batchnorm_changes_statistics_only_and_restores_every_mode(samples):
    model = freeze(build(stem="cifar_resampled"), "stem").eval()
    model.layer1.train()
    before, modes = copied(model), {name: m.training for name, m in model.named_modules()}
    models.refresh_batchnorm(model, normalize(samples.images[:64]).split(32))
    names = moved(before, model)
    assert names
    assert all(name.endswith(("running_mean", "running_var", "num_batches_tracked")) for name in names)
    assert not any(name.startswith("bn1") for name in names)  # frozen
    assert {name: m.training for name, m in model.named_modules()} == modes
    assert {m.momentum for m in model.modules() if isinstance(m, nn.BatchNorm2d)} == {0.1}


# freezing

RESNET_PARTS = ["conv1", "bn1", "layer1", "layer2", "layer3", "layer4", "fc"]
RESNET_UPTO = {"none": 0, "stem": 2, "stage1": 3, "stage3": 5, "backbone": 6}


@pytest.mark.parametrize("upto", RESNET_UPTO)
def test_a_frozen_part_stays_bit_for_bit_through_real_training(upto):
    model = build(freeze=upto)
    before, border = copied(model), RESNET_UPTO[upto]
    train_steps(model)
    frozen = [f"{part}." for part in RESNET_PARTS[:border]]
    assert not frozen or not moved(before, model, frozen)
    for part in RESNET_PARTS[border:]:  # parameters and BatchNorm statistics of the rest move
        names = {name for name in before if name.startswith(f"{part}.")}
        assert moved(before, model, [f"{part}."]) == names
    for name, parameter in model.named_parameters():
        assert parameter.requires_grad is not name.startswith(tuple(frozen or ["-"]))


@pytest.mark.parametrize(("upto", "first_free"), [("stage3", "blocks.3."), ("backbone", "classifier.")])
def test_lite0_freezes_the_same_way(lite0, upto, first_free):
    model = freeze(copy.deepcopy(lite0), upto)
    before = copied(model)
    train_steps(model, steps=2)
    names = list(before)
    border = next(i for i, name in enumerate(names) if name.startswith(first_free))
    behind = ("blocks.3.", "blocks.4.", "blocks.5.", "blocks.6.", "conv_head.", "bn2.", "classifier.")
    free = {name for name in names if name.startswith(behind[behind.index(first_free) :])}
    assert border > 10
    assert moved(before, model) == free


def test_requires_grad_false_alone_does_not_freeze_batchnorm():
    model = build()
    for part in (model.conv1, model.bn1, model.layer1):
        part.requires_grad_(False)
    before = copied(model)
    train_steps(model, only="trainable")
    names = moved(before, model, ["conv1", "bn1", "layer1"])
    assert "bn1.running_mean" in names  # the trap that `freeze` is there for
    assert all(name.endswith(("running_mean", "running_var", "num_batches_tracked")) for name in names)


def test_freezing_survives_a_copy():
    model = copy.deepcopy(build(freeze="stage2"))
    before = copied(model)
    train_steps(model)
    assert not moved(before, model, ["conv1", "bn1", "layer1", "layer2"])
    assert "layer3.0.bn1.running_mean" in moved(before, model)


@pytest.mark.parametrize(("first", "second"), [("stage1", "stage3"), ("stage3", "stage1"), ("backbone", "none")])
def test_freezing_again_with_another_depth_is_freezing_to_that_depth(first, second):
    again, once = freeze(build(freeze=first), second), build(freeze=second)
    assert [p.requires_grad for p in again.parameters()] == [p.requires_grad for p in once.parameters()]
    train_steps(again)
    train_steps(once)
    assert not moved(copied(once), again)


def test_unfreezing_a_model_in_eval_mode_leaves_it_in_eval_mode():
    model = freeze(build(freeze="backbone").eval(), "none")
    assert not any(module.training for module in model.modules())
    assert all(module.training for module in model.train().modules())


def test_a_frozen_model_computes_what_it_did_in_eval_mode(lite0):
    images = torch.randn(2, 3, 32, 32)
    frozen = freeze(copy.deepcopy(lite0), "backbone").train()
    torch.testing.assert_close(frozen(images), lite0.eval()(images))


# weights


@pytest.fixture(scope="module")
def resnet18_state():
    return create_backbone("resnet18").state_dict()


def test_a_whole_file_is_loaded_whole(resnet18_state):
    model = create_backbone("resnet18")
    report = load_state(model, resnet18_state, "resnet18")
    expected = {name for name in resnet18_state if not name.startswith("fc.")}  # the head is replaced anyway
    assert set(report.loaded) == expected
    assert report.missing == ()
    assert not moved({name: resnet18_state[name] for name in expected}, model)
    assert set(report.table().status) == {"loaded"}


def test_a_partial_file_is_loaded_and_reported_layer_by_layer(resnet18_state):
    partial = {name: t for name, t in resnet18_state.items() if not name.startswith("layer4")}
    del partial["layer3.1.bn2.bias"]
    model = create_backbone("resnet18")
    before = copied(model)
    report = load_state(model, partial, "resnet18")
    table = report.table().set_index("layer")
    assert table.status["layer1.0.conv1"] == "loaded"
    assert table.loc["layer3.1.bn2", ["loaded", "tensors", "status"]].tolist() == [4, 5, "in part"]
    assert table.status["layer4.0.conv1"] == "missing"
    assert all(name.startswith("layer4") or name == "layer3.1.bn2.bias" for name in report.missing)
    assert len(report.missing) == 1 + sum(k.startswith("layer4") and "num_batches" not in k for k in resnet18_state)
    assert not moved({name: before[name] for name in report.missing}, model)  # what is missing is left as it was
    assert not moved({name: partial[name] for name in report.loaded}, model)


def test_a_file_without_step_counters_is_a_whole_file(resnet18_state):
    old = {name: t for name, t in resnet18_state.items() if not name.endswith("num_batches_tracked")}
    assert load_state(create_backbone("resnet18"), old, "resnet18").missing == ()


def test_half_precision_weights_load_into_a_float32_model(resnet18_state):
    model = create_backbone("resnet18")
    load_state(
        model, {name: t.half() if t.is_floating_point() else t for name, t in resnet18_state.items()}, "resnet18"
    )
    assert model.conv1.weight.dtype == torch.float32
    torch.testing.assert_close(model.conv1.weight, resnet18_state["conv1.weight"], rtol=1e-3, atol=1e-3)


def with_changes(state, **changes):
    return {**state, **{key.replace("__", "."): value for key, value in changes.items()}}


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda s: with_changes(s, layer1__0__conv1__weight=torch.zeros(64, 64, 1, 1)),
         r"layer1.0.conv1.weight is \[64, 64, 1, 1\] and should be \[64, 64, 3, 3\]"),
        (lambda s: with_changes(s, bn1__bias=torch.full((64,), math.nan)), "bn1.bias holds values that are not finite"),
        (lambda s: with_changes(s, bn1__running_var=torch.full((64,), math.inf)), "finite; the weights file .*damaged"),
        (lambda s: with_changes(s, blocks__0__weight=torch.zeros(1)), "not of a resnet18: .* 'blocks.0.weight'"),
        (lambda s: {"encoder." + name: tensor for name, tensor in s.items()}, "not of a resnet18: 0 of its"),
        (lambda s: {}, "not of a resnet18"),
        (lambda s: {name: s[name] for name in ("fc.weight", "fc.bias")}, "not of a resnet18"),
        (lambda s: create_backbone("efficientnet_lite0").state_dict(), "not of a resnet18: .*torchvision's names"),
        (lambda s: create_backbone("resnet50").state_dict(), "another architecture"),
    ],
)  # fmt: skip
def test_weights_that_do_not_fit_are_refused_and_change_nothing(resnet18_state, damage, words):
    model = create_backbone("resnet18")
    before = copied(model)
    with pytest.raises(SurgeryError, match=words):
        load_state(model, damage(dict(resnet18_state)), "resnet18")
    assert not moved(before, model)


def test_weights_loaded_behind_a_new_stem_are_refused_before_anything_changes(resnet18_state):
    model = replace_stem(create_backbone("resnet18"), "cifar_random")
    before = copied(model)
    with pytest.raises(SurgeryError, match=r"conv1.weight is \[64, 3, 7, 7\] and .* \[64, 3, 3, 3\].*before changing"):
        load_state(model, resnet18_state, "resnet18")
    assert not moved(before, model)


@needs_partial
def test_the_local_partial_file_gives_258_tensors_and_names_layer4_as_missing():
    lines = []
    model = build(lines.append, backbone="resnet50", weights=str(PARTIAL))
    info = model.weights_info
    assert info["loaded"] == 258
    assert {name.split(".")[0] for name in info["missing"]} == {"layer4"}
    assert any("has no layer4; " in line and "random" in line for line in lines)
    assert (info["backbone"], info["weights"]) == ("resnet50", PARTIAL.name)
    assert len(info["sha256"]) == 64


@needs_partial
def test_cut_behind_stage_3_the_local_partial_file_is_complete():
    lines = []
    model = build(lines.append, backbone="auto", weights=str(PARTIAL), last_stage=3)  # auto: told by the tensors' names
    assert (model.weights_info["loaded"], model.weights_info["missing"]) == (258, [])
    assert model.weights_info["backbone"] == "resnet50"
    assert not any("random" in line for line in lines)
    state = fetch_weights("resnet50", str(PARTIAL)).state_dict
    assert not moved({name: state[name] for name in state if not name.startswith("fc")}, model)


def test_the_real_lite0_weights_arrive_in_the_model_with_their_origin(lite0):
    weights, info = fetch_weights("efficientnet_lite0", echo=lambda line: None), lite0.weights_info
    expected = {name: t for name, t in weights.state_dict.items() if not name.startswith("classifier")}
    assert len(expected) == info["loaded"] == len(lite0.state_dict()) - 2
    assert not moved(expected, lite0)
    assert (info["sha256"], info["missing"], info["licence"]) == (weights.sha256, [], weights.licence)


def test_features_of_the_real_weights_know_the_ten_classes(lite0, samples):
    """A ridge classifier on 100 images tells 100 others apart; random features reach 0.15 to 0.26."""
    with torch.no_grad():
        found = models.features(
            copy.deepcopy(lite0).eval(), eval_transform(recipe(image_size=96))(samples.images)
        ).double()
    found = (found - found.mean(0)) / found.std()
    one, other = found[::2], found[1::2]
    targets = F.one_hot(samples.labels[::2], 10).double()
    scores = other @ one.T @ torch.linalg.solve(one @ one.T + 1000 * torch.eye(100), targets)
    assert (scores.argmax(1) == samples.labels[1::2]).double().mean() > 0.35


@pytest.fixture
def no_network(monkeypatch):
    def refuse(*arguments, **options):
        raise SourceError("the network is down")

    monkeypatch.setattr(surgery, "fetch_weights", refuse)
    monkeypatch.setattr(surgery, "resolve_backbone", refuse)


@pytest.mark.parametrize("backbone", ["auto", "resnet18", "efficientnet_lite0"])
def test_random_weights_on_purpose_never_touch_the_network(no_network, backbone):
    lines = []
    info = build(lines.append, backbone=backbone).weights_info
    assert (info["weights"], info["loaded"], info["sha256"]) == ("none", 0, None)
    assert "random initialisation, as asked" in lines[-1]


@pytest.mark.parametrize("weights", ["imagenet", "/no/such/file.pt"])
@pytest.mark.parametrize("backbone", ["auto", "resnet18"])
def test_weights_that_cannot_be_had_are_an_error_and_never_random(no_network, backbone, weights):
    with pytest.raises(SourceError, match="network is down"):
        build(backbone=backbone, weights=weights)


def test_a_backbone_chosen_by_auto_must_allow_the_other_settings(monkeypatch):
    monkeypatch.setattr(surgery, "resolve_backbone", lambda backbone, echo: "efficientnet_lite0")
    with pytest.raises(ValueError, match="last_stage"):
        build(backbone="auto", weights="imagenet", last_stage=2)


def test_a_model_depends_on_its_seed_and_leaves_the_global_generator_alone():
    before = torch.get_rng_state()
    first = build(seed=1)
    assert torch.equal(torch.get_rng_state(), before)
    torch.rand(3)
    assert not moved(copied(first), build(seed=1))
    assert "fc.weight" in moved(copied(first), build(seed=2))


# tables


@pytest.fixture(scope="module")
def resnet50():
    return create_backbone("resnet50")


def counted(model, size):
    """10^9 multiply-adds of convolutions and linear layers, counted in a forward pass of a copy."""
    model = copy.deepcopy(model)
    total = []
    for module in model.modules():
        if isinstance(module, nn.Conv2d | nn.Linear):
            module.register_forward_hook(lambda m, _, out: total.append(m.weight[0].numel() * out[0].numel()))
    with torch.no_grad():
        model.eval()(torch.zeros(1, 3, size, size))
    return sum(total) / 1e9


@pytest.mark.parametrize("backbone", ["resnet18", "efficientnet_lite0"])
def test_a_summary_adds_up_to_an_independent_count(backbone):
    model = build(backbone=backbone, freeze="stage1")
    table = models.summarize(model, 48)
    assert table.parameters.sum() == numel(model)
    assert table.trainable.sum() == sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert table.gmac.sum() == pytest.approx(counted(model, 48), rel=0.01)
    assert table.set_index("part").batchnorm.to_dict() | {"head": ""} == {
        part: "frozen" if part in ("stem", "stage1") else "" if part == "head" else "moves" for part in table.part
    }


@pytest.mark.parametrize(
    ("size", "stem", "max_pool", "gmac"),
    [
        (224, "pretrained", True, 4.09), (64, "pretrained", True, 0.33), (32, "cifar_random", True, 0.33),
        (32, "cifar_random", False, 1.30),
    ],
)  # fmt: skip
def test_the_cost_of_a_resnet50_is_what_the_course_says(resnet50, size, stem, max_pool, gmac):
    model = replace_stem(copy.deepcopy(resnet50), stem, max_pool)
    assert models.summarize(model, size).gmac.sum() == pytest.approx(gmac, abs=0.006)


def test_a_summary_changes_nothing():
    model = freeze(build(), "stem").train()
    model.layer2.eval()
    before, modes = copied(model), [m.training for m in model.modules()]
    table = models.summarize(model, 32)
    assert not moved(before, model)
    assert [m.training for m in model.modules()] == modes
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    assert table.set_index("part").output.to_dict() == {
        "stem": "64x16x16", "stage1": "64x8x8", "stage2": "128x4x4", "stage3": "256x2x2", "stage4": "512x1x1",
        "head": "10",
    }  # fmt: skip


def test_a_comparison_shows_both_models_and_right_totals():
    before, after = create_backbone("resnet18"), build(stem="cifar_random", last_stage=2)
    models.freeze(after, "stem")
    table = models.compare(before, after, 32, size_before=64)
    assert list(table.index) == ["stem", "stage1", "stage2", "stage3", "stage4", "head", "total"]
    for side, model, size in (("before", before, 64), ("after", after, 32)):
        total = table.loc["total", side]
        assert total["parameters"] == numel(model)
        assert total["trainable"] == sum(p.numel() for p in model.parameters() if p.requires_grad)
        assert total["gmac"] == pytest.approx(counted(model, size), rel=0.01)
    assert pd.isna(table.loc["stage4", ("after", "parameters")])
    assert table.loc["stem", ("after", "batchnorm")] == "frozen"


# sanity


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("backbone", ["resnet18", "efficientnet_lite0"])
def test_the_first_loss_is_about_ln_10(backbone, lite0, samples, training):
    model = lite0 if backbone == "efficientnet_lite0" else build()
    with torch.no_grad():
        logits = copy.deepcopy(model).train(training)(eval_transform(recipe())(samples.images))
    assert F.cross_entropy(logits, samples.labels).item() == pytest.approx(math.log(10), abs=0.1)


def test_the_head_starts_small_or_as_published():
    small, published = build(), build(head_init="default")
    assert small.fc.weight.std().item() == pytest.approx(0.01, rel=0.1)
    assert not small.fc.bias.any()
    bound = 512**-0.5  # PyTorch's: uniform up to the inverse root of the inputs
    assert 0.99 * bound < published.fc.weight.abs().max() <= bound
    assert published.fc.bias.all()
    assert moved(copied(small), published) == {"fc.weight", "fc.bias"}


def test_one_batch_can_be_overfitted(samples):
    model, batch = build(last_stage=1).to(memory_format=torch.channels_last).train(), samples.subset(20)
    images = eval_transform(recipe())(batch.images)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    for _ in range(30):
        optimizer.zero_grad()
        loss = F.cross_entropy(model(images), batch.labels)
        loss.backward()
        optimizer.step()
    assert loss.item() < 0.05


@pytest.mark.parametrize(("backbone", "last"), [("resnet18", "stage2"), ("efficientnet_lite0", "stage3")])
def test_early_freezes_the_stages_of_an_eighth_of_the_width_or_more(backbone, last):
    model = models.freeze(models.create_backbone(backbone), "early")
    table = models.summarize(model, 128)
    table = table[table.part.str.startswith("st")]
    width = table.output.str.split("x").str[-1].astype(int)
    assert (table.trainable[width >= 128 // 8] == 0).all()
    assert (table.trainable[width < 128 // 8] > 0).all()
    assert table.part[width >= 128 // 8].iloc[-1] == last
