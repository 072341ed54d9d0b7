"""Promise: one command runs the course, refuses wrong arguments before it starts, says what failed where."""

from __future__ import annotations

import contextlib
import json
import os
import sys
from pathlib import Path

import nbformat
import pytest
from hypothesis import given
from hypothesis import strategies as st
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook

from cifar_ft import CifarFtError, course, files
from cifar_ft.course import runner
from cifar_ft.recipes import get_recipe

PARAMETERS = 'RECIPE: str = "quick"\nRUN_DIR: str = ""\nEPOCHS: int = 3\nLR: float = 0.1\nFLIP: bool = True'


def write(folder: Path, name: str, *cells: str, parameters: str = PARAMETERS, **metadata) -> Path:
    """Write a notebook of a title, a parameters cell and code cells."""
    folder.mkdir(exist_ok=True, parents=True)
    first = new_code_cell(parameters, metadata={"tags": ["parameters"]})
    cells = [new_markdown_cell(f"# {name}"), first, *map(new_code_cell, cells)]
    nbformat.write(new_notebook(cells=cells, metadata=metadata), folder / f"{name}.ipynb")
    return folder / f"{name}.ipynb"


def texts(path: Path) -> list[str]:
    """What each code cell printed."""
    cells = nbformat.read(path, 4).cells
    return ["".join(o.get("text", "") for o in cell.outputs) for cell in cells if cell.cell_type == "code"]


# -- parameters


def test_parameters_are_read_with_default_and_type(tmp_path):
    path = write(tmp_path, "a", parameters=PARAMETERS + "\n# a comment\nNAME = 'x'  # untyped")
    assert course.read_parameters(path) == {
        "RECIPE": ("quick", str),
        "RUN_DIR": ("", str),
        "EPOCHS": (3, int),
        "LR": (0.1, float),
        "FLIP": (True, bool),
        "NAME": ("x", str),
    }


@pytest.mark.parametrize(
    "source",
    [
        "A: int = 2\nB: int = A // 2",
        "A: int = True",
        "A: list = [1]",
        "A: int | None = None",
        "import os",
        "A: int",
        "A, B = 1, 2",
    ],
)
def test_a_parameters_cell_with_more_than_typed_literals_is_refused(tmp_path, source):
    with pytest.raises(course.CourseError, match="not a typed literal"):
        course.read_parameters(write(tmp_path, "a", parameters=source))


@pytest.mark.parametrize("count", [0, 2])
def test_a_notebook_needs_exactly_one_parameters_cell(tmp_path, count):
    cells = [new_code_cell("A: int = 1", metadata={"tags": ["parameters"]}) for _ in range(count)]
    nbformat.write(new_notebook(cells=cells), tmp_path / "a.ipynb")
    with pytest.raises(course.CourseError, match=f"exactly one code cell tagged 'parameters', has {count}"):
        course.read_parameters(tmp_path / "a.ipynb")


@pytest.fixture(scope="module")
def declared(tmp_path_factory):
    path = write(tmp_path_factory.mktemp("declared"), "a")
    return {path: course.read_parameters(path)}


def test_texts_and_values_get_the_declared_type(declared):
    pairs = ["RECIPE=5", "EPOCHS=5", "LR=1e-3", "FLIP=false", "RUN_DIR=a=b"]
    values = runner.check_parameters(pairs, declared)
    assert values == {"RECIPE": "5", "EPOCHS": 5, "LR": 0.001, "FLIP": False, "RUN_DIR": "a=b"}
    assert type(values["FLIP"]) is bool
    assert runner.check_parameters(["FLIP=True"], declared) == {"FLIP": True}
    assert runner.check_parameters({"LR": 1}, declared) == {"LR": 1}  # an int is good enough for a float


