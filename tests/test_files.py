"""Files are whole or not there at all, paths read well, a wrong name is answered with the nearest right one."""

import errno
import io
import os
import re
import subprocess
from pathlib import Path

import pytest
from filelock import FileLock

from cifar_ft import files
from cifar_ft.files import (
    FileError,
    check_target,
    command,
    data_root,
    file_digest,
    full_path,
    locked,
    progress,
    replacing,
    runs_root,
    show_path,
)


def test_paths_are_shown_from_home_on(monkeypatch, tmp_path):
    monkeypatch.setattr(Path, "home", lambda: tmp_path)
    assert show_path(tmp_path) == "~"
    assert show_path(tmp_path / "a" / ".." / "b c") == "~/b c"
    assert show_path("/elsewhere/x") == str(Path("/elsewhere/x"))


@pytest.fixture
def home(tmp_path, monkeypatch):
    """The user's home and the current folder, both with names that need care."""
    for name in ("HOME", "USERPROFILE"):
        monkeypatch.setenv(name, str(tmp_path / "my home"))
    (tmp_path / "Bücher & mehr").mkdir()
    monkeypatch.chdir(tmp_path / "Bücher & mehr")
    return tmp_path / "my home"


def test_a_path_is_full_whatever_way_it_is_given(home, tmp_path):
    here = tmp_path / "Bücher & mehr"
    for given, path in {
        "~": home, "~/my run": home / "my run", "run": here / "run", ".": here, "../run": tmp_path / "run",
        "./~x": here / "~x", "a/./b": here / "a" / "b", str(tmp_path): tmp_path, here / "run": here / "run",
    }.items():  # fmt: skip
        assert full_path(given) == path
    assert full_path(full_path("run")) == here / "run"
    assert list(here.iterdir()) == []


@pytest.mark.skipif(os.name == "nt", reason="links need rights on Windows")
def test_above_a_link_is_above_its_target(home, tmp_path):
    (tmp_path / "far" / "away").mkdir(parents=True)
    Path("link").symlink_to(tmp_path / "far" / "away")
    assert full_path("link/../run") == tmp_path / "far" / "run"
    assert full_path("link/run") == Path.cwd() / "link" / "run"


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ("", "it is empty"), ("  ", "it is empty"), ("~nobody-of-this-name/run", "no such home folder"),
        (" ~/run", "write it in full"),
        ("s3://bucket/run", "an address"), ("file:///run", "an address"),
    ],
)  # fmt: skip
def test_a_path_that_means_no_place_here_is_a_wrong_argument(home, given, words):
    with pytest.raises(FileError, match=words) as caught:
        full_path(given, "RUN_DIR")
    assert caught.value.wrong_argument
    assert str(caught.value).startswith(f"RUN_DIR {given!r}: ")


def test_a_file_that_is_there_may_have_any_name(home):
    for name in ("~nobody-of-this-name", "a:"):
        Path(name).mkdir()
    assert full_path("~nobody-of-this-name") == Path.cwd() / "~nobody-of-this-name"
    assert full_path("a:/") == Path.cwd() / "a:"


@pytest.mark.parametrize("value", ["~/runs", " ~/runs ", '"~/runs"', "'~/runs'"])
def test_a_folder_from_the_environment_is_full(home, monkeypatch, value):
    for name in files.FOLDER_VARIABLES:
        monkeypatch.setenv(name, value)
    assert runs_root() == data_root() == home / "runs"
    assert files.folder_variables() == dict.fromkeys(files.FOLDER_VARIABLES, str(home / "runs"))
    monkeypatch.setenv("CIFAR_FT_RUNS", "./cache")
    assert runs_root() == Path.cwd() / "cache"
    monkeypatch.setenv("CIFAR_FT_RUNS", " ")
    assert runs_root() == files.checkout() / "runs"
    monkeypatch.setenv("CIFAR_FT_RUNS", "~nobody-of-this-name/runs")
    with pytest.raises(FileError, match="CIFAR_FT_RUNS '~nobody"):
        runs_root()


def test_every_environment_variable_that_decides_something_is_documented():
    sources = [path.read_text("utf-8") for path in files.PACKAGE.rglob("*.py")]
    asked = re.compile(r"""(?:environ\.get\(|environ\[|getenv\(|folder_variable\()\s*["'](\w+)""")
    names = {name for source in sources for name in asked.findall(source)} | {*files.FOLDER_VARIABLES}
    table = (files.checkout() / "docs" / "downloads.md").read_text("utf-8")
    assert {name for name in names - {"PYTHONPATH"} if f"| `{name}` |" not in table} == set()
    assert {"CIFAR_FT_RUNS", "CIFAR_FT_BACKBONE", "HF_ENDPOINT"} <= names


STRANGE = ("my run", "it's", "a & b", 'say "so"', "$HOME", "~", "two\nlines", "red \x1b[31m", "b\\n", "ü", "\udcff.png")


@pytest.mark.skipif(os.name == "nt", reason="a POSIX shell")
@pytest.mark.parametrize("name", STRANGE)
def test_a_command_to_type_means_the_same_path_in_a_shell(home, name):
    line = command("train", "--out", full_path(f"./{name}"), "--resume")
    assert line.isprintable()
    shell = ["bash", "-c", line.replace("python -m cifar_ft", "printf '%s\\0'", 1)]
    typed = os.fsdecode(subprocess.run(shell, capture_output=True, check=True).stdout)
    assert typed.split("\0")[:-1] == ["train", "--out", f"{Path.cwd()}/{name}", "--resume"]


