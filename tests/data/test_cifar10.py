"""CIFAR-10 in memory: fixed splits, balanced subsets, and the statistics of its pixels."""

import hashlib
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from cifar_ft.data import CLASSES, DataError, SourceError, Split, cifar10, load_cifar10, pixel_statistics
from cifar_ft.data.sources import RawCifar10

# SHA-256 over the validation positions (int64, little-endian) where the labels go round 0, 1, ..., 9, 0, ...
VAL_SHA256 = "234fd034a0041be486a474dd4142188669caed0e27051a4005fff01651654d9a"
# the same where the labels are those of CIFAR-10
REAL_VAL_SHA256 = "d1d93cbb058acee9f7c9af6fd4f5c86d6a60a88c8ae8b80eaa47f7dd1df9e66f"


def numbered(labels, name="train"):
    """A split whose tiny images hold their own position, in four bytes, so that none can be taken for another."""
    labels = torch.as_tensor(labels)
    position = torch.arange(len(labels))
    bytes_ = [(position >> shift & 255).to(torch.uint8) for shift in (0, 8, 16)]
    return Split(torch.stack(bytes_, 1)[:, :, None, None].expand(-1, -1, 2, 2).contiguous(), labels, name)


def position(images):
    low, middle, high = images[:, :, 0, 0].long().unbind(1)
    return low + (middle << 8) + (high << 16)


def sha256(indices):
    return hashlib.sha256(indices.numpy().astype("<i8").tobytes()).hexdigest()


def raw_cifar10():
    """50,000 + 10,000 numbered images, small, as `fetch_cifar10` would return them."""
    train, test = numbered(torch.arange(50_000) % 10), numbered(torch.arange(10_000) * 7 % 10)
    parts = [
        array.numpy().astype(np.uint8)
        for split in (train, test)
        for array in (split.images.permute(0, 2, 3, 1), split.labels)
    ]
    return RawCifar10(*parts, "hub", "2026-01-01", Path("cifar10.safetensors"))


@pytest.fixture(scope="module")
def data():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cifar10, "fetch_cifar10", lambda root, source: raw_cifar10())
        return load_cifar10()


def test_split_is_45000_and_5000_stratified_disjoint_and_complete(data):
    assert (data.source, data.digest) == ("hub", raw_cifar10().digest)
    assert [len(split) for split in (data.train, data.val, data.test)] == [45_000, 5_000, 10_000]
    assert data.train.labels.bincount().tolist() == [4_500] * 10
    assert data.val.labels.bincount().tolist() == [500] * 10
    together = torch.cat([data.train.indices, data.val.indices])
    assert torch.equal(together.sort().values, torch.arange(50_000))


def test_the_validation_images_are_always_the_same(data):
    assert sha256(data.val.indices) == VAL_SHA256
    torch.manual_seed(1)
    assert torch.equal(cifar10.split_indices(torch.arange(50_000) % 10)[1], data.val.indices)


def test_images_keep_their_labels_and_their_official_positions(data):
    for split, factor in ((data.train, 1), (data.val, 1), (data.test, 7)):
        assert torch.equal(position(split.images), split.indices)
        assert torch.equal(split.labels, split.indices * factor % 10)
        assert (split.images.dtype, split.labels.dtype) == (torch.uint8, torch.int64)


def test_full_train_is_the_official_order(data):
    full = data.full_train
    assert torch.equal(position(full.images), torch.arange(50_000))
    assert torch.equal(full.labels, torch.arange(50_000) % 10)


def test_empty_data_root_means_the_default_one(monkeypatch):
    asked = []
    monkeypatch.setattr(cifar10, "fetch_cifar10", lambda root, source: asked.append(root) or raw_cifar10())
    load_cifar10("")  # notebooks pass DATA_ROOT = ""
    assert asked == [None]


@given(per_class=st.integers(3, 40), share=st.floats(0.01, 1), seed=st.integers(0, 99), dropped=st.integers(0, 9))
def test_a_subset_keeps_every_class_within_one_of_its_share(per_class, share, seed, dropped):
    split = numbered(torch.arange(10).repeat(per_class)[dropped:])  # classes equal to within one
    n = max(1, int(share * len(split)))
    subset = split.subset(n, seed)
    wanted = split.labels.bincount(minlength=10) * n / len(split)
    assert len(subset) == n
    assert (subset.labels.bincount(minlength=10) - wanted).abs().max() <= 1
    assert torch.equal(position(subset.images), subset.indices)  # in the split's order, each image once
    assert (subset.indices.diff() > 0).all()


