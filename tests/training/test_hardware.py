"""The choice of how to compute: measured once, remembered, and crash-safe."""

import json
import signal
import sys
import textwrap

import pytest
import torch

from cifar_ft import training
from cifar_ft.recipes import get_recipe
from cifar_ft.training import Plan, choose_plan

CPU = torch.device("cpu")
TINY = {"backbone": "resnet18", "last_stage": 1, "image_size": 16, "batch_size": 8, "precision": "auto"}


def recipe(**overrides):
    return get_recipe("smoke", {**TINY, **overrides})


@pytest.fixture
def threads():
    """Leave the number of threads and oneDNN as they were."""
    before = torch.get_num_threads()
    yield before
    torch.set_num_threads(before)
    torch.backends.mkldnn.set_flags(True)


@pytest.fixture
def probed(monkeypatch):
    """Stands in for the process that measures: notes what is asked, and finds bf16 the faster."""
    calls = []

    def probe(recipe, threads, onednn):
        calls.append((recipe.image_size, recipe.batch_size, onednn))
        return {Plan("fp32", True, 1, onednn): 100.0, Plan("bf16", True, 1, onednn): 150.0}, None

    monkeypatch.setattr(tuning, "_probe", probe)
    return calls


def child(monkeypatch, code):
    """Let this code be the process that measures."""
    monkeypatch.setattr(tuning, "COMMAND", [sys.executable, "-c", textwrap.dedent(code)])


def test_the_fastest_plan_is_chosen_and_remembered(probed, tmp_path):
    cache, lines = tmp_path / "new" / "speed.json", []
    assert choose_plan(recipe(), "resnet18", CPU, cache, echo=lines.append) == Plan("bf16", True, 1)
    assert probed == [(16, 8, True)]
    assert "fp32 100, bf16 150" in lines[0]
    assert "bf16, channels last, 1 thread" in lines[1]
    assert "--set precision=fp32" in lines[1]
    assert choose_plan(recipe(), "resnet18", CPU, cache, echo=lines.append).precision == "bf16"
    assert len(probed) == 1  # from the cache
    assert "bf16" in lines[-1]
    for other in ({"image_size": 24}, {"batch_size": 16}, {"freeze": "stage1"}):  # another question
        choose_plan(recipe(**other), "resnet18", CPU, cache, echo=lines.append)
    choose_plan(recipe(), "resnet50", CPU, cache, echo=lines.append)
    assert len(probed) == 5
    assert len(json.loads(cache.read_text())["plans"]) == 5


def test_a_remembered_answer_is_obeyed(probed, tmp_path):
    cache = tmp_path / "speed.json"
    choose_plan(recipe(), "resnet18", CPU, cache, echo=str)
    cache.write_text(cache.read_text().replace("bf16", "fp32"))
    assert choose_plan(recipe(), "resnet18", CPU, cache, echo=str).precision == "fp32"


@pytest.mark.parametrize(
    "content", ["", "{", "[]", "[1]", "3", "null", '{"x": 1}', '{"plans": 3, "crashes": 4}', "\x00\xff"]
)
def test_a_damaged_cache_is_measured_again(probed, tmp_path, content):
    cache = tmp_path / "speed.json"
    cache.write_bytes(content.encode("latin-1"))
    for _ in range(2):
        assert choose_plan(recipe(), "resnet18", CPU, cache, echo=str).precision == "bf16"
    assert len(probed) == 1


@pytest.mark.parametrize("entry", [None, 3, "bf16", {}, {"precision": "fp8"}, {"precision": "fp32", "more": 1}])
def test_a_strange_entry_is_measured_again(probed, tmp_path, entry):
    cache = tmp_path / "speed.json"
    choose_plan(recipe(), "resnet18", CPU, cache, echo=str)
    known = json.loads(cache.read_text())
    cache.write_text(json.dumps({**known, "plans": dict.fromkeys(known["plans"], entry)}))
    assert choose_plan(recipe(), "resnet18", CPU, cache, echo=str) == Plan("bf16", True, 1)
    assert len(probed) == 2


def test_a_cache_that_cannot_be_written_only_costs_time(probed, tmp_path):
    (tmp_path / "file").touch()
    assert choose_plan(recipe(), "resnet18", CPU, tmp_path / "file" / "speed.json", echo=str).precision == "bf16"


def test_a_precision_that_is_asked_for_needs_no_measuring(probed, tmp_path):
    for precision in ("fp32", "bf16"):
        plan = choose_plan(recipe(precision=precision), "resnet18", CPU, tmp_path / "speed.json", echo=str)
        assert (plan.precision, plan.channels_last, plan.onednn) == (precision, True, True)
    assert probed == []


