"""All that exists only for speed and for the machine: precision, threads, kept memory, a crash to be avoided.

The layers of `convolutions` belong to it too.
"""

from __future__ import annotations

import ctypes
import hashlib
import json
import os
import platform
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, fields
from pathlib import Path

import torch
import torch.nn.functional as F

from cifar_ft import CifarFtError, log
from cifar_ft.files import PACKAGE, FileError, data_root, write_atomic
from cifar_ft.models import build_model, choose_device
from cifar_ft.recipes import Recipe
from cifar_ft.training.convolutions import speed_up

TRIAL_SECONDS = 180
CRASHES = {getattr(signal, name, None) for name in ("SIGFPE", "SIGILL", "SIGSEGV", "SIGBUS", "SIGABRT")} - {None}
CPU_TREES = {  # of control groups, versions 2 and 1: their controller, and the files of quota and period
    "/sys/fs/cgroup": ("", ("cpu.max",)),
    "/sys/fs/cgroup/unified": ("", ("cpu.max",)),
    "/sys/fs/cgroup/cpu": ("cpu", ("cpu.cfs_quota_us", "cpu.cfs_period_us")),
    "/sys/fs/cgroup/cpu,cpuacct": ("cpu", ("cpu.cfs_quota_us", "cpu.cfs_period_us")),
}


@dataclass(frozen=True)
class Plan:
    """How to compute the steps of a run; it decides the speed, and with it how numbers are rounded."""

    precision: str  # fp32 | bf16 | fp16
    threads: int | None = None  # of a CPU; None: as many as PyTorch takes
    onednn: bool = True  # the CPU library for convolutions, off where it crashes

    @classmethod
    def stored(cls, values: dict, device: torch.device) -> Plan:
        """The plan of a run's config.json, which another version may have written, for this device."""
        known = {field.name for field in fields(cls)}
        plan = cls(**{name: value for name, value in values.items() if name in known})
        _check_precision(plan.precision, device)
        return plan

    def apply(self) -> None:
        """Set what is global to the process: threads and oneDNN."""
        if self.threads:
            torch.set_num_threads(min(self.threads, usable_cpus()))
        torch.backends.mkldnn.set_flags(self.onednn)

    def __str__(self) -> str:
        threads = f", {self.threads} thread{'s' * (self.threads > 1)}" if self.threads else ""
        return self.precision + threads + ("" if self.onednn else ", without oneDNN")


def choose_plan(recipe: Recipe, backbone: str, device: torch.device) -> Plan:
    """How to train this recipe here, by a rule: the same on every run, whatever else the machine does.

    On a GPU bf16 where it is native, else fp16. On a CPU see `cpu_precision`.

    Parameters
    ----------
    backbone : str
        What `recipe.backbone` became.

    Raises
    ------
    CifarFtError
        For fp16 without an NVIDIA GPU.
    """
    asked = recipe.precision
    _check_precision(asked, device)
    if device.type == "cuda":
        fastest = "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp16"
        return Plan(fastest if asked == "auto" else asked)
    if device.type != "cpu":
        return Plan("fp32" if asked == "auto" else asked)
    precision, why = (asked, "as asked") if asked != "auto" else cpu_precision(backbone, *_processor())
    why += "; --set precision=fp32 overrides this" if (asked, precision) == ("auto", "bf16") else ""
    plan = Plan(precision, min(torch.get_num_threads(), usable_cpus()))
    if not survives(recipe.replace(backbone=backbone), plan):
        plan = Plan(precision, plan.threads, onednn=False)
    log.info(f"Training in {plan} ({why})")
    return plan


def _check_precision(precision: str, device: torch.device) -> None:
    if precision == "fp16" and device.type != "cuda":
        raise CifarFtError("precision=fp16 needs an NVIDIA GPU; use bf16, fp32 or auto here")


def cpu_precision(backbone: str, vendor: str, features: frozenset[str]) -> tuple[str, str]:
    """The faster precision on a processor with these features, and why.

    Measured in images a second on two threads, fp32 against bf16. Intel with AMX: bf16 by far for every network. Intel
    with avx512_bf16 alone: ResNet-50 at 112 px 49 against 31, EfficientNet-Lite0 at 128 px 145 against 131. AMD Zen 5
    (avx512_bf16): ResNet-50 with the published stem 131 against 186, EfficientNet-Lite0 at 96 px faster in fp32.
    """
    if "amx_bf16" in features:
        return "bf16", "the processor has AMX"
    if vendor == "AuthenticAMD" and "avx512_bf16" in features and backbone.startswith("resnet"):
        return "bf16", "faster for ResNets on AMD processors with AVX-512 BF16"
    return "fp32", "bf16 was not measured to be faster on a processor like this"


