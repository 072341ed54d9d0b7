"""The command line as a user meets it: exit status, what it says and where; real processes for what only they show."""

import csv
import errno
import io
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from PIL import Image

from cifar_ft import __version__, course, data, log, models, predictions, training, widget
from cifar_ft.__main__ import main

TINY = ["backbone=resnet18", "last_stage=1", "image_size=16", "train_images=all", "val_images=all", "test_images=all"]


@pytest.fixture
def run(monkeypatch, capsys):
    """Run the command line in this process; the answer has returncode, stdout and stderr."""
    handler = signal.getsignal(signal.SIGTERM)

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["cifar_ft", *map(str, arguments)])
        capsys.readouterr()
        with pytest.raises(SystemExit) as ended:
            main()
        return SimpleNamespace(returncode=ended.value.code, **capsys.readouterr()._asdict())

    yield run
    signal.signal(signal.SIGTERM, handler)


@pytest.fixture
def pictures(tmp_path, samples):
    """A folder of three pictures, the last with a name outside of ASCII."""
    for name, image in zip(("0.png", "1.png", "猫.png"), samples.images, strict=False):
        Image.fromarray(image.permute(1, 2, 0).numpy()).save(tmp_path / name)
    return tmp_path


def raising(error):
    def fail(*arguments, **options):
        raise error

    return fail


@pytest.mark.parametrize(
    ("arguments", "names"),
    [
        (["train", "--recipe", "quik"], ["'quik'", "did you mean 'quick'"]),
        (["train", "--set", "epoch=1"], ["'epoch'", "did you mean 'epochs'"]),
        (["train", "--set", "epochs=some"], ["epochs='some'", "whole number"]),
        (["train", "--resume"], ["--out"]),
        (["course", "-p", "SEEED=1"], ["SEEED", "did you mean 'SEED'"]),
        (["course", "-p", "SEED=one"], ["SEED", "wants int"]),
        (["course", "--recipe", "quick", "-p", "RECIPE=smoke"], ["RECIPE is given twice"]),
        (["data", "--source", "ftp"], ["ftp", "npm"]),
        (["predict", "x.png", "--csv", "."], ["it is a folder", "choose another file"]),
        (["predict", "x.png", "--csv", "no/rows.csv"], ["there is no folder", "choose another file"]),
        (["predict", "x.png", "--fit", "stretch"], ["stretch", "crop", "pad"]),
        (["app", "--port", "99999"], ["--port", "65535"]),
        (["nonsense"], ["nonsense"]),
        (["train", "--device", "cuda:9"], ["no device 'cuda:9' here", "choose from auto"]),
        (["predict", "x.png", "--device", "gpu"], ["no device 'gpu' here"]),
        (["export", "--device="], ["no device '' here"]),
        (["app", "--device", "tpu"], ["no device 'tpu' here"]),
        (["predict", "x.png", "--run", "no-run"], ["no run directory", "no-run"]),
        (["predict", "x.png", "--run", "."], ["no run directory", "no config.json"]),
        (["predict", "x.png", "--run="], ["--run", "it is empty"]),
        (["export", "--run", "no-run"], ["no run directory", "no-run"]),
        (["export", "--out", "~nobody-here/m.onnx"], ["--out", "no such home folder"]),
        (["app", "--run", "no-run"], ["no run directory", "no-run"]),
        (["train", "--weights", "no.pt"], ["--weights", "no.pt", "there is no file"]),
        (["train", "--weights="], ["--weights", "it is empty"]),
        (["train", "--out="], ["--out", "it is empty"]),
        (["train", "--out", "s3://bucket/run"], ["--out", "an address"]),
        (["train", "--out", __file__], ["--out", "test_cli.py", "is no folder"]),
        (["course", "--out", f"{__file__}/below"], ["--out", "test_cli.py", "is no folder"]),
        (["data", "--root", __file__], ["--root", "is no folder"]),
    ],
)
def test_a_wrong_argument_exits_2_and_says_what_is_allowed(run, tmp_path, monkeypatch, arguments, names):
    monkeypatch.chdir(tmp_path)
    done = run(*arguments)
    assert (done.returncode, done.out) == (2, "")
    for name in names:
        assert name in done.err
    assert not list(tmp_path.iterdir())


def test_a_failure_exits_1_in_one_or_two_lines_and_with_debug_shows_the_traceback(run, tmp_path, monkeypatch):
    (tmp_path / "config.json").write_text("no JSON")
    done = run("predict", "x.png", "--run", tmp_path)
    assert done.returncode == 1
    assert len(done.err.strip().splitlines()) <= 2
    assert "config.json is damaged" in done.err
    monkeypatch.setattr(data, "fetch_cifar10", raising(KeyError("x")))
    done = run("data")
    assert (done.returncode, done.err) == (1, "Error: KeyError: 'x'\nRun it again with --debug to see where.\n")
    monkeypatch.setattr(sys, "argv", ["cifar_ft", "data", "--debug"])
    with pytest.raises(KeyError):
        main()
    monkeypatch.setattr(data, "fetch_cifar10", raising(KeyboardInterrupt()))
    assert run("data").returncode == 130


