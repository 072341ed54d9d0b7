"""Faults in the middle of training: short memory, a loss that diverges, and a stop that is asked for."""

import math
import os
import signal
import subprocess
import sys

import numpy as np
import pytest
import torch
from tiny_runs import quiet, recipe, same_run, weights

from cifar_ft import data, models, training
from cifar_ft.recipes import RecipeError
from cifar_ft.results import load_run
from cifar_ft.training import TrainingError, fit

pytestmark = pytest.mark.usefixtures("one_thread")


# memory


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

    monkeypatch.setattr(surgery, "build_model", build_small)


@pytest.mark.parametrize(
    "error", [None, RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate")]
)
def test_where_memory_is_short_a_batch_is_computed_in_pieces(small_data, tmp_path, monkeypatch, error):
    mine, lines = recipe(freeze_batchnorm=True, ema_decay=0.0, checkpoint_steps=0, precision="fp32"), []
    fit(mine, small_data, tmp_path / "whole", echo=quiet)
    short_of_memory(monkeypatch, 7, error)
    fit(mine, small_data, tmp_path / "pieces", echo=lines.append)
    announced = [line for line in lines if "Out of memory" in line]
    assert [line.split(" pieces of up to ")[0][-1] for line in announced] == ["2", "4"]  # once each, for the whole run
    assert "4 pieces of up to 6 images" in announced[-1]
    assert "BatchNorm" in announced[-1]
    whole, pieces = weights(tmp_path / "whole"), weights(tmp_path / "pieces")
    for name in whole:  # the same steps, so the same weights but for rounding
        torch.testing.assert_close(pieces[name], whole[name], rtol=1e-3, atol=1e-4, msg=name)
    np.testing.assert_allclose(
        load_run(tmp_path / "pieces").history.train_loss, load_run(tmp_path / "whole").history.train_loss, rtol=1e-4
    )


def test_pieces_that_are_asked_for_are_the_same_steps(small_data, tmp_path):
    one = fit(recipe(freeze_batchnorm=True, checkpoint_steps=0), small_data, tmp_path / "one", echo=quiet)
    for pieces in (5, 24, 1000):
        mine = recipe(freeze_batchnorm=True, checkpoint_steps=0, accumulation=pieces)
        run = fit(mine, small_data, tmp_path / str(pieces), echo=quiet)
        np.testing.assert_allclose(run.history.train_loss, one.history.train_loss, rtol=1e-4)
        assert list(run.history.train_accuracy) == pytest.approx(list(one.history.train_accuracy), abs=0.02)


def test_memory_for_less_than_two_images_ends_training_with_advice(small_data, tmp_path, monkeypatch):
    short_of_memory(monkeypatch, 1)
    with pytest.raises(TrainingError, match=r"out of memory with only 3 images at a time; use a smaller image_size"):
        fit(recipe(), small_data, tmp_path / "run", echo=quiet)
    assert not (tmp_path / "run" / "metrics.json").exists()


def test_another_error_of_the_model_is_not_taken_for_short_memory(small_data, tmp_path, monkeypatch):
    short_of_memory(monkeypatch, 7, RuntimeError("shapes cannot be multiplied"))
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        fit(recipe(), small_data, tmp_path / "run", echo=quiet)


def test_a_run_in_pieces_is_resumed_in_pieces(small_data, tmp_path, monkeypatch):
    short_of_memory(monkeypatch, 12)
    fit(recipe(), small_data, tmp_path / "whole", echo=quiet)
    stop_behind(monkeypatch, 3)
    with pytest.raises(KeyboardInterrupt):
        fit(recipe(), small_data, tmp_path / "run", echo=quiet)
    fit(recipe(), small_data, tmp_path / "run", resume=True, echo=quiet)
    same_run(tmp_path / "whole", tmp_path / "run")


# a loss that diverges


@pytest.mark.parametrize(("value", "text"), [(math.nan, "nan"), (math.inf, "nan"), (1e4, r"[\d.e+]+")])
def test_a_loss_that_diverges_stops_training_and_names_step_and_images(small_data, tmp_path, monkeypatch, value, text):
    batches, call = [], training.backward

    def broken(state, inputs, labels, *arguments):
        logits = call(state, inputs, labels, *arguments)
        batches.append(len(labels))
        if len(batches) == 7:
            logits = logits.clone()
            logits[3, (labels[3] + 1) % 10] = value
        return logits

    monkeypatch.setattr(training, "backward", broken)
    mine = recipe(ema_decay=0.0)
    with pytest.raises(TrainingError, match=rf"the loss is {text} at epoch 2, step 2: .*--set lr=0.005") as caught:
        fit(mine, small_data, tmp_path / "run", echo=quiet)
    named = str(caught.value).partition("The batch were images ")[2].partition(" of the training set")[0]
    named = [int(word) for word in named.split(", ")]
    loader = data.make_loader(small_data.train, mine, train=True, epoch=1)
    positions = list(loader.batch_sampler)[1]
    assert named == small_data.train.indices[positions].tolist()
    assert not (tmp_path / "run" / "metrics.json").exists()


def test_no_checkpoint_is_written_of_a_model_that_has_diverged(small_data, tmp_path, monkeypatch):
    build = models.build_model

    def broken(*arguments):
        model = build(*arguments)
        with torch.no_grad():
            models.head(model).bias[3] = math.nan
        return model

    monkeypatch.setattr(surgery, "build_model", broken)
    with pytest.raises(TrainingError, match="the loss is nan at epoch 1, step 1"):
        fit(recipe(), small_data, tmp_path / "run", echo=quiet)
    assert not list((tmp_path / "run").rglob("*.pt"))


def test_a_real_learning_rate_that_is_far_too_high_is_caught(small_data, tmp_path):
    with pytest.raises(TrainingError, match="training has diverged"):
        fit(recipe(lr=90, momentum=0.99, epochs=10, checkpoint_steps=0), small_data, tmp_path / "run", echo=quiet)


def test_the_first_bad_step_is_remembered_where_nobody_looks_at_each():
    watch = training.LossWatch(torch.device("cpu"))
    for step, loss in enumerate([2.0, 3.0, math.nan, 1.0, math.inf]):
        watch.see(torch.tensor([10 * loss, 0.0, 10.0]), step)
    assert (watch.step.item(), watch.loss.isnan().item()) == (2, True)
    quiet_watch = training.LossWatch(torch.device("cpu"))
    for step, loss in enumerate([2.0, 99.0, 0.0]):
        quiet_watch.see(torch.tensor([10 * loss, 0.0, 10.0]), step)
    quiet_watch.see(torch.tensor([0.0, 0.0, 0.0]), 3)  # a process without an image
    quiet_watch.check(None, None, None, None)


@pytest.mark.parametrize(
    ("device", "checkpoint_steps", "due"),
    [("cpu", 0, [1, 2, 7, 50, 60]), ("meta", 0, [50]), ("meta", 7, [7, 50]), ("meta", 2, [2, 50, 60])],
)
def test_a_gpu_is_looked_at_now_and_then_and_before_each_checkpoint(device, checkpoint_steps, due):
    watch, mine = training.LossWatch(torch.device(device)), recipe(checkpoint_steps=checkpoint_steps)
    assert [step for step in (1, 2, 7, 50, 60) if watch.due(step, mine)] == due


# a stop that is asked for


def stop_behind(monkeypatch, nth, number=signal.SIGINT):
    """Send this process a signal in the middle of its nth step."""
    call, count = training.backward, [0]

    def with_signal(*arguments):
        count[0] += 1
        if count[0] == nth:
            os.kill(os.getpid(), number)
        return call(*arguments)

    monkeypatch.setattr(training, "backward", with_signal)


@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="this system sends no such signals")
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("nth", [1, 3, 5, 7])
def test_a_stop_is_saved_and_resumed_as_if_never_stopped(small_data, tmp_path, monkeypatch, nth, number):
    mine, lines = recipe(checkpoint_steps=0), []
    fit(mine, small_data, tmp_path / "whole", echo=quiet)
    before = [signal.getsignal(each) for each in (signal.SIGINT, signal.SIGTERM)]
    with monkeypatch.context() as patch:
        stop_behind(patch, nth, number)
        with pytest.raises(KeyboardInterrupt):
            fit(mine, small_data, tmp_path / "my run", echo=lines.append)
    assert [signal.getsignal(each) for each in (signal.SIGINT, signal.SIGTERM)] == before
    assert lines[-2].startswith(f"{number.name}: stopping behind this step")
    assert lines[-1].startswith(
        f"Stopped behind epoch {(nth - 1) // 5}, step {(nth - 1) % 5 + 1}, and saved. Go on with:"
    )
    assert f"python -m cifar_ft train --out '{tmp_path / 'my run'}' --resume" in lines[-1]
    fit(mine, small_data, tmp_path / "my run", resume=True, echo=lines.append)
    assert any(line.startswith("Resuming behind epoch") for line in lines)
    same_run(tmp_path / "whole", tmp_path / "my run")