def test_a_subset_depends_on_its_seed_alone_and_a_larger_one_holds_the_smaller():
    split = numbered(torch.arange(500) % 10)
    first = split.subset(100, seed=3)
    torch.manual_seed(5)
    assert torch.equal(split.subset(100, seed=3).indices, first.indices)
    assert not torch.equal(split.subset(100, seed=4).indices, first.indices)
    assert set(split.subset(57, seed=3).indices.tolist()) < set(first.indices.tolist())
    assert split.subset(None) is split
    assert split.subset(500) is split


def test_a_subset_of_a_subset_still_knows_the_official_positions(data):
    inner = data.val.subset(1000).subset(100, seed=1)
    assert torch.equal(position(inner.images), inner.indices)
    assert set(inner.indices.tolist()) <= set(data.val.indices.tolist())


@pytest.mark.parametrize("n", [0, -1, 51])
def test_an_impossible_subset_is_refused_with_what_is_there(n):
    with pytest.raises(DataError, match=f"subset\\({n}\\) of the train split .* 1 to 50 images"):
        numbered(torch.arange(50) % 10).subset(n)


def test_images_and_labels_of_different_number_are_refused():
    with pytest.raises(DataError, match="3 images, 2 labels"):
        Split(torch.zeros(3, 3, 2, 2, dtype=torch.uint8), torch.zeros(2, dtype=torch.int64))


def test_a_split_gives_one_image_or_a_batch(samples):
    image, label = samples[7]
    images, labels = samples[torch.tensor([7, 3])]
    assert torch.equal(images[0], image)
    assert labels[0] == label
    assert images.shape == (2, 3, 32, 32)


def test_the_shipped_samples_are_20_of_each_class(samples):
    assert samples.images.shape == (200, 3, 32, 32)
    assert samples.images.dtype == torch.uint8
    assert samples.labels.bincount().tolist() == [20] * len(CLASSES)
    assert len(samples.indices.unique()) == 200
    assert 0 <= samples.indices.min() <= samples.indices.max() < 10_000


@pytest.fixture(scope="module")
def real():
    try:
        return load_cifar10()
    except SourceError as error:
        pytest.skip(f"CIFAR-10 cannot be had here: {str(error).splitlines()[0]}")


@pytest.mark.data
def test_the_shipped_samples_are_the_test_images_they_say(real, samples):
    assert torch.equal(real.test.images[samples.indices], samples.images)
    assert torch.equal(real.test.labels[samples.indices], samples.labels)


@pytest.mark.data
def test_the_real_data_is_in_the_official_order_with_the_documented_statistics(real):
    full = real.full_train
    assert full.labels[:5].tolist() == [6, 9, 9, 4, 1]
    assert real.test.labels[:5].tolist() == [3, 8, 8, 0, 6]
    assert real.val.labels.bincount().tolist() == [500] * 10
    assert sha256(real.val.indices) == REAL_VAL_SHA256
    found = pixel_statistics(full.images)
    assert found["mean"] == pytest.approx((0.49139968, 0.48215841, 0.44653091), abs=1e-6)
    assert found["std"] == pytest.approx((0.24703223, 0.24348513, 0.26158784), abs=1e-6)
    assert found["mean_of_image_stds"] == pytest.approx((0.2023, 0.1994, 0.2010), abs=1e-3)


def test_pixel_statistics_are_those_of_numpy():
    images = torch.randint(0, 256, (5_003, 3, 4, 5), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    images[:, 1] //= 2
    images[::2, 2] //= 4
    found, pixels = pixel_statistics(images), images.numpy() / 255
    assert found["mean"] == pytest.approx(pixels.mean((0, 2, 3)))
    assert found["std"] == pytest.approx(pixels.std((0, 2, 3)))
    assert found["mean_of_image_stds"] == pytest.approx(pixels.std((2, 3), ddof=1).mean(0))
