"""Faults in the middle of training: short memory, a loss that diverges, and a stop that is asked for."""

import importlib
import itertools
import math
import os
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from tiny_runs import interrupted, recipe, same_run, weights

from cifar_ft import models, transforms
from cifar_ft.data import Split, TrainLoader
from cifar_ft.results import load_run
from cifar_ft.training import Plan, TrainingError, distributed, fit, loop
from cifar_ft.training.faults import StopRequest, check_loss
from cifar_ft.training.state import Training

fit_file = importlib.import_module("cifar_ft.training.fit")  # `training.fit` is the function
pytestmark = pytest.mark.usefixtures("one_thread")


def short_of_memory(monkeypatch, images, error=None):
    """Let the model's first layer fail when it sees more than so many images in training."""
    build = models.build_model

    def build_small(*arguments):
        model = build(*arguments)
        model.conv1.register_forward_pre_hook(check)
        return model

    def check(layer, inputs):
        if layer.training and len(inputs[0]) > images:
            raise error or torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")

    monkeypatch.setattr(fit_file, "build_model", build_small)


@pytest.mark.parametrize(
    "error", [None, RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate")]
)
def test_where_memory_is_short_a_batch_is_computed_in_micro_batches(small_data, tmp_path, monkeypatch, error, said):
    mine = recipe(freeze_batchnorm=True, ema_decay=0.0, checkpoint_steps=0, precision="fp32")
    fit(mine, small_data, tmp_path / "whole")
    short_of_memory(monkeypatch, 7, error)
    fit(mine, small_data, tmp_path / "parts")
    announced = [line for line in said if "Out of memory" in line]
    assert [line.split(" micro-batches of up to ")[0][-1] for line in announced] == [
        "2",
        "4",
    ]  # once each, for the whole run
    assert "4 micro-batches of up to 6 images" in announced[-1]
    assert "BatchNorm" in announced[-1]
    whole, parts = weights(tmp_path / "whole"), weights(tmp_path / "parts")
    for name in whole:  # the same steps, so the same weights but for rounding
        torch.testing.assert_close(parts[name], whole[name], rtol=1e-3, atol=1e-4, msg=name)
    np.testing.assert_allclose(
        load_run(tmp_path / "parts").history.train_loss, load_run(tmp_path / "whole").history.train_loss, rtol=1e-4
    )


def test_memory_for_less_than_two_images_ends_training_with_advice(small_data, tmp_path, monkeypatch):
    short_of_memory(monkeypatch, 1)
    with pytest.raises(TrainingError, match=r"out of memory with only 3 images at a time; use a smaller image_size"):
        fit(recipe(), small_data, tmp_path / "run")
    assert not (tmp_path / "run" / "metrics.json").exists()


@pytest.mark.parametrize("when", ["validation", "the end"])
def test_short_memory_in_evaluation_evaluates_fewer_images_at_a_time(
    whole, small_data, tmp_path, monkeypatch, when, said
):
    out_of_memory_in_evaluation(monkeypatch, 6, {"validation": 1, "the end": 3}[when])
    run = fit(recipe(), small_data, tmp_path / "run")
    np.testing.assert_allclose(run.logits, load_run(whole).logits, rtol=1e-4, atol=1e-4)
    assert "Out of memory in evaluation: from now on 5 images at a time" in said
    for name, values in weights(whole).items():
        assert torch.equal(weights(run.path)[name], values)


def out_of_memory_in_evaluation(monkeypatch, images, nth):
    """From the nth evaluation of a split on, the model's first layer sees no more than so many images."""
    build, predict, count = models.build_model, models.predict_logits, itertools.count(1)
    state = {"short": False}

    def build_small(*arguments):
        model = build(*arguments)
        model.conv1.register_forward_pre_hook(check)
        return model

    def check(layer, inputs):
        if state["short"] and not layer.training and len(inputs[0]) > images:
            raise torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")

    def spy(*arguments, **options):
        state["short"] = next(count) >= nth
        return predict(*arguments, **options)

    monkeypatch.setattr(fit_file, "build_model", build_small)
    monkeypatch.setattr(distributed, "predict_logits", spy)


@pytest.mark.parametrize("checkpoint_steps", [0, 2])
@pytest.mark.parametrize("nth", [1, 2, 3, 4])
def test_an_epoch_is_saved_before_it_is_scored(whole, small_data, tmp_path, monkeypatch, said, nth, checkpoint_steps):
    predict, count = models.predict_logits, itertools.count(1)

    def killed(*arguments, **options):
        if next(count) == nth:
            raise SystemExit("killed, for want of memory")
        return predict(*arguments, **options)

    mine = recipe(checkpoint_steps=checkpoint_steps)
    with monkeypatch.context() as patch:
        patch.setattr(distributed, "predict_logits", killed)
        with pytest.raises(SystemExit):
            fit(mine, small_data, tmp_path / "run")
    fit(mine, small_data, tmp_path / "run", resume=True)
    place = {1: "epoch 0, step 5", 2: "epoch 1, step 5"}.get(nth, "epoch 2, step 0")
    assert f"Resuming after {place}" in said
    same_run(whole, tmp_path / "run")


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
@pytest.mark.parametrize("steps", [1, 3])
def test_short_memory_in_the_optimisers_step_is_a_step_in_micro_batches(
    small_data, tmp_path, monkeypatch, optimizer, steps, said
):
    """Its own tensors are made in its first step."""
    mine = recipe(optimizer=optimizer, lr=0.001, freeze_batchnorm=True, ema_decay=0.0, checkpoint_steps=0)
    fit(mine, small_data, tmp_path / "whole")
    kind, count = {"sgd": torch.optim.SGD, "adamw": torch.optim.AdamW}[optimizer], itertools.count(1)
    step = kind.step
    monkeypatch.setattr(kind, "step", lambda self, *rest: step(self, *rest) if next(count) > steps else out_of_memory())
    fit(mine, small_data, tmp_path / "parts")
    assert sum("Out of memory" in line for line in said) == steps
    expected, found = weights(tmp_path / "whole"), weights(tmp_path / "parts")
    for name in expected:
        torch.testing.assert_close(found[name], expected[name], rtol=1e-3, atol=1e-4, msg=name)


def out_of_memory():
    raise torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")


@pytest.mark.parametrize("where", ["step", "average", "save"])
def test_a_step_that_has_moved_weights_is_not_computed_again(small_data, tmp_path, monkeypatch, where):
    def moved_then_fails(self, *rest):
        with torch.no_grad():
            for weight in self.param_groups[0]["params"]:  # the first group is done
                weight.add_(1)
        out_of_memory()

    if where == "step":
        monkeypatch.setattr(torch.optim.SGD, "step", moved_then_fails)
    elif where == "average":
        monkeypatch.setattr(loop, "move_average", lambda *arguments: out_of_memory())
    else:
        monkeypatch.setattr(fit_file, "save", lambda *arguments: out_of_memory())
    with pytest.raises(
        TrainingError, match=r"out of memory while the weights were moved or saved, in epoch 1; free so"
    ):
        fit(recipe(), small_data, tmp_path / "run")


def test_another_error_of_the_model_is_not_taken_for_short_memory(small_data, tmp_path, monkeypatch):
    short_of_memory(monkeypatch, 7, RuntimeError("shapes cannot be multiplied"))
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        fit(recipe(), small_data, tmp_path / "run")


def test_a_run_in_micro_batches_is_resumed_in_them(small_data, tmp_path, monkeypatch):
    short_of_memory(monkeypatch, 12)
    fit(recipe(), small_data, tmp_path / "whole")
    stop_after(monkeypatch, 3)
    with pytest.raises(KeyboardInterrupt):
        fit(recipe(), small_data, tmp_path / "run")
    fit(recipe(), small_data, tmp_path / "run", resume=True)
    same_run(tmp_path / "whole", tmp_path / "run")


@pytest.mark.parametrize(("value", "text"), [(math.nan, "nan"), (math.inf, "nan"), (1e4, r"[\d.e+]+")])
def test_a_loss_that_diverges_stops_training_and_names_step_and_images(small_data, tmp_path, monkeypatch, value, text):
    batches, measure = [], Training.measure

    def broken(training, logits, labels):
        batches.append(len(labels))
        if len(batches) == 7:
            logits[3, (labels[3] + 1) % 10] = value
        measure(training, logits, labels)

    monkeypatch.setattr(Training, "measure", broken)
    mine = recipe(ema_decay=0.0)
    with pytest.raises(TrainingError, match=rf"the loss is {text} at epoch 2, step 2: .*--set lr=0.005") as caught:
        fit(mine, small_data, tmp_path / "run")
    named = str(caught.value).partition("The images of the batch were ")[2].partition(" of the training set")[0]
    named = [int(word) for word in named.split(", ")]
    loader = TrainLoader(small_data.train, mine, transforms.draw, epoch=1)
    assert named == small_data.train.indices[loader.order().split(loader.sizes)[1]].tolist()
    assert not (tmp_path / "run" / "metrics.json").exists()


def test_no_checkpoint_is_written_of_a_model_that_has_diverged(small_data, tmp_path, monkeypatch):
    build = models.build_model

    def broken(*arguments):
        model = build(*arguments)
        with torch.no_grad():
            models.head(model).bias[3] = math.nan
        return model

    monkeypatch.setattr(fit_file, "build_model", broken)
    with pytest.raises(TrainingError, match="the loss is nan at epoch 1, step 1"):
        fit(recipe(), small_data, tmp_path / "run")
    assert not list((tmp_path / "run").rglob("*.pt"))


def test_a_real_learning_rate_that_is_far_too_high_is_caught(small_data, tmp_path):
    with pytest.raises(TrainingError, match="training has diverged"):
        fit(recipe(lr=90, momentum=0.99, epochs=10, checkpoint_steps=0), small_data, tmp_path / "run")


def watched(device="cpu", **settings):
    """A Training that has a place and metrics, and a loader of 60 steps."""
    accelerator = SimpleNamespace(device=torch.device("cpu"))
    training = Training(recipe(**settings), accelerator, Plan("fp32"), None, None, None, {}, 1)
    accelerator.device = torch.device(device)
    loader = TrainLoader(Split(torch.zeros(120, 3, 1, 1), torch.zeros(120)), recipe(batch_size=2), transforms.draw)
    loader.order = lambda: torch.arange(120)
    return training, loader


def test_the_first_bad_step_is_remembered_where_nobody_looks_at_each():
    training, loader = watched()
    for loss in [2.0, 3.0, math.nan, 1.0, math.inf]:
        training.running = torch.tensor([10 * loss, 0.0, 10.0])
        training.finish_step()
    with pytest.raises(TrainingError, match=r"the loss is nan at epoch 1, step 3: .* were 4, 5 of the training set"):
        check_loss(training, loader)
    training, loader = watched()
    for loss, images in [(2.0, 10), (99.0, 10), (0.0, 10), (0.0, 0)]:  # the last: a process without an image
        training.running = torch.tensor([10 * loss, 0.0, images])
        training.finish_step()
    check_loss(training, loader)


@pytest.mark.parametrize(
    ("device", "saving", "looked"),
    [("cpu", [], [1, 2, 7, 50, 60]), ("cuda", [], [50, 60]), ("cuda", [2, 7], [2, 7, 50, 60])],
)
def test_a_gpu_is_looked_at_now_and_then_and_before_a_checkpoint_is_saved(device, saving, looked):
    training, loader = watched(device)
    training.diverged, found = (torch.tensor(0), torch.tensor(200.0)), []
    for training.step in (1, 2, 7, 50, 60):
        try:
            check_loss(training, loader, training.step in saving)
        except TrainingError:
            found.append(training.step)
    assert found == looked


def test_more_micro_batches_may_be_asked_for_on_resume(small_data, tmp_path, monkeypatch):
    interrupted(monkeypatch, small_data, tmp_path / "run", 3)
    sizes, check = [], Training.measure

    def spy(training, logits, labels):
        sizes.append(len(labels))
        check(training, logits, labels)

    monkeypatch.setattr(Training, "measure", spy)
    fit(recipe(accumulation=4), small_data, tmp_path / "run", resume=True)
    assert set(sizes) == {6}  # batches of 24


def stop_after(monkeypatch, nth, number=signal.SIGINT):
    """Send this process a signal in the middle of its nth step."""
    call, count = loop.train_step, [0]

    def with_signal(*arguments):
        count[0] += 1
        if count[0] == nth:
            os.kill(os.getpid(), number)
        return call(*arguments)

    monkeypatch.setattr(loop, "train_step", with_signal)


@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="this system sends no such signals")
@pytest.mark.parametrize("number", StopRequest.SIGNALS)
@pytest.mark.parametrize("nth", [1, 3, 5, 7])
def test_a_stop_is_saved_and_resumed_as_if_never_stopped(small_data, tmp_path, monkeypatch, nth, number, said):
    mine = recipe(checkpoint_steps=0)
    fit(mine, small_data, tmp_path / "whole")
    before = [signal.getsignal(each) for each in StopRequest.SIGNALS]
    with monkeypatch.context() as patch:
        stop_after(patch, nth, number)
        with pytest.raises(KeyboardInterrupt):
            fit(mine, small_data, tmp_path / "my run")
    assert [signal.getsignal(each) for each in StopRequest.SIGNALS] == before
    assert said[-2].startswith(f"{number.name}: stopping after this step")
    assert said[-1].startswith(
        f"Stopped after epoch {(nth - 1) // 5}, step {(nth - 1) % 5 + 1}, and saved. Resume with:"
    )
    assert f"python -m cifar_ft train --out '{tmp_path / 'my run'}' --resume" in said[-1]
    fit(mine, small_data, tmp_path / "my run", resume=True)
    assert any(line.startswith("Resuming after epoch") for line in said)
    same_run(tmp_path / "whole", tmp_path / "my run")


