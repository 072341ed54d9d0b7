"""Promise: one command runs the course, refuses wrong arguments before it starts, says what failed where."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import sys
from pathlib import Path

import nbformat
import pytest
from hypothesis import given
from hypothesis import strategies as st
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook, new_output

from cifar_ft import CifarFtError, course, files
from tools.badges import END, FOLDER, START, read_address, rewrite_badges, setup_cell
from tools.publish import KERNELSPEC, publish

ROOT = Path(__file__).resolve().parent.parent
PARAMETERS = 'RECIPE: str = "quick"\nRUN_DIR: str = ""\nEPOCHS: int = 3\nLR: float = 0.1\nFLIP: bool = True'


def write(folder: Path, name: str, *cells, parameters: str = PARAMETERS, **metadata) -> Path:
    """Write a notebook of code cells (strings or cells) behind a parameters cell."""
    folder.mkdir(exist_ok=True, parents=True)
    first = new_code_cell(parameters, metadata={"tags": ["parameters"]})
    cells = [cell if isinstance(cell, dict) else new_code_cell(cell) for cell in cells]
    path = folder / f"{name}.ipynb"
    nbformat.write(new_notebook(cells=[new_markdown_cell(f"# {name}"), first, *cells], metadata=metadata), path)
    return path


def texts(path: Path) -> list[str]:
    """What each code cell printed."""
    cells = nbformat.read(path, 4).cells
    return ["".join(o.get("text", "") for o in cell.outputs) for cell in cells if cell.cell_type == "code"]


# -- parameters


def test_parameters_are_read_with_default_and_type(tmp_path):
    path = write(tmp_path, "a", parameters=PARAMETERS + "\n# a comment\nNAME = 'x'  # untyped")
    assert course.parameters(path) == {
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
        course.parameters(write(tmp_path, "a", parameters=source))


@pytest.mark.parametrize("count", [0, 2])
def test_a_notebook_needs_exactly_one_parameters_cell(tmp_path, count):
    path = write(tmp_path, "a", new_code_cell("A: int = 1", metadata={"tags": ["parameters"]}))
    notebook = nbformat.read(path, 4)
    if count == 0:
        notebook.cells = notebook.cells[:1]
    nbformat.write(notebook, path)
    with pytest.raises(course.CourseError, match=f"exactly one cell tagged 'parameters', has {count}"):
        course.parameters(path)


def test_values_on_the_command_line_get_the_declared_type(tmp_path):
    path = write(tmp_path, "a")
    pairs = ["RECIPE=5", "EPOCHS=5", "LR=1e-3", "FLIP=false", "RUN_DIR=a=b"]
    values = course.parse_parameters(pairs, [path])
    assert values == {"RECIPE": "5", "EPOCHS": 5, "LR": 0.001, "FLIP": False, "RUN_DIR": "a=b"}
    assert type(values["FLIP"]) is bool
    assert course.parse_parameters(["FLIP=True"], [path]) == {"FLIP": True}


@pytest.mark.parametrize(
    ("pair", "message"),
    [
        ("EPOCH=5", "unknown parameter 'EPOCH'.*EPOCHS.*did you mean 'EPOCHS'"),
        ("epochs=5", "did you mean 'EPOCHS'"),
        ("EPOCHS=five", "EPOCHS=five: expected int"),
        ("EPOCHS=5.0", "expected int"),
        ("FLIP=maybe", "FLIP=maybe: expected bool"),
        ("LR=", "expected float"),
        ("EPOCHS", "name=value"),
        ("=5", "name=value"),
    ],
)
def test_wrong_values_on_the_command_line_are_refused(tmp_path, pair, message):
    with pytest.raises(course.ParameterError, match=message):
        course.parse_parameters([pair], [write(tmp_path, "a")])


@pytest.fixture(scope="module")
def declared(tmp_path_factory):
    return [write(tmp_path_factory.mktemp("declared"), "a")]


@given(text=st.text())
def test_any_text_is_either_of_the_declared_type_or_refused(declared, text):
    assert course.parse_parameters([f"RECIPE={text}"], declared) == {"RECIPE": text}
    for name, kind in (("EPOCHS", int), ("LR", float), ("FLIP", bool)):
        with contextlib.suppress(course.ParameterError):
            assert type(course.parse_parameters([f"{name}={text}"], declared)[name]) is kind


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"EPOCHS": True}, "wants int"),
        ({"EPOCHS": "5"}, "wants int"),
        ({"FLIP": 1}, "wants bool"),
        ({"RUN_DIR": 5}, "wants str"),
        ({"TYPO": 1}, "unknown parameter 'TYPO'"),
    ],
)
def test_ill_typed_values_are_refused_before_anything_runs(tmp_path, values, message):
    write(tmp_path / "n", "a", f"open({str(tmp_path / 'ran')!r}, 'w')")
    with pytest.raises(course.ParameterError, match=message):
        course.run_course(tmp_path / "out", parameters=values, notebooks=tmp_path / "n")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["n"]


def test_an_int_is_good_enough_for_a_float(declared):
    course.check_parameters(declared, {"LR": 1})


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"recipe": "quik"}, "quick"),
        ({"parameters": ["RECIPE=quik"]}, "quick"),
        ({"recipe": "quick", "parameters": ["RECIPE=smoke"]}, "contradict"),
        ({"parameters": {"OVERRIDES": "epoch=1"}}, "epochs"),
    ],
)
def test_an_unknown_recipe_or_override_is_refused_before_anything_runs(tmp_path, arguments, message):
    write(tmp_path / "n", "a", "1", parameters=PARAMETERS + '\nOVERRIDES: str = ""')
    with pytest.raises(CifarFtError, match=message) as caught:
        course.run_course(tmp_path / "out", notebooks=tmp_path / "n", **arguments)
    assert isinstance(caught.value, ValueError)  # the command line answers with exit code 2
    assert not (tmp_path / "out").exists()


def test_a_folder_with_files_is_not_written_into(tmp_path):
    write(tmp_path / "n", "a")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.txt").write_text("mine")
    with pytest.raises(course.ParameterError, match="not an empty folder"):
        course.run_course(tmp_path / "out", notebooks=tmp_path / "n")
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["thesis.txt"]


def test_a_folder_without_notebooks_is_named(tmp_path):
    with pytest.raises(course.CourseError, match=r"no notebooks in .*nothing_here"):
        course.run_course(tmp_path / "out", notebooks=tmp_path / "nothing_here")


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
print("a warning", file=sys.stderr)
"""
SHOWS = """
from IPython.display import display
view = {"application/vnd.jupyter.widget-view+json": {"model_id": "x"}}
display({"text/html": f"<b>{RUN_DIR}</b>", **view}, raw=True)
RUN_DIR
"""


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A finished course of two notebooks, run while another Python's kernel stands first on the path."""
    folder = tmp_path_factory.mktemp("a course {with braces} in its path")
    spec = folder / "jupyter" / "kernels" / "python3"
    spec.mkdir(parents=True)
    argv = ["/no/such/python", "-m", "ipykernel_launcher", "-f", "{connection_file}"]
    (spec / "kernel.json").write_text(json.dumps({"argv": argv, "display_name": "x", "language": "python"}))
    write(folder / "n", "1_train", TRAINS, papermill={"duration": 1})
    write(folder / "n", "2_show", "import cifar_ft", SHOWS, "2", parameters='RUN_DIR: str = ""')
    lines = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("JUPYTER_PATH", str(folder / "jupyter"))
        result = course.run_course(
            folder / "out",
            recipe="quick",
            parameters={"EPOCHS": 3},
            notebooks=folder / "n",
            echo=lines.append,
        )
    return folder, result, lines


