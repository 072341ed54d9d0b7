"""Speed: what is made faster on a CPU computes the same, and the precision is measured once and changes nothing."""

import copy
import json

import pytest
import torch
import torch.nn.functional as F
from timm.layers import Conv2dSame
from torch import nn

from cifar_ft import speed
from cifar_ft.speed import DepthwiseConv2d, choose_precision, speed_up
from cifar_ft.surgery import create_backbone

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


def pair(kind, kernel, stride, channels=6):
    torch.manual_seed(0)
    plain = LAYERS[kind](channels, kernel, stride)
    fast = speed_up(copy.deepcopy(plain))
    assert type(fast) is DepthwiseConv2d
    return plain, fast


@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("kernel", [3, 5])
@pytest.mark.parametrize("kind", LAYERS)
def test_outputs_and_gradients_are_those_of_the_plain_layer_at_every_size(kind, kernel, stride):
    plain, fast = pair(kind, kernel, stride)
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
        nn.Conv2d(6, 6, 3), nn.Conv2d(6, 6, 3, groups=2), nn.Conv2d(6, 12, 3, groups=6, bias=False),
        nn.Conv2d(6, 6, (3, 5), groups=6, bias=False),
        nn.Conv2d(6, 6, 3, groups=6, bias=True), nn.Conv2d(6, 6, 3, groups=6, bias=False, dilation=2),
        nn.Conv2d(6, 6, 3, (1, 2), groups=6, bias=False), nn.Conv2d(1, 1, 3, bias=False), nn.Linear(6, 6),
    ],
    ids=str,
)  # fmt: skip
def test_other_layers_are_left_alone(layer):
    kind = type(layer)
    assert type(speed_up(nn.Sequential(layer))[0]) is kind


def test_resnets_have_nothing_to_speed_up():
    model = create_backbone("resnet18")
    kinds = [type(m) for m in model.modules()]
    assert [type(m) for m in speed_up(model).modules()] == kinds


# precision

CPU = torch.device("cpu")


@pytest.fixture
def model():
    torch.manual_seed(0)
    layers = nn.Conv2d(3, 4, 3), LAYERS["conv"](4, 3, 1), nn.BatchNorm2d(4), nn.AdaptiveAvgPool2d(1), nn.Flatten()
    model = nn.Sequential(*layers, nn.Linear(4, 10)).eval()
    model.weights_info = {"backbone": "tiny"}
    return model


@pytest.fixture
def timed(monkeypatch):
    """Stands in for the stop-watch: notes what is timed, and finds bf16 the faster."""
    calls = []

    def watch(model, precision, image_size, batch_size, steps=4):
        calls.append((precision, image_size, batch_size))
        return {"fp32": 100.0, "bf16": 150.0}[precision]

    monkeypatch.setattr(speed, "_images_per_second", watch)
    return calls


def test_the_faster_precision_is_chosen_and_remembered(model, timed, tmp_path):
    cache, lines = tmp_path / "new" / "precision.json", []
    assert choose_precision(model, CPU, 64, 32, cache, lines.append) == "bf16"
    assert timed == [("fp32", 64, 32), ("bf16", 64, 32)]
    assert "100 images/s" in lines[0]
    assert "150 images/s" in lines[0]
    assert choose_precision(model, CPU, 64, 32, cache, lines.append) == "bf16"
    assert len(timed) == 2  # from the cache
    assert "bf16" in lines[-1]
    assert choose_precision(model, CPU, 96, 32, cache, lines.append) == "bf16"
    assert len(timed) == 4  # another size is another question
    assert len(json.loads(cache.read_text())) == 2


def test_a_remembered_answer_is_obeyed(model, timed, tmp_path):
    cache = tmp_path / "precision.json"
    choose_precision(model, CPU, 64, 32, cache, lambda line: None)
    cache.write_text(cache.read_text().replace("bf16", "fp32"))
    assert choose_precision(model, CPU, 64, 32, cache, lambda line: None) == "fp32"


@pytest.mark.parametrize("content", ["", "{", "[]", "[1]", "3", "null", '{"x": 1}', "\x00\xff"])
def test_a_damaged_cache_is_measured_again(model, timed, tmp_path, content):
    cache = tmp_path / "precision.json"
    cache.write_bytes(content.encode("latin-1"))
    assert choose_precision(model, CPU, 64, 32, cache, lambda line: None) == "bf16"
    assert choose_precision(model, CPU, 64, 32, cache, lambda line: None) == "bf16"
    assert len(timed) == 2


def test_a_cache_that_cannot_be_written_only_costs_time(model, timed, tmp_path):
    (tmp_path / "file").touch()
    assert choose_precision(model, CPU, 64, 32, tmp_path / "file" / "precision.json", lambda line: None) == "bf16"


def test_measuring_leaves_the_model_as_it_was(model, tmp_path):
    before, kinds = copy.deepcopy(model.state_dict()), [type(m) for m in model.modules()]
    answer = choose_precision(model, CPU, 16, 4, tmp_path / "precision.json", lambda line: None)
    assert answer in ("fp32", "bf16")
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    assert [type(m) for m in model.modules()] == kinds
    assert not any(m.training for m in model.modules())
    assert all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize(
    ("device", "native", "answer"), [("cuda", True, "bf16"), ("cuda", False, "fp16"), ("mps", False, "fp32")]
)
def test_elsewhere_the_answer_needs_no_timing(monkeypatch, timed, tmp_path, device, native, answer):
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: native)
    assert choose_precision(None, torch.device(device), 64, 32, tmp_path / "precision.json") == answer
    assert timed == []
