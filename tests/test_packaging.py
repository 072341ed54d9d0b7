"""Promise: an installation is complete or counts as none, and says what is missing in words."""

from __future__ import annotations

import json
import os
import re
import shutil
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from tools.badges import read_address

ROOT = Path(__file__).resolve().parent.parent
needs_make = pytest.mark.skipif(os.name == "nt" or not shutil.which("make"), reason="make is not installed")


def ranges(lines: list[str]) -> dict[str, str]:
    """Name and range of each requirement."""
    return dict(re.match(r"([\w-]+)(.*)", line).groups() for line in lines)


def requirements(path: Path) -> dict[str, str]:
    """Those of a file, comments and options left out."""
    lines = (line.split("#")[0].strip() for line in path.read_text("utf-8").splitlines())
    return ranges([line for line in lines if line and not line.startswith("-")])


def project() -> dict:
    tomllib = pytest.importorskip("tomllib" if sys.version_info >= (3, 11) else "tomli")
    return tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]


def test_requirements_and_pyproject_ask_for_the_same():
    extras = [line for extra in project()["optional-dependencies"].values() for line in extra]
    assert requirements(ROOT / "requirements.txt") == ranges([*project()["dependencies"], *extras])


def test_every_course_requirement_has_a_reason_and_the_library_comes_last():
    lines = (ROOT / "requirements.txt").read_text("utf-8").splitlines()
    course_lines = lines[: lines.index("# tests")]
    assert [line for line in course_lines if line and not line.startswith("#") and "  # " not in line] == []
    assert lines[-1] == "-e ."


def test_binder_installs_what_the_notebooks_need_on_cpu():
    needed = ranges(project()["dependencies"])
    binder = requirements(ROOT / "binder" / "requirements.txt")
    for name in ("torch", "torchvision"):
        needed.pop(name)
        # Pinned without "+cpu": pip takes that build where the extra index answers, and the plain one elsewhere.
        assert re.fullmatch(r"==[\d.]+", binder.pop(name))
    text = (ROOT / "binder" / "requirements.txt").read_text()
    assert "--extra-index-url https://download.pytorch.org/whl/cpu" in text
    assert binder == needed


@pytest.mark.parametrize("name", ["binder/postBuild", "binder/start", ".ci/run"])
@pytest.mark.skipif(os.name == "nt", reason="Windows has no executable bit")
def test_scripts_can_be_executed(name):
    path = ROOT / name
    assert path.stat().st_mode & stat.S_IXUSR
    assert subprocess.run(["bash", "-n", str(path)]).returncode == 0


def test_an_installed_copy_is_complete_and_has_nothing_of_the_repository_but_its_results(tmp_path):
    site, ignored = tmp_path / "site", shutil.ignore_patterns("__pycache__")
    for name in ("cifar_ft", "results", "tools"):
        shutil.copytree(ROOT / name, tmp_path / "source" / name, ignore=ignored)
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, tmp_path / "source")
    options = ["--no-deps", "--no-index", "--no-build-isolation", "--quiet", "--target", str(site)]
    subprocess.run([sys.executable, "-m", "pip", "install", *options, str(tmp_path / "source")], check=True)
    assert {path.name for path in site.iterdir() if "dist-info" not in path.name} == {"cifar_ft"}
    kept = {path.relative_to(ROOT) for path in (ROOT / "cifar_ft").rglob("*") if path.is_file()}
    missing = [path for path in kept if "__pycache__" not in path.parts and not (site / path).exists()]
    assert missing == []
    code = """
import json, cifar_ft
from cifar_ft import results
from cifar_ft.data import load_samples
tables = results.recorded_ablations(), results.recorded_redrawn(), results.published_log(), results.test_issues()
accuracy = {name: results.load_run(results.RECORDED / name).accuracy for name in ("cpu", "quick")}
found = {"library": cifar_ft.__file__, "recorded": str(results.RECORDED), "tables": [len(table) for table in tables]}
print(json.dumps({**found, "images": len(load_samples()), "accuracy": accuracy}))
"""
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(site)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert Path(found["library"]).is_relative_to(site)
    assert Path(found["recorded"]) == site / "cifar_ft" / "recorded"
    assert found["images"] == 200
    assert all(found["tables"])
    for name, accuracy in found["accuracy"].items():
        assert accuracy == json.loads((ROOT / f"results/{name}/metrics.json").read_text())["test_accuracy"]


