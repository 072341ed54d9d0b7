"""Model surgery: what is loaded, changed and cut is exactly what was asked, and said so."""

import copy
import math

import pandas as pd
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from tiny_models import build, copied, moved, numel, recipe, v1_file
from torch import nn

from cifar_ft import models
from cifar_ft.data import SourceError
from cifar_ft.models import SurgeryError, build_model, create_backbone, cut, fetch_weights, replace_stem, surgery
from cifar_ft.transforms import eval_transform

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.parametrize(
    ("stem", "max_pool", "pixels"),
    [
        ("pretrained", True, 8), ("pretrained", False, 16), ("cifar_random", True, 16), ("cifar_random", False, 32),
        ("cifar_resampled", True, 16), ("cifar_resampled", False, 32),
    ],
)  # fmt: skip
def test_stem_and_max_pool_set_the_size_of_the_maps_after_them(stem, max_pool, pixels):
    model, seen = build(stem=stem, max_pool=max_pool, last_stage=2), []
    model.layer1.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].shape))
    assert model(torch.randn(2, 3, 32, 32)).shape == (2, 10)
    assert seen == [(2, 64, pixels, pixels)]
    if stem != "pretrained":
        conv = model.conv1
        assert (conv.kernel_size, conv.stride, conv.padding, conv.bias) == ((3, 3), (1, 1), (1, 1), None)


@pytest.mark.parametrize("stem", ["cifar_random", "cifar_resampled"])
def test_lite0_takes_a_new_stem_too(lite0, stem):
    model, seen = replace_stem(copy.deepcopy(lite0), stem).eval(), []
    model.blocks.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].shape))
    assert model(torch.randn(2, 3, 32, 32)).shape == (2, 10)
    assert seen == [(2, 32, 32, 32)]


def test_a_cut_drops_what_comes_after_it_and_nothing_before_it():
    whole, short = create_backbone("resnet18"), create_backbone("resnet18")
    short.load_state_dict(whole.state_dict())
    cut(short, 2)
    left = [name for name in whole.state_dict() if not name.startswith(("layer3", "layer4", "fc"))]
    assert [name for name in short.state_dict() if not name.startswith("fc")] == left
    assert not moved({name: whole.state_dict()[name] for name in left}, short)
    assert cut(whole, None) is whole


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda: create_backbone("vgg"), "unknown backbone 'vgg'; choose from resnet50"),
        (lambda: replace_stem(build(), "tiny"), "unknown stem 'tiny'; choose from pretrained"),
        (lambda: models.replace_head(build(), init="big"), "unknown init 'big'; choose from small, default"),
        (lambda: cut(create_backbone("resnet18"), 5), "last_stage=5 is out of range; choose 1, 2, 3 or none"),
        (lambda: cut(create_backbone("efficientnet_lite0"), 2), "lite0 cannot be cut, only ResNets can"),
        (lambda: replace_stem(create_backbone("efficientnet_lite0"), max_pool=False), "no max-pool"),
    ],
)
def test_an_impossible_change_is_refused_with_what_is_possible(change, words):
    with pytest.raises(SurgeryError, match=words):
        change()


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


# weights


@pytest.fixture(scope="module")
def partial(tmp_path_factory):
    """A file of ResNet-18 without its last stage and head."""
    path = tmp_path_factory.mktemp("weights") / "partial.safetensors"
    state = create_backbone("resnet18").state_dict()
    save_file({name: state[name] for name in state if not name.startswith(("layer4", "fc"))}, path)
    return path


@pytest.mark.parametrize("backbone", ["auto", "resnet18"])
def test_a_partial_file_is_used_and_what_it_lacks_is_said(partial, backbone, said):
    info = build(backbone=backbone, weights=str(partial)).weights_info  # auto: told by the tensors' names
    assert (info["backbone"], info["weights"], len(info["sha256"])) == ("resnet18", partial.name, 64)
    assert {name.split(".")[0] for name in info["missing"]} == {"layer4"}
    assert said[-1] == f"Note: the weights file has no layer4; {len(info['missing'])} tensors there stay random"


def test_cut_to_what_a_partial_file_has_the_model_is_complete(partial, said):
    model = build(weights=str(partial), last_stage=3)
    state = fetch_weights("resnet18", str(partial)).state_dict
    assert (model.weights_info["loaded"], model.weights_info["missing"]) == (len(state), [])
    assert not any("random" in line for line in said)
    assert not moved(state, model)


def test_the_real_lite0_weights_arrive_in_the_model_with_their_origin(lite0):
    weights, info = fetch_weights("efficientnet_lite0"), lite0.weights_info
    expected = {name: t for name, t in weights.state_dict.items() if not name.startswith("classifier")}
    assert len(expected) == info["loaded"] == len(lite0.state_dict()) - 2
    assert not moved(expected, lite0)
    assert (info["sha256"], info["missing"], info["licence"]) == (weights.sha256, [], weights.licence)


def test_features_of_the_real_weights_know_the_ten_classes(lite0, samples):
    """A ridge classifier on 100 images tells 100 others apart; random features reach 0.15 to 0.26."""
    images = eval_transform(recipe(image_size=96))(samples.images)
    with torch.no_grad():
        found = models.features(copy.deepcopy(lite0).eval(), images).double()
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
def test_random_weights_on_purpose_never_touch_the_network(no_network, backbone, said):
    info = build(backbone=backbone, freeze="stem").weights_info
    assert (info["weights"], info["loaded"], info["sha256"]) == ("none", 0, None)
    assert "random initialisation, as asked" in said[-2]
    assert said[-1] == "Note: the weights are random, and freeze=stem leaves a part of them so"