@pytest.mark.skipif(os.name == "nt", reason="a folder in use cannot be removed there")
def test_a_current_folder_that_was_removed_is_named(run, tmp_path, monkeypatch):
    (tmp_path / "gone").mkdir()
    monkeypatch.chdir(tmp_path / "gone")
    (tmp_path / "gone").rmdir()
    done = run("train", "--out", "run")
    monkeypatch.chdir(tmp_path)
    assert (done.returncode, done.out) == (1, "")
    assert done.err == "Error: the current folder is no longer there; change to one that is\n"


def test_help_lists_the_commands_at_once():
    done = subprocess.run(
        [sys.executable, "-X", "importtime", "-m", "cifar_ft", "--help"], capture_output=True, text=True
    )
    assert done.returncode == 0
    for command in ("check", "data", "train", "predict", "export", "app", "course", "version"):
        assert f"  {command} " in done.stdout
    imported = {line.split("|")[-1].strip() for line in done.stderr.splitlines()}
    assert "typer" in imported
    assert not {"torch", "numpy", "pydantic", "tqdm", "cifar_ft.recipes"} & imported  # a second and more


def test_version_and_app_pass_on_what_they_are_told(run, monkeypatch):
    assert run("version").out == f"{__version__}\n"
    calls = []
    monkeypatch.setattr(widget, "serve", lambda *arguments: calls.append(arguments))
    assert run("app", "--port", 9000, "--no-browser", "--pool", 1).returncode == 0
    assert calls == [(9000, "127.0.0.1", False, 1, "shipped")]


def test_a_path_after_a_sign_of_equality_is_in_the_home_folder(run, tmp_path, monkeypatch):
    asked = []
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(data, "load_cifar10", lambda root: asked.append(root))
    monkeypatch.setattr(training, "fit", lambda recipe, data, out, **_: asked.append(out))
    monkeypatch.setattr(widget, "serve", lambda *arguments: asked.append(Path(arguments[-1])))
    monkeypatch.setattr(predictions, "export_checked", lambda *arguments: asked.extend(map(Path, arguments)))
    for arguments in (
        ["train", "--out=~/my run", "--root=~/data"],
        ["app", "--run=~/my run"],
        ["export", "--run=~/my run", "--out=~/m.onnx"],
    ):
        assert run(*arguments).returncode == 0
    names = ("data", "my run", "my run", "my run", "m.onnx")
    assert asked == [tmp_path / "home" / name for name in names]
    assert not list(tmp_path.iterdir())


# -- predict


def test_predict_answers_every_input_and_exits_1_when_one_cannot_be_read(run, pictures):
    good = run("predict", pictures, "--csv", pictures / "rows.csv", "--run", "shipped")
    assert (good.returncode, good.out) == (0, "")
    assert good.err.startswith("Predicting with the shipped model")
    assert "Right on CIFAR-10's test images, by the probability given: 0 to 0.5: 46.7% of 225" in good.err
    assert good.err.endswith("3 inputs, 0 could not be read\n")
    rows = list(csv.DictReader((pictures / "rows.csv").open(encoding="utf-8")))
    assert [row["path"][-5:] for row in rows] == ["0.png", "1.png", "猫.png"]
    assert all(0.1 <= float(row["probability"]) <= 1 and not row["error"] for row in rows)
    (pictures / "bad.png").write_text("no picture")
    bad = run("predict", pictures, "https://example.org/cat.jpg", "--details")
    assert bad.returncode == 1
    rows = list(csv.DictReader(bad.out.splitlines()))  # nothing but rows on standard output
    assert [bool(row["error"]) for row in rows] == [False, False, True, False, True]
    assert "is an address; download the picture" in rows[-1]["error"]
    assert {"unknown", "notes"} < rows[0].keys()


def test_no_file_name_ends_the_rows_on_standard_output(run, pictures, monkeypatch):
    stream = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    monkeypatch.setattr(sys, "stdout", stream)
    assert run("predict", pictures, "--fit", "pad").returncode == 0
    lines = stream.buffer.getvalue().decode().splitlines()
    assert [line.split(",")[0][-6:] for line in lines[1:]] == ["/0.png", "/1.png", "/猫.png"]


