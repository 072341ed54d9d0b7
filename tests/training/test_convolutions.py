"""Convolutions: what is made faster on a CPU computes the same values and gradients."""

import copy

import pytest
import torch
import torch.nn.functional as F
from timm.layers import Conv2dSame
from torch import nn

from cifar_ft.models import create_backbone
from cifar_ft.training.convolutions import (
    DepthwiseConv2d,
    GpuDepthwiseConv2d,
    PointwiseConv2d,
    SmallMapConv2d,
    speed_up,
)

pytestmark = pytest.mark.usefixtures("one_thread")
SIZES = [*((size, size) for size in range(2, 18)), (5, 8), (16, 7), (3, 12)]
LAYERS = {
    "conv": lambda channels, kernel, stride: nn.Conv2d(
        channels, channels, kernel, stride, padding=kernel // 2, groups=channels, bias=False
    ),
    "same": lambda channels, kernel, stride: Conv2dSame(
        channels, channels, kernel, stride, padding=0, groups=channels, bias=False
    ),
}


def results(layer, images, weigh=None, autocast=False):
    """Output of a layer, and the gradients of its input and weight, for one fixed function of the output."""
    images = images.clone().requires_grad_()
    layer.zero_grad()
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        output = layer(images)
    generator = torch.Generator().manual_seed(1)
    (output.float() * torch.randn(output.shape, generator=generator)).sum().backward()
    return output.detach(), images.grad, layer.weight.grad.clone()


def pair(kind, kernel, stride, channels=6, whole_batch=None):
    torch.manual_seed(0)
    plain = LAYERS[kind](channels, kernel, stride)
    fast = speed_up(copy.deepcopy(plain), whole_batch)
    assert type(fast) is (GpuDepthwiseConv2d if whole_batch else DepthwiseConv2d)
    return plain, fast


@pytest.mark.parametrize("whole_batch", [None, 3, 4], ids=["cpu", "gpu, whole batch", "gpu, another"])
@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("kernel", [3, 5])
@pytest.mark.parametrize("kind", LAYERS)
def test_outputs_and_gradients_are_those_of_the_plain_layer_at_every_size(kind, kernel, stride, whole_batch):
    plain, fast = pair(kind, kernel, stride, whole_batch=whole_batch)
    for height, width in SIZES:
        images = torch.randn(3, 6, height, width).contiguous(memory_format=torch.channels_last)
        for found, expected in zip(results(fast, images), results(plain, images), strict=True):
            assert found.shape == expected.shape
            torch.testing.assert_close(
                found, expected, rtol=1e-4, atol=1e-4, msg=lambda m, s=(height, width): f"{s}: {m}"
            )


@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("kernel", [3, 5])
@pytest.mark.parametrize("kind", LAYERS)
def test_bfloat16_stays_close_to_float32(kind, kernel, stride):
    plain, fast = pair(kind, kernel, stride)
    for size in (2, 5, 8, 17):
        images = torch.randn(4, 6, size, size)
        found, exact = results(fast, images, autocast=True), results(plain, images)
        assert found[0].dtype == torch.bfloat16
        assert (found[1].dtype, found[2].dtype) == (torch.float32, torch.float32)
        for half, full in zip(found, exact, strict=True):
            assert (half.float() - full).norm() < 0.02 * full.norm()


@pytest.mark.parametrize(("images_grad", "weight_grad"), [(True, False), (False, True), (False, False)])
def test_only_the_gradients_that_are_wanted_are_given(images_grad, weight_grad):
    plain, fast = pair("conv", 5, 2)
    for layer in (plain, fast):
        layer.weight.requires_grad_(weight_grad)
    images = torch.randn(2, 6, 8, 8, requires_grad=images_grad)
    output = fast(images)
    assert output.requires_grad is (images_grad or weight_grad)
    if output.requires_grad:
        output.sum().backward()
    assert (images.grad is not None, fast.weight.grad is not None) == (images_grad, weight_grad)
    torch.testing.assert_close(output, plain(images))


def test_a_whole_network_keeps_its_state_dict_outputs_and_gradients():
    torch.manual_seed(0)
    plain = create_backbone("efficientnet_lite0").train()
    fast = speed_up(copy.deepcopy(plain))
    assert sum(isinstance(m, DepthwiseConv2d) for m in fast.modules()) == 16
    assert fast.state_dict().keys() == plain.state_dict().keys()
    assert all(torch.equal(a, b) for a, b in zip(fast.state_dict().values(), plain.state_dict().values(), strict=True))
    images = torch.randn(8, 3, 48, 48)
    torch.testing.assert_close(fast.eval()(images), plain.eval()(images), rtol=1e-4, atol=1e-5)
    for model in (plain, fast):
        F.cross_entropy(model(images), torch.arange(8)).backward()
    for (name, a), b in zip(fast.named_parameters(), plain.parameters(), strict=True):
        assert (a.grad - b.grad).norm() <= 1e-3 * b.grad.norm() + 1e-6, name
    speed_up(fast)  # a second time changes nothing
    plain.load_state_dict(fast.state_dict())
    copy.deepcopy(fast)(images)


