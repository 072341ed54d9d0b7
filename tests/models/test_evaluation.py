"""Evaluation: every image once and in order, and the model left as it was."""

from types import SimpleNamespace

import pytest
import torch
from torch import nn

from cifar_ft.models import DeviceError, EvaluationError, choose_device, predict_logits


def to_float(images):
    return images.float() / 255


class Pixel(nn.Module):
    """Its logits are the image's first and last column: order and mirroring are seen in the answer."""

    def __init__(self):
        super().__init__()
        self.norm = nn.BatchNorm2d(3)
        self.drop = nn.Dropout(0.5)

    def forward(self, x):
        self.seen = x
        y = self.drop(self.norm(x))
        return torch.stack([y[:, 0, 0, 0], y[:, 0, 0, -1]], dim=1)


@pytest.fixture(scope="module")
def split():
    generator = torch.Generator().manual_seed(0)
    return SimpleNamespace(images=torch.randint(0, 256, (23, 3, 8, 8), dtype=torch.uint8, generator=generator))


@pytest.mark.parametrize("batch_size", [1, 5, 23, None])
def test_every_image_is_evaluated_once_and_in_order_channels_last(split, batch_size):
    model = Pixel()
    logits = predict_logits(model, split, to_float, batch_size=batch_size)
    assert logits.dtype == torch.float32
    assert logits.device.type == "cpu"
    torch.testing.assert_close(logits, split.images[:, 0, 0, [0, -1]].float() / 255, atol=1e-5, rtol=1e-4)
    assert model.seen.is_contiguous(memory_format=torch.channels_last)


def test_evaluation_leaves_modes_and_batchnorm_statistics_alone(split):
    model = nn.Sequential(Pixel(), nn.Sequential(nn.Dropout(), nn.BatchNorm1d(2)))
    model.train()
    model[1][1].eval()  # a frozen layer inside a training model
    flags = [module.training for module in model.modules()]
    state = {name: value.clone() for name, value in model.state_dict().items()}
    first = predict_logits(model, split, to_float, batch_size=5)
    assert torch.equal(first, predict_logits(model, split, to_float, batch_size=5))  # no dropout
    assert [module.training for module in model.modules()] == flags
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())


def test_modes_come_back_even_when_the_model_fails(split):
    model = nn.Sequential(nn.Dropout(), nn.Linear(1, 1))
    model[0].eval()
    with pytest.raises(RuntimeError):
        predict_logits(model, split, to_float)
    assert [module.training for module in model.modules()] == [True, False, True]


def test_flip_averages_the_image_and_its_mirror(split):
    plain = predict_logits(Pixel(), split, to_float)
    both = predict_logits(Pixel(), split, to_float, flip_tta=True)
    torch.testing.assert_close(both, (plain + plain.flip(1)) / 2)


def test_half_precision_rounds_inside_but_answers_in_float32(split):
    model = nn.Sequential(nn.Flatten(), nn.Linear(192, 10))
    exact = predict_logits(model, split, to_float)
    half = predict_logits(model, split, to_float, precision="bf16")
    assert half.dtype == torch.float32
    assert 0 < (half - exact).abs().max() < 0.05


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"split": SimpleNamespace(images=torch.zeros(0, 3, 8, 8, dtype=torch.uint8))}, r"\(0, 3, 8, 8\)"),
        ({"precision": "fp8"}, r"fp8.*bf16"),
        ({"batch_size": 0}, "batch_size is 0"),
    ],
)
def test_what_cannot_be_evaluated_is_refused_by_name(split, options, words):
    with pytest.raises(EvaluationError, match=words):
        predict_logits(Pixel(), **{"split": split, "transform": to_float, **options})


MEMORY = [
    torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"),
    RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory"),
    RuntimeError("MPS backend out of memory (MPS allocated: 18 GB)"),
    RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
    MemoryError(),
]


class Small(Pixel):
    """It has no memory for more than so many images."""

    def __init__(self, most, error):
        super().__init__()
        self.most, self.error, self.sizes = most, error, []

    def forward(self, x):
        self.sizes.append(len(x))
        if len(x) > self.most:
            raise self.error
        return super().forward(x)


@pytest.mark.parametrize("error", MEMORY, ids=str)
@pytest.mark.parametrize("flip", [False, True])
def test_where_memory_is_short_fewer_images_at_a_time_give_the_same_logits(split, error, flip, said):
    model = Small(6, error)
    found = predict_logits(model, split, to_float, flip_tta=flip)
    torch.testing.assert_close(found, predict_logits(Pixel(), split, to_float, flip_tta=flip))
    assert [size for size in model.sizes if size != 5] == [23, 11, *([3, 3] if flip else [3])]  # 23 images in fives
    assert said[-1] == "Out of memory in evaluation: from now on 5 images at a time"


def test_where_a_single_image_is_too_much_or_the_error_is_another_one_it_is_said(split):
    with pytest.raises(EvaluationError, match=r"out of memory with a single image; use a smaller image_size, or anoth"):
        predict_logits(Small(0, MEMORY[0]), split, to_float)
    with pytest.raises(RuntimeError, match="shapes"):
        predict_logits(Small(6, RuntimeError("shapes cannot be multiplied")), split, to_float)


@pytest.fixture
def machine(monkeypatch):
    """Pretend that there are so many GPUs, or Apple's."""
    monkeypatch.delenv("CIFAR_FT_DEVICE", raising=False)

    def pretend(gpus, apple):
        monkeypatch.setattr(torch.cuda, "is_available", lambda: gpus > 0)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
        monkeypatch.setattr(torch.backends.mps, "is_available", lambda: apple)

    return pretend


@pytest.mark.parametrize(
    ("gpus", "apple", "auto", "others"),
    [
        (0, False, "cpu", ["cpu"]), (0, True, "mps", ["mps", "cpu"]), (1, False, "cuda", ["cuda", "cuda:0", "cpu"]),
        (2, True, "cuda", ["cuda:1", "mps", "cpu"]),
    ],
)  # fmt: skip
def test_the_device_is_a_gpu_if_there_is_one_or_the_one_that_is_named(machine, monkeypatch, gpus, apple, auto, others):
    machine(gpus, apple)
    assert choose_device() == choose_device("auto") == torch.device(auto)
    for name in others:
        assert choose_device(name) == choose_device(torch.device(name)) == torch.device(name)
        monkeypatch.setenv("CIFAR_FT_DEVICE", name)
        assert choose_device() == torch.device(name)
        assert choose_device("cpu") == torch.device("cpu")


@pytest.mark.parametrize("name", ["cuda:2", "mps", "gpu", "cuda:x", "cuda:-1", "", "tpu", "0"])
def test_a_device_that_is_not_here_is_refused_with_those_that_are(machine, monkeypatch, name):
    machine(2, False)
    with pytest.raises(DeviceError, match=f"no device '{name}' here; choose from auto, cuda, cuda:0, cuda:1, cpu"):
        choose_device(name)
    monkeypatch.setenv("CIFAR_FT_DEVICE", name or "nothing")
    with pytest.raises(DeviceError, match="here; choose from auto"):
        choose_device()
