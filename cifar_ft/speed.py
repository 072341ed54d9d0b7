"""What makes training fast on a CPU: a quicker depthwise convolution, memory that is kept, and a measured precision.

Nothing here changes what is computed, only how long it takes; on a GPU all of it steps aside.
"""

from __future__ import annotations

import ctypes
import json
import platform
import sys
import time

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
    if stride == 1:
        return F.conv2d(grad, weight.flip(2, 3), None, 1, kernel - 1 - padding, 1, channels)
    return _native_gradient(grad.float(), images.float(), weight.float(), stride, padding, 0).to(grad.dtype)


def _weight_gradient(grad: Tensor, images: Tensor, weight: Tensor, stride: int, padding: int) -> Tensor:
    (batch, channels, height, width), kernel = images.shape, weight.shape[-1]
    if kernel < 5 and height > 4:
        return _native_gradient(grad, images, weight, stride, padding, 1)
    wide = images.permute(2, 3, 0, 1).reshape(1, height, width, batch * channels).permute(0, 3, 1, 2)
    kernels = grad.reshape(batch * channels, 1, *grad.shape[-2:])
    each = F.conv2d(wide, kernels, None, 1, padding, stride, batch * channels)[..., :kernel, :kernel]
    return each.reshape(batch, channels, 1, kernel, kernel).sum(0, dtype=torch.float32).to(weight.dtype)


def _native_gradient(grad, images, weight, stride, padding, which):
    mask = [which == 0, which == 1, False]
    args = (None, [stride] * 2, [padding] * 2, [1, 1], False, [0, 0], images.shape[1], mask)
    return _convolution_backward(grad, images, weight, *args)[which]


class DepthwiseConv2d(nn.Conv2d):
    """`nn.Conv2d` for one channel a group, the same function with gradients faster on a CPU; pads as timm's "SAME"."""

    def forward(self, images: Tensor) -> Tensor:
        weight, kernel, stride = self.weight, self.kernel_size[0], self.stride[0]
        if torch.is_autocast_enabled("cpu"):
            dtype = torch.get_autocast_dtype("cpu")
            images, weight = images.to(dtype), weight.to(dtype)
        padding = self.padding[0]
        if self.same_padding:
            padding = 0
            before_after = [_same(size, kernel, stride) for size in images.shape[:1:-1]]  # width first, then height
            images = F.pad(images, [pad for pair in before_after for pad in pair])
        return _Depthwise.apply(images, weight, stride, padding)


def _same(size: int, kernel: int, stride: int) -> tuple[int, int]:
    total = max((-(-size // stride) - 1) * stride + kernel - size, 0)
    return total // 2, total - total // 2


def speed_up(model: nn.Module) -> nn.Module:
    """Give the model's square depthwise convolutions their faster gradients, on a CPU. In place; weights stay."""
    for layer in model.modules():
        if isinstance(layer, nn.Conv2d) and layer.groups == layer.in_channels == layer.out_channels > 1:
            same = type(layer).__name__ == "Conv2dSame"
            square = len({*layer.kernel_size}) == len({*layer.stride}) == 1 and layer.dilation == (1, 1)
            if square and layer.bias is None and (same or type(layer) is nn.Conv2d):
                layer.__class__ = DepthwiseConv2d
                layer.same_padding = same
    return model


def keep_memory() -> None:
    """Ask glibc to keep freed memory. Training frees and asks for the same large blocks at each step, and each block
    that goes back to the kernel is cleared page by page when it is used again."""
    if not sys.platform.startswith("linux"):
        return
    try:
        libc = ctypes.CDLL("libc.so.6")
        mmap_max, trim_threshold, top_pad = -4, -1, -2  # from malloc.h
        libc.mallopt(mmap_max, 0)
        libc.mallopt(trim_threshold, 2**31 - 1)
        libc.mallopt(top_pad, 64 * 2**20)
    except (OSError, AttributeError):  # another C library: nothing to gain
        return


def hardware() -> str:
    """One line on the machine: processor, cores, and the GPU if there is one."""
    name = platform.processor() or platform.machine()
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            names = [line.partition(":")[2].strip() for line in file if line.startswith("model name")]
        name = names[0] if names else name
    except OSError:
        pass
    gpu = f", {torch.cuda.get_device_name()}" if torch.cuda.is_available() else ""
    return f"{name}, {torch.get_num_threads()} threads{gpu}"


def choose_precision(
    model: nn.Module, device: torch.device, image_size: int, batch_size: int, cache, echo=print
) -> str:
    """The faster of fp32 and bf16 for training this model here, by timing a few real steps; remembered in `cache`.

    On a GPU the answer needs no timing: bf16 where it is native, else fp16.

    Parameters
    ----------
    model : nn.Module
        Is not changed.
    cache : Path
        A JSON file of earlier answers by machine, model and size, so that a machine answers the same each time.
    """
    if device.type == "cuda":
        return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp16"
    if device.type != "cpu":
        return "fp32"
    setting = f"{model.weights_info['backbone']} {image_size} px, batch {batch_size}"
    key = f"{hardware()} | torch {torch.__version__} | {setting}"
    try:
        known = dict(json.loads(cache.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError):
        known = {}
    if known.get(key) not in ("fp32", "bf16"):
        speeds = {name: _images_per_second(model, name, image_size, batch_size) for name in ("fp32", "bf16")}
        known[key] = max(speeds, key=speeds.get)
        echo("Precision: " + ", ".join(f"{name} {speed:.0f} images/s" for name, speed in speeds.items()))
        try:
            cache.parent.mkdir(parents=True, exist_ok=True)
            cache.write_text(json.dumps(known, indent=1), encoding="utf-8")
        except OSError:
            pass  # a read-only cache only costs the next run these seconds
    echo(f"Precision: {known[key]} is the faster one here (--set precision=fp32 to choose yourself)")
    return known[key]


def _images_per_second(model: nn.Module, precision: str, image_size: int, batch_size: int, steps: int = 4) -> float:
    import copy

    trial = speed_up(copy.deepcopy(model)).train().to(memory_format=torch.channels_last)
    images = torch.randn(batch_size, 3, image_size, image_size).contiguous(memory_format=torch.channels_last)
    seconds = []
    for _ in range(steps):
        start = time.perf_counter()
        with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
            loss = trial(images).float().square().mean()
        loss.backward()
        seconds.append(time.perf_counter() - start)
    return batch_size / min(seconds[1:])