@given(text=st.text())
def test_any_text_is_either_of_the_declared_type_or_refused(declared, text):
    assert runner.check_parameters([f"RECIPE={text}"], declared) == {"RECIPE": text}
    for name, kind in (("EPOCHS", int), ("LR", float), ("FLIP", bool)):
        with contextlib.suppress(course.ParameterError):
            assert type(runner.check_parameters([f"{name}={text}"], declared)[name]) is kind


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"parameters": ["EPOCH=5"]}, "unknown parameter 'EPOCH'.*EPOCHS.*did you mean 'EPOCHS'"),
        ({"parameters": ["epochs=5"]}, "did you mean 'EPOCHS'"),
        ({"parameters": ["EPOCHS=five"]}, r"EPOCHS='five': a\.ipynb wants int, e\.g\. 3"),
        ({"parameters": ["EPOCHS=5.0"]}, "wants int"),
        ({"parameters": ["FLIP=maybe"]}, "wants bool, e.g. True"),
        ({"parameters": ["LR="]}, "wants float"),
        ({"parameters": ["EPOCHS"]}, "name=value"),
        ({"parameters": ["=5"]}, "name=value"),
        ({"parameters": {"EPOCHS": True}}, "wants int"),
        ({"parameters": {"EPOCHS": "5"}}, "wants int"),
        ({"parameters": {"FLIP": 1}}, "wants bool"),
        ({"parameters": {"RUN_DIR": 5}}, "wants str"),
        ({"parameters": {"TYPO": 1}}, "unknown parameter 'TYPO'"),
        ({"parameters": ["RECIPE=quik"]}, "quick"),
        ({"parameters": ["RECIPE=quick", "RECIPE=smoke"]}, "RECIPE is given twice, at last as 'smoke'"),
        ({"parameters": {"OVERRIDES": "epoch=1"}}, "epochs"),
        ({"out": "thesis"}, "not an empty folder"),
    ],
)
def test_a_wrong_argument_is_refused_before_anything_runs(tmp_path, monkeypatch, arguments, message):
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "n", "a", "open('ran', 'w')", parameters=PARAMETERS + '\nOVERRIDES: str = ""')
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "mine.txt").write_text("mine")
    with pytest.raises(CifarFtError, match=message) as caught:
        course.run_course(**{"out": "out", "notebooks": "n", **arguments})
    assert caught.value.wrong_argument
    assert {path.name for path in tmp_path.rglob("*")} == {"n", "a.ipynb", "thesis", "mine.txt"}


def test_a_folder_without_notebooks_is_named(tmp_path):
    with pytest.raises(course.CourseError, match=r"no notebooks in .*nothing_here"):
        course.run_course(tmp_path / "out", notebooks=tmp_path / "nothing_here")


def test_running_notebooks_without_papermill_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "papermill", None)
    with pytest.raises(course.CourseError, match=r"needs papermill: pip install -r requirements\.txt"):
        course.run_course(tmp_path / "out", notebooks=[write(tmp_path / "n", "a")])


# -- running

TRAINS = """
import json, os, pathlib, sys
run = pathlib.Path(RUN_DIR)
run.mkdir()
metrics = dict(test_accuracy=0.912, test_accuracy_ci95=[0.906, 0.917])
metrics.update(backbone="resnet50", weights="IMAGENET1K_V1")
(run / "metrics.json").write_text(json.dumps(metrics))
config = dict(weights=dict(source="torchvision"), data=dict(source="npm"))
(run / "config.json").write_text(json.dumps(config))
facts = dict(epochs=EPOCHS, python=sys.executable, cwd=os.getcwd())
(run / "facts.json").write_text(json.dumps(facts))
"""
SHOWS = """
from IPython.display import display
view = {"application/vnd.jupyter.widget-view+json": {"model_id": "x"}}
display({"text/html": f"<b>{RUN_DIR}</b>", **view}, raw=True)
"""


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A finished course of two notebooks, run while another Python's kernel stands first on the path."""
    folder = tmp_path_factory.mktemp("a course {with braces} in its path")
    spec = folder / "jupyter" / "kernels" / "python3"
    spec.mkdir(parents=True)
    argv = ["/no/such/python", "-m", "ipykernel_launcher", "-f", "{connection_file}"]
    (spec / "kernel.json").write_text(json.dumps({"argv": argv, "display_name": "x", "language": "python"}))
    write(folder / "n", "1_train", TRAINS)
    write(folder / "n", "2_show", "import cifar_ft", SHOWS, parameters='RUN_DIR: str = ""')
    fetched = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("JUPYTER_PATH", str(folder / "jupyter"))
        given = {"RECIPE": "quick", "EPOCHS": 3}
        result = course.run_course(folder / "out", given, folder / "n", before=fetched.append)
    return folder, result, fetched


def test_notebooks_run_in_order_in_their_folder_with_this_python(finished):
    folder, result, _ = finished
    facts = json.loads((folder / "out" / "run" / "facts.json").read_text())
    assert facts["epochs"] == 3
    assert os.path.realpath(facts["cwd"]) == os.path.realpath(folder / "n")
    assert facts["python"] == sys.executable
    assert [name for name, _ in result.rows] == ["1_train", "2_show"]


def test_what_fetches_data_first_gets_all_parameters(finished):
    folder, _, fetched = finished
    run_dir = str(folder / "out" / "run")
    assert fetched == [{"RECIPE": "quick", "RUN_DIR": run_dir, "EPOCHS": 3, "LR": 0.1, "FLIP": True}]


def test_each_executed_notebook_has_a_page_beside_it(finished):
    folder, *_ = finished
    page = (folder / "out" / "2_show.html").read_text("utf-8")
    assert f"{os.sep}run" in page
    assert str(folder) not in page  # nor does it tell the folders above its own
    # a page cannot run widgets, and would ask a foreign host for them
    assert 'type="application/vnd.jupyter.widget-view' not in page


def test_the_record_holds_seconds_and_parameters(finished):
    folder, result, _ = finished
    record = json.loads((folder / "out" / "course.json").read_text())
    assert record["complete"] is True
    assert record["changed"] == []
    assert record["seconds"] == dict(result.rows)
    assert all(0 < seconds < 120 for _, seconds in result.rows)
    assert record["parameters"] == {"RECIPE": "quick", "EPOCHS": 3, "RUN_DIR": str(folder / "out" / "run")}


