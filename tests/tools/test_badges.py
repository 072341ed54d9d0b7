"""Promise: badges and set-up cells name the course's address, and a set-up cell installs only where it must."""

from __future__ import annotations

import re
import shutil
import subprocess
from importlib.metadata import version
from pathlib import Path
from urllib.parse import quote, urlsplit

import nbformat
import pytest
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook

from cifar_ft.course import CourseError
from tools.badges import END, FOLDER, ROOT, START, TO_DO, read_address, rewrite_badges, setup_cell, web_address

UNSET = "https://run-make-badges.invalid/cifar-ft"


def test_badges_and_setup_cells_are_in_step_with_pyproject(tmp_path):
    for name in ("pyproject.toml", "README.md", "CITATION.cff"):
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
    for name in ("pyproject.toml", "CITATION.cff"):
        unset = (ROOT / name).read_text("utf-8").replace(read_address().repository, UNSET)
        (tmp_path / name).write_text(unset, "utf-8")
    (tmp_path / "README.md").write_text(f"# Title\n\n{START}\n{END}\n\nText.\n")
    write(tmp_path, "01_a.ipynb", "setup")
    return tmp_path


def texts(root: Path) -> dict[str, str]:
    return {
        path.name: path.read_text("utf-8") for path in root.rglob("*") if path.is_file() and ".git" not in path.parts
    }


def origin(root: Path, address: str) -> None:
    for command in (["init", "-q"], ["remote", "add", "origin", address]):
        subprocess.run(["git", "-C", str(root), *command], check=True)


def test_nobody_s_name_stands_in_the_committed_files():
    """An address that nobody is known to own would run code of whoever registers it."""
    address = read_address()
    assert urlsplit(address.repository).hostname.endswith(".invalid") or web_address(address.repository)
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True).stdout.split()
    committed = [ROOT / name for name in listed if name.endswith((".md", ".ipynb", ".toml", ".cff", ".yml"))]
    assert [path.name for path in committed if "github.com/cifar-ft" in path.read_text("utf-8")] == []


def test_without_an_address_nothing_leads_anywhere_and_a_line_says_what_to_do(root):
    assert {path.name for path in rewrite_badges(root)} == {"README.md", "01_a.ipynb"}
    assert rewrite_badges(root) == []
    title, setup = nbformat.read(root / "notebooks" / "01_a.ipynb", 4).cells
    assert title.source.split("\n\n")[1] == TO_DO  # a comment: whoever reads the notebook sees nothing of it
    assert "`make badges` has written its address" in setup.source
    assert f'"{UNSET}"' in setup.source
    found = re.findall(r"https?://[^\s\"')]+", texts(root)["README.md"] + title.source + setup.source)
    assert {urlsplit(address).hostname for address in found} == {"img.shields.io", "run-make-badges.invalid"}


@pytest.mark.parametrize("given", [True, False], ids=["as an argument", "as the remote"])
@pytest.mark.parametrize(
    ("text", "address"),
    [
        ("https://github.com/ada/course", "https://github.com/ada/course"),
        ("https://github.com/ada/course.git", "https://github.com/ada/course"),
        ("https://github.com/ada/course/", "https://github.com/ada/course"),
        ("https://ada:secret@github.com/ada/course.git", "https://github.com/ada/course"),
        ("git@github.com:ada/course.git", "https://github.com/ada/course"),
        ("git@github.com:ada/course", "https://github.com/ada/course"),
        ("ssh://git@github.com/ada/course.git", "https://github.com/ada/course"),
        ("ssh://git@ssh.github.com:443/ada/course.git", "https://github.com/ada/course"),
        ("git://github.com/ada/course.git", "https://github.com/ada/course"),
        ("git@gitlab.com:group/sub/course.git", "https://gitlab.com/group/sub/course"),
        ("https://gitlab.com/group/sub/course.git", "https://gitlab.com/group/sub/course"),
        ("http://git.example:3000/ada/course", "http://git.example:3000/ada/course"),
    ],
)
def test_an_address_as_git_has_it_reaches_every_file_once(root, text, address, given):
    if not given:
        origin(root, text)
    changed = rewrite_badges(root, text if given else "")
    assert {path.name for path in changed} == {"pyproject.toml", "CITATION.cff", "README.md", "01_a.ipynb"}
    assert rewrite_badges(root) == []  # from then on it is kept
    assert read_address(root).repository == address
    found = texts(root)
    assert f"repository-code: {address}\n" in found["CITATION.cff"]
    assert not [name for name, content in found.items() if ".invalid" in content or "secret" in content]
    title, setup = nbformat.read(root / "notebooks" / "01_a.ipynb", 4).cells
    assert f'"main", "{address}", "course"]' in setup.source
    head, line, rest = title.source.split("\n\n")
    assert (head, rest) == ("# A title", "You will learn.")
    if "github" in address:
        assert "(https://colab.research.google.com/github/ada/course/blob/main/notebooks/01_a.ipynb)" in line
        assert "(https://mybinder.org/v2/gh/ada/course/main?urlpath=lab%2Ftree%2Fnotebooks%2F01_a.ipynb)" in line
        assert "https://github.com/ada/course/actions/workflows/tests.yml" in found["README.md"]
    else:
        assert f"(https://mybinder.org/v2/git/{quote(address, safe='')}/main?urlpath=lab%2F" in line
        assert "colab.research" not in line + found["README.md"]  # which opens nothing but GitHub
        assert "actions/workflows" not in found["README.md"]
    assert found["README.md"].startswith("# Title\n\n<!--")
    assert found["README.md"].endswith("-->\n\nText.\n")


def test_an_address_can_be_changed_and_the_release_too(root):
    origin(root, "git@github.com:ada/course.git")
    rewrite_badges(root)
    subprocess.run(["git", "-C", str(root), "remote", "set-url", "origin", "git@github.com:bob/fork.git"], check=True)
    project = root / "pyproject.toml"
    project.write_text(project.read_text("utf-8").replace('ref = "main"', 'ref = "v9"'), "utf-8")
    rewrite_badges(root)
    assert not [name for name, content in texts(root).items() if "ada/course" in content]
    assert "mybinder.org/v2/gh/bob/fork/v9" in texts(root)["README.md"]
    assert '"v9", "https://github.com/bob/fork"' in setup_cell(read_address(root))


LOCAL = ("/srv/git/course.git", "../course", "file:///srv/a/course", "C:\\git\\course", "C:/git/course", "x")
INCOMPLETE = ("git@work:ada/course.git", "https://github.com/ada", "https://[::1/a/b")
ELSEWHERE = ("git@github.com-work:ada/course.git", "https://github.com/ada/course/tree/main")
UNSAFE = ('https://github.com/ada/"+x+"', "https://github.com/ada/../b")


@pytest.mark.parametrize("text", [*LOCAL, *INCOMPLETE, *ELSEWHERE, *UNSAFE])
def test_what_is_no_web_address_is_no_address(root, text):
    assert web_address(text) == ""
    origin(root, text)
    rewrite_badges(root)
    assert read_address(root).repository == UNSET
    before = texts(root)
    with pytest.raises(CourseError, match=r"is no address; give one such as https://github\.com/OWNER/NAME"):
        rewrite_badges(root, text)
    assert texts(root) == before


def test_the_remote_of_a_repository_further_up_is_not_taken(root):
    (root / "inner").mkdir()
    for name in ("pyproject.toml", "CITATION.cff", "README.md", "notebooks"):
        shutil.move(root / name, root / "inner")
    origin(root, "https://github.com/ada/everything")
    rewrite_badges(root / "inner")
    assert read_address(root / "inner").repository == UNSET


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
