"""Weights made by other libraries or for other inputs, converted to ours: names, layout, normalisation."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from cifar_ft.transforms import NORMALIZATIONS

CAFFE_MEAN = (123.68, 116.779, 103.939)  # of RGB from 0 to 255; a deviation of 1
KERAS_EPSILON, TORCH_EPSILON = 1e-3, 1e-5  # of BatchNorm
KERAS_KINDS = {
    "kernel": "weight",
    "gamma": "weight",
    "bias": "bias",
    "beta": "bias",
    "moving_mean": "running_mean",
    "moving_variance": "running_var",
}


def for_imagenet_normalization(
    state: dict[str, Tensor],
    mean: float | Sequence[float] = 0.5,
    std: float | Sequence[float] = 0.5,
    stem: tuple[str, str] = ("conv_stem", "bn1"),
) -> dict[str, Tensor]:
    """The same network for inputs normalised with ImageNet's mean and deviation, in place of another's.

    One normalisation is a scale and a shift of the other for each channel, so the first convolution takes in the
    scale, and the mean of the BatchNorm after it the shift. Away from the picture's border, where zeros now stand for
    ImageNet's mean colour and no longer for that of the other normalisation, the outputs are the same.

    Parameters
    ----------
    state : tensors by name, among them those of the stem.
    mean, std : with which the network was trained, for pixels from 0 to 1; one number, or one for each channel. By
        default those of EfficientNet-Lite0, whose pixels went from -1 to 1.
    stem : names of the first convolution and its BatchNorm.
    """
    convolution, batchnorm = f"{stem[0]}.weight", f"{stem[1]}.running_mean"
    kernel = state[convolution]
    ours, theirs = (
        [kernel.new_tensor(values).view(1, -1, 1, 1) for values in pair]
        for pair in (NORMALIZATIONS["imagenet"], (mean, std))
    )
    shift = (kernel * (ours[0] - theirs[0]) / theirs[1]).sum((1, 2, 3))
    return {**state, convolution: kernel * ours[1] / theirs[1], batchnorm: state[batchnorm] - shift}


def wants_pixels_from_minus_1(state: dict[str, Tensor]) -> bool:
    """Whether EfficientNet-Lite0 was trained on pixels from -1 to 1, as TensorFlow's was, not on normalised ones, as
    timm's `efficientnet_lite0.ra_in1k` or one that was adapted already.

    The first BatchNorm tells: its mean is what the convolution gave on average, for the mean colour then, else for 0.
    """
    adapted = for_imagenet_normalization(state)
    return bool(adapted["bn1.running_mean"].norm() < state["bn1.running_mean"].norm())


def resnet50_from_keras(weights: Sequence[dict], data: bytes) -> dict[str, Tensor]:
    """ResNet-50 as Keras has it (the Caffe release of He et al.), under torchvision's names and for our inputs.

    Keras has kernels with the channels last. Its convolutions have a bias, which the mean of the BatchNorm after them
    takes in, and a larger epsilon, which the variance takes in. The first kernel wants blue, green and red from 0 to
    255, less Caffe's means.

    Parameters
    ----------
    weights : name, shape and dtype of each tensor, from the manifest of a TensorFlow.js layers model.
    data : their values, one tensor after the other.

    Raises
    ------
    ValueError, KeyError : they are not of such a network, or do not fit each other.
    """
    state, start = {}, 0
    for entry in weights:
        if entry["dtype"] != "float32" or "quantization" in entry:
            raise ValueError(f"{entry['name']} is not plain float32")
        layer, kind = entry["name"].split("/")
        end = start + 4 * math.prod(entry["shape"])
        values = np.frombuffer(data[start:end], "<f4").reshape(entry["shape"])
        # in double precision, so that the sums below round to the same values everywhere
        state[f"{_torchvision_name(layer)}.{KERAS_KINDS[kind]}"] = torch.from_numpy(values.astype(np.float64))
        start = end
    if start != len(data):
        raise ValueError(f"{start:,} bytes are described, {len(data):,} are there")
    for name, value in list(state.items()):
        if value.ndim == 4:
            convolution = name.removesuffix(".weight")
            batchnorm = convolution.replace("conv", "bn").replace("downsample.0", "downsample.1")
            state[name] = value.permute(3, 2, 0, 1)
            state[f"{batchnorm}.running_mean"] -= state.pop(f"{convolution}.bias")
        elif value.ndim == 2:
            state[name] = value.T
        elif name.endswith("running_var"):
            value += KERAS_EPSILON - TORCH_EPSILON
    state["conv1.weight"] = state["conv1.weight"].flip(1)  # BGR to RGB
    state = for_imagenet_normalization(state, [value / 255 for value in CAFFE_MEAN], 1 / 255, ("conv1", "bn1"))
    return {name: value.float().contiguous() for name, value in state.items()}


def _torchvision_name(layer: str) -> str:
    """`res3b_branch2c` is layer2.1.conv3, and `bn3b_branch2c` the BatchNorm after it."""
    if layer in (ends := {"conv1": "conv1", "bn_conv1": "bn1", "fc1000": "fc"}):
        return ends[layer]
    found = re.fullmatch(r"(res|bn)([2-5])([a-z])_branch(1|2[abc])", layer)
    if found is None:
        raise ValueError(f"{layer} is no layer of a ResNet-50")
    kind, stage, block, branch = found.groups()
    convolution = kind == "res"
    if branch == "1":
        part = "downsample.0" if convolution else "downsample.1"
    else:
        part = f"{'conv' if convolution else 'bn'}{'abc'.index(branch[1]) + 1}"
    return f"layer{int(stage) - 1}.{ord(block) - ord('a')}.{part}"
