"""How to train fastest on this machine: precision, memory format and threads, chosen by timing a few real steps.

The steps run in a process of their own. Where the CPU library crashes on them (pytorch/pytorch#177227: SIGFPE in oneDNN
on some AMD processors), that process dies, the library is switched off for training, and the caller lives on.
"""

from __future__ import annotations

import contextlib
import copy
import ctypes
import json
import os
import platform
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import torch.nn.functional as F

import cifar_ft
from cifar_ft import CifarFtError, log
from cifar_ft.models import build_model
from cifar_ft.recipes import Recipe
from cifar_ft.training.convolutions import speed_up

LIMIT = 180  # seconds for all measurements; what is known by then decides
CRASHES = {getattr(signal, name, None) for name in ("SIGFPE", "SIGILL", "SIGSEGV", "SIGBUS", "SIGABRT")} - {None}
COMMAND = [sys.executable, "-m", "cifar_ft.tuning"]


@dataclass(frozen=True)
class Plan:
    """How to compute the steps of a run; it decides the speed, and with it how numbers are rounded."""

    precision: str  # fp32 | bf16 | fp16
    channels_last: bool = True
    threads: int | None = None  # of a CPU; None: as many as PyTorch takes
    onednn: bool = True  # the CPU library behind convolutions, off where it crashes

    def apply(self) -> None:
        """Set what is global to the process: threads and oneDNN."""
        if self.threads:
            torch.set_num_threads(min(self.threads, usable_cpus()))
        torch.backends.mkldnn.set_flags(self.onednn)

    @property
    def memory_format(self) -> torch.memory_format:
        return torch.channels_last if self.channels_last else torch.contiguous_format

    def __str__(self) -> str:
        parts = [self.precision, "channels last" if self.channels_last else "channels first"]
        parts += [f"{self.threads} thread{'s' * (self.threads > 1)}"] if self.threads else []
        return ", ".join(parts + ([] if self.onednn else ["without oneDNN"]))


