"""The benchmarks measure what they say; how fast this machine is, no test asks."""

import json
import statistics
import time

import pytest
from tiny_runs import recipe

from benchmarks import comparison, contenders, steps
from benchmarks.processes import several_processes
from tools.charts import comparison_chart, growth_chart


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
    models, build = [], steps.models.build_model
    monkeypatch.setattr(steps.models, "build_model", lambda *arguments: models.append(build(*arguments)) or models[0])
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


@pytest.mark.parametrize("name", ["plain", "timm", "cifar_ft"])
def test_contenders_that_need_no_more_than_the_course_run(small_data, tmp_path, monkeypatch, one_thread, name):
    monkeypatch.setattr(contenders, "load_cifar10", lambda: small_data)
    sizes = {"images": 64, "size": 32, "epochs": 1}
    settings = ["precision=fp32"] if name == "cifar_ft" else []
    contenders.main(contenders.Name(name), tmp_path / "out.json", **sizes, settings=settings)
    found = json.loads((tmp_path / "out.json").read_text())
    assert {key: found[key] for key in sizes} == sizes
    assert found["name"] == name
    assert found["images_per_second"] == pytest.approx(64 / found["train_seconds"])
    assert 0 <= found["val_accuracy"] <= 1
    assert found["test_accuracy"] is None  # only when asked for


def _contender(name, lr, epochs, **task):
    """A contender whose accuracy is highest at its second learning rate, and who takes as long as its name says."""
    rates = comparison.LEARNING_RATES[name]
    accuracy = 0.5 + 0.1 * (lr == rates[1]) + 0.05 * (epochs - 3)
    speed = {"cifar_ft": 400, "fastai": 180}.get(name, 150) + rates.index(lr)
    scores = {"val_accuracy": accuracy, "test_accuracy": accuracy - 0.01}
    seconds = task["images"] * epochs / speed
    return {"name": name, "lr": lr, "epochs": epochs, **task, **scores, "images_per_second": speed} | {
        "train_seconds": seconds
    }


def test_contenders_take_turns_and_the_course_then_gets_their_time():
    kept = []
    runs = comparison.compare(1000, 64, 3, (), lambda runs: kept.append(len(runs)), _contender)
    names = list(comparison.LEARNING_RATES)
    assert [run["name"] for run in runs] == names * 3 + ["cifar_ft"]
    assert kept == list(range(1, len(runs) + 1))  # nothing is lost when it is stopped
    assert comparison.speed(runs)["fastai"] == 181  # the median of 180, 181, 182
    assert runs[-1]["epochs"] == int(3 * 401 / 181)
    assert runs[-1]["lr"] == comparison.LEARNING_RATES["cifar_ft"][1]  # the one that validation picked
    for name, best in comparison.tuned(runs).items():
        assert (best["lr"], best["epochs"]) == (comparison.LEARNING_RATES[name][1], 3)
    lines = "\n".join(comparison.verdict(runs))
    assert "cifar_ft / fastai 2.22x; test 49.0% with its own lr 0.002, 59.0% with lr 0.005" in lines
    assert "cifar_ft 6 epochs in 15 s, test 74.0%" in lines


def test_a_comparison_goes_on_where_it_was_stopped():
    first, asked = comparison.compare(1000, 64, 3, run=_contender), []

    def run(**task):
        asked.append(task["name"])
        return _contender(**task)

    again = comparison.compare(1000, 64, 3, first[:7], run=run)
    assert asked == [each["name"] for each in first[7:]]
    assert again == first
    asked.clear()
    comparison.compare(2000, 64, 3, first, run=run)  # other work: nothing is taken over
    assert len(asked) == len(first)
    comparison_chart(first)


def test_growth_is_fitted_to_what_was_measured(monkeypatch):
    def case(_, images, size, batch):
        seconds = images * (0.001 + 0.002 * (size / 64) ** 2 + 0.01 / batch)
        sizes = {"images": images, "image_size": size, "batch_size": batch}
        return {**sizes, "epoch_seconds": seconds, "peak_memory_mb": 700 + 5 * batch}

    monkeypatch.setattr(steps, "_in_a_process", case)
    found = steps.growth(recipe())
    fits = found["fits"]
    assert fits["seconds_per_1000_by_area"]["slope"] == pytest.approx(2)
    assert fits["seconds_per_1000_by_steps"]["slope"] == pytest.approx(0.01)
    assert fits["epoch_seconds_by_images"]["intercept"] == pytest.approx(0, abs=1e-9)
    assert fits["memory_mb_by_batch"] == pytest.approx({"slope": 5, "intercept": 700, "r_squared": 1})
    axes = growth_chart(found).axes
    assert [len(ax.collections[0].get_offsets()) for ax in axes] == [4, 5, 5, 5]


def test_one_process_and_two_are_compared_seed_by_seed():
    def train(processes, *settings):
        seed = int(settings[0].partition("=")[2])
        accuracy = 0.7 + 0.01 * seed - (0.02 * (processes == 2) if settings[1] == "freeze_batchnorm=false" else 0)
        return {"val_loss": 1.0, "val_accuracy": accuracy, "train_loss": 1.0}

    found = several_processes((0, 1, 2), train)
    assert len(found["runs"]) == 8
    assert found["moving_difference"] == pytest.approx(-0.02)
    assert found["moving_std"] == pytest.approx(0.01)
    assert found["frozen_difference"] == 0


def test_an_epoch_is_measured_in_a_process_of_its_own():
    found = steps._in_a_process(recipe(backbone="efficientnet_lite0", freeze="none", last_stage=None), 64, 32, 32)
    assert (found["images"], found["image_size"], found["batch_size"]) == (64, 32, 32)
    assert found["epoch_seconds"] > 0
    assert found["peak_memory_mb"] > 100
