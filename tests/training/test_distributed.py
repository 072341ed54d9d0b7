"""Several processes, really started: one result, each image once, one folder, resumable."""

import os
import signal
import subprocess
import sys
import time
from types import SimpleNamespace

import numpy as np
import psutil
import pytest
import torch
from accelerate import PartialState
from accelerate.state import AcceleratorState
from tiny_runs import raise_, recipe, same_run
from torch import nn

from cifar_ft import CifarFtError, models
from cifar_ft.results import load_run
from cifar_ft.training import TrainingError, distributed, fit

pytestmark = pytest.mark.usefixtures("one_thread")
LAUNCH = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node"]
TRAIN = ["-m", "cifar_ft", "train", "--recipe", "smoke"]
FROZEN = {
    "backbone": "resnet18", "weights": "none", "last_stage": 1, "freeze_batchnorm": True, "epochs": 2, "batch_size": 60,
    "train_images": 242, "val_images": 101, "test_images": 997, "lr": 0.05, "ema_decay": 0.9, "label_smoothing": 0.1,
}  # fmt: skip
MOVING = {**FROZEN, "freeze_batchnorm": False, "epochs": 15, "checkpoint_steps": 2}


def command(number, out, settings, *more):
    start = [*LAUNCH, str(number)] if number > 1 else [sys.executable]
    words = [word for key, value in settings.items() for word in ("--set", f"{key}={value}")]
    return [*start, *TRAIN, *words, "--out", str(out), *more]


def train(number, out, settings, *more):
    done = subprocess.run(command(number, out, settings, *more), capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return load_run(out), done.stdout


@pytest.fixture(scope="module")
def single(tmp_path_factory):
    """The run of one process."""
    return train(1, tmp_path_factory.mktemp("single") / "run", FROZEN)[0]


@pytest.mark.data
@pytest.mark.slow
@pytest.mark.parametrize("number", [2, 3])
def test_several_processes_with_frozen_batchnorm_train_as_one(single, tmp_path, number):
    # The last batch has two images, fewer than three processes; 101 and 997 images do not divide either.
    run, output = train(number, tmp_path / "run", FROZEN)
    assert len(run.labels) == 997
    assert output.count("Epoch 1/2") == output.count("Model: ") == output.count("CIFAR-10: ") == 1
    assert list(tmp_path.iterdir()) == [tmp_path / "run"]
    np.testing.assert_allclose(run.history.train_loss, single.history.train_loss, rtol=1e-4)
    np.testing.assert_allclose(run.history.train_accuracy, single.history.train_accuracy, atol=2 / 242)
    np.testing.assert_allclose(run.steps, single.steps, rtol=1e-3)
    np.testing.assert_allclose(run.history.val_accuracy, single.history.val_accuracy, atol=2 / 101)
    np.testing.assert_allclose(run.logits, single.logits, atol=5e-3)
    assert np.array_equal(run.labels, single.labels)


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    """The run of two processes, with BatchNorm that moves."""
    return train(2, tmp_path_factory.mktemp("pair") / "run", MOVING)[0]


@pytest.mark.data
@pytest.mark.slow
@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="this system has no SIGKILL")
@pytest.mark.parametrize("how", ["killed", "interrupted"])
def test_several_processes_are_resumed_as_if_never_stopped(pair, tmp_path, how):
    path = tmp_path / "run"
    with subprocess.Popen(command(2, path, MOVING), **quietly()) as group:
        wait_for(lambda: len(list(path.glob("checkpoint/epoch-00002-*.pt"))) > 0, group)
        workers = psutil.Process(group.pid).children(recursive=True)
        assert len(workers) >= 2
        if how == "killed":
            for process in (group, *workers):
                process.kill()
        else:
            group.send_signal(signal.SIGINT)
        group.wait(timeout=90)
        psutil.wait_procs(workers, timeout=90)
    assert not (path / "metrics.json").exists()
    run, output = train(2, path, MOVING, "--resume")
    assert "Resuming after epoch" in output
    assert np.array_equal(run.logits, pair.logits)
    for column in ("train_loss", "train_accuracy"):
        assert list(run.history[column]) == list(pair.history[column])
    assert run.steps.equals(pair.steps)


def quietly():
    return {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}


def wait_for(condition, process, seconds=120):
    deadline = time.monotonic() + seconds
    while not condition():
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_statistics_are_shared_as_their_mean():
    mine, other = nn.BatchNorm2d(3), nn.BatchNorm2d(3)
    mine.running_mean.fill_(1.0)
    other.running_mean.fill_(4.0)

    def reduce(values, reduction):
        assert reduction == "mean"
        return (values + torch.cat([b.flatten() for b in other.buffers() if b.is_floating_point()])) / 2

    distributed.share_statistics(SimpleNamespace(num_processes=2, reduce=reduce), mine, None, nn.Linear(2, 2))
    assert mine.running_mean.tolist() == [2.5] * 3
    assert mine.running_var.tolist() == [1.0] * 3


