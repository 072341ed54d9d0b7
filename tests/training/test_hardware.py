"""All that exists only for speed: precision by rule, the trial for the oneDNN crash, what the machine is."""

import os
import signal
import sys
from pathlib import Path

import pytest
import torch

from cifar_ft import CifarFtError
from cifar_ft.recipes import get_recipe
from cifar_ft.training import Plan, choose_plan, describe_machine, usable_cpus
from cifar_ft.training.hardware import cpu_precision, trial_step

machine, fit_file = (sys.modules[f"cifar_ft.training.{name}"] for name in ("hardware", "fit"))
CPU = torch.device("cpu")
AMX, BF16 = frozenset({"avx512f", "avx512_bf16", "amx_bf16"}), frozenset({"avx512f", "avx512_bf16"})


def recipe(**overrides):
    tiny = {"backbone": "resnet18", "last_stage": 1, "image_size": 16, "batch_size": 8, "precision": "auto"}
    return get_recipe("smoke", {**tiny, **overrides})


@pytest.fixture
def processor(monkeypatch, tmp_path):
    """Pretend another processor; the answers of trials go to an empty data folder."""
    monkeypatch.setenv("CIFAR_FT_DATA", str(tmp_path))
    return lambda vendor, features=BF16: monkeypatch.setattr(machine, "_processor", lambda: (vendor, features))


# what was measured, and what the rule makes of it
@pytest.mark.parametrize(
    ("backbone", "vendor", "features", "faster"),
    [
        ("resnet50", "GenuineIntel", AMX, "bf16"),
        ("efficientnet_lite0", "GenuineIntel", AMX, "bf16"),
        ("resnet50", "GenuineIntel", BF16, "fp32"),
        ("efficientnet_lite0", "GenuineIntel", BF16, "fp32"),
        ("resnet50", "AuthenticAMD", BF16, "bf16"),
        ("efficientnet_lite0", "AuthenticAMD", BF16, "fp32"),
        ("resnet50", "AuthenticAMD", frozenset({"avx2"}), "fp32"),
        ("resnet50", "", frozenset(), "fp32"),
    ],
)
def test_the_rule_fits_what_was_measured(backbone, vendor, features, faster):
    assert cpu_precision(backbone, vendor, features)[0] == faster


def test_the_choice_is_said_with_its_reason_and_can_be_overruled(processor, said):
    processor("GenuineIntel", AMX)
    assert choose_plan(recipe(), "resnet18", CPU).precision == "bf16"
    assert said[-1].startswith("Training in bf16, ")
    assert "(the processor has AMX; --set precision=fp32 overrides this)" in said[-1]
    assert choose_plan(recipe(precision="fp32"), "resnet18", CPU).precision == "fp32"
    assert "as asked" in said[-1]


@pytest.mark.parametrize(
    ("device", "native", "answer"), [("cuda", True, "bf16"), ("cuda", False, "fp16"), ("mps", False, "fp32")]
)
def test_an_accelerator_has_a_rule_of_its_own(monkeypatch, device, native, answer):
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: native)
    assert choose_plan(recipe(), "resnet18", torch.device(device)) == Plan(answer)
    assert choose_plan(recipe(precision="fp32"), "resnet18", torch.device(device)) == Plan("fp32")


@pytest.mark.parametrize("device", ["cpu", "mps"])
def test_fp16_without_an_nvidia_gpu_is_refused_with_the_alternatives(device):
    with pytest.raises(CifarFtError, match="needs an NVIDIA GPU; use bf16, fp32 or auto"):
        choose_plan(recipe(precision="fp16"), "resnet18", torch.device(device))


@pytest.fixture
def trials(monkeypatch):
    """Stands in for the process that tries a step: notes what is tried, and ends with `trials.signal`."""

    class Trials(list):
        signal = None

    calls = Trials()
    monkeypatch.setattr(machine, "_trial", lambda recipe, plan: calls.append(plan.precision) or calls.signal)
    return calls