def survives(recipe: Recipe, plan: Plan) -> bool:
    """Whether oneDNN survives a training step of this recipe: on some AMD processors it dies of SIGFPE.

    Tried on AMD processors alone, in a process of its own (pytorch/pytorch#177227). The answer is kept in the data
    folder; one that cannot be kept costs the time of another trial.
    """
    if _processor()[0] != "AuthenticAMD":
        return True
    # Whatever decides which convolutions oneDNN meets, and where.
    shapes = ("backbone", "stem", "max_pool", "last_stage", "freeze", "image_size", "train_sizes", "batch_size")
    machine = describe_machine(torch.device("cpu"))
    question = [machine, torch.__version__, plan.precision, *(getattr(recipe, name) for name in shapes)]
    file = data_root() / "onednn" / f"{hashlib.sha256(repr(question).encode()).hexdigest()[:16]}.txt"
    with suppress(OSError, UnicodeDecodeError):
        if (known := file.read_text(encoding="ascii")) in ("survives", "crashes"):
            return known == "survives"
    died = _trial(recipe, plan)
    if died in CRASHES:
        name = signal.Signals(died).name
        log.warning(f"The CPU library oneDNN crashes on this processor ({name}): training without it")
    with suppress(FileError):
        write_atomic(file, b"crashes" if died in CRASHES else b"survives")
    return died not in CRASHES


def _trial(recipe: Recipe, plan: Plan) -> int | None:
    """The signal that ended a training step in a process of its own, if one did."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(PACKAGE.parent), os.environ.get("PYTHONPATH", "")])}
    request = json.dumps({"recipe": recipe.to_dict(), "precision": plan.precision}).encode()
    command = [sys.executable, "-m", "cifar_ft.training.hardware"]
    try:
        done = subprocess.run(command, input=request, env=environment, capture_output=True, timeout=TRIAL_SECONDS)
    except (subprocess.TimeoutExpired, OSError):
        return None
    return -done.returncode if done.returncode < 0 else None


def trial_step(recipe: Recipe, precision: str) -> None:
    """A step forward and backward at each image size, on random weights and images, as training computes it."""
    model = speed_up(build_model(recipe.replace(weights="none")).train().to(memory_format=torch.channels_last))
    for size in sorted({recipe.image_size, *recipe.train_sizes}):
        images = torch.randn(recipe.batch_size, 3, size, size).contiguous(memory_format=torch.channels_last)
        with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
            logits = model(images).float()
        F.cross_entropy(logits, torch.arange(recipe.batch_size) % 10).backward()


def describe_machine(device: torch.device | None = None) -> str:
    """One line on the machine: processor, threads, and the GPU if `device` is one; None: what "auto" is."""
    name, device = _cpuinfo("model name") or platform.processor() or platform.machine(), device or choose_device()
    gpu = f", {torch.cuda.get_device_name(device)}" if device.type == "cuda" else ""
    return f"{name}, {torch.get_num_threads()} threads{gpu}"


def _processor() -> tuple[str, frozenset[str]]:
    """Vendor and features of the processor, as Linux names them; empty elsewhere."""
    return _cpuinfo("vendor_id"), frozenset(_cpuinfo("flags").split())


def _cpuinfo(entry: str) -> str:
    with suppress(OSError), open("/proc/cpuinfo", encoding="utf-8") as file:
        lines = (line.partition(":") for line in file)
        return next((value.strip() for name, _, value in lines if name.strip() == entry), "")
    return ""


def usable_cpus() -> int:
    """Processors that this process may use: a container's quota can allow fewer than the machine has.

    A quota between two whole numbers counts as the nearer one, and as one at least.
    """
    cpus = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(cpus, max(1, round(min(_cpu_quotas(), default=cpus))))


def _cpu_quotas() -> Iterator[float]:
    """The quotas, in processors, of this process's control groups and of all above them; each of them holds.

    A container sees its own group as the root of the tree, often under the path that it has outside.
    """
    paths = {}  # of the groups, by controller; version 2 has one tree without a controller's name
    with suppress(OSError, ValueError):
        for line in Path("/proc/self/cgroup").read_text(encoding="utf-8").splitlines():
            _, controllers, path = line.split(":", 2)
            paths |= dict.fromkeys(controllers.split(","), path)
    for tree, (controller, files) in CPU_TREES.items():
        parts = [part for part in paths.get(controller, "").split("/") if part not in ("", "..")]
        for depth in range(len(parts) + 1):
            with suppress(OSError, ValueError):  # no such group; without a quota
                folder = Path(tree, *parts[:depth])
                quota, period = " ".join((folder / file).read_text(encoding="ascii") for file in files).split()
                if int(quota) > 0:
                    yield int(quota) / int(period)


def keep_memory() -> None:
    """Ask glibc to keep freed memory, in the whole process and until its end: nothing can undo it, so nobody else asks.

    Training and prediction free the same large blocks at each step and ask for them again; a block that went back to
    the kernel is cleared page by page when it is used again. Without this a step of `quick` on one processor took
    5.3 to 6.1 s of its time instead of 4.8 to 5.0 (six steps).
    """
    if not sys.platform.startswith("linux"):
        return
    with suppress(OSError, AttributeError):  # another C library: nothing to gain
        libc = ctypes.CDLL("libc.so.6")
        mmap_max, trim_threshold, top_pad = -4, -1, -2  # from malloc.h
        libc.mallopt(mmap_max, 0)
        libc.mallopt(trim_threshold, 2**31 - 1)
        libc.mallopt(top_pad, 64 * 2**20)


if __name__ == "__main__":
    asked = json.load(sys.stdin)
    trial_step(Recipe.from_dict(asked["recipe"]), asked["precision"])
