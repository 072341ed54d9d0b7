"""What several processes change: the same training in one and in two, with BatchNorm moving and frozen."""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterable
from pathlib import Path

from cifar_ft.results import load_run

SETTINGS = (
    "backbone=efficientnet_lite0 freeze=none train_sizes= image_size=64 epochs=2 train_images=5000 test_images=10 "
    "ema_decay=0.98 precision=fp32"
)


def train(processes: int, *settings: str) -> dict:
    """Train `SETTINGS`, changed by `settings`, in so many processes of this machine; validation loss and accuracy."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "run"
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)]
        command += ["-m", "cifar_ft", "train", "--recipe", "quick", "--out", str(out)]
        command += [word for setting in (*SETTINGS.split(), *settings) for word in ("--set", setting)]
        threads = max(1, (os.cpu_count() or 1) // processes)
        subprocess.run(command, check=True, env={**os.environ, "OMP_NUM_THREADS": str(threads)})
        last = load_run(out).history.iloc[-1]
    return {"val_loss": last.val_loss, "val_accuracy": last.val_accuracy, "train_loss": last.train_loss}


def several_processes(seeds: Iterable[int] = (0, 1, 2), train=train) -> dict:
    """One process against two, for BatchNorm that moves (over seeds) and for frozen BatchNorm (the first seed).

    Returns
    -------
    dict
        runs: rows with batchnorm, processes, seed and what `train` gives; moving_difference and
        frozen_difference: of validation accuracy, two processes less one, the mean over seeds;
        moving_std: deviation of one process over the seeds, to compare with.
    """
    seeds, runs = list(seeds), []
    for seed in seeds:
        for batchnorm in ("moving", "frozen") if seed == seeds[0] else ("moving",):
            for processes in (1, 2):
                frozen = f"freeze_batchnorm={str(batchnorm == 'frozen').lower()}"
                found = train(processes, f"seed={seed}", frozen)
                runs.append({"batchnorm": batchnorm, "processes": processes, "seed": seed, **found})

    def scores(batchnorm: str, processes: int) -> list[float]:
        return [r["val_accuracy"] for r in runs if (r["batchnorm"], r["processes"]) == (batchnorm, processes)]

    def difference(batchnorm: str) -> float:
        return statistics.mean(scores(batchnorm, 2)) - statistics.mean(scores(batchnorm, 1))

    return {
        "runs": runs,
        "moving_difference": difference("moving"),
        "moving_std": statistics.stdev(scores("moving", 1)),
        "frozen_difference": difference("frozen"),
    }
