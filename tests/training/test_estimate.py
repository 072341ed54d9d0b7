"""How long a run will take: what is counted, and that a real machine can be asked."""

import pytest
import torch
from tiny_runs import recipe

from cifar_ft.recipes import get_recipe
from cifar_ft.training import estimate_seconds
from cifar_ft.training.estimate import run_seconds


@pytest.mark.parametrize(
    ("settings", "seconds"),
    [
        # 704 steps an epoch; 5,000 validation images after each epoch and at the end, 10,000 test images once
        ({"train_sizes": (80, 112)}, 704 * 3 + (3 * 5_000 + 10_000) / 100),
        ({"train_sizes": (), "epochs": 1}, 704 * 2 + (2 * 5_000 + 10_000) / 100),
        ({"train_sizes": (), "epochs": 1, "validation": False}, 782 * 2 + 10_000 / 100),
        ({"train_sizes": (), "epochs": 1, "validation": False, "track_test": True}, 782 * 2 + 20_000 / 100),
        ({"train_sizes": (), "epochs": 1, "train_images": 128, "val_images": 50, "test_images": 50, "flip_tta": True},
         2 * 2 + (2 * 50 + 3 * 50) / 100),
    ],
)  # fmt: skip
def test_each_step_and_each_evaluated_image_counts(settings, seconds):
    assert run_seconds(get_recipe("quick", settings), {80: 1.0, 112: 2.0}, 0.01) == pytest.approx(seconds)


def test_a_machine_is_asked_without_a_word_and_without_touching_the_random_numbers(said):
    before = torch.get_rng_state()
    seconds = estimate_seconds(recipe(train_images=48, val_images=20, test_images=20), "resnet18", "cpu")
    assert 0 < seconds < 60
    assert not said
    assert torch.equal(torch.get_rng_state(), before)
