"""Convolutions that take less time: the same values and gradients, by another way through the machine's library."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

_convolution_backward = torch.ops.aten.convolution_backward


class _Depthwise(torch.autograd.Function):
    """A depthwise convolution whose gradients avoid two slow paths of the CPU library.

    The weight gradient of a large kernel or a tiny map is computed as a forward convolution, with batch and channels as
    the channels and the output gradient as the kernel. The input gradient of a strided bfloat16
    convolution is computed in float32.
    """

    @staticmethod
    def forward(ctx, images: Tensor, weight: Tensor, stride: int, padding: int) -> Tensor:
        ctx.save_for_backward(images, weight)
        ctx.stride, ctx.padding = stride, padding
        return F.conv2d(images, weight, None, stride, padding, 1, images.shape[1])

    @staticmethod
    def backward(ctx, grad: Tensor):
        images, weight = ctx.saved_tensors
        return (
            _input_gradient(grad, images, weight, ctx.stride, ctx.padding) if ctx.needs_input_grad[0] else None,
            _weight_gradient(grad, images, weight, ctx.stride, ctx.padding) if ctx.needs_input_grad[1] else None,
            None,
            None,
        )


def _input_gradient(grad: Tensor, images: Tensor, weight: Tensor, stride: int, padding: int) -> Tensor:
    channels, kernel = images.shape[1], weight.shape[-1]
    # Times: this way against oneDNN's own, 64 images, one thread of an Intel processor with AMX, bfloat16.
    if stride == 1:  # a convolution with the kernel turned by 180 degrees: 1.1 against 2.7 ms (480 maps of 7 x 7)
        return F.conv2d(grad, weight.flip(2, 3), None, 1, kernel - 1 - padding, 1, channels)
    # By way of float32: 35 against 202 ms (144 maps of 28 x 28, 5 x 5 kernels); in float32 the two are as quick.
    return _native_gradient(grad.float(), images.float(), weight.float(), stride, padding, 0).to(grad.dtype)


def _weight_gradient(grad: Tensor, images: Tensor, weight: Tensor, stride: int, padding: int) -> Tensor:
    (batch, channels, height, width), kernel = images.shape, weight.shape[-1]
    if kernel < 5 and height > 4:  # oneDNN's own is as quick
        return _native_gradient(grad, images, weight, stride, padding, 1)
    # The weight gradient is a correlation of each image with its output gradient. Laid side by side as the channels of
    # a single image, all images of the batch are correlated by one depthwise convolution: the output gradient is its
    # kernel, and the stride becomes its dilation. 5 against 86 ms (480 maps of 7 x 7, 5 x 5 kernels).
    wide = images.permute(2, 3, 0, 1).reshape(1, height, width, batch * channels).permute(0, 3, 1, 2)
    kernels = grad.reshape(batch * channels, 1, *grad.shape[-2:])
    each = F.conv2d(wide, kernels, None, 1, padding, stride, batch * channels)[..., :kernel, :kernel]
    return each.reshape(batch, channels, 1, kernel, kernel).sum(0, dtype=torch.float32).to(weight.dtype)


def _native_gradient(grad, images, weight, stride, padding, which):
    mask = [which == 0, which == 1, False]
    args = (None, [stride] * 2, [padding] * 2, [1, 1], False, [0, 0], images.shape[1], mask)
    return _convolution_backward(grad, images, weight, *args)[which]


class _Padded(nn.Conv2d):
    """One channel a group, padded as `nn.Conv2d` or, where `same_padding` is set, as timm's "SAME"."""

    def padded(self, images: Tensor) -> tuple[Tensor, int]:
        """The images, padded by hand if need be, and the padding that is left to the convolution."""
        if not self.same_padding:
            return images, self.padding[0]
        kernel, stride = self.kernel_size[0], self.stride[0]
        before_after = [_same(size, kernel, stride) for size in images.shape[:1:-1]]  # width first, then height
        return F.pad(images, [pad for pair in before_after for pad in pair]), 0


class DepthwiseConv2d(_Padded):
    """`nn.Conv2d` for one channel a group, the same function with gradients faster on a CPU."""

    def forward(self, images: Tensor) -> Tensor:
        weight = self.weight
        if torch.is_autocast_enabled("cpu"):  # which knows nothing of functions that are not PyTorch's
            dtype = torch.get_autocast_dtype("cpu")
            images, weight = images.to(dtype), weight.to(dtype)
        images, padding = self.padded(images)
        return _Depthwise.apply(images, weight, self.stride[0], padding)