def test_a_second_ctrl_c_stops_at_once(small_data, tmp_path, monkeypatch):
    def twice(*arguments):
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)
        raise AssertionError("not reached")

    monkeypatch.setattr(training, "backward", twice)
    with pytest.raises(KeyboardInterrupt):
        fit(recipe(), small_data, tmp_path / "run", echo=quiet)
    assert not list((tmp_path / "run").rglob("*.pt"))


@pytest.mark.data
@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="this system sends no such signals")
def test_ctrl_c_on_the_command_line_says_how_to_go_on_and_that_works(tmp_path):
    command = [sys.executable, "-u", "-m", "cifar_ft", "train", "--recipe", "smoke", "--out", "run"]
    settings = {"backbone": "resnet18", "weights": "none", "epochs": 30, "train_images": 200, "seed": 3}
    command += [word for key, value in settings.items() for word in ("--set", f"{key}={value}")]
    root = os.path.dirname(os.path.dirname(__file__))
    environment = {**os.environ, "PYTHONPATH": root}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True, "cwd": tmp_path, "env": environment}
    with subprocess.Popen(command, **pipes) as child:
        for line in child.stdout:
            if line.startswith("Epoch 1/"):
                child.send_signal(signal.SIGINT)
                break
        output, errors = child.communicate(timeout=120)
    assert child.returncode == 130, errors
    advice = next(line for line in output.splitlines() if line.startswith("Stopped behind epoch"))
    again = advice.partition("Go on with: python ")[2].partition(" (in Python")[0]
    done = subprocess.run([sys.executable, *again.split()], **pipes, check=False, timeout=300)
    assert done.returncode == 0, done.stderr
    assert "Resuming behind epoch" in done.stdout
    run = load_run(tmp_path / "run")
    assert (len(run.history), run.recipe.seed, run.recipe.train_images) == (30, 3, 200)


