"""Promises of `predictions.folders`: a row for every input, whatever it is, and a table that is whole or says so."""

from __future__ import annotations

import csv
import io
import os
import shutil

import pytest
from PIL import Image

from cifar_ft.data import CLASSES
from cifar_ft.files import FileError
from cifar_ft.predictions import count_files, predict_paths, write_csv

ROW = {"path": "a", "label": "cat", "probability": 0.5, "error": "", "unknown": None, "notes": ""}


@pytest.fixture
def folder(tmp_path, samples):
    folder = tmp_path / "pictures"
    (folder / "more").mkdir(parents=True)
    (folder / ".hidden").mkdir()
    for name in ("b.png", "a.JPG", "more/c.gif", ".hidden/x.png"):
        Image.fromarray(samples.images[len(name)].permute(1, 2, 0).numpy()).save(folder / name)
    (folder / 'broken, "1".png').write_bytes((folder / "b.png").read_bytes()[:60])
    (folder / "._a.JPG").write_bytes(b"a mac was here")
    (folder / "notes.txt").write_text("no picture")
    return folder


def test_a_folder_gives_one_row_a_picture_sorted_and_goes_on_after_a_bad_one(folder, predictor):
    rows = list(predict_paths(folder, predictor))
    names = [os.path.relpath(row["path"], folder).replace(os.sep, "/") for row in rows]
    assert names == ["a.JPG", "b.png", 'broken, "1".png', "more/c.gif"]
    assert [bool(row["error"]) for row in rows] == [False, False, True, False]
    for row in rows:
        assert list(row) == ["path", "label", "probability", "error", "unknown", "notes"]
        if row["error"]:
            assert (row["label"], row["probability"]) == ("", None)
        else:
            (answer,) = predictor.predict(row["path"])
            assert row["label"] == answer.label
            assert row["probability"] == pytest.approx(answer.probability, abs=1e-5)
    assert count_files(folder) == 4
    assert count_files([folder, "missing.png"]) == len(list(predict_paths([folder, "missing.png"], predictor)))


def test_a_row_tells_no_folder_that_was_not_given(folder, predictor, monkeypatch):
    monkeypatch.chdir(folder)
    (folder / "empty.png").touch()
    (folder / "text.png").write_text("no picture")
    rows = list(predict_paths(["missing.png", "empty.png", "text.png", ".", "http://x/y.png", ""], predictor))
    assert sum(bool(row["error"]) for row in rows) == 8
    assert rows[0]["error"] == "there is no file missing.png"
    assert str(folder) not in str(rows)


def test_pictures_of_kinds_that_are_mostly_not_read_are_told_of_in_a_folder(tmp_path, predictor, samples):
    (tmp_path / "phone.HEIC").write_bytes(b"\0\0\0\x18ftypheic")
    Image.fromarray(samples.images[0].permute(1, 2, 0).numpy()).save(tmp_path / "really_a_png.heic", "PNG")
    (tmp_path / "notes.txt").write_text("no picture")
    first, second = predict_paths([tmp_path], predictor)
    assert "not a picture that can be read here" in first["error"]
    assert (second["error"], second["label"] in CLASSES) == ("", True)


def test_linked_folders_are_read_and_a_link_back_ends(folder, predictor, tmp_path):
    (tmp_path / "elsewhere").mkdir()
    shutil.copy(folder / "b.png", tmp_path / "elsewhere" / "photo.jfif")
    try:
        (folder / "linked").symlink_to(tmp_path / "elsewhere", target_is_directory=True)
        (folder / "more" / "back").symlink_to(folder, target_is_directory=True)
    except OSError:
        pytest.skip("links cannot be made here")
    rows = list(predict_paths(folder, predictor))
    assert [os.path.basename(row["path"]) for row in rows if f"{os.sep}linked{os.sep}" in row["path"]] == ["photo.jfif"]
    assert len(rows) == 5


def test_every_input_has_its_row_in_its_place_whatever_it_is(folder, predictor, tmp_path):
    (tmp_path / "empty").mkdir()
    good = str(folder / "b.png")
    inputs = [good, "nope.png", tmp_path / "empty", None, good, str(folder / "notes.txt"), "a\0b.png", good]
    rows = list(predict_paths(inputs, predictor))
    errors = [row["error"] for row in rows]
    assert [bool(error) for error in errors] == [False, True, True, True, False, True, True, False]
    assert "no pictures in this folder" in errors[2]
    assert rows[0]["probability"] == pytest.approx(rows[7]["probability"], abs=1e-5)
    assert list(predict_paths([], predictor)) == []