def test_each_of_several_processes_is_timed_on_its_share(probed, tmp_path):
    choose_plan(recipe(), "resnet18", CPU, tmp_path / "speed.json", world=4, echo=str)
    assert probed == [(16, 2, True)]


@pytest.mark.parametrize(
    ("device", "native", "answer"), [("cuda", True, "bf16"), ("cuda", False, "fp16"), ("mps", False, "fp32")]
)
def test_elsewhere_the_answer_needs_no_timing(monkeypatch, probed, tmp_path, device, native, answer):
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: native)
    assert choose_plan(recipe(), "resnet18", torch.device(device), tmp_path / "speed.json").precision == answer
    assert choose_plan(recipe(precision="fp32"), "resnet18", torch.device(device), tmp_path / "x").precision == "fp32"
    assert probed == []


@pytest.mark.slow
def test_real_steps_are_timed_in_a_process_of_their_own(tmp_path):
    cache, lines = tmp_path / "speed.json", []
    plan = choose_plan(recipe(), "resnet18", CPU, cache, echo=lines.append)
    assert plan.precision in ("fp32", "bf16")
    assert "Timed a few steps" in lines[0]
    assert next(iter(json.loads(cache.read_text())["plans"].values()))["precision"] == plan.precision


CRASHING = """
    import os, signal, sys, torch
    from cifar_ft import tuning
    timed = training._images_per_second
    def crash(*arguments, **options):
        if torch.backends.mkldnn.enabled:
            os.kill(os.getpid(), signal.{name})
        return timed(*arguments, **options)
    training._images_per_second = crash
    training.main()
"""


@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="this system has no such signals")
@pytest.mark.parametrize("name", ["SIGFPE", "SIGILL"])
def test_where_the_cpu_library_crashes_training_goes_on_without_it(monkeypatch, tmp_path, name, threads):
    child(monkeypatch, CRASHING.format(name=name))
    cache, lines = tmp_path / "speed.json", []
    plan = choose_plan(recipe(), "resnet18", CPU, cache, echo=lines.append)
    assert plan.onednn is False
    assert lines[0] == f"The CPU library oneDNN crashes on this processor ({name}): training without it"
    assert "without oneDNN" in lines[-1]
    monkeypatch.setattr(tuning, "_probe", None)  # nothing is measured again
    assert choose_plan(recipe(), "resnet18", CPU, cache, echo=str) == plan
    # A precision of one's own choice is not timed, but what is known of the machine counts.
    assert choose_plan(recipe(precision="fp32"), "resnet18", CPU, cache, echo=str).onednn is False
    plan.apply()
    assert not torch.backends.mkldnn.enabled


BROKEN = {
    "an error": "raise SystemExit('no memory')",
    "noise": "print('hello'); print('{}'); print('[1, 2]')",
    "killed": "import os, signal; os.kill(os.getpid(), signal.SIGKILL)",
    "hanging": "import time; time.sleep(60)",
    "crashing always": "import os, signal; os.kill(os.getpid(), signal.SIGFPE)",
}


@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="this system has no such signals")
@pytest.mark.parametrize("code", BROKEN.values(), ids=BROKEN)
def test_a_measurement_that_fails_ends_in_what_works_everywhere(monkeypatch, tmp_path, code):
    child(monkeypatch, code)
    monkeypatch.setattr(tuning, "LIMIT", 2)
    lines = []
    plan = choose_plan(recipe(), "resnet18", CPU, tmp_path / "speed.json", echo=lines.append)
    assert plan.precision == "fp32"
    assert plan.onednn is ("SIGFPE" not in code)
    assert "did not succeed; training in fp32" in "".join(lines)
    assert not (tmp_path / "speed.json").exists()  # measured again next time


def test_what_was_measured_before_the_time_was_over_decides(monkeypatch, tmp_path):
    line = json.dumps({"plan": {"precision": "bf16", "threads": 1}, "images_per_second": 7})
    child(monkeypatch, f"import time; print({line!r}, flush=True); time.sleep(60)")
    monkeypatch.setattr(tuning, "LIMIT", 4)
    assert choose_plan(recipe(), "resnet18", CPU, tmp_path / "speed.json", echo=str) == Plan("bf16", True, 1)


def test_memory_format_and_threads_are_tried_behind_the_precision(monkeypatch, threads):
    speeds = {("fp32", True, 1): 5.0, ("bf16", True, 1): 4.0, ("fp32", False, 1): 6.0, ("fp32", False, 2): 5.5}
    tried = []

    def timed(model, plan, recipe, give_up):
        tried.append((plan.precision, plan.channels_last, plan.threads))
        return speeds[tried[-1]]

    monkeypatch.setattr(tuning, "_images_per_second", timed)
    found = dict(training.measure(recipe(), [1, 2], True))
    assert tried == list(speeds)
    assert max(found, key=found.get) == Plan("fp32", False, 1)
