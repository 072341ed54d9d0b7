"""Training batches: each image once, in an order that seed and epoch alone decide, shared and cut without loss."""

import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from cifar_ft.data import Split, TrainLoader
from cifar_ft.data.loader import epoch_seed
from cifar_ft.recipes import get_recipe


def numbered(n):
    """A split whose images carry their position."""
    images = torch.zeros(n, 3, 32, 32, dtype=torch.uint8)
    images[:, 0, 0, 0], images[:, 0, 0, 1] = torch.arange(n) % 256, torch.arange(n) // 256
    return Split(images, torch.arange(n) * 3 % 10)


def position(images):
    return images[:, 0, 0, 0].long() + 256 * images[:, 0, 0, 1].long()


def draw(n, padding, generator):
    """Each image's place in the global batch, and something random."""
    return torch.arange(n), torch.rand(n, 2, generator=generator)


def batches(split, *place, start=0, **settings):
    """The batches of a loader; `place` is epoch, rank and world."""
    loader = TrainLoader(split, get_recipe("smoke", settings), draw, *place)
    loader.start = start
    return list(loader)


def test_a_loader_yields_each_image_once_with_its_label_and_in_another_order():
    split = numbered(997)
    found = batches(split, batch_size=64)
    assert [len(batch.labels) for batch in found] == [batch.global_size for batch in found] == [64] * 15 + [37]
    assert all(batch.images.shape[1:] == (3, 32, 32) and batch.images.dtype == torch.uint8 for batch in found)
    seen = torch.cat([position(batch.images) for batch in found])
    assert torch.equal(seen.sort().values, torch.arange(997))
    assert torch.equal(torch.cat([batch.labels for batch in found]), split.labels[seen])
    assert not torch.equal(seen, torch.arange(997))
    assert len(TrainLoader(split, get_recipe("smoke"), draw)) == 16


def order(epoch, seed):
    return torch.cat([position(batch.images) for batch in batches(numbered(200), epoch, seed=seed)])


def test_the_shuffle_depends_on_seed_and_epoch_alone():
    first = order(2, seed=1)
    torch.manual_seed(9)
    order(1, seed=1)  # no earlier epoch moves it
    assert torch.equal(order(2, seed=1), first)
    assert not torch.equal(order(3, seed=1), first)
    assert not torch.equal(order(2, seed=2), first)


def test_each_seed_epoch_and_step_has_its_own_seed():
    seeds = {epoch_seed(*key) for key in itertools.product(range(12), repeat=3)}
    assert len(seeds) == 12**3
    assert all(0 <= seed < 2**63 for seed in seeds)
    assert epoch_seed(0, 1, 2) == epoch_seed(0, 1, 2)


def test_each_batch_is_drawn_from_its_own_seed():
    for step, batch in enumerate(batches(numbered(200), 3, batch_size=64, seed=5), start=1):
        expected = draw(batch.global_size, 4, torch.Generator().manual_seed(epoch_seed(5, 3, step)))
        assert all(map(torch.equal, batch.draws, expected))


def test_a_resumed_epoch_has_the_batches_that_are_left_with_their_draws():
    whole, rest = batches(numbered(200), 3), batches(numbered(200), 3, start=2)
    assert len(rest) == len(whole) - 2
    for one, other in zip(whole[2:], rest, strict=True):
        assert torch.equal(one.images, other.images)
        assert all(map(torch.equal, one.draws, other.draws))


def test_three_processes_share_the_global_batches_of_one():
    split = numbered(997)
    whole = batches(split, 4)
    shares = [batches(split, 4, rank, 3) for rank in range(3)]
    for batch, *parts in zip(whole, *shares, strict=True):
        for rank, part in enumerate(parts):
            assert torch.equal(position(part.images), position(batch.images)[rank::3])
            assert part.global_size == batch.global_size
            assert part.draws[0].tolist() == list(range(rank, batch.global_size, 3))
            assert torch.equal(part.draws[1], batch.draws[1][rank::3])


@pytest.mark.parametrize("world", [1, 2, 3, 5, 7])
@pytest.mark.parametrize("size", [2, 3, 5, 6, 60])
def test_shares_count_each_image_once_and_none_is_too_small_for_batchnorm(world, size):
    split = numbered(size)
    (whole,) = batches(split, 0, batch_size=size)
    shares = [batches(split, 0, rank, world, batch_size=size)[0] for rank in range(world)]
    counted = [position(share.images)[: len(share.labels)].tolist() for share in shares]
    assert sorted(itertools.chain(*counted)) == sorted(position(whole.images).tolist())
    for share in shares:
        assert len(share.images) >= 2
        assert len(set(position(share.images).tolist())) == len(share.images)


@pytest.mark.parametrize(("n", "sizes"), [(129, [64, 65]), (130, [64, 64, 2]), (1, [1]), (64, [64])])
def test_a_lone_last_image_joins_the_batch_before(n, sizes):
    assert TrainLoader(numbered(n), get_recipe("smoke", "batch_size=64"), draw).sizes == sizes
    assert [len(batch.images) for batch in batches(numbered(n), batch_size=64)] == sizes


@given(n=st.integers(2, 400), batch=st.integers(2, 70), seed=st.integers(0, 5), world=st.integers(1, 4))
def test_whatever_the_numbers_no_image_is_lost_or_seen_twice(n, batch, seed, world):
    split = numbered(n)
    shares = [batches(split, 1, rank, world, batch_size=batch, seed=seed) for rank in range(world)]
    seen = torch.cat([position(part.images)[: len(part.labels)] for share in shares for part in share])
    assert torch.equal(seen.sort().values, torch.arange(n))
    assert min(len(part.images) for share in shares for part in share) > 1