def test_many_files_are_read_a_batch_at_a_time(folder, predictor):
    taken = []
    rows = predict_paths((taken.append(i) or folder / "b.png" for i in range(70)), predictor)
    next(rows)
    assert len(taken) == 32
    assert len(list(rows)) == 69


def test_a_row_tells_what_was_done_to_the_picture_and_the_table_does_when_asked(predictor, tmp_path):
    Image.new("RGB", (20, 10)).save(tmp_path / "wide.png")
    (row,) = predict_paths(tmp_path / "wide.png", predictor)
    assert (row["unknown"], row["notes"]) == (None, "the middle 10 x 10 of 20 x 10 pixels")
    (row,) = predict_paths(tmp_path / "wide.png", predictor, fit="pad")
    assert row["notes"] == "all of 20 x 10 pixels, with black bars"
    for details, more in ((True, ",unknown,notes"), (False, "")):
        write_csv([row], stream := io.StringIO(), details=details)
        assert stream.getvalue().splitlines()[0] == f"path,label,probability,error{more}"
    assert row["notes"] not in stream.getvalue()


def test_the_csv_has_a_row_for_each_input_and_reads_back(folder, predictor, tmp_path):
    file = tmp_path / "answers.csv"
    rows = list(predict_paths([folder, "é.png"], predictor))
    assert write_csv(rows, file) == (5, 2)
    with open(file, encoding="utf-8", newline="") as stream:
        read = list(csv.DictReader(stream))
    assert [row["path"] for row in read] == [row["path"] for row in rows]
    assert [row["error"] for row in read] == [row["error"] for row in rows]
    assert [float(row["probability"] or -1) for row in read] == [row["probability"] or -1 for row in rows]
    write_csv(rows, stream := io.StringIO())
    assert stream.getvalue() == file.read_text(encoding="utf-8")


def test_a_name_that_a_spreadsheet_would_run_is_made_a_path():
    for name in ("=1+1.png", "+1.png", "-1.png", "@x.png"):
        write_csv([{**ROW, "path": name}], stream := io.StringIO())
        assert stream.getvalue().splitlines()[1].startswith(f"./{name},")


def test_names_that_are_not_utf8_do_not_stop_the_csv(tmp_path):
    write_csv([{**ROW, "path": "caf\udce9.png"}], tmp_path / "answers.csv")
    assert "udce9" in (tmp_path / "answers.csv").read_text(encoding="utf-8")


def test_a_csv_that_fails_half_way_keeps_the_earlier_file_and_the_rows_so_far(tmp_path):
    def rows():
        yield ROW
        raise KeyboardInterrupt

    file = tmp_path / "answers.csv"
    file.write_text("before")
    with pytest.raises(KeyboardInterrupt):
        write_csv(rows(), file)
    assert file.read_text() == "before"
    assert (tmp_path / "answers.csv.partial").read_text().splitlines()[1:] == ["a,cat,0.5,"]
    assert len(list(tmp_path.iterdir())) == 2
    for target, message in (
        (tmp_path / "no" / "x.csv", "cannot write .*; choose another file"),
        (tmp_path, "a folder"),
    ):
        with pytest.raises(FileError, match=message):
            write_csv([], target)


def test_every_row_is_there_before_the_next_picture_is_read(tmp_path):
    read = []

    def rows(file):
        yield ROW
        read.append(file.read_text())
        yield ROW

    target = tmp_path / "answers.csv"
    with target.open("w") as stream:
        write_csv(rows(target), stream)
    assert read == ["path,label,probability,error\na,cat,0.5,\n"]


@pytest.mark.skipif(os.name == "nt", reason="links and devices as on Linux")
def test_links_and_devices_stay_what_they_are(tmp_path):
    target, link = tmp_path / "target.csv", tmp_path / "link.csv"
    link.symlink_to(target)
    write_csv([ROW], link)
    assert link.is_symlink()
    assert "a,cat" in target.read_text()
    assert write_csv([ROW], os.devnull) == (1, 0)
    assert not os.path.isfile(os.devnull)