def test_on_windows_double_quotes_hold_a_path_together(monkeypatch):
    monkeypatch.setattr(os, "name", "nt")
    for path, typed in {r"C:\a\b": r"C:\a\b", r"C:\my run": r'"C:\my run"', r"C:\R&D": r'"C:\R&D"'}.items():
        assert command("train", "--out", path) == f"python -m cifar_ft train --out {typed}"


def test_a_name_shown_does_nothing_to_a_terminal(home):
    for name in STRANGE:
        assert show_path(home / name).isprintable()
    assert show_path(home / "a\n\x1b[2J\u202eb") == r"~/a\x0a\x1b[2J\xe2\x80\xaeb"
    assert show_path(home / "Bücher 猫") == "~/Bücher 猫"


def test_the_data_folder_is_the_argument_else_the_environments_else_the_users_cache(monkeypatch, tmp_path):
    monkeypatch.setenv("CIFAR_FT_DATA", str(tmp_path / "env"))
    assert data_root("~/here") == Path.home() / "here"
    assert data_root("") == data_root(None) == tmp_path / "env"
    monkeypatch.delenv("CIFAR_FT_DATA")
    assert data_root().name == "cifar_ft"


def test_an_unknown_name_is_answered_with_what_is_allowed_and_the_nearest():
    assert files.unknown("fruit", "aple", ["apple", "pear"]) == (
        "unknown fruit 'aple'; choose from apple, pear (did you mean 'apple'?)"
    )
    assert "did you mean" not in files.unknown("fruit", "xyz", ["apple", "pear"])


def test_a_digest_is_that_of_the_whole_file(tmp_path):
    (tmp_path / "file").write_bytes(b"abc")
    assert file_digest(tmp_path / "file").startswith("ba7816bf8f01cfea")
    assert file_digest(tmp_path / "file", "md5") == "900150983cd24fb0d6963f7d28e17f72"


@pytest.mark.parametrize("call", ["fsync", "replace"])
def test_an_atomic_write_leaves_the_old_file_or_the_new_one(tmp_path, monkeypatch, call):
    file = files.write_atomic(tmp_path / "new" / "metrics.json", b"old")

    def fail(*arguments):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(os, call, fail)
        with pytest.raises(FileError, match=r"cannot write .*metrics.json: No space left on device; make room"):
            files.write_atomic(file, b"new")
    assert file.read_bytes() == b"old"
    assert os.listdir(file.parent) == ["metrics.json"]
    files.write_atomic(file, b"new")
    assert file.read_bytes() == b"new"


def test_what_was_begun_can_be_left_beside_the_file_and_an_old_one_stays(tmp_path):
    file = tmp_path / "rows.csv"
    file.write_text("old")

    def interrupted():
        with replacing(file, ".partial") as temporary:
            temporary.write_text("new")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert file.read_text() == "old"
    assert (tmp_path / "rows.csv.partial").read_text() == "new"
    assert sorted(os.listdir(tmp_path)) == ["rows.csv", "rows.csv.partial"]


@pytest.mark.skipif(os.name == "nt", reason="links need rights on Windows")
def test_a_link_stays_and_its_target_is_replaced(tmp_path):
    (tmp_path / "target").write_text("old")
    (tmp_path / "link").symlink_to("target")
    files.write_atomic(tmp_path / "link", b"new")
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "target").read_text() == "new"


def test_a_target_that_cannot_be_written_is_a_wrong_argument(tmp_path):
    for path, words in ((tmp_path, "it is a folder"), (tmp_path / "no" / "file", "there is no folder")):
        with pytest.raises(FileError, match=words) as caught:
            check_target(path)
        assert caught.value.wrong_argument
    if Path("/dev/null").exists():
        with pytest.raises(FileError, match="no regular file"):
            check_target("/dev/null")
    (tmp_path / "file").touch()
    with pytest.raises(FileError, match="cannot write"):
        files.write_atomic(tmp_path / "file" / "below", b"")


def test_a_lock_is_waited_for_and_that_is_said(tmp_path, said, monkeypatch):
    path = tmp_path / "new" / ".lock"
    with locked(path, "CIFAR-10"), pytest.raises(Exception, match=r"\.lock"):
        FileLock(path).acquire(timeout=0)
    FileLock(path).acquire(timeout=0)
    assert said == []
    acquire, calls = FileLock.acquire, []

    def busy_once(self, timeout=-1):
        calls.append(timeout)
        if len(calls) == 1:
            raise files.Timeout(str(path))
        return acquire(self, timeout=timeout)

    monkeypatch.setattr(FileLock, "acquire", busy_once)
    with locked(path, "CIFAR-10"):
        assert calls == [0, -1]
    assert "another process is fetching it" in said[0]


def test_progress_shows_where_somebody_watches_and_nothing_elsewhere():
    class Terminal(io.StringIO):
        def isatty(self):
            return True

    for file, shown in ((Terminal(), True), (io.StringIO(), False)):
        assert list(progress(range(3), "label", file, mininterval=0)) == [0, 1, 2]
        assert ("label" in file.getvalue()) is shown


def test_progress_needs_no_output_at_all(monkeypatch):
    monkeypatch.setattr("sys.stderr", None)
    assert list(progress(range(3))) == [0, 1, 2]