@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_predict_keeps_its_rows_and_says_where(run, tmp_path, monkeypatch, how):
    def rows(*arguments, **options):
        yield {"path": "a.png", "label": "cat", "probability": 0.5, "error": ""}
        signal.raise_signal(how)

    monkeypatch.setattr(predictions, "predict_paths", rows)
    done = run("predict", "a.png", "--csv", tmp_path / "rows.csv", "--run", "shipped")
    assert done.returncode == 130
    assert "Interrupted; the rows so far are in" in done.err
    assert (tmp_path / "rows.csv.partial").read_text() == "path,label,probability,error\na.png,cat,0.5,\n"
    assert not (tmp_path / "rows.csv").exists()


@pytest.mark.skipif(os.name == "nt", reason="pipes and signals as on Linux")
def test_a_reader_that_stops_and_a_signal_end_a_real_process_without_a_traceback(pictures):
    command = [sys.executable, "-m", "cifar_ft", "predict", *["0.png"] * 5000, "--run", "shipped"]
    options = {"cwd": pictures, "text": True, "env": {**os.environ, "PYTHONPATH": str(Path.cwd())}}
    reading = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, **options)
    writing = subprocess.Popen([*command, "--csv", "rows.csv"], stderr=subprocess.PIPE, **options)
    assert reading.stdout.readline() == "path,label,probability,error\n"
    reading.stdout.close()
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and not any(file.stat().st_size > 60 for file in pictures.glob(".rows.csv.*")):
        time.sleep(0.05)
    writing.send_signal(signal.SIGTERM)
    said = [process.stderr.read() for process in (reading, writing)]
    assert (reading.wait(60), writing.wait(60)) == (1, 130), said
    assert "Traceback" not in "".join(said)
    assert (pictures / "rows.csv.partial").read_text().startswith("path,label,probability,error\n0.png,")


# -- messages


class Broken(io.StringIO):
    """Standard output whose reader has gone."""

    def write(self, text):
        raise BrokenPipeError(errno.EPIPE, "Broken pipe")


def ascii_only():
    return io.TextIOWrapper(io.BytesIO(), encoding="ascii")


def closed():
    stream = io.StringIO()
    stream.close()
    return stream


@pytest.mark.parametrize(
    "stream", [lambda: None, Broken, closed, ascii_only], ids=["none", "broken", "closed", "ascii"]
)
def test_a_message_that_nobody_can_get_does_not_decide_the_status(tmp_path, samples, monkeypatch, stream):
    folder = tmp_path / "ümläut 😀 \udcff"
    folder.mkdir()
    Image.fromarray(samples.images[0].permute(1, 2, 0).numpy()).save(str(tmp_path / "a.png"))
    os.rename(tmp_path / "a.png", folder / "猫 \udcfe.png")
    monkeypatch.setattr(course, "checks", lambda: [(True, f"data in {folder}", "")])
    monkeypatch.setattr(course, "run_course", lambda *_, **__: SimpleNamespace(table=lambda: f"in {folder}"))
    monkeypatch.setattr(data, "fetch_cifar10", lambda *_: log.info(f"in {folder}"))
    monkeypatch.setattr(predictions, "export_checked", lambda *_: log.info(f"in {folder}"))
    monkeypatch.setattr(signal, "signal", lambda *_: None)
    monkeypatch.setattr(log, "handlers", log.handlers[:1])  # without pytest's, which cannot hand such names on
    csv = folder / "rows.csv"
    for arguments, status in (
        (["check"], 0),
        (["course"], 0),
        (["data"], 0),
        (["export"], 0),
        (["predict", str(folder), "--csv", str(csv)], 0),
        (["predict", str(folder / "none.png"), "--csv", str(csv)], 1),
    ):
        monkeypatch.setattr(sys, "argv", ["cifar_ft", *arguments])
        with monkeypatch.context() as patch:
            patch.setattr(sys, "stdout", stream())
            patch.setattr(sys, "stderr", stream())
            with pytest.raises(SystemExit) as ended:
                main()
        assert ended.value.code == status, arguments


def test_rows_without_a_standard_output_need_a_file(run, pictures, monkeypatch):
    monkeypatch.setattr(sys, "stdout", None)
    assert run("predict", pictures).returncode == 2


# -- check, course, train


def test_check_exits_1_where_something_is_missing(run, monkeypatch):
    monkeypatch.setattr(course, "checks", lambda: iter([(True, "Python 3", ""), (False, "CIFAR-10", "by hand: ...")]))
    done = run("check")
    assert (done.returncode, done.out) == (1, "[OK] Python 3\n[FAIL] CIFAR-10 - by hand: ...\n")


@pytest.mark.data
def test_check_says_ok_where_the_course_can_run(run, monkeypatch):
    done = run("check")
    assert done.returncode == 0, done.out
    assert "CIFAR-10 is verified" in done.out