@pytest.mark.parametrize("name", ["SIGFPE", "SIGILL"])
def test_where_the_cpu_library_crashes_training_continues_without_it(processor, trials, said, name):
    processor("AuthenticAMD")
    trials.signal = getattr(signal, name)
    plan = choose_plan(recipe(), "resnet18", CPU)
    assert (plan.precision, plan.onednn) == ("bf16", False)
    assert said[0] == f"The CPU library oneDNN crashes on this processor ({name}): training without it"
    assert "without oneDNN" in said[-1]
    assert choose_plan(recipe(), "resnet18", CPU) == plan
    assert trials == ["bf16"]  # the answer is remembered
    trials.signal = None
    assert choose_plan(recipe(image_size=24), "resnet18", CPU).onednn  # another question
    try:
        plan.apply()
        assert not torch.backends.mkldnn.enabled
    finally:
        torch.backends.mkldnn.set_flags(True)


def test_only_amd_processors_are_tried(processor, trials):
    processor("GenuineIntel")
    assert choose_plan(recipe(), "resnet18", CPU).onednn
    assert trials == []


@pytest.mark.parametrize("content", [b"", b"perhaps", b"\x00\xff"])
def test_a_damaged_answer_costs_another_trial(processor, trials, tmp_path, content):
    processor("AuthenticAMD")
    choose_plan(recipe(), "resnet18", CPU)
    (answer,) = (tmp_path / "onednn").iterdir()
    answer.write_bytes(content)
    for _ in range(2):
        assert choose_plan(recipe(), "resnet18", CPU).onednn
    assert len(trials) == 2
    assert answer.read_bytes() == b"survives"


def test_answers_that_cannot_be_written_cost_a_trial_each_time(processor, trials, tmp_path, monkeypatch):
    processor("AuthenticAMD")
    (tmp_path / "file").touch()
    monkeypatch.setenv("CIFAR_FT_DATA", str(tmp_path / "file"))
    assert choose_plan(recipe(), "resnet18", CPU).onednn
    assert choose_plan(recipe(), "resnet18", CPU).onednn
    assert len(trials) == 2


CODES = {  # what the process that tries does, and whether oneDNN then counts as sound
    "crashing": ("import os, signal; os.kill(os.getpid(), signal.SIGFPE)", False),
    "an error": ("raise SystemExit('no memory')", True),
    "killed": ("import os, signal; os.kill(os.getpid(), signal.SIGKILL)", True),
    "hanging": ("import time; time.sleep(60)", True),
}


@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="this system has no such signals")
@pytest.mark.parametrize(("code", "sound"), CODES.values(), ids=CODES)
def test_only_a_crash_of_the_trial_counts(processor, monkeypatch, code, sound):
    run = machine.subprocess.run
    monkeypatch.setattr(machine, "TRIAL_SECONDS", 1)
    monkeypatch.setattr(
        machine.subprocess, "run", lambda command, **options: run([sys.executable, "-c", code], **options)
    )
    processor("AuthenticAMD")
    assert choose_plan(recipe(), "resnet18", CPU).onednn is sound


@pytest.mark.slow
def test_a_real_trial_is_survived_here(processor, monkeypatch):
    processor("AuthenticAMD")
    assert machine._trial(recipe(), Plan("fp32")) is None


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_trial_step_goes_forward_and_backward(precision):
    trial_step(recipe(), precision)


@pytest.fixture
def files(monkeypatch):
    """A function that sets what the files of /proc and /sys hold, a dict; others do not exist. 8 processors."""

    def set_to(content):
        def read(self, *arguments, **options):
            if str(self) not in content:
                raise FileNotFoundError(self)
            return content[str(self)]

        monkeypatch.setattr(Path, "read_text", read)
        monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(8)), raising=False)

    return set_to


MINE, V2 = "/proc/self/cgroup", "/sys/fs/cgroup"
V1, V1_BOTH = f"{V2}/cpu", f"{V2}/cpu,cpuacct"


def v1(folder, quota, period="100000"):
    return {f"{folder}/cpu.cfs_quota_us": f"{quota}\n", f"{folder}/cpu.cfs_period_us": f"{period}\n"}