@pytest.mark.parametrize("backbone", ["auto", "efficientnet_lite0"])
@pytest.mark.parametrize("weights", ["imagenet", "/no/such/file.pt"])
def test_what_a_checkpoint_will_fill_fetches_nothing_and_says_what_it_was(no_network, backbone, weights, said):
    info = {"backbone": "efficientnet_lite0", "weights": "V1", "source": "the hub", "sha256": "ab", "missing": []}
    model = build_model(recipe(backbone=backbone, weights=weights, freeze="stem"), info)
    assert model.weights_info == info
    assert said == ["Model: efficientnet_lite0, weights V1 (the hub)"]
    fresh = create_backbone("efficientnet_lite0").state_dict()
    assert {name: value.shape for name, value in model.state_dict().items() if not name.startswith("class")} == {
        name: value.shape for name, value in fresh.items() if not name.startswith("class")
    }


@pytest.mark.parametrize("weights", ["imagenet", "/no/such/file.pt"])
@pytest.mark.parametrize("backbone", ["auto", "resnet18"])
def test_weights_that_cannot_be_had_are_an_error_and_never_random(no_network, backbone, weights):
    with pytest.raises(SourceError, match="network is down"):
        build(backbone=backbone, weights=weights)


def test_a_backbone_chosen_by_auto_must_allow_the_other_settings(monkeypatch):
    monkeypatch.setattr(surgery, "resolve_backbone", lambda backbone: "efficientnet_lite0")
    monkeypatch.setattr(surgery, "fetch_weights", lambda *arguments: None)
    with pytest.raises(ValueError, match="last_stage"):
        build(backbone="auto", weights="imagenet", last_stage=2)


def test_a_model_depends_on_its_seed_and_leaves_the_global_generator_alone(partial):
    before = torch.get_rng_state()
    first = build(seed=1, weights=str(partial), backbone="auto")
    assert torch.equal(torch.get_rng_state(), before)
    torch.rand(3)
    assert not moved(copied(first), build(seed=1, weights=str(partial)))
    assert "fc.weight" in moved(copied(first), build(seed=2, weights=str(partial)))


def test_a_model_has_the_strides_that_its_weights_were_made_for(tmp_path, said):
    v1 = build(weights=str(v1_file(tmp_path / "v1.safetensors")), backbone="auto", last_stage=2)
    assert (v1.weights_info["backbone"], v1.weights_info["strides"]) == ("resnet50", "v1")
    assert said[-1].startswith("Model: resnet50 (strides v1), weights v1.safetensors (the file ")
    plain = build(backbone="resnet50", last_stage=2)
    assert plain.weights_info["strides"] == "v1.5"
    assert build().weights_info["strides"] is None
    plain.load_state_dict(v1.state_dict())
    images = torch.randn(4, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    assert not torch.allclose(models.features(v1.eval(), images), models.features(plain.eval(), images), rtol=0.1)
    total = models.compare(plain, v1, 64).loc["total"]
    saved = 256 * 128 * (16 * 16 - 8 * 8)  # of the 1x1 convolution that begins stage 2
    assert total["before", "gmac"] - total["after", "gmac"] == pytest.approx(saved / 1e9, abs=2e-6)


# tables


def counted(model, size):
    """10^9 multiply-adds of convolutions and linear layers, counted in a forward pass of a copy."""
    model, total = copy.deepcopy(model), []
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
    assert table.set_index("part").batchnorm.to_dict() == {
        part: "frozen" if part in ("stem", "stage1") else "" if part == "head" else "moves" for part in table.part
    }


@pytest.mark.parametrize(
    ("size", "stem", "max_pool", "gmac"),
    [
        (224, "pretrained", True, 4.09), (64, "pretrained", True, 0.33), (32, "cifar_random", True, 0.33),
        (32, "cifar_random", False, 1.30),
    ],
)  # fmt: skip
def test_the_cost_of_a_resnet50_is_what_the_course_says(size, stem, max_pool, gmac):
    model = replace_stem(create_backbone("resnet50"), stem, max_pool)
    assert models.summarize(model, size).gmac.sum() == pytest.approx(gmac, abs=0.006)


def test_a_summary_changes_nothing():
    model = models.freeze(build(), "stem").train()
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
        assert total["output"] == total["batchnorm"] == ""
    assert pd.isna(table.loc["stage4", ("after", "parameters")])
    assert table.loc["stem", ("after", "batchnorm")] == "frozen"
    assert str(table.dtypes[("after", "parameters")]) == "Int64"  # whole numbers beside the gaps


# sanity


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("backbone", ["resnet18", "efficientnet_lite0"])
def test_the_first_loss_is_about_ln_10(backbone, lite0, samples, training):
    model = copy.deepcopy(lite0) if backbone == "efficientnet_lite0" else build()
    with torch.no_grad():
        logits = model.train(training)(eval_transform(recipe())(samples.images))
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
    images = eval_transform(recipe(image_size=32))(batch.images)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    for _ in range(30):
        optimizer.zero_grad()
        loss = F.cross_entropy(model(images), batch.labels)
        loss.backward()
        optimizer.step()
    assert loss.item() < 0.05