@pytest.mark.parametrize("finished", [False, True])
def test_course_fetches_what_the_notebooks_need_says_how_long_it_takes_and_prints_the_table(
    run, tmp_path, monkeypatch, finished
):
    fetched, made = [], tmp_path / "run"
    made.mkdir()
    if finished:
        (made / "metrics.json").touch()
    monkeypatch.setattr(training, "estimate_seconds", lambda recipe, backbone: 600 if backbone == "resnet18" else 0)
    monkeypatch.setattr(data, "fetch_cifar10", fetched.append)
    monkeypatch.setattr(models, "resolve_backbone", lambda name: "resnet18")
    monkeypatch.setattr(models, "fetch_weights", lambda name: SimpleNamespace(name="V1", source="torchvision"))

    def run_course(out, parameters, before):
        before({"RECIPE": "smoke", "OVERRIDES": "", "DATA_ROOT": "there", "RUN_DIR": str(made)})
        return course.CourseResult([(" ".join(parameters), 2.0)], None, None, out)

    monkeypatch.setattr(course, "run_course", run_course)
    done = run("course", "--recipe", "smoke", "-p", "SEED=1", "--out", tmp_path / "out")
    assert (done.returncode, fetched) == (0, ["there"])
    lines = done.out.splitlines()
    assert lines[0] == "Weights: resnet18, V1, from torchvision"
    said = "Notebook 04 will train resnet18, which takes about 10 min on this machine"
    assert [line.startswith(said) for line in lines[1:2]] == [not finished]
    assert "RECIPE=smoke SEED=1       2.0 s" in lines


def test_train_leaves_a_run_and_resume_finds_it_finished(run, tmp_path, monkeypatch, small_data):
    monkeypatch.setattr(data, "load_cifar10", lambda root: small_data)
    settings = [part for setting in TINY for part in ("--set", setting)]
    arguments = ["train", "--recipe", "smoke", "--weights", "none", *settings, "--out", tmp_path / "run"]
    first = run(*arguments)
    assert first.returncode == 0, first.err
    assert "Test accuracy" in first.out
    again = run(*arguments)
    assert (again.returncode, "already holds a run" in again.err) == (1, True)
    assert "nothing to resume" in run("train", "--out", tmp_path / "run", "--resume").out  # the recipe is the run's
    other = run("train", "--out", tmp_path / "run", "--resume", "--set", "lr=0.5")
    assert (other.returncode, "lr" in other.err) == (1, True)


def test_resume_where_nothing_has_begun_needs_a_recipe_to_begin(run, tmp_path, monkeypatch, small_data):
    monkeypatch.setattr(data, "load_cifar10", raising(AssertionError("not before it is known what to train")))
    for out in (tmp_path / "none", tmp_path):
        done = run("train", "--resume", "--out", out, "--set", "epochs=1")
        assert (done.returncode, "there is nothing to resume in" in done.err, "--recipe" in done.err) == (2, True, True)
    monkeypatch.setattr(data, "load_cifar10", lambda root: small_data)
    settings = [part for setting in [*TINY, "epochs=1"] for part in ("--set", setting)]
    begun = run("train", "--resume", "--out", tmp_path / "new", "--recipe", "smoke", "--weights", "none", *settings)
    assert (begun.returncode, "nothing to resume" in begun.out, "Test accuracy" in begun.out) == (0, True, True)


def test_a_device_is_that_of_the_whole_command(run, pictures, monkeypatch, small_data):
    monkeypatch.setenv("CIFAR_FT_DEVICE", "auto")  # is put back
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(data, "load_cifar10", lambda root: small_data)
    seen = []
    monkeypatch.setattr(training, "fit", lambda *_, **__: seen.append(models.choose_device()))
    monkeypatch.setattr(widget, "serve", lambda *_: seen.append(os.environ["CIFAR_FT_DEVICE"]))
    monkeypatch.setattr(predictions, "export_checked", lambda *_: seen.append(models.choose_device()))
    monkeypatch.setattr(training, "start_processes", lambda: None)
    for command in (["train", "--recipe", "smoke"], ["app"], ["export"]):
        assert run(*command, "--device", "cuda:1").returncode == 0
    assert seen == [torch.device("cuda:1"), "cuda:1", torch.device("cuda:1")]
    assert run("predict", pictures, "--device", "cpu").returncode == 0


def test_the_weights_of_a_run_to_be_resumed_may_be_gone(run, tmp_path, monkeypatch):
    seen = []
    monkeypatch.setattr(data, "load_cifar10", lambda root: None)
    monkeypatch.setattr(training, "start_processes", lambda: None)
    monkeypatch.setattr(training, "fit", lambda recipe, *_, **options: seen.append((recipe.weights, options)))
    gone = tmp_path / "gone.pt"
    options = ["--weights", gone, "--out", tmp_path / "run", "--resume", "--accept-changes"]
    assert run("train", "--recipe", "smoke", *options).returncode == 0
    assert seen == [(str(gone), {"resume": True, "accept_changes": True})]
