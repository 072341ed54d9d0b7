"""The run directory while it is written: locked against a second writer, resumable after a kill at any moment.

A checkpoint carries the beginning of its SHA-256 in its name, so that a damaged one is known before it is used.
"""

from __future__ import annotations

import hashlib
import io
import json
from contextlib import suppress
from pathlib import Path

import torch
from filelock import FileLock, Timeout

from cifar_ft import log
from cifar_ft.files import show_path, write_atomic
from cifar_ft.recipes import Recipe, RecipeError
from cifar_ft.training.faults import TrainingError

KEEP = 2  # checkpoints: the newest and the one to fall back to
FREE = ("name", "checkpoint_steps", "accumulation", "flip_tta")  # settings that a resumed run may change


class RunDirectory:
    """One run's folder while training writes it. Only the main one of several processes has it open; the others have it
    with `active` False, and then nothing happens."""

    def __init__(self, path: Path, active: bool = True):
        self.path, self.active = Path(path), active

    def __enter__(self) -> RunDirectory:
        if not self.active:
            return self
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            self._lock = FileLock(self.path / ".lock")
            self._lock.acquire(timeout=0)
            for part in self.path.rglob(".*.part"):  # left by a process that was killed while it wrote
                part.unlink(missing_ok=True)
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
        if self.active:
            self._lock.release()

    def config(self) -> dict:
        """What the folder's run is; empty where none has begun."""
        file = self.path / "config.json"
        try:
            return json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}
        except (ValueError, OSError) as error:
            raise TrainingError(f"{show_path(file)} is damaged ({error}); start anew in another folder") from error

    def check_free(self, resume: bool) -> None:
        """Raise a TrainingError when the folder holds a run that is not to be resumed."""
        if self.active and not resume and self.config():
            raise TrainingError(
                f"{show_path(self.path)} already holds a run; resume it (--resume) or choose another folder"
            )

    def begin(self, config: dict) -> None:
        """Store what the run is, or check that a resumed run is still the same one."""
        if self.active and self.config():
            self.check(config)
        else:
            self.write_json("config.json", config)

    def check(self, config: dict) -> None:
        """Raise a TrainingError with each difference in recipe, data, weights, code or versions that `config` names."""
        if not self.active:
            return
        stored = self.config()
        with suppress(RecipeError, KeyError, TypeError):  # of a damaged one, which is then compared as it is
            stored["recipe"] = Recipe.from_dict(stored["recipe"]).to_dict()  # with the keys that came later
        compared = {
            "recipe": [key for key in config["recipe"] if key not in FREE],
            "data": ["digest", "train", "val", "test"],
            "weights": ["backbone", "sha256"],
            "code": list(config.get("code", ())),
            "versions": ["cifar_ft", "torch", "timm"],
        }
        changes = [
            f"{part}.{key}: {stored.get(part, {}).get(key)!r} then, {config[part].get(key)!r} now"
            for part, keys in compared.items()
            for key in keys
            if key in config.get(part, {}) and stored.get(part, {}).get(key) != config[part].get(key)
        ]
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
        """Store the complete state of training, `step` steps after `epoch` epochs; then drop all but the newest two."""
        if not self.active:
            return
        torch.save(state, buffer := io.BytesIO())
        data = buffer.getvalue()
        self.write(f"checkpoint/epoch-{epoch:05d}-step-{step:07d}-{_digest(data)}.pt", data)
        for old in self.checkpoints()[KEEP:]:
            old.unlink(missing_ok=True)

    def checkpoints(self) -> list[Path]:
        """Checkpoint files, newest first."""
        return sorted((self.path / "checkpoint").glob("epoch-*.pt"), reverse=True)

    def load_checkpoint(self) -> dict | None:
        """The newest checkpoint that is whole, or None. A damaged one is reported and passed over."""
        files = self.checkpoints() if self.active else []
        for file in files:
            try:
                data = file.read_bytes()
            except OSError as error:
                log.warning(
                    f"Warning: checkpoint {file.name} cannot be read ({error.strerror}); falling back to the one before"
                )
                continue
            if _digest(data) == file.stem.rpartition("-")[2]:
                return torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
            log.warning(f"Warning: checkpoint {file.name} is damaged; falling back to the one before")
        if files:
            log.warning("Warning: no checkpoint is usable; starting from the beginning")
        return None


def _digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()[:16]