def test_on_gpus_batchnorm_is_synchronised_unless_it_is_frozen():
    cuda = SimpleNamespace(num_processes=2, device=torch.device("cuda"))
    model = models.build_model(recipe(freeze="stem"))
    names = set(model.state_dict())
    synced = distributed.synchronize_batchnorm(model, cuda)
    norms = [m for m in synced.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    assert sum(isinstance(m, nn.SyncBatchNorm) for m in norms) == len(norms) - 1
    assert models.is_frozen_batchnorm(synced.bn1)
    assert set(synced.state_dict()) == names
    for world, device in ((1, "cuda"), (2, "cpu")):
        alone = SimpleNamespace(num_processes=world, device=torch.device(device))
        model = distributed.synchronize_batchnorm(models.build_model(recipe()), alone)
        assert not any(isinstance(m, nn.SyncBatchNorm) for m in model.modules())


def test_frozen_batchnorm_trains_weights_and_keeps_statistics():
    model = models.build_model(recipe(freeze_batchnorm=True)).train()
    before = {name: value.clone() for name, value in model.named_buffers()}
    model(torch.randn(4, 3, 32, 32)).sum().backward()
    assert all(torch.equal(before[name], value) for name, value in model.named_buffers())
    assert all(p.grad is not None for p in model.parameters())


@pytest.fixture
def gpus(monkeypatch):
    """Two GPUs that are not there, and an Accelerate that starts anew."""
    taken = []
    monkeypatch.delenv("CIFAR_FT_DEVICE", raising=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_device", taken.append)
    yield taken
    monkeypatch.undo()
    distributed.start_processes("cpu")


def test_each_run_gets_the_device_it_asks_for(gpus):
    names = ["cuda:1", "cpu", "cuda", "auto", "cuda:0", "cpu"]
    devices = [torch.device(name.replace("auto", "cuda")) for name in names]
    assert [distributed.start_processes(name).device for name in names] == devices
    assert gpus == [torch.device("cuda:1"), torch.device("cuda:0")]  # else PyTorch's current one


def test_several_processes_cannot_share_a_gpu(gpus, monkeypatch):
    state = SimpleNamespace(num_processes=2, is_main_process=True, device=torch.device("cuda:0"))
    monkeypatch.setattr(distributed, "PartialState", lambda **_: state)
    assert distributed.start_processes("cuda").device == torch.device("cuda:0")  # its own
    with pytest.raises(models.DeviceError, match="cuda:1 is one GPU for several processes; use device=cuda and set"):
        distributed.start_processes("cuda:1")


def test_an_error_of_the_main_process_ends_the_others_in_silence(monkeypatch):
    sent = []
    monkeypatch.setattr(distributed, "broadcast_object_list", lambda values: sent.append(values) or sent[0])
    main, other = SimpleNamespace(is_main_process=True), SimpleNamespace(is_main_process=False)
    assert [distributed.on_main(each, lambda: "result") for each in (main, other)] == ["result"] * 2
    sent.clear()
    with pytest.raises(TrainingError, match="in use"):
        distributed.on_main(main, lambda: raise_(TrainingError("the folder is in use")))
    with pytest.raises(SystemExit, match="1"):
        distributed.on_main(other, lambda: raise_(AssertionError("never called")))


SETTINGS = {
    "ACCELERATE_GRADIENT_ACCUMULATION_STEPS": "4", "ACCELERATE_DYNAMO_BACKEND": "EAGER",
    "ACCELERATE_MIXED_PRECISION": "bf16", "ACCELERATE_USE_FSDP": "true", "ACCELERATE_USE_DEEPSPEED": "true",
    "ACCELERATE_USE_MEGATRON_LM": "true", "ACCELERATE_USE_PARALLELISM_CONFIG": "true",
    "ACCELERATE_TORCH_DEVICE": "meta", "ACCELERATE_USE_SAGEMAKER": "true", "ACCELERATE_DOWNCAST_BF16": "yes",
    "ACCELERATE_DYNAMO_MODE": "max-autotune", "ACCELERATE_USE_CPU": "false",
}  # fmt: skip


@pytest.mark.parametrize("name", SETTINGS)
def test_no_setting_of_accelerates_decides_a_run(whole, small_data, tmp_path, monkeypatch, name):
    monkeypatch.setenv(name, SETTINGS[name])
    for state in (AcceleratorState, PartialState):
        state._reset_state()
    fit(recipe(), small_data, tmp_path / "run")
    same_run(whole, tmp_path / "run")
    assert os.environ[name] == SETTINGS[name]  # for whatever else runs in this process


@pytest.mark.parametrize("name", ["WORLD_SIZE", "OMPI_COMM_WORLD_SIZE"])
def test_what_another_launcher_left_in_the_environment_is_named(monkeypatch, name):
    for each in ("WORLD_SIZE", "RANK", "LOCAL_RANK", "LOCAL_WORLD_SIZE"):  # Accelerate sets them
        monkeypatch.setenv(each, "1")
        monkeypatch.delenv(each)
    monkeypatch.setenv(name, "2")
    monkeypatch.setattr(PartialState, "_shared_state", {})
    with pytest.raises(CifarFtError, match=r"not how they meet: .*MASTER_ADDR.*Start them with torchrun.*unset these"):
        distributed.start_processes("cpu")
