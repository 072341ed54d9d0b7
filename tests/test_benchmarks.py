"""The benchmarks measure what they say; how fast this machine is, no test asks."""

import json
import statistics
import subprocess
import sys
import time
from pathlib import Path

import pytest
from tiny_runs import recipe

from benchmarks import steps

ROOT = Path(__file__).parent.parent


def test_loops_take_turns_and_the_median_round_counts():
    turns = []
    loops = {name: lambda name=name: (turns.append(name), time.sleep(0.001)) for name in "ab"}
    found = steps.alternate(loops, batch_size=10, rounds=3, steps=2)
    assert "".join(turns) == "aabb" + "aabb" * 3  # a warm-up of each first
    for name in "ab":
        assert len(found[name]["rounds"]) == 3
        assert found[name]["images_per_second"] == statistics.median(found[name]["rounds"])
        assert 0 < found[name]["images_per_second"] < 10_000


@pytest.mark.parametrize("loop", ["course", "plain"])
def test_both_loops_really_train(small_data, monkeypatch, loop):
    models, build = [], steps.surgery.build_model
    monkeypatch.setattr(steps.surgery, "build_model", lambda *arguments: models.append(build(*arguments)) or models[0])
    mine = recipe(image_size=32, freeze="none")
    step = (
        steps.course_loop(mine, small_data.train, "fp32")
        if loop == "course"
        else steps.plain_loop(mine, small_data.train)
    )
    before = models[0].fc.weight.detach().clone()
    for _ in range(7):  # more than one epoch of five steps
        step()
    assert (models[0].fc.weight - before).abs().max() > 0


def test_the_operations_of_a_step_are_counted():
    assert steps.gflop_per_image(recipe(image_size=32)) == pytest.approx(4 * steps.gflop_per_image(recipe()), rel=0.1)


def test_each_start_is_measured_in_processes_of_its_own(monkeypatch):
    codes = []
    monkeypatch.setattr(steps, "_seconds", lambda code: codes.append(code) or float(len(codes)))
    found = steps.start_up(repeats=3)
    assert list(found.values()) == [2.0, 5.0, 8.0]
    monkeypatch.undo()
    assert 0 < steps._seconds("import time; t = time.perf_counter(); print(time.perf_counter() - t)") < 1


@pytest.mark.data
@pytest.mark.slow
@pytest.mark.parametrize("name", ["plain", "timm", "cifar_ft"])
def test_contenders_that_need_no_more_than_the_course_run(tmp_path, name):
    out = tmp_path / "out.json"
    sizes = {"images": 128, "size": 32, "epochs": 1}
    command = [sys.executable, "-m", "benchmarks.contenders", name, "--out", str(out)]
    command += [word for key, value in sizes.items() for word in (f"--{key}", str(value))]
    command += ["--set", "precision=fp32"] if name == "cifar_ft" else []
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    found = json.loads(out.read_text())
    assert {key: found[key] for key in sizes} == sizes
    assert found["name"] == name
    assert found["images_per_second"] == pytest.approx(128 / found["train_seconds"])
    assert 0 < found["val_accuracy"] < 1
    assert found["test_accuracy"] is None  # only when asked for