@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="this system sends no such signals")
def test_a_stop_is_saved_also_where_nothing_can_be_printed(small_data, tmp_path, monkeypatch):
    """As in the middle of a print, where Python refuses another one."""
    stop_after(monkeypatch, 3)
    reentrant = RuntimeError("reentrant call inside <_io.BufferedWriter name='<stdout>'>")
    monkeypatch.setattr("builtins.print", lambda *_, **__: (_ for _ in ()).throw(reentrant))
    with pytest.raises(KeyboardInterrupt):
        fit(recipe(checkpoint_steps=0), small_data, tmp_path / "run")
    assert [file.name[:23] for file in (tmp_path / "run" / "checkpoint").iterdir()] == ["epoch-00000-step-000000"]


@pytest.mark.skipif(not hasattr(signal, "SIGHUP"), reason="this system sends no such signal")
def test_under_nohup_a_closed_terminal_stops_nothing():
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with StopRequest() as request:
            os.kill(os.getpid(), signal.SIGHUP)
            assert request.name is None
        assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)


def test_a_second_ctrl_c_stops_at_once(small_data, tmp_path, monkeypatch):
    def twice(*arguments):
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)
        raise AssertionError("not reached")

    monkeypatch.setattr(loop, "train_step", twice)
    with pytest.raises(KeyboardInterrupt):
        fit(recipe(), small_data, tmp_path / "run")
    assert not list((tmp_path / "run").rglob("*.pt"))


