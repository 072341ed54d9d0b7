"""Files are whole or not there at all, paths read well, a wrong name is answered with the nearest right one."""

import errno
import io
import os
from pathlib import Path

import pytest
from filelock import FileLock

from cifar_ft import files
from cifar_ft.files import FileError, check_target, data_root, file_digest, locked, progress, replacing, show_path


def test_paths_are_shown_from_home_on(monkeypatch, tmp_path):
    monkeypatch.setattr(Path, "home", lambda: tmp_path)
    assert show_path(tmp_path) == "~"
    assert show_path(tmp_path / "a" / ".." / "b c") == "~/b c"
    assert show_path("/elsewhere/x") == str(Path("/elsewhere/x"))


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
