"""The machine: what it is, how many processors may be used, and memory that is kept between steps."""

from __future__ import annotations

import ctypes
import os
import platform
import sys
from pathlib import Path

import torch


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
