"""Many files at once: predict paths and folders of any size, and write the answers as CSV while they come."""

from __future__ import annotations

import csv
import os
from collections.abc import Iterable, Iterator
from contextlib import nullcontext
from pathlib import Path

import torch

from cifar_ft.files import full_path, printable, replacing
from cifar_ft.predictions.images import ImageError, find_pictures, squared
from cifar_ft.predictions.predictor import Predictor, chunks

COLUMNS = ("path", "label", "probability", "error")
DETAILS = ("unknown", "notes")
PARTIAL = ".partial"  # ends the name of a file that was not finished


def predict_paths(paths, predictor: Predictor, *, fit: str = "crop") -> Iterator[dict]:
    """Predict files and folders; a bad one is reported in its row and does not stop the others.

    Parameters
    ----------
    paths : path or iterable of paths
        A folder stands for all pictures in it and below, sorted, without hidden ones; links are followed.
    predictor : Predictor
    fit : {"crop", "pad"}

    Yields
    ------
    dict
        One for each picture, in order: path (str), label ("" on error), probability (None on error), error
        ("" if none), unknown (whether it is unlike anything in CIFAR-10; None if not known) and notes (what was done
        to the picture). A folder without pictures gives one row with an error.
    """
    for chunk in chunks(_files(paths)):
        rows, pictures = [], []
        for path, problem in chunk:
            name = os.fsdecode(path) if isinstance(path, (str, os.PathLike)) else type(path).__name__
            rows.append({"path": name, "label": "", "probability": None, "error": "", "unknown": None, "notes": ""})
            try:
                if problem:
                    raise problem
                pictures.append((rows[-1], squared(path, fit)))
            except ImageError as error:  # its row is handed on, and tells no folder that was not given
                shown = printable(name) or "''"
                error.about = error.about and shown
                error.values |= {"path": shown} if "path" in error.values else {}
                rows[-1]["error"] = str(error)
        answers = predictor.predict(torch.stack([picture.image for _, picture in pictures])) if pictures else []
        for (row, picture), answer in zip(pictures, answers, strict=True):
            row.update(label=answer.label, probability=answer.probability, unknown=answer.unknown)
            row["notes"] = "; ".join(map(str, picture.notes))
        yield from rows


def count_files(paths) -> int:
    """How many rows `predict_paths` will give; reads folders, not pictures."""
    return sum(1 for _ in _files(paths))


def _files(paths) -> Iterator[tuple[object, ImageError | None]]:
    """Each path, folders opened, with what is wrong with it, if anything yet."""
    for path in [paths] if isinstance(paths, (str, os.PathLike)) else paths:
        yield from find_pictures(path)


def is_device(path: Path) -> bool:
    """Whether `path` is a device or a pipe, which is written to as it is and never replaced."""
    return path.exists() and not path.is_file() and not path.is_dir()


def write_csv(rows: Iterable[dict], file, *, details: bool = False) -> tuple[int, int]:
    """Write the rows of `predict_paths` as CSV (UTF-8) as they come.

    Parameters
    ----------
    rows : iterable of dict
    file : path or text stream
        A file appears under its name only when it is complete; what an interruption or an error leaves of it is
        kept beside it, with `PARTIAL` added to its name. A device or a pipe gets the rows as they come.
    details : bool
        Also write the columns unknown and notes.

    Returns
    -------
    (int, int)
        Rows in all, and rows with an error.
    """
    if not hasattr(file, "write"):
        path = full_path(file)
        with (
            nullcontext(path) if is_device(path) else replacing(path, PARTIAL) as target,
            open(target, "w", encoding="utf-8", errors="backslashreplace", newline="") as stream,
        ):
            return write_csv(rows, stream, details=details)
    total = failed = 0
    columns = (*COLUMNS, *DETAILS) if details else COLUMNS
    writer = csv.DictWriter(file, columns, extrasaction="ignore", lineterminator="\n")
    writer.writeheader()
    for row in rows:
        # A spreadsheet would take such a name for a formula; the path stays the same file's.
        path = f"./{row['path']}" if row["path"].startswith(("=", "+", "-", "@")) else row["path"]
        writer.writerow({**row, "path": path})
        file.flush()  # whoever reads along, or what is left after an interruption, has every row
        total, failed = total + 1, failed + bool(row["error"])
    file.flush()
    return total, failed
