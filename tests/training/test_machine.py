"""The machine: processors that may be used, and one line that names it."""

import os
from pathlib import Path

import pytest

from cifar_ft import training


@pytest.fixture
def quota(monkeypatch):
    """A function that sets what the control group says, as text, or None for no control groups."""

    def set_to(text):
        def read(self, *arguments, **options):
            if text is None:
                raise FileNotFoundError
            return text

        monkeypatch.setattr(Path, "read_text", read)
        monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(8)), raising=False)

    return set_to


@pytest.mark.parametrize(
    ("text", "cpus"),
    [
        ("max 100000\n", 8), ("200000 100000\n", 2), ("250000 100000", 2), ("50000 100000", 1),
        ("9900000 100000", 8), (None, 8), ("", 8), ("what", 8),
    ],
)  # fmt: skip
def test_the_processors_that_may_be_used_are_counted(quota, text, cpus):
    quota(text)
    assert training.usable_cpus() == cpus


def test_without_affinity_all_processors_count(quota, monkeypatch):
    quota(None)
    monkeypatch.delattr(os, "sched_getaffinity")
    monkeypatch.setattr(os, "cpu_count", lambda: 6)
    assert training.usable_cpus() == 6


def test_the_machine_is_named_in_one_line():
    assert "threads" in training.hardware()
    assert "\n" not in training.hardware()