def test_the_stored_recipe_can_be_changed_only_where_it_may(tmp_path):
    code = "import sys; from cifar_ft.__main__ import main; main()"
    (tmp_path / "config.json").write_text('{"recipe": {"name": "smoke", "size": 3}}')
    command = [sys.executable, "-c", code, "train", "--out", str(tmp_path), "--resume"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "config.json cannot be read" in done.stderr
    assert "start anew in another folder" in done.stderr


def test_an_impossible_number_of_pieces_is_refused():
    with pytest.raises(RecipeError, match="accumulation=0 is out of range"):
        recipe(accumulation=0)


# torch.compile


@pytest.mark.slow
def test_a_compiled_model_is_trained_and_stored_under_the_same_names(small_data, tmp_path, monkeypatch):
    monkeypatch.setattr(torch.nn.Module, "compile", compile_without_a_compiler)
    mine = recipe(checkpoint_steps=0, epochs=1)
    plain = fit(mine, small_data, tmp_path / "plain", echo=quiet)
    compiled = fit(recipe(checkpoint_steps=0, epochs=1, compile=True), small_data, tmp_path / "compiled", echo=quiet)
    assert weights(compiled.path).keys() == weights(plain.path).keys()
    np.testing.assert_allclose(compiled.logits, plain.logits, atol=1e-2)


def compile_without_a_compiler(self, compile_module=torch.nn.Module.compile):
    """The whole of torch.compile but for the C++ compiler, which a machine may lack."""
    compile_module(self, backend="aot_eager")
