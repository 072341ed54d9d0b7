"""The door to recorded steps, with a stand-in for the GPU's recording."""

import pytest
import torch
from tiny_runs import raise_, recipe, same_run

from cifar_ft.training import Replay, fit, state


class FakeGraph:
    """Replays by calling; like a real one it does nothing while it is recorded."""

    def __init__(self, work):
        self.replay = work


@pytest.fixture
def recorded(monkeypatch):
    """How often a step was recorded; recordings are fake."""
    works = []
    monkeypatch.setattr(Replay, "capture", lambda self, work: works.append(work) or FakeGraph(work))
    return works


@pytest.fixture
def optimizer():
    return torch.optim.AdamW([torch.zeros(1, requires_grad=True)])


def calls(door, optimizer, *batches, settings=()):
    """Call a step on batches of zeros [N, 1]; which sizes it was called with, and on which memory."""
    seen = []
    for size in batches:
        inputs = torch.zeros(size, 1)
        door(lambda x, y: seen.append((len(x), x.data_ptr())), inputs, torch.zeros(size), optimizer, *settings)
    return seen


def test_whole_batches_are_recorded_after_two_eager_steps_and_others_never(recorded, optimizer):
    door = Replay(batch_size=4)
    seen = calls(door, optimizer, 4, 4, 3, 4, 4, 3, 4, 5)
    assert [size for size, _ in seen] == [4, 4, 3, 4, 4, 3, 4, 5]  # each step is done once, in its place
    assert len(recorded) == 1
    static = door.inputs.data_ptr()
    assert [where == static for _, where in seen] == [False, False, False, True, True, False, True, False]


def test_a_replayed_step_sees_the_batch_it_is_called_with(recorded, optimizer):
    door, sums = Replay(batch_size=2), []
    for i in range(5):
        door(
            lambda x, y: sums.append((x.sum() + y.sum()).item()),
            torch.full((2, 1), i),
            torch.full((2,), 10 * i),
            optimizer,
        )
    assert sums == [22 * i for i in range(5)]


def test_a_new_size_or_setting_drops_the_recording_before_its_first_step(recorded, optimizer):
    door = Replay(batch_size=2)
    for shape, settings in (((2, 1), (1,)), ((2, 3), (1,)), ((2, 3), (2,))):
        for step in range(4):
            door(lambda x, y, step=step: step or door.graph is None or raise_(AssertionError), torch.zeros(shape),
                 torch.zeros(2), optimizer, *settings)  # fmt: skip
    assert len(recorded) == 3


def test_what_cannot_be_recorded_is_said_once_and_goes_on_eagerly(monkeypatch, optimizer, said):
    monkeypatch.setattr(Replay, "capture", lambda self, work: raise_(RuntimeError("no such luck\nmore")))
    door = Replay(batch_size=4)
    assert len(calls(door, optimizer, *[4] * 6)) == 6
    assert len(said) == 1
    assert "no such luck)" in said[0]


def test_an_optimiser_is_capturable_while_it_is_recorded_and_no_longer(monkeypatch, optimizer):
    seen = []
    monkeypatch.setattr(
        Replay, "capture", lambda self, work: seen.append(optimizer.param_groups[0]["capturable"]) or FakeGraph(work)
    )
    calls(Replay(batch_size=4), optimizer, *[4] * 4)
    assert seen == [True]
    assert optimizer.param_groups[0]["capturable"] is False


def test_a_dropped_recording_is_told_once(recorded, optimizer):
    door = Replay(batch_size=4)
    assert not door.forget()
    calls(door, optimizer, *[4] * 3)
    assert door.forget()
    assert not door.forget()


@pytest.mark.parametrize("overrides", [{}, {"accumulation": 2}, {"optimizer": "adamw"}])
def test_a_run_of_replayed_steps_is_the_same_run(recorded, small_data, tmp_path, monkeypatch, one_thread, overrides):
    plain = recipe(checkpoint_steps=0, **overrides)
    fit(plain, small_data, tmp_path / "plain")
    assert not recorded  # nothing is recorded on a CPU
    make = state.Training.__post_init__

    def recording(self):
        make(self)
        self.replay.batch_size = plain.batch_size

    monkeypatch.setattr(state.Training, "__post_init__", recording)
    fit(plain, small_data, tmp_path / "replayed")
    assert len(recorded) == 1  # the same size in both epochs
    same_run(tmp_path / "plain", tmp_path / "replayed")