@pytest.mark.parametrize(
    "layer",
    [
        nn.Conv2d(6, 6, 3), nn.Conv2d(6, 6, 1), nn.Conv2d(6, 6, 3, groups=2), nn.Conv2d(6, 6, 5, bias=False),
        nn.Conv2d(6, 6, 1, padding=1, bias=False), nn.Conv2d(6, 6, 3, padding=(0, 1), bias=False),
        nn.Conv2d(6, 6, 3, padding=1, padding_mode="reflect", bias=False),
        nn.Conv2d(6, 6, 3, padding="same", bias=False), nn.Conv2d(6, 6, (3, 5), groups=6, bias=False),
        nn.Conv2d(6, 12, 3, groups=6, bias=False), nn.Conv2d(6, 6, 3, (1, 2), groups=6, bias=False),
        nn.Conv2d(6, 6, 3, groups=6, bias=True), nn.Conv2d(6, 6, 3, groups=6, bias=False, dilation=2), nn.Linear(6, 6),
    ],
    ids=str,
)  # fmt: skip
def test_other_layers_are_left_alone(layer):
    kind = type(layer)
    assert type(speed_up(nn.Sequential(layer))[0]) is kind
    assert type(speed_up(nn.Sequential(layer), 64)[0]) is kind


@pytest.mark.parametrize(("kernel", "stride", "padding"), [(1, 1, 0), (1, 2, 0), (3, 1, 1), (3, 2, 1), (3, 1, 0)])
def test_full_convolutions_as_matrix_products_are_the_plain_layer_at_every_size(kernel, stride, padding):
    torch.manual_seed(0)
    plain = nn.Conv2d(6, 10, kernel, stride, padding, bias=False)
    fast = speed_up(copy.deepcopy(plain))
    assert type(fast) is (PointwiseConv2d if kernel == 1 else SmallMapConv2d)
    for height, width in [*((size, size) for size in range(3, 12)), (5, 8), (16, 7), (3, 12)]:
        images = torch.randn(3, 6, height, width).contiguous(memory_format=torch.channels_last)
        for found, expected in zip(results(fast, images), results(plain, images), strict=True):
            assert found.shape == expected.shape
            torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
        found, exact = results(fast, images, autocast=True), results(plain, images)
        assert found[0].dtype == torch.bfloat16
        for half, full in zip(found, exact, strict=True):
            assert (half.float() - full).norm() < 0.02 * full.norm()


@pytest.mark.parametrize(("backbone", "strides"), [("resnet18", "v1.5"), ("resnet50", "v1.5"), ("resnet50", "v1")])
def test_without_gradients_a_resnet_is_products_of_whole_batches_too(backbone, strides):
    model = speed_up(create_backbone(backbone, strides).eval()).to(memory_format=torch.channels_last)
    images = torch.randn(2, 3, 64, 64).contiguous(memory_format=torch.channels_last)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16), torch.profiler.profile() as profile:
        model(images)
    assert "aten::mm" in (names := {event.key for event in profile.key_averages()})
    assert "aten::bmm" not in names  # one product, and one copy of the weights, for each row of each image


@pytest.mark.parametrize(("backbone", "strides"), [("resnet18", "v1.5"), ("resnet50", "v1.5"), ("resnet50", "v1")])
def test_a_whole_resnet_keeps_its_outputs_and_gradients(backbone, strides):
    torch.manual_seed(0)
    plain = create_backbone(backbone, strides).double().train()
    fast = speed_up(copy.deepcopy(plain))
    assert sum(isinstance(m, SmallMapConv2d) for m in fast.modules()) == 16
    assert type(fast.conv1) is nn.Conv2d  # 7x7
    images = torch.randn(4, 3, 64, 64, dtype=torch.double).contiguous(memory_format=torch.channels_last)
    for model in (plain, fast):
        F.cross_entropy(model(images), torch.arange(4)).backward()
    for (name, a), b in zip(fast.named_parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-6, atol=1e-9, msg=name)
    plain.load_state_dict(fast.state_dict())
