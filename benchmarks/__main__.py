"""`python -m benchmarks [all | steps | start | growth | speedrun | processes | compare | gpu]`: measure, print, keep.

Each command puts its section into results/benchmarks.json; `gpu`, which `all` leaves out, has files of its own. Run on
an idle machine. `compare` needs `pip install -r benchmarks/requirements.txt`; the others need the course alone.
"""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Annotated

import typer

from cifar_ft.data import load_cifar10
from cifar_ft.files import write_atomic
from cifar_ft.recipes import get_recipe
from cifar_ft.training import describe_machine

FILE = Path("results/benchmarks.json")
app = typer.Typer(help=__doc__, add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None)


@app.command()
def steps(rounds: int = 3) -> None:
    """A step of reference_b32 against the plain loop, and its share of the matrix-product peak."""
    from benchmarks.steps import reference_speed

    found = reference_speed(get_recipe("reference_b32"), _data().train.subset(4096), rounds)
    _keep("steps", found)
    typer.echo(f"reference_b32, course / plain loop: {found['ratio_to_plain']:.2f}x (target 1.6x)")
    share, peak = found["share_of_bf16_peak"], found["matmul_gflops"]["bf16"]
    typer.echo(f"reference_b32, batch 64, share of the bf16 peak of {peak:.0f} GFLOP/s: {share:.0%} (target 55 %)")


@app.command()
def start() -> None:
    """Seconds until the package is imported and the cached dataset loaded."""
    from benchmarks.steps import start_up

    found = start_up()
    _keep("start", found)
    for name, seconds in found.items():
        typer.echo(f"{name}: {seconds:.2f} s (target below 1 s)")


@app.command()
def growth() -> None:
    """Seconds of an epoch and memory against images, image size and batch size."""
    from benchmarks import steps

    recipe = get_recipe("quick", "backbone=efficientnet_lite0 weights=none freeze=none")
    found = steps.growth(recipe)
    _keep("growth", found)
    line = "{images} images, {image_size} px, batch {batch_size}: {epoch_seconds:.1f} s, {peak_memory_mb:.0f} MB"
    for case in found["cases"]:
        typer.echo(line.format(**case))
    for name, fit in found["fits"].items():
        typer.echo("{}: {slope:.4g} x + {intercept:.4g}, R squared {r_squared:.3f}".format(name, **fit))


@app.command()
def speedrun() -> None:
    """Minutes to the published best, 93.45 %, on the full test set."""
    from cifar_ft.training import fit

    with tempfile.TemporaryDirectory() as folder:
        metrics = fit(get_recipe("speedrun"), _data(), Path(folder) / "run").metrics
    _keep("speedrun", {key: metrics[key] for key in ("test_accuracy", "test_accuracy_ci95", "train_seconds")})
    minutes = metrics["train_seconds"] / 60
    typer.echo(f"speedrun: {metrics['test_accuracy']:.2%} in {minutes:.1f} min (target 93.45 % in 15 min)")


@app.command()
def processes() -> None:
    """What two processes change in accuracy, with BatchNorm moving and frozen."""
    from benchmarks.processes import several_processes

    found = several_processes()
    _keep("processes", found)
    line = "two processes less one, validation accuracy: {:+.2%} with moving BatchNorm (deviation over seeds {:.2%}), "
    line += "{:+.2%} with frozen"
    typer.echo(line.format(found["moving_difference"], found["moving_std"], found["frozen_difference"]))


@app.command()
def compare(images: int = 10_000, size: int = 64, epochs: int = 3, again: bool = False) -> None:
    """The same work by what a user would pick instead, in turns, a process each.

    The first round takes each contender's own learning rate, the others two more; validation picks the best of three.
    Then the course alone gets as many epochs as fit into the time of the quickest other. Finished runs are kept in the
    file and not repeated, unless with --again.
    """
    from benchmarks import comparison

    known = [] if again else _known().get("compare", {}).get("runs", [])
    runs = comparison.compare(images, size, epochs, known, lambda runs: _keep("compare", {"runs": runs}))
    for line in comparison.verdict(runs):
        typer.echo(line)


@app.command()
def gpu(
    out: Annotated[Path, typer.Option(help="Folder of the results; parts that are there are not repeated.")],
    minutes: Annotated[float, typer.Option(help="No part is begun for which too little of it is left.")] = 12,
    only: Annotated[str, typer.Option(help="These parts alone, with commas.")] = "",
) -> None:
    """What an NVIDIA GPU does: checks, speeds beside plain loops, whole runs."""
    from benchmarks.gpu import everything

    everything(minutes, out.expanduser().absolute(), only)


@app.command()
def all() -> None:
    """Everything, one after the other."""
    for command in (steps, start, growth, speedrun, processes, compare):
        command()


def _data():
    return load_cifar10()


def _known() -> dict:
    return json.loads(FILE.read_text("utf-8")) if FILE.exists() else {}


def _keep(section: str, found: dict) -> None:
    known = {**_known(), section: {**found, "hardware": describe_machine()}}
    write_atomic(FILE, (json.dumps(known, indent=1) + "\n").encode())


if __name__ == "__main__":
    app()