def test_notebooks_run_in_order_in_their_folder_with_this_python(finished):
    folder, result, lines = finished
    facts = json.loads((folder / "out" / "run" / "facts.json").read_text())
    assert facts["epochs"] == 3
    assert os.path.realpath(facts["cwd"]) == os.path.realpath(folder / "n")
    assert facts["python"] == sys.executable
    assert [name for name, _ in result.rows] == ["1_train", "2_show"]
    assert [line.split()[:2] for line in lines] == [
        ["[1/2]", "1_train"], ["[1/2]", "1_train"], ["[2/2]", "2_show"], ["[2/2]", "2_show"]
    ]  # fmt: skip


def test_nothing_but_the_lines_is_printed(tmp_path, capfd):
    write(tmp_path / "n", "a", "1", parameters='NAME: str = ""  # such as "x=1 y=2"')
    course.run_course(tmp_path / "out", parameters=["NAME=x"], notebooks=tmp_path / "n", echo=lambda _: None)
    assert capfd.readouterr() == ("", "")


def test_each_executed_notebook_has_a_page_beside_it(finished):
    folder, *_ = finished
    page = (folder / "out" / "2_show.html").read_text("utf-8")
    assert str(folder / "out" / "run") in page
    # a page cannot run widgets, and would ask a foreign host for them
    assert 'type="application/vnd.jupyter.widget-view' not in page