class GpuDepthwiseConv2d(_Padded):
    """`nn.Conv2d` for one channel a group on an NVIDIA GPU: whole training batches by cuDNN, others by PyTorch.

    cuDNN compiles its kernels for each shape, batch size included. On an H100 (cuDNN 9.19) the first step of
    EfficientNet-Lite0 took 9.4 s at a new batch or image size, and every other one 5.0 ms. PyTorch's own kernels
    took 0.3 and 9.9 ms: the better ones for the last batch of an epoch and for evaluation.
    """

    def forward(self, images: Tensor) -> Tensor:
        images, padding = self.padded(images)
        weight, rest = self.weight, (None, self.stride, padding, 1, self.groups)
        if len(images) == self.whole_batch:
            return F.conv2d(images, weight, *rest)
        # Only channels last goes to cuDNN; a kernel with one input channel counts as both until it is laid out anew.
        found = F.conv2d(images.contiguous(), weight.reshape(-1).view(weight.shape), *rest)
        return found.contiguous(memory_format=torch.channels_last)


def _same(size: int, kernel: int, stride: int) -> tuple[int, int]:
    total = max((-(-size // stride) - 1) * stride + kernel - size, 0)
    return total // 2, total - total // 2


class PointwiseConv2d(nn.Conv2d):
    """A 1x1 convolution as the matrix product it is: on a channels_last batch no value has to move."""

    def forward(self, images: Tensor) -> Tensor:
        stride = self.stride[0]
        if stride > 1:  # laid out anew: without gradients a view is multiplied row by row (bmm)
            images = images[:, :, ::stride, ::stride].contiguous(memory_format=torch.channels_last)
        return F.linear(images.permute(0, 2, 3, 1), self.weight.flatten(1)).permute(0, 3, 1, 2)


class SmallMapConv2d(nn.Conv2d):
    """A 3x3 convolution that is one matrix product where its map is small, there faster than the CPU library's own."""

    LARGEST_MAP = 16  # pixels of the output

    def forward(self, images: Tensor) -> Tensor:
        kernel, stride, padding = self.kernel_size[0], self.stride[0], self.padding[0]
        height, width = ((size + 2 * padding - kernel) // stride + 1 for size in images.shape[2:])
        if height * width > self.LARGEST_MAP:
            return super().forward(images)
        padded = F.pad(images.permute(0, 2, 3, 1), (0, 0, padding, padding, padding, padding))
        rows, columns = ((size - 1) * stride + 1 for size in (height, width))
        # One row for each output pixel, with the kernel * kernel input pixels that it sees side by side (im2col).
        taps = [(i, j) for i in range(kernel) for j in range(kernel)]
        patches = torch.cat([padded[:, i : i + rows : stride, j : j + columns : stride] for i, j in taps], dim=-1)
        return F.linear(patches, self.weight.permute(0, 2, 3, 1).flatten(1)).permute(0, 3, 1, 2)


def speed_up(model: nn.Module, whole_batch: int | None = None) -> nn.Module:
    """Give the model's convolutions a faster way to the same values and gradients. In place; weights stay.

    Parameters
    ----------
    model : module in channels-last format.
    whole_batch : on a CPU None; on an NVIDIA GPU the images of a training batch.
    """
    for layer in model.modules():
        if not isinstance(layer, nn.Conv2d) or layer.bias is not None or layer.dilation != (1, 1):
            continue
        same = type(layer).__name__ == "Conv2dSame"
        if not (same or type(layer) is nn.Conv2d) or len({*layer.kernel_size}) != 1 or len({*layer.stride}) != 1:
            continue
        if not isinstance(layer.padding, tuple) or len({*layer.padding}) != 1 or layer.padding_mode != "zeros":
            continue
        if layer.groups == layer.in_channels == layer.out_channels > 1:
            # in place: parameters, hooks and state dict keys stay
            layer.__class__ = GpuDepthwiseConv2d if whole_batch else DepthwiseConv2d
            layer.same_padding, layer.whole_batch = same, whole_batch
        elif layer.groups == 1 and not same and not whole_batch:
            if layer.kernel_size == (1, 1) and layer.padding == (0, 0):
                layer.__class__ = PointwiseConv2d
            elif layer.kernel_size == (3, 3):
                layer.__class__ = SmallMapConv2d
    return model
