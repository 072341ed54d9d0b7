"""Evaluation: every image once and in order, and the model left as it was."""

from types import SimpleNamespace

import pytest
import torch
from torch import nn

from cifar_ft.models import EvaluationError, predict_logits


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