def test_the_record_holds_seconds_and_parameters(finished):
    folder, result, _ = finished
    record = json.loads((folder / "out" / "course.json").read_text())
    assert record["complete"] is True
    assert record["seconds"] == dict(result.rows)
    assert all(0 < seconds < 120 for _, seconds in result.rows)
    assert record["parameters"] == {"RECIPE": "quick", "EPOCHS": 3, "RUN_DIR": str(folder / "out" / "run")}


def test_the_table_says_what_was_reached_and_with_what(finished):
    _, result, _ = finished
    table = result.table()
    assert "91.20 % [90.60, 91.70]" in table
    for fact in (
        "1_train",
        "total",
        "resnet50",
        "IMAGENET1K_V1, from torchvision",
        "npm",
        files.show_path(result.path),
    ):
        assert fact in table


def test_a_course_without_a_run_has_a_table_too(tmp_path):
    result = course.CourseResult([("a", 1.5)], None, None, tmp_path)
    assert result.table().split("\n")[0].split() == ["a", "1.5", "s"]
    assert "accuracy" not in result.table()


def test_relative_paths_mean_the_callers_folder(tmp_path, monkeypatch):
    write(tmp_path / "n", "a", "print(DATA_ROOT)", parameters='DATA_ROOT: str = ""')
    monkeypatch.chdir(tmp_path)
    result = course.run_course("out", parameters=["DATA_ROOT=here"], notebooks="n", echo=lambda _: None)
    assert texts(result.path / "a.ipynb")[2].strip() == str(tmp_path.resolve() / "here")
    assert (result.metrics, result.config) == (None, None)


def failed_course(tmp_path, *cells) -> tuple[str, Path]:
    write(tmp_path / "n", "1_fails", "print('kept')", *cells)
    write(tmp_path / "n", "2_never", f"open({str(tmp_path / 'ran')!r}, 'w')")
    with pytest.raises(course.CourseError) as caught:
        course.run_course(tmp_path / "out", notebooks=tmp_path / "n", echo=lambda _: None)
    out = tmp_path / "out"
    assert not (tmp_path / "ran").exists()
    assert any("kept" in text for text in texts(out / "1_fails.ipynb"))
    assert "kept" in (out / "1_fails.html").read_text("utf-8")
    assert json.loads((out / "course.json").read_text())["complete"] is False
    return str(caught.value), out


def test_a_failing_cell_stops_the_course_and_is_named(tmp_path):
    message, _ = failed_course(tmp_path, "raise ValueError('no\\nsuch thing')", "print('not reached')")
    first, second = message.split("\n")
    assert first == "1_fails.ipynb, cell [4]: ValueError: no such thing"
    assert "1_fails.ipynb" in second


def test_a_dead_kernel_is_reported_with_its_cell(tmp_path):
    message, _ = failed_course(tmp_path, "import os\nos._exit(1)", "print('not reached')")
    assert message.startswith("1_fails.ipynb, cell [4]: the kernel died")
    assert "memory" in message


def test_a_cell_without_end_is_stopped(tmp_path, monkeypatch):
    monkeypatch.setattr(execution, "CELL_SECONDS", 2)
    message, _ = failed_course(tmp_path, "import time\ntime.sleep(60)")
    assert message.startswith("1_fails.ipynb, cell [4]: still running after 2 s")


# -- publishing


def test_publish_brings_outputs_back_and_nothing_else(finished, tmp_path):
    folder, *_ = finished
    shutil.copytree(folder / "n", tmp_path / "n")
    before = {path.name: nbformat.read(path, 4) for path in (folder / "n").glob("*.ipynb")}
    assert publish(folder / "out", tmp_path / "n") == ["1_train", "2_show"]
    for name, old in before.items():
        new = nbformat.read(tmp_path / "n" / name, 4)
        assert [(c.id, c.source, c.metadata) for c in new.cells] == [(c.id, c.source, c.metadata) for c in old.cells]
        code = [cell for cell in new.cells if cell.cell_type == "code"]
        assert [cell.execution_count for cell in code] == list(range(1, len(code) + 1))
        assert new.metadata == {"kernelspec": KERNELSPEC}
    shown = nbformat.read(tmp_path / "n" / "2_show.ipynb", 4).cells[3].outputs
    assert shown[0].data == {"text/html": "<b>course-output/quick/run</b>"}
    assert shown[1].data == {"text/plain": "'course-output/quick/run'"}
    assert nbformat.read(tmp_path / "n" / "1_train.ipynb", 4).cells[2].outputs == []  # it only wrote to stderr


