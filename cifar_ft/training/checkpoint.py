"""The run directory while it is written: locked against a second writer, resumable after a kill at any moment.

A checkpoint carries the beginning of its SHA-256 in its name, so that a damaged one is known before it is used.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import re
from contextlib import suppress
from pathlib import Path

import torch
from filelock import FileLock, Timeout

from cifar_ft import log
from cifar_ft.files import file_digest, full_path, show_path, write_atomic
from cifar_ft.recipes import Recipe, RecipeError, weights_name
from cifar_ft.training.faults import TrainingError

KEEP = 2  # checkpoints: the newest and the one to fall back to
FREE = ("name", "checkpoint_steps", "accumulation", "flip_tta")  # settings that a resumed run may change
CHECKPOINT = r"epoch-\d{5,}-step-\d{7,}-[0-9a-f]{16}\.pt"
# What a process that was killed leaves of a file that it was writing (see `files.replacing`).
WRITTEN = (
    rf"{CHECKPOINT}|(config|metrics)\.json|(history|steps)\.csv|(val|test|flip_tta)_logits\.npz|model\.safetensors"
)
LEFTOVER = re.compile(rf"\.({WRITTEN})\.\d+\.part")


class RunDirectory:
    """One run's folder while training writes it. Only the main one of several processes has it open; the others have it
    with `active` False, and then nothing happens."""

    def __init__(self, path: Path, active: bool = True):
        self.path, self.active = Path(path), active
        self._whole: list[str] = []  # names of the newest checkpoints that were read or written here

    def __enter__(self) -> RunDirectory:
        if not self.active:
            return self
        try:
            self._made = [folder for folder in (self.path, *self.path.parents) if not folder.exists()]
            if self.path.is_dir() and not self.config() and (strange := self._visible()):
                error = TrainingError(
                    f"{show_path(self.path)} is no run folder and not empty ({strange[0].name}); choose another one"
                )
                error.wrong_argument = True
                raise error
            self.path.mkdir(parents=True, exist_ok=True)
            self._lock = FileLock(self.path / ".lock")
            self._lock.acquire(timeout=0)
            for folder in (self.path, self.path / "checkpoint"):
                for file in folder.glob(".*.part"):
                    if LEFTOVER.fullmatch(file.name):
                        file.unlink(missing_ok=True)
        except Timeout:
            raise TrainingError(
                f"{show_path(self.path)} is in use by another process; wait for it or choose another folder"
            ) from None
        except OSError as error:
            raise TrainingError(
                f"cannot use {show_path(self.path)} as a run folder: {error.strerror}; choose another one"
            ) from error
        return self

    def __exit__(self, *_) -> None:
        if not self.active:
            return
        self._lock.release()
        if not self._visible():  # no run has begun
            with suppress(OSError):  # of the lock of another process, or of something else that is hidden
                (self.path / ".lock").unlink(missing_ok=True)
                for folder in self._made:
                    folder.rmdir()

    def _visible(self) -> list[Path]:
        """What is in the folder, hidden files aside, which a file manager may have made and a run never overwrites."""
        return sorted(file for file in self.path.iterdir() if not file.name.startswith("."))

    def config(self) -> dict:
        """What the folder's run is; empty where none has begun, or where the file is not a run's."""
        file = self.path / "config.json"
        try:
            config = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}
        except (ValueError, OSError) as error:
            raise TrainingError(f"{show_path(file)} is damaged ({error}); start anew in another folder") from error
        ours = isinstance(config, dict) and all(isinstance(config.get(part), dict) for part in ("recipe", "weights"))
        return config if ours else {}

    def begun(self, recipe: dict, data_digest: str, resume: bool) -> tuple[dict, dict | None]:
        """What the folder's run is, and its last checkpoint; nothing of a run that only begins.

        Raises
        ------
        TrainingError
            When there is a run that is not to be resumed, or has another recipe or other data.
        """
        stored = self.config()
        if not stored:
            if resume:
                log.info(f"There is nothing to resume in {show_path(self.path)}: beginning")
            return {}, None
        if not resume:
            raise TrainingError(
                f"{show_path(self.path)} already holds a run; resume it (--resume) or choose another folder"
            )
        self.check({"recipe": recipe, "data": {"digest": data_digest}})
        return stored, None if self.finished() else self.load_checkpoint()

    def finished(self) -> bool:
        """Whether the run's last files are there; where one was lost, the last checkpoint can make it anew."""
        with suppress(OSError, ValueError):
            json.loads((self.path / "metrics.json").read_text(encoding="utf-8"))
            return (self.path / "model.safetensors").is_file()
        return False

    def begin(self, config: dict, accept_changes: bool = False) -> None:
        """Store what the run is; of a resumed one, check that it still is what it was.

        Other code or versions are refused, unless `accept_changes`: they are then stored, and those before beside them.
        """
        stored = self.config()
        if not stored:
            self.write_json("config.json", config)
            return
        self.check(config)
        now = {part: config[part] for part in ("code", "versions")}
        changes = _differences(stored, now, {"code": [*now["code"]], "versions": ["cifar_ft", "torch", "timm"]})
        if changes and not accept_changes:
            raise TrainingError(
                f"cannot resume {show_path(self.path)} as if nothing had changed: {'; '.join(changes)}. Resume it with "
                "what it was begun with, or accept that (--accept-changes, in Python accept_changes=True), which its "
                "config.json will tell, or start anew in another folder"
            )
        if changes:
            log.warning(f"Resuming with changes, which config.json tells: {'; '.join(changes)}")
            before = [*stored.get("before", []), {part: stored.get(part) for part in now}]
            self.write_json("config.json", {**stored, **now, "before": before})

    def check(self, config: dict) -> None:
        """Raise a TrainingError with each difference in recipe, data or weights that `config` names."""
        stored = self.config()
        with suppress(RecipeError, KeyError, TypeError):  # of a damaged one, which is then compared as it is
            stored["recipe"] = Recipe.from_dict(stored["recipe"]).to_dict()  # with the keys that came later
        free, described = FREE, {**config.get("weights", {})}
        if digest := _digest_there(config["recipe"]["weights"]) or described.get("sha256"):
            free, described["sha256"] = (*FREE, "weights"), digest  # a file is what it holds, whatever its name
        config = {**config, "weights": described, "recipe": {**config["recipe"]}}
        for each in (stored, config):
            each["recipe"]["weights"] = weights_name(str(each["recipe"].get("weights")))
        compared = {
            "recipe": [key for key in config["recipe"] if key not in free],
            "data": ["digest", "train", "val", "test"],
            "weights": ["backbone", "sha256"],
        }
        changes = _differences(stored, config, compared)
        if changes:
            raise TrainingError(
                f"cannot resume {show_path(self.path)}: it is another run ({'; '.join(changes)}). "
                "Resume it with what it was begun with, or start anew in another folder"
            )

    def write(self, name: str, data: bytes) -> None:
        """Write one file of the run, whole or not at all."""
        if self.active:
            write_atomic(self.path / name, data)

    def write_json(self, name: str, value: dict) -> None:
        """Write one JSON file of the run."""
        self.write(name, (json.dumps(value, indent=2) + "\n").encode())

    def save_checkpoint(self, epoch: int, step: int, state: dict) -> None:
        """Store the complete state of training, `step` steps after `epoch` epochs.

        Kept are this one and the one known to be whole before it; then all others go, damaged ones too.
        """
        if not self.active:
            return
        torch.save(state, buffer := io.BytesIO())
        data = buffer.getvalue()
        name = f"epoch-{epoch:05d}-step-{step:07d}-{_digest(data)}.pt"
        self.write(f"checkpoint/{name}", data)
        self._whole = [*(whole for whole in self._whole if whole != name), name][-KEEP:]
        for old in self.checkpoints():
            if old.name not in self._whole:
                try:
                    old.unlink(missing_ok=True)
                except OSError as error:
                    log.warning(f"Warning: the old checkpoint {old.name} cannot be removed ({error.strerror})")

    def checkpoints(self) -> list[Path]:
        """Checkpoint files, newest first."""
        files = (self.path / "checkpoint").glob("epoch-*.pt")
        return sorted((file for file in files if re.fullmatch(CHECKPOINT, file.name)), reverse=True)

    def load_checkpoint(self) -> dict | None:
        """The newest checkpoint that is whole, or None. A damaged one is reported and passed over."""
        files = self.checkpoints()
        for file in files:
            try:
                data = file.read_bytes()
            except OSError as error:
                log.warning(
                    f"Warning: checkpoint {file.name} cannot be read ({error.strerror}); falling back to the one before"
                )
                continue
            if _digest(data) == file.stem.rpartition("-")[2]:
                self._whole = [file.name]
                return torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
            log.warning(f"Warning: checkpoint {file.name} is damaged; falling back to the one before")
        if files:
            log.warning("Warning: no checkpoint is usable; starting from the beginning")
        else:
            log.info("There is no checkpoint yet: starting from the beginning")
        return None


def _differences(stored: dict, now: dict, compared: dict[str, list[str]]) -> list[str]:
    """What the parts of two descriptions differ in, of the keys that `now` has."""
    before = {part: stored[part] if isinstance(stored.get(part), dict) else {} for part in compared}
    return [
        f"{part}.{key}: {before[part].get(key)!r} then, {now[part][key]!r} now"
        for part, keys in compared.items()
        for key in keys
        if key in now.get(part, {}) and before[part].get(key) != now[part][key]
    ]


def _digest_there(weights: str) -> str | None:
    """The digest of the file that a recipe's weights are, if it is there; a name alone may be that of another file."""
    with suppress(OSError):
        return file_digest(full_path(weights)) if os.path.dirname(weights) else None


def _digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()[:16]
