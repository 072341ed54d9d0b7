"""Chapter 02: augmentation and normalisation on whole uint8 batches, and corruptions to test with."""

from cifar_ft.transforms.augmentation import (
    TrainTransform,
    blur,
    cut_out,
    degrade,
    draw,
    random_crop,
    random_flip,
    train_transform,
)
from cifar_ft.transforms.corruptions import CORRUPTIONS, OURS, brightness, corrupt
from cifar_ft.transforms.normalization import NORMALIZATIONS, denormalize, eval_transform, normalize, resize