def test_publishing_twice_changes_nothing(finished, tmp_path):
    folder, *_ = finished
    shutil.copytree(folder / "n", tmp_path / "n")
    publish(folder / "out", tmp_path / "n")
    once = (tmp_path / "n" / "2_show.ipynb").read_bytes()
    publish(folder / "out", tmp_path / "n")
    assert (tmp_path / "n" / "2_show.ipynb").read_bytes() == once


def ran(tmp_path, *outputs, **record) -> tuple[Path, Path]:
    """A source notebook and the folder of a run of it, written by hand."""
    out, source = tmp_path / "out", tmp_path / "n"
    cell = new_code_cell("f()")
    write(source, "a", cell)
    write(out, "a", new_code_cell("f()", outputs=list(outputs), execution_count=7))
    record = {"complete": True, "seconds": {"a": 1.0}, "parameters": {}, "changed": [], **record}
    (out / "course.json").write_text(json.dumps(record))
    return out, source


@pytest.mark.parametrize(
    ("output", "message"),
    [
        (new_output("error", ename="ValueError", evalue="x", traceback=[]), "error .ValueError"),
        (new_output("stream", text=f"saved\n{Path.home() / 'runs'}\n"), "path of this machine"),
        (new_output("stream", text="see /home/ada/cifar/run"), "/home/ada/cifar/run"),
        (new_output("display_data", data={"text/html": "<b>C:\\Users\\ada</b>"}), "path of this machine"),
    ],
)
def test_publish_refuses_errors_and_paths_of_this_machine(tmp_path, output, message):
    out, source = ran(tmp_path, output)
    before = (source / "a.ipynb").read_bytes()
    with pytest.raises(course.CourseError, match=message):
        publish(out, source)
    assert (source / "a.ipynb").read_bytes() == before


def test_publish_does_not_take_a_picture_for_a_path(tmp_path):
    html = '<figure><img alt="x" src="data:image/png;base64,aa+/home/x/tmp/y="></figure>'
    out, source = ran(tmp_path, new_output("display_data", data={"text/html": html}))
    assert publish(out, source) == ["a"]


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ({"complete": False}, "no complete run"),
        ({"changed": ["EPOCHS"]}, "values that the notebooks do not show: EPOCHS"),
    ],
)
def test_publish_refuses_a_run_that_the_notebooks_do_not_show(tmp_path, record, message):
    with pytest.raises(course.CourseError, match=message):
        publish(*ran(tmp_path, **record))


def test_publish_refuses_outputs_of_other_code(tmp_path):
    out, source = ran(tmp_path)
    write(source, "a", "g()")
    with pytest.raises(course.CourseError, match="not the code that was run"):
        publish(out, source)


def test_the_run_says_which_values_differ_from_the_notebooks(tmp_path):
    write(tmp_path / "n", "a", "1")
    result = course.run_course(tmp_path / "out", parameters=["EPOCHS=9"], notebooks=tmp_path / "n", echo=lambda _: None)
    assert json.loads((result.path / "course.json").read_text())["changed"] == ["EPOCHS"]


# -- badges


def copy_of_checkout(folder: Path) -> Path:
    for name in ("pyproject.toml", "README.md"):
        if (ROOT / name).exists():
            shutil.copy(ROOT / name, folder)
    shutil.copytree(ROOT / "notebooks", folder / "notebooks")
    return folder


def test_badges_and_setup_cells_are_in_step_with_pyproject(tmp_path):
    assert rewrite_badges(copy_of_checkout(tmp_path)) == []


def small_checkout(folder: Path) -> Path:
    shutil.copy(ROOT / "pyproject.toml", folder)
    (folder / "README.md").write_text(f"# Title\n\n{START}\n{END}\n\nText.\n")
    path = write(folder / "notebooks", "01_a", new_code_cell("old", metadata={"tags": ["setup"]}))
    notebook = nbformat.read(path, 4)
    notebook.cells[0].source = "# A title\n[![Old](x)](y)\n\nYou will learn."
    nbformat.write(notebook, path)
    return folder


