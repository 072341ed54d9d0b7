"""Converted weights: on inputs normalised as ours, the network answers as it did on its own."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from keras_model import describe, small_network

from cifar_ft.models.conversion import resnet50_from_keras
from cifar_ft.transforms import NORMALIZATIONS

pytestmark = pytest.mark.usefixtures("one_thread")


def converted(keras):
    return resnet50_from_keras(*describe(keras))


@pytest.fixture(scope="module")
def keras():
    return small_network()


def in_keras(keras, images, convolution, batchnorm, stride=1):
    """The two layers as Keras computes them, on images [B, H, W, C]."""
    kernel = torch.from_numpy(keras[f"{convolution}/kernel"]).double().permute(3, 2, 0, 1)
    bias = torch.from_numpy(keras[f"{convolution}/bias"]).double()
    found = F.conv2d(images.permute(0, 3, 1, 2), kernel, bias, stride).permute(0, 2, 3, 1)
    names = ("moving_mean", "moving_variance", "gamma", "beta")
    mean, variance, gamma, beta = (torch.from_numpy(keras[f"{batchnorm}/{name}"]).double() for name in names)
    return ((found - mean) / (variance + 1e-3).sqrt() * gamma + beta).permute(0, 3, 1, 2)


def in_torch(state, images, convolution, batchnorm, stride=1):
    """The two layers as torchvision computes them, on images [B, C, H, W]."""
    values = [state[f"{batchnorm}.{name}"].double() for name in ("running_mean", "running_var", "weight", "bias")]
    return F.batch_norm(F.conv2d(images, state[f"{convolution}.weight"].double(), None, stride), *values, eps=1e-5)


def test_the_first_layers_take_our_inputs_in_place_of_caffes(keras):
    """Keras wants blue, green, red from 0 to 255 less Caffe's means; we, ImageNet's normalisation."""
    rgb = torch.rand(2, 16, 16, 3, dtype=torch.double, generator=torch.Generator().manual_seed(0)) * 255
    caffe = rgb.flip(3) - torch.tensor([103.939, 116.779, 123.68])
    mean, std = (torch.tensor(values, dtype=torch.double) for values in NORMALIZATIONS["imagenet"])
    ours = ((rgb / 255 - mean) / std).permute(0, 3, 1, 2)
    found = in_torch(converted(keras), ours, "conv1", "bn1", 2)
    torch.testing.assert_close(found, in_keras(keras, caffe, "conv1", "bn_conv1", 2), rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize(
    ("layer", "ours"),
    [
        ("2a_branch2a", ("layer1.0.conv1", "layer1.0.bn1")),
        ("2a_branch1", ("layer1.0.downsample.0", "layer1.0.downsample.1")),
        ("3b_branch2b", ("layer2.1.conv2", "layer2.1.bn2")),
        ("4f_branch2c", ("layer3.5.conv3", "layer3.5.bn3")),
    ],
)
def test_bias_and_epsilon_go_into_the_batchnorm_after_the_convolution(keras, layer, ours):
    images = torch.rand(2, 6, 6, 4, dtype=torch.double, generator=torch.Generator().manual_seed(0))
    found = in_torch(converted(keras), images.permute(0, 3, 1, 2), *ours)
    torch.testing.assert_close(found, in_keras(keras, images, f"res{layer}", f"bn{layer}"), rtol=1e-5, atol=1e-5)


def test_the_head_is_turned_and_nothing_else_is_left_over(keras):
    state = converted(keras)
    np.testing.assert_array_equal(state["fc.weight"], keras["fc1000/kernel"].T)
    np.testing.assert_array_equal(state["fc.bias"], keras["fc1000/bias"])
    assert len(state) == 5 * 5 + 2
    assert {value.dtype for value in state.values()} == {torch.float32}
    assert all(value.is_contiguous() for value in state.values())


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda entries, data: (entries, data + b"0000"), "3,876 bytes are described, 3,880 are there"),
        (lambda entries, data: (entries, data[:-4]), "cannot reshape array"),
        (lambda entries, data: (entries[:-1], data), "3,852 bytes are described, 3,876 are there"),
        (lambda entries, data: ([{**entries[0], "dtype": "int32"}, *entries[1:]], data), "is not plain float32"),
        (lambda entries, data: ([{**entries[0], "quantization": {}}, *entries[1:]], data), "is not plain float32"),
        (lambda entries, data: ([{**entries[0], "name": "res6a_branch2a/bias"}], data), "no layer of a ResNet-50"),
    ],
)
def test_what_does_not_fit_is_refused(keras, change, reason):
    with pytest.raises(ValueError, match=reason):
        resnet50_from_keras(*change(*describe(keras)))