def v2(folder, text):
    return {f"{folder}/cpu.max": f"{text}\n"}


@pytest.mark.parametrize(
    ("text", "cpus"),
    [
        ("max 100000\n", 8), ("200000 100000\n", 2), ("150000 100000", 2), ("250000 100000", 2), ("290000 100000", 3),
        ("50000 100000", 1), ("1000 100000", 1), ("9900000 100000", 8), (None, 8), ("", 8), ("what", 8),
    ],
)  # fmt: skip
def test_the_processors_that_may_be_used_are_counted(files, text, cpus):
    files({} if text is None else {f"{V2}/cpu.max": text})
    assert usable_cpus() == cpus


@pytest.mark.parametrize(
    ("content", "cpus"),
    [
        ({MINE: "0::/\n", **v2(V2, "200000 100000")}, 2),
        ({MINE: "0::/a.slice/b.scope\n", **v2(f"{V2}/a.slice/b.scope", "200000 100000")}, 2),
        ({MINE: "0::/a/b\n", **v2(f"{V2}/a/b", "max 100000"), **v2(f"{V2}/a", "300000 100000")}, 3),
        ({MINE: "0::/a/b\n", **v2(f"{V2}/a/b", "500000 100000"), **v2(f"{V2}/a", "300000 100000")}, 3),
        ({MINE: "0::/a/b\n", **v2(f"{V2}/a/b", "100000 50000"), **v2(V2, "500000 100000")}, 2),
        ({MINE: "0::/other\n", **v2(f"{V2}/a", "200000 100000")}, 8),
        ({MINE: "0::/../a\n", **v2(V2, "200000 100000")}, 2),
        ({MINE: "3:memory:/m\n2:cpu,cpuacct:/\n", **v1(V1_BOTH, 200000)}, 2),
        ({MINE: "2:cpu,cpuacct:/docker/1f\n", **v1(V1_BOTH, 200000)}, 2),  # of a container, which is its root
        ({MINE: "2:cpu,cpuacct:/a/b\n0::/x\n", **v1(f"{V1_BOTH}/a", 300000), **v1(f"{V1_BOTH}/a/b", -1)}, 3),
        ({MINE: "2:cpuacct,cpu:/a\n", **v1(f"{V1}/a", 100000, 50000)}, 2),
        ({MINE: "2:cpu:/a\n", **v1(V1, -1), **v1(f"{V1}/a", -1)}, 8),
        ({MINE: "2:cpuset:/a\n", **v1(f"{V1}/a", 200000)}, 8),  # the group of another controller
        ({MINE: "2:cpu:/a\n0::/a\n", **v1(f"{V1}/a", 400000), **v2(f"{V2}/unified/a", "200000 100000")}, 2),
        ({MINE: "0::/with:colon\n", **v2(f"{V2}/with:colon", "200000 100000")}, 2),
        (v1(V1, 200000), 2),
    ],
)
def test_a_quota_counts_wherever_control_groups_keep_it(files, content, cpus):
    files(content)
    assert usable_cpus() == cpus


def test_without_affinity_all_processors_count(files, monkeypatch):
    files({})
    monkeypatch.delattr(os, "sched_getaffinity")
    monkeypatch.setattr(os, "cpu_count", lambda: 6)
    assert usable_cpus() == 6


def test_only_who_asks_gets_another_allocator_for_the_whole_process(monkeypatch):
    class Libc:
        def __init__(self, name):
            self.mallopt = lambda option, value: set_to.append(option)

    def stop(*_):
        raise EOFError

    set_to = []
    monkeypatch.setattr(machine.ctypes, "CDLL", Libc)
    monkeypatch.setattr(fit_file, "start_processes", stop)
    monkeypatch.setattr(sys, "platform", "linux")
    with pytest.raises(EOFError):
        fit_file.fit(recipe(), None)
    assert set_to == []
    machine.keep_memory()
    assert sorted(set_to) == [-4, -2, -1]


def test_the_machine_is_named_in_one_line():
    assert "threads" in describe_machine()
    assert "\n" not in describe_machine()