def choose_plan(recipe: Recipe, backbone: str, device: torch.device, cache: Path, world: int = 1) -> Plan:
    """The fastest way to train this recipe here; measured once for each machine, backbone, size and batch.

    With a `recipe.precision` other than "auto" nothing is measured. On a GPU the answer needs no timing either: bf16
    where it is native, else fp16.

    Parameters
    ----------
    backbone : str
        What `recipe.backbone` became.
    cache : Path
        A JSON file of earlier answers. One that is damaged or cannot be written costs the time of measuring again.
    world : int
        Processes that share the batch. Several on one machine keep the threads they were started with.
    """
    asked = recipe.precision
    if device.type != "cpu":
        bf16 = device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
        fastest = "fp32" if device.type != "cuda" else "bf16" if bf16 else "fp16"
        return Plan(fastest if asked == "auto" else asked)
    known = _read(cache)
    machine = f"{hardware()} | torch {torch.__version__} | cifar_ft {cifar_ft.__version__}"
    threads = [min(torch.get_num_threads(), usable_cpus())]
    if asked != "auto":
        return Plan(asked, threads=threads[0], onednn=machine not in known.get("crashes", []))
    if world == 1 and usable_cpus() != threads[0]:
        threads.append(usable_cpus())
    batch = max(2, recipe.batch_size // world)
    key = f"{machine} | {backbone}, {recipe.image_size} px, batch {batch}, freeze {recipe.freeze}"
    plan = _plan(known.get("plans", {}).get(key))
    if plan is None:
        plan, found = _measured(recipe.replace(backbone=backbone, batch_size=batch), threads)
        if found:
            crashes = known.get("crashes", []) + (
                [] if plan.onednn or machine in known.get("crashes", []) else [machine]
            )
            _write(cache, {"plans": {**known.get("plans", {}), key: asdict(plan)}, "crashes": crashes})
    log.info(f"Training in {plan} (to choose the precision yourself: --set precision=fp32)")
    return plan


def _measured(recipe: Recipe, threads: list[int]) -> tuple[Plan, bool]:
    """The fastest plan by measurement, and whether there was one; else a plan that works everywhere."""
    start = time.perf_counter()
    for onednn in (True, False):
        speeds, died = _probe(recipe, threads, onednn)
        if died in CRASHES and onednn:
            log.info(
                f"The CPU library oneDNN crashes on this processor ({signal.Signals(died).name}): training without it"
            )
            continue
        if speeds:
            named = ", ".join(f"{plan.precision} {speed:.0f}" for plan, speed in speeds.items() if plan.channels_last)
            log.info(f"Timed a few steps in {time.perf_counter() - start:.0f} s (images/s: {named})")
            return max(speeds, key=speeds.get), True
        break
    log.info("The timing of a few steps did not succeed; training in fp32")
    return Plan("fp32", threads=threads[0], onednn=onednn), False


def _probe(recipe: Recipe, threads: list[int], onednn: bool) -> tuple[dict[Plan, float], int | None]:
    """Images a second by plan, from a process of its own, and the signal that ended it, if one did."""
    request = {"recipe": recipe.to_dict(), "threads": threads, "onednn": onednn}
    path = os.pathsep.join([str(Path(cifar_ft.__file__).parent.parent), *filter(None, [os.environ.get("PYTHONPATH")])])
    process = {"capture_output": True, "text": True, "timeout": LIMIT, "env": {**os.environ, "PYTHONPATH": path}}
    try:
        done = subprocess.run(COMMAND, input=json.dumps(request), check=False, **process)
        output, status = done.stdout, done.returncode
    except subprocess.TimeoutExpired as expired:
        output, status = (expired.stdout or b""), 0
        output = output.decode(errors="replace") if isinstance(output, bytes) else output
    except OSError:
        return {}, None
    speeds = {}
    for line in output.splitlines():
        try:
            entry = json.loads(line)
            speeds[Plan(**entry["plan"])] = float(entry["images_per_second"])
        except (ValueError, TypeError, KeyError):
            continue
    return speeds, -status if status < 0 else None


def measure(recipe: Recipe, threads: list[int], onednn: bool) -> Iterator[tuple[Plan, float]]:
    """Time real training steps, one choice after another: precision first, then memory format, then threads.

    Yields
    ------
    Plan, float
        And its images a second.
    """
    model = build_model(recipe.replace(weights="none"))
    found: dict[Plan, float] = {}

    def timed(plan: Plan) -> tuple[Plan, float]:
        plan.apply()
        found[plan] = _images_per_second(model, plan, recipe, give_up=max(found.values(), default=0.0) / 3)
        return plan, found[plan]

    for precision in ("fp32", "bf16"):
        yield timed(Plan(precision, True, threads[0], onednn))
    best = max(found, key=found.get)
    yield timed(Plan(best.precision, False, threads[0], onednn))
    best = max(found, key=found.get)
    for number in threads[1:]:
        yield timed(Plan(best.precision, best.channels_last, number, onednn))


def _images_per_second(model, plan: Plan, recipe: Recipe, give_up: float, steps: int = 3) -> float:
    """Of the fastest of `steps` training steps behind a first one; that one alone where it is below `give_up`."""
    trial, size = copy.deepcopy(model).train().to(memory_format=plan.memory_format), recipe.image_size
    if plan.channels_last:
        speed_up(trial)
    images = torch.randn(recipe.batch_size, 3, size, size).contiguous(memory_format=plan.memory_format)
    labels = torch.arange(recipe.batch_size) % 10
    seconds = []
    for step in range(1 + steps):
        start = time.perf_counter()
        with torch.autocast("cpu", torch.bfloat16, enabled=plan.precision == "bf16"):
            loss = F.cross_entropy(trial(images).float(), labels)
        loss.backward()
        seconds.append(time.perf_counter() - start)
        if step == 0 and recipe.batch_size / seconds[0] < give_up / 2:
            return recipe.batch_size / seconds[0]
    return recipe.batch_size / min(seconds[1:])


def _plan(entry: object) -> Plan | None:
    try:
        plan = Plan(**entry)
        return plan if plan.precision in ("fp32", "bf16") else None
    except TypeError:
        return None


def _read(cache: Path) -> dict:
    try:
        known = json.loads(cache.read_text(encoding="utf-8"))
        plans, crashes = known["plans"], known["crashes"]
        return known if isinstance(plans, dict) and isinstance(crashes, list) else {}
    except (OSError, ValueError, TypeError, KeyError):
        return {}


def _write(cache: Path, known: dict) -> None:
    part = cache.with_name(f".{cache.name}.{os.getpid()}.part")
    try:
        cache.parent.mkdir(parents=True, exist_ok=True)
        part.write_text(json.dumps(known, indent=1) + "\n", encoding="utf-8")
        os.replace(part, cache)
    except OSError:  # a read-only cache only costs the next run these seconds
        with contextlib.suppress(OSError):
            part.unlink()


def main() -> None:
    """Measure what is asked for on standard input, a JSON line on standard output for each plan."""
    request = json.load(sys.stdin)
    keep_memory()
    for plan, speed in measure(Recipe.from_dict(request["recipe"]), request["threads"], request["onednn"]):
        print(json.dumps({"plan": asdict(plan), "images_per_second": speed}), flush=True)


if __name__ == "__main__":
    try:
        main()
    except CifarFtError as error:
        sys.exit(f"Error: {error}")


def keep_memory() -> None:
    """Ask glibc to keep freed memory, in this process, from now on.

    Training and prediction free the same large blocks at each step and ask for them again; a block that went back to
    the kernel is cleared page by page when it is used again.
    """
    if not sys.platform.startswith("linux"):
        return
    try:
        libc = ctypes.CDLL("libc.so.6")
        mmap_max, trim_threshold, top_pad = -4, -1, -2  # from malloc.h
        libc.mallopt(mmap_max, 0)
        libc.mallopt(trim_threshold, 2**31 - 1)
        libc.mallopt(top_pad, 64 * 2**20)
    except (OSError, AttributeError):  # another C library: nothing to gain
        return


def hardware() -> str:
    """One line on the machine: processor, cores, and the GPU if there is one."""
    name = platform.processor() or platform.machine()
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            names = [line.partition(":")[2].strip() for line in file if line.startswith("model name")]
        name = names[0] if names else name
    except OSError:
        pass
    gpu = f", {torch.cuda.get_device_name()}" if torch.cuda.is_available() else ""
    return f"{name}, {torch.get_num_threads()} threads{gpu}"


def usable_cpus() -> int:
    """Processors that this process may use: a container's quota can allow fewer than the machine has."""
    cpus = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    try:
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text(encoding="ascii").split()
        if quota != "max":
            cpus = min(cpus, max(1, round(int(quota) / int(period))))
    except (OSError, ValueError):  # no control groups here
        pass
    return cpus