def test_a_new_address_reaches_readme_and_notebooks(tmp_path):
    root = small_checkout(tmp_path)
    text = (root / "pyproject.toml").read_text("utf-8")
    text = text.replace(read_address().repository, "https://github.com/ada/course")
    (root / "pyproject.toml").write_text(text.replace('ref = "main"', 'ref = "v9"'), "utf-8")
    assert {path.name for path in rewrite_badges(root)} == {"README.md", "01_a.ipynb"}
    assert rewrite_badges(root) == []
    readme = (root / "README.md").read_text("utf-8")
    assert "mybinder.org/v2/gh/ada/course/v9" in readme
    assert readme.startswith("# Title\n\n<!--")
    assert readme.endswith("-->\n\nText.\n")
    title, _, setup = nbformat.read(root / "notebooks" / "01_a.ipynb", 4).cells
    head, line, rest = title.source.split("\n\n")
    assert (head, rest) == ("# A title", "You will learn.")
    assert "colab.research.google.com/github/ada/course/blob/v9/notebooks/01_a.ipynb" in line
    assert "urlpath=lab%2Ftree%2Fnotebooks%2F01_a.ipynb" in line
    assert '"v9", "https://github.com/ada/course"' in setup.source


def test_a_notebook_without_a_place_for_its_setup_is_named_and_nothing_is_written(tmp_path):
    root = small_checkout(tmp_path)
    write(root / "notebooks", "02_b", "1")
    before = (root / "README.md").read_bytes()
    with pytest.raises(course.CourseError, match=r"02_b\.ipynb: .*tagged 'setup'"):
        rewrite_badges(root)
    assert (root / "README.md").read_bytes() == before


@pytest.fixture
def run_setup(monkeypatch, tmp_path):
    """Run the set-up cell with commands recorded instead of run; returns the commands."""
    monkeypatch.chdir(tmp_path)

    def run(installed: bool, host: str = "home") -> list[list[str]]:
        modules = {"Colab": {"google", "google.colab"}, "home with Google's libraries": {"google"}}.get(host, set())
        modules |= {"cifar_ft"} if installed else set()
        commands = []
        is_dir = Path.is_dir
        monkeypatch.setattr(Path, "is_dir", lambda p: host == "Kaggle" if p == Path("/kaggle") else is_dir(p))
        monkeypatch.setattr("importlib.util.find_spec", lambda name: object() if name in modules else None)
        monkeypatch.setattr("subprocess.run", lambda command, check: commands.append(command))
        exec(setup_cell(read_address()), {})
        return commands

    return run


def test_setup_cell_does_nothing_at_home_or_where_the_course_is_installed(run_setup, tmp_path):
    assert run_setup(installed=False) == []
    assert run_setup(installed=False, host="home with Google's libraries") == []
    assert run_setup(installed=True, host="Colab") == []
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("host", ["Colab", "Kaggle"])
def test_setup_cell_installs_on_hosts_without_moving_torch(run_setup, tmp_path, host):
    from importlib.metadata import version

    clone, pip = run_setup(installed=False, host=host)
    address = read_address()
    assert clone[-2:] == [address.repository, FOLDER]
    assert clone[clone.index("-b") + 1] == address.ref
    assert pip[-1] == f"./{FOLDER}"  # a path: a bare name could fetch a stranger's package
    assert pip[pip.index("-c") + 1] == "constraints.txt"
    constraints = (tmp_path / "constraints.txt").read_text().split("\n")
    assert f"torch=={version('torch')}" in constraints
    assert f"ipywidgets=={version('ipywidgets')}" in constraints
    (tmp_path / FOLDER).mkdir()
    assert run_setup(installed=False, host=host) == [pip]  # a second try does not stumble over the clone


def test_setup_cell_fits_a_cell():
    lines = setup_cell(read_address()).split("\n")
    assert len(lines) <= 15
    assert max(map(len, lines)) <= 110


def test_publish_keeps_of_a_progress_bar_only_what_a_reader_saw_last():
    from tools.publish import _last_state

    bar = nbformat.v4.new_output("stream", name="stdout", text="\r 10%|#   | 1/9\r 99%|### | 8/9")
    rest = nbformat.v4.new_output("stream", name="stdout", text="\r        \rEpoch 1: done\nnext\n")
    assert [output.text for output in _last_state([bar, rest])] == ["Epoch 1: done\nnext\n"]
