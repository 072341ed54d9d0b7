"""Promise: arrows between the rooms of cifar_ft run down only, in no circle, and nobody uses what is inside a room."""

from __future__ import annotations

import ast
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import nbformat
import pytest

ROOT = Path(__file__).resolve().parents[1]
LIBRARY = ROOT / "cifar_ft"
# A room may use all rooms below its own line.
FLOORS = ("__main__", "widget course", "training predictions", "results", "models", "data transforms plots", "recipes")
FLOOR = {room: -n for n, rooms in enumerate((*FLOORS, "files")) for room in rooms.split()}


def imports(source: str):
    """Yield (file, name) of all that a source takes of cifar_ft, wherever it stands: ("data.loader", "make_loader").

    ("data", "") is the room itself; what is read of it later, as in `data.Split`, counts as ("data", "Split").
    """
    nodes, rooms = list(ast.walk(ast.parse(source))), {}
    for node in nodes:
        if isinstance(node, ast.Import):
            yield from ((alias.name[9:], "") for alias in node.names if alias.name.startswith("cifar_ft."))
        for alias in node.names if isinstance(node, ast.ImportFrom) and f"{node.module}."[:9] == "cifar_ft." else ():
            if node.module == "cifar_ft" and alias.name in FLOOR:
                rooms[alias.asname or alias.name] = alias.name
                yield alias.name, ""
            else:
                yield node.module[9:], alias.name
    for node in nodes:
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id in rooms:
            yield rooms[node.value.id], node.attr


def handed_on(source: str) -> set[str]:
    """The public names of a room: those that its __init__ imports."""
    return {
        alias.name for node in ast.walk(ast.parse(source)) if isinstance(node, ast.ImportFrom) for alias in node.names
    }


def faults(library: dict[str, str], others: dict[str, str]) -> list[str]:
    """What breaks the rules in the files of the library, such as "training.loop", and in those that use it."""
    arrows, problems = {name: set() for name in library}, []
    for user, source in {**library, **others}.items():
        room = user.split(".")[0] if user in library else None
        for file, name in imports(source):
            target, what = file.split(".")[0], f"{user}: {file}:{name}"
            package = any(other.startswith(f"{file}.") for other in library)
            inner = "." in file or name.startswith("_") or (name and package and name not in handed_on(library[file]))
            if not file:
                problems += [] if name in ("CifarFtError", "log", "__version__") else [f"{what} is not there for all"]
            elif target != room:
                problems += [f"{what} is inside another room"] if inner else []
                problems += [f"{what} is not below"] if room and FLOOR[target] >= FLOOR[room] else []
            else:
                arrows[user].add(file)
    try:
        TopologicalSorter(arrows).prepare()
    except CycleError as error:
        problems.append(f"a circle: {', '.join(error.args[1])}")
    return problems


def test_arrows_run_down_to_public_names():
    names = {path.relative_to(LIBRARY).with_suffix("").parts: path for path in LIBRARY.rglob("*.py")}
    library = {".".join(name).removesuffix(".__init__"): path.read_text("utf-8") for name, path in names.items()}
    others = {path.name: path.read_text("utf-8") for path in [*ROOT.glob("tools/*.py"), *ROOT.glob("benchmarks/*.py")]}
    for path in ROOT.glob("notebooks/**/*.ipynb"):
        cells = nbformat.read(path, 4).cells
        others[path.name] = "\n".join(cell.source for cell in cells if cell.cell_type == "code")
    assert faults(library, others) == []


def test_the_house_is_small_and_each_file_has_its_tests():
    entries = {path.stem for path in LIBRARY.iterdir() if path.name != "__pycache__"}
    assert entries == {*FLOOR, "__init__", "assets"}
    assert len(entries) <= 14
    files = [path.relative_to(LIBRARY) for path in LIBRARY.rglob("*.py") if path.name != "__init__.py"]
    tests = [file.with_name(f"test_{'cli' if file.stem == '__main__' else file.stem}.py") for file in files]
    assert [str(test) for test in tests if not (ROOT / "tests" / test).exists()] == []


@pytest.mark.parametrize(
    ("user", "source", "problem"),
    [
        ("data.b", "def f():\n    from cifar_ft.models import cut", "not below"),
        ("data.b", "if TYPE_CHECKING:\n    from cifar_ft import plots", "not below"),
        ("data.b", "import cifar_ft.models", "not below"),
        ("data.b", "from cifar_ft.data.a import x", "a circle"),
        ("data.a", "from cifar_ft.data import x", "a circle"),
        ("models", "from cifar_ft.data.a import x", "inside"),
        ("models", "from cifar_ft.data import _x", "inside"),
        ("models", "from cifar_ft import data as d\nd.a.x()", "inside"),
        ("models", "from cifar_ft import data\ndata._x", "inside"),
        ("models", "from cifar_ft import _Lines", "not there for all"),
        ("01.ipynb", "from cifar_ft.data.a import x", "inside"),
        ("tool.py", "import cifar_ft.data.a", "inside"),
    ],
)
def test_the_checker_turns_red(user, source, problem):
    good = {"models": "", "data": "from cifar_ft.data.a import x", "data.b": ""}
    good["data.a"] = "from cifar_ft import files, log\nfrom cifar_ft.data.b import x\nfiles.show_path"
    others = {user: source} if user not in good else {}
    assert faults(good, {"tool.py": "from cifar_ft import data\ndata.x"}) == []
    assert problem in "".join(faults(good if others else {**good, user: source}, others))