@pytest.mark.data
@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="this system sends no such signals")
def test_ctrl_c_on_the_command_line_says_how_to_go_on_and_that_works(tmp_path):
    command = [sys.executable, "-u", "-m", "cifar_ft", "train", "--recipe", "smoke", "--out", "run"]
    settings = {"backbone": "resnet18", "weights": "none", "last_stage": 1, "image_size": 16, "epochs": 20, "seed": 3}
    settings |= {"train_images": 100, "val_images": 20, "test_images": 20}
    command += [word for key, value in settings.items() for word in ("--set", f"{key}={value}")]
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).resolve().parents[2])}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True, "cwd": tmp_path, "env": environment}
    with subprocess.Popen(command, **pipes) as child:
        for line in child.stdout:
            if line.startswith("Epoch 1/"):
                child.send_signal(signal.SIGINT)
                break
        output, errors = child.communicate(timeout=120)
    assert child.returncode == 130, errors
    advice = next(line for line in output.splitlines() if line.startswith("Stopped after epoch"))
    again = advice.partition("Resume with: python ")[2].partition(" (in Python")[0]
    done = subprocess.run([sys.executable, *again.split()], **pipes, check=False, timeout=300)
    assert done.returncode == 0, done.stderr
    assert "Resuming after epoch" in done.stdout
    run = load_run(tmp_path / "run")
    assert (len(run.history), run.recipe.seed, run.recipe.train_images) == (20, 3, 100)


@pytest.mark.parametrize("asked", [0.0, 1.0])
def test_processes_agree_to_stop_at_every_tenth_step(asked):
    stop, asks = StopRequest(), []

    def reduce(values, reduction):
        asks.append(reduction)
        return values + asked  # what the others say

    several = SimpleNamespace(num_processes=3, device=torch.device("cpu"), reduce=reduce)
    assert [stop.agreed(several, step) for step in range(1, 11)] == [False] * 9 + [asked > 0]
    assert len(asks) == 1
    assert stop.agreed(several) is (asked > 0)
    stop.name = "SIGTERM"
    assert not stop.agreed(several, 3)
    assert stop.agreed(several, 20)