def test_the_citation_names_the_address_and_version():
    from cifar_ft import __version__

    text = (ROOT / "CITATION.cff").read_text("utf-8")
    assert f"repository-code: {read_address().repository}\n" in text
    assert f"\nversion: {__version__}\n" in text


# -- make, with programs that stand in for Python and pip


def script(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)
    return path


@pytest.fixture
def checkout(tmp_path):
    """A copy of what make reads, in a folder with a space in its name."""
    folder = tmp_path / "my course"
    folder.mkdir()
    for name in ("Makefile", "requirements.txt", "pyproject.toml"):
        shutil.copy(ROOT / name, folder)
    return folder


def make(folder: Path, *arguments: str) -> subprocess.CompletedProcess:
    environment = {k: v for k, v in os.environ.items() if k not in ("MAKEFLAGS", "MAKELEVEL", "PYTHON", "ARGS")}
    return subprocess.run(["make", *arguments], cwd=folder, env=environment, capture_output=True, text=True)


@needs_make
def test_make_takes_an_interrupted_installation_up_again(checkout):
    python = checkout / ".venv" / "bin" / "python"
    fake = 'echo "$@" >> calls.txt\ncase "$*" in *"pip install"*) [ -e network ];; esac'
    script(python, fake)
    for _ in range(2):  # without network, and again
        assert make(checkout, "course", f"PYTHON={sys.executable}").returncode != 0
        assert "cifar_ft course" not in (checkout / "calls.txt").read_text()
    (checkout / "network").touch()
    done = make(checkout, "course", f"PYTHON={sys.executable}", "RECIPE=smoke", "ARGS=-p SEED=1")
    assert done.returncode == 0, done.stderr
    calls = (checkout / "calls.txt").read_text().split("\n")
    assert sum("pip install" in call for call in calls) == 3
    assert "-m cifar_ft course --recipe smoke -p SEED=1" in calls
    make(checkout, "course", f"PYTHON={sys.executable}")
    assert sum("pip install" in call for call in (checkout / "calls.txt").read_text().split("\n")) == 3


@needs_make
def test_make_fails_when_lint_tests_or_the_course_fail(checkout):
    for failing in ("ruff check", "ruff format", "-m pytest", "cifar_ft course"):
        script(checkout / ".venv" / "bin" / "python", f'case "$*" in *"{failing}"*) exit 1;; esac')
        target = "course" if "course" in failing else "test"
        assert make(checkout, target, f"PYTHON={sys.executable}").returncode != 0, failing


@needs_make
def test_make_says_which_python_it_needs(checkout, tmp_path):
    old = "import sys; sys.version_info = (3, 9, 0); exec(sys.argv[1])"
    python = script(tmp_path / "python3.9", f'exec "{sys.executable}" -c "{old}" "$2"')
    done = make(checkout, "course", f"PYTHON={python}")
    assert done.returncode != 0
    assert "needs Python 3.10 or newer" in done.stderr
    assert "is 3.9" in done.stderr
    done = make(checkout, "course", "PYTHON=no-such-python")
    assert "no-such-python not found" in done.stderr
    assert not (checkout / ".venv").exists()


@needs_make
def test_make_without_target_lists_the_targets(checkout):
    done = make(checkout)
    assert done.returncode == 0
    for target in ("course", "test", "lab", "lint", "record", "badges", "report", "clean"):
        assert f"make {target} " in done.stdout