def test_the_table_says_what_was_reached_and_with_what(finished):
    _, result, _ = finished
    table = result.table()
    assert "91.20 % [90.60, 91.70]" in table
    for fact in ("1_train", "total", "resnet50", "IMAGENET1K_V1, from torchvision", "npm"):
        assert fact in table
    assert files.show_path(result.path) in table
    bare = course.CourseResult([("a", 1.5)], None, None, Path("out")).table()
    assert bare.split("\n")[0].split() == ["a", "1.5", "s"]
    assert "accuracy" not in bare


def test_relative_paths_mean_the_callers_folder_and_only_progress_is_printed(tmp_path, monkeypatch, capfd):
    names = 'DATA_ROOT: str = ""\nNAME: str = ""  # such as "x=1 y=2"'
    write(tmp_path / "n", "a", "print(DATA_ROOT, NAME)", parameters=names)
    monkeypatch.chdir(tmp_path)
    result = course.run_course("out", parameters=["DATA_ROOT=here", "NAME=x"], notebooks="n")
    assert texts(result.path / "a.ipynb")[2].split() == [str(tmp_path.resolve() / "here"), "x"]
    assert (result.metrics, result.config) == (None, None)
    assert json.loads((result.path / "course.json").read_text())["changed"] == ["NAME"]
    printed, error = capfd.readouterr()
    assert [line.split()[:2] for line in printed.splitlines()] == [["[1/1]", "a"], ["[1/1]", "a"]]
    assert error == ""


def test_paths_in_parameters_and_environment_mean_the_callers_folder_in_every_notebook(tmp_path, monkeypatch):
    here, home = tmp_path / "Bücher & mehr", tmp_path / "my home"
    here.mkdir()
    monkeypatch.chdir(here)
    for name, value in {"HOME": str(home), "CIFAR_FT_DATA": "./cache", "CIFAR_FT_RUNS": "~/my runs"}.items():
        monkeypatch.setenv(name, value)
    names = "('CIFAR_FT_DATA', 'CIFAR_FT_RUNS')"
    shows = f"import os\nfor name in {names}: print(os.environ[name])\nprint(RUN_DIR)\nprint(OVERRIDES)"
    write(here / "n", "a", shows, parameters='RECIPE: str = "quick"\nOVERRIDES: str = ""\nRUN_DIR: str = ""')
    given = ["RUN_DIR=~/x", "OVERRIDES='weights=my weights.pt' epochs=1"]
    result = course.run_course("~/out", given, "n")
    assert result.path == home / "out"
    *paths, overrides = texts(home / "out" / "a.ipynb")[2].splitlines()
    assert paths == [f"{here}/cache", f"{home}/my runs", f"{home}/x"]
    assert get_recipe("quick", overrides).weights == f"{here}/my weights.pt"
    write(here / "reading", "b", "print(RUN_DIR)", parameters='RUN_DIR: str = ""')
    course.run_course("read", ["RUN_DIR=shipped"], "reading")  # a name, see `results.choose_run`, and no folder
    assert texts(here / "read" / "b.ipynb")[2] == "shipped\n"
    with pytest.raises(CifarFtError, match="RUN_DIR '~nobody-here/x': there is no such home folder") as caught:
        course.run_course("other", ["RUN_DIR=~nobody-here/x"], "n")
    assert caught.value.wrong_argument
    assert not (here / "other").exists()


@pytest.mark.parametrize(
    ("cell", "message"),
    [
        ("raise ValueError('no\\nsuch thing')", "ValueError: no such thing"),
        ("import os\nos._exit(1)", "the kernel died (Kernel died); often a lack of memory"),
        ("import time\ntime.sleep(60)", "still running after 2 s, stopped"),
    ],
)
def test_a_cell_that_fails_stops_the_course_and_what_ran_is_kept(tmp_path, monkeypatch, cell, message):
    monkeypatch.setattr(runner, "CELL_SECONDS", 2)
    write(tmp_path / "n", "1_fails", "print('printed')", cell, "print('not reached')")
    write(tmp_path / "n", "2_never", f"open({str(tmp_path / 'ran')!r}, 'w')")
    with pytest.raises(course.CourseError) as caught:
        course.run_course(tmp_path / "out", notebooks=tmp_path / "n")
    out = tmp_path / "out"
    assert str(caught.value).split("\n") == [
        f"1_fails.ipynb, cell [4]: {message}",
        f"what ran until then is in {files.show_path(out / '1_fails.ipynb')}",
    ]
    assert not caught.value.wrong_argument
    assert not (tmp_path / "ran").exists()
    assert texts(out / "1_fails.ipynb")[2:3] == ["printed\n"]
    assert "printed" in (out / "1_fails.html").read_text("utf-8")
    assert json.loads((out / "course.json").read_text())["complete"] is False
