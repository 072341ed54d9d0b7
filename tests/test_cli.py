"""The command line as a user meets it: real processes, their exit status, and what they say."""

import csv
import os
import signal
import subprocess
import sys
import time

import pytest
from PIL import Image

from cifar_ft.data import load_samples


def run(*arguments, **options):
    command = [sys.executable, "-m", "cifar_ft", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=300, check=False, **options)


@pytest.mark.parametrize(
    ("arguments", "names"),
    [
        (["train", "--recipe", "quik"], ["'quik'", "did you mean 'quick'"]),
        (["train", "--set", "epoch=1"], ["'epoch'", "did you mean 'epochs'"]),
        (["train", "--set", "epochs=some"], ["epochs='some'", "whole number"]),
        (["train", "--resume"], ["--out"]),
        (["course", "-p", "SEEED=1"], ["SEEED", "SEED"]),
        (["course", "-p", "SEED=one"], ["SEED"]),
        (["data", "--source", "ftp"], ["ftp", "npm"]),
        (["predict", "x.png", "--csv", "."], ["it is a folder", "choose another file"]),
        (["predict", "x.png", "--csv", "no/rows.csv"], ["there is no folder", "choose another file"]),
        (["nonsense"], ["nonsense"]),
    ],
)
def test_a_wrong_argument_exits_2_and_says_what_is_allowed(arguments, names, tmp_path):
    done = run(*arguments, cwd=tmp_path if arguments[0] != "course" else None)
    assert done.returncode == 2
    assert "Traceback" not in done.stderr
    for name in names:
        assert name in done.stderr
    assert not list(tmp_path.iterdir())


def test_a_failure_exits_1_in_one_or_two_lines_and_with_debug_shows_the_traceback(tmp_path):
    done = run("predict", "x.png", "--run", tmp_path / "none")
    assert done.returncode == 1
    assert len(done.stderr.strip().splitlines()) <= 2
    assert "no run directory" in done.stderr
    assert "Traceback" in run("predict", "x.png", "--run", tmp_path / "none", "--debug").stderr


def test_importing_the_package_and_asking_for_help_does_not_import_torch():
    code = "import sys, cifar_ft, cifar_ft.__main__; print('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip() == "False"
    assert "course" in run("--help").stdout


@pytest.mark.skipif(os.name == "nt", reason="signals as on Linux")
@pytest.mark.parametrize("how", ["SIGINT", "SIGTERM"])
def test_an_interrupted_predict_keeps_its_rows_and_says_where(how, tmp_path):
    picture = tmp_path / "a.png"
    Image.new("RGB", (32, 32)).save(picture)
    code = "import signal, sys; signal.signal(signal.SIGINT, signal.default_int_handler)\n"
    code += "from cifar_ft.__main__ import main\n"
    code += "sys.argv = ['cifar_ft', 'predict', *['a.png'] * 5000, '--csv', 'rows.csv', '--run', 'shipped']; main()"
    process = subprocess.Popen([sys.executable, "-c", code], cwd=tmp_path, stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and not any(file.stat().st_size > 60 for file in tmp_path.glob(".rows.csv.*")):
        time.sleep(0.1)
    process.send_signal(getattr(signal, how))
    said = process.communicate(timeout=60)[1]
    assert process.returncode == 130, said
    assert "Interrupted; the rows so far are in" in said
    assert "Traceback" not in said
    assert (tmp_path / "rows.csv.partial").read_text().startswith("path,label,probability,error\na.png,")
    assert not (tmp_path / "rows.csv").exists()


def test_predict_answers_every_input_and_exits_1_when_one_cannot_be_read(tmp_path):
    for i, image in enumerate(load_samples().images[:3]):
        Image.fromarray(image.permute(1, 2, 0).numpy()).save(tmp_path / f"{i}.png")
    good = run("predict", tmp_path, "--csv", tmp_path / "rows.csv")
    assert good.returncode == 0, good.stderr
    rows = list(csv.DictReader((tmp_path / "rows.csv").open()))
    assert [row["path"][-5:] for row in rows] == ["0.png", "1.png", "2.png"]
    assert all(0.1 <= float(row["probability"]) <= 1 and not row["error"] for row in rows)
    (tmp_path / "bad.png").write_text("no picture")
    bad = run("predict", tmp_path)
    assert bad.returncode == 1
    rows = list(csv.DictReader(bad.stdout.splitlines()))  # nothing but rows on standard output
    assert [bool(row["error"]) for row in rows] == [False, False, False, True]


def test_no_file_name_ends_the_rows_on_standard_output(tmp_path):
    for name in ("猫.png", "b.png"):
        Image.fromarray(load_samples().images[0].permute(1, 2, 0).numpy()).save(tmp_path / name)
    environment = {**os.environ, "PYTHONIOENCODING": "ascii"}
    command = [sys.executable, "-m", "cifar_ft", "predict", str(tmp_path), "--fit", "pad"]
    done = subprocess.run(command, capture_output=True, env=environment)
    assert done.returncode == 0, done.stderr
    assert [line.split(",")[0][-6:] for line in done.stdout.decode().splitlines()[1:]] == ["/b.png", "/猫.png"]


def test_an_address_is_told_from_a_path():
    done = run("predict", "https://example.org/cat.jpg")
    assert "is an address; download the picture" in done.stdout


@pytest.mark.data
def test_check_says_ok_where_the_course_can_run():
    done = run("check")
    assert done.returncode == 0, done.stdout
    assert "[FAIL]" not in done.stdout
    assert "CIFAR-10 is verified" in done.stdout


def test_check_fails_and_says_what_to_do_without_data_and_network(tmp_path):
    offline = {"PATH": "", "HOME": str(tmp_path), "CIFAR_FT_DATA": str(tmp_path), "HF_ENDPOINT": "http://127.0.0.1:9"}
    offline |= {"http_proxy": "http://127.0.0.1:9", "https_proxy": "http://127.0.0.1:9"}
    done = run("check", env=offline)
    assert done.returncode == 1
    assert "[FAIL] CIFAR-10" in done.stdout
    assert "By hand" in done.stdout


@pytest.mark.data
def test_train_leaves_a_run_and_resume_finds_it_finished(tmp_path):
    tiny = [
        "--set",
        "backbone=resnet18",
        "--set",
        "train_images=64",
        "--set",
        "val_images=50",
        "--set",
        "test_images=50",
    ]
    arguments = ["train", "--recipe", "smoke", "--weights", "none", *tiny, "--out", tmp_path / "run"]
    first = run(*arguments)
    assert first.returncode == 0, first.stderr
    assert "Test accuracy" in first.stdout
    again = run(*arguments)
    assert again.returncode == 1
    assert "already holds a run" in again.stderr
    assert "nothing to resume" in run(*arguments, "--resume").stdout
