"""Promise: badges and set-up cells name the course's address, and a set-up cell installs only where it must."""

from __future__ import annotations

import shutil
from importlib.metadata import version
from pathlib import Path

import nbformat
import pytest
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook

from cifar_ft.course import CourseError
from tools.badges import END, FOLDER, ROOT, START, read_address, rewrite_badges, setup_cell


def test_badges_and_setup_cells_are_in_step_with_pyproject(tmp_path):
    for name in ("pyproject.toml", "README.md"):
        shutil.copy(ROOT / name, tmp_path)
    shutil.copytree(ROOT / "notebooks", tmp_path / "notebooks")
    assert rewrite_badges(tmp_path) == []


def write(root: Path, name: str, *tags: str) -> None:
    cells = [new_markdown_cell("# A title\n[![Old](x)](y)\n\nYou will learn."), new_code_cell("old")]
    cells[1].metadata["tags"] = list(tags)
    nbformat.write(new_notebook(cells=cells), root / "notebooks" / name)


@pytest.fixture
def root(tmp_path):
    """A checkout with a README and one notebook."""
    (tmp_path / "notebooks").mkdir()
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    (tmp_path / "README.md").write_text(f"# Title\n\n{START}\n{END}\n\nText.\n")
    write(tmp_path, "01_a.ipynb", "setup")
    return tmp_path


def test_a_new_address_reaches_readme_and_notebooks(root):
    text = (root / "pyproject.toml").read_text("utf-8")
    text = text.replace(read_address().repository, "https://github.com/ada/course")
    (root / "pyproject.toml").write_text(text.replace('ref = "main"', 'ref = "v9"'), "utf-8")
    assert {path.name for path in rewrite_badges(root)} == {"README.md", "01_a.ipynb"}
    assert rewrite_badges(root) == []
    readme = (root / "README.md").read_text("utf-8")
    assert "mybinder.org/v2/gh/ada/course/v9" in readme
    assert readme.startswith("# Title\n\n<!--")
    assert readme.endswith("-->\n\nText.\n")
    title, setup = nbformat.read(root / "notebooks" / "01_a.ipynb", 4).cells
    head, line, rest = title.source.split("\n\n")
    assert (head, rest) == ("# A title", "You will learn.")
    assert "colab.research.google.com/github/ada/course/blob/v9/notebooks/01_a.ipynb" in line
    assert "urlpath=lab%2Ftree%2Fnotebooks%2F01_a.ipynb" in line
    assert '"v9", "https://github.com/ada/course"' in setup.source


def test_a_file_without_a_place_is_named_and_nothing_is_written(root):
    before = (root / "README.md").read_bytes()
    write(root, "02_b.ipynb")
    with pytest.raises(CourseError, match=r"02_b\.ipynb: .*tagged 'setup'"):
        rewrite_badges(root)
    assert (root / "README.md").read_bytes() == before
    (root / "README.md").write_text("# Title\n")
    with pytest.raises(CourseError, match="no place for badges; add the lines"):
        rewrite_badges(root)


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
