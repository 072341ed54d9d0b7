"""The run directory on disk: written atomically, locked against a second writer, resumable after a kill at any moment.

A checkpoint carries the SHA-256 of its bytes in its name, so that a damaged one is known before it is used.
"""

from __future__ import annotations

import hashlib
import io
import json
from contextlib import suppress
from pathlib import Path

import torch
from filelock import FileLock, Timeout

from cifar_ft import CifarFtError, log
from cifar_ft.files import show_path, write_atomic
from cifar_ft.recipes import Recipe, RecipeError

KEEP = 2  # checkpoints: the newest and the one to fall back to


class TrainingError(CifarFtError, RuntimeError):
    """Training that cannot start, go on or be stored."""


class RunDirectory:
    """One run's folder while it is being written."""

    def __init__(self, path: Path):
        self.path = Path(path)
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            self._lock = FileLock(self.path / ".lock")
            self._lock.acquire(timeout=0)
            for part in self.path.rglob(".*.part"):  # left by a process that was killed while it wrote
                part.unlink(missing_ok=True)
        except Timeout:
            raise TrainingError(
                f"{show_path(path)} is in use by another process; wait for it or choose another folder"
            ) from None
        except OSError as error:
            raise TrainingError(
                f"cannot use {show_path(path)} as a run folder: {error.strerror}; choose another one"
            ) from error

    def close(self) -> None:
        """Release the lock."""
        self._lock.release()

    @property
    def finished(self) -> bool:
        """Whether the run's final figures are there."""
        return (self.path / "metrics.json").exists()

    def config(self) -> dict:
        """What the folder's run is; empty where none has begun."""
        file = self.path / "config.json"
        try:
            return json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}
        except (ValueError, OSError) as error:
            raise TrainingError(f"{show_path(file)} is damaged ({error}); start anew in another folder") from error

    def start(self, config: dict, resume: bool) -> None:
        """Store what the run is, or check that a resumed run is still the same one.

        Raises
        ------
        TrainingError
            When the folder holds a run and `resume` is off, or holds a run of another recipe, data, weights or code.
        """
        stored = self.config()
        if not stored:
            self.write_json("config.json", config)
            return
        if not resume:
            raise TrainingError(
                f"{show_path(self.path)} already holds a run; go on with it by resume (--resume) or "
                "choose another folder"
            )
        self.check(config)

    def check(self, config: dict) -> None:
        """Refuse to go on with a run that is another one by recipe, data, weights or code, if `config` names them.

        Raises
        ------
        TrainingError
            With each difference.
        """
        stored = self.config()
        with suppress(RecipeError, KeyError, TypeError):  # of a damaged one, which is then compared as it is
            stored["recipe"] = Recipe.from_dict(stored["recipe"]).to_dict()  # with the keys that came later
        changes = [
            f"{part}.{key}: {stored.get(part, {}).get(key)!r} then, {config[part].get(key)!r} now"
            for part, keys in _must_agree(config).items()
            for key in keys
            if key in config[part] and stored.get(part, {}).get(key) != config[part].get(key)
        ]
        if changes:
            raise TrainingError(
                f"cannot resume {show_path(self.path)}: it is another run ({'; '.join(changes)}). "
                "Go on with what it was begun with, or start anew in another folder"
            )

    def write_json(self, name: str, value: dict) -> None:
        """Write one JSON file of the run."""
        write_atomic(self.path / name, (json.dumps(value, indent=2) + "\n").encode())

    def save_checkpoint(self, epoch: int, step: int, state: dict) -> None:
        """Store the complete state of training `step` steps behind `epoch` epochs, then drop all but the newest two."""
        buffer = io.BytesIO()
        torch.save(state, buffer)
        data = buffer.getvalue()
        name = f"epoch-{epoch:05d}-step-{step:07d}-{_digest(data)}.pt"
        write_atomic(self.path / "checkpoint" / name, data)
        for old in self.checkpoints()[KEEP:]:
            old.unlink(missing_ok=True)

    def checkpoints(self) -> list[Path]:
        """Checkpoint files, newest first."""
        return sorted((self.path / "checkpoint").glob("epoch-*.pt"), reverse=True)

    def load_checkpoint(self) -> dict | None:
        """The newest checkpoint that is whole, or None. A damaged one is reported and passed over."""
        for file in self.checkpoints():
            try:
                data = file.read_bytes()
            except OSError as error:
                log.info(
                    f"Warning: checkpoint {file.name} cannot be read ({error.strerror}); falling back to the one before"
                )
                continue
            if _digest(data) == file.stem.rpartition("-")[2]:
                return torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
            log.info(f"Warning: checkpoint {file.name} is damaged; falling back to the one before")
        return None


def _digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()[:16]


def _must_agree(config: dict) -> dict[str, list[str]]:
    recipe = [key for key in config["recipe"] if key not in ("name", "checkpoint_steps", "accumulation", "flip_tta")]
    parts = {
        "recipe": recipe,
        "data": ["digest", "train", "val", "test"],
        "weights": ["backbone", "sha256"],
        "code": list(config.get("code", ())),
        "versions": ["cifar_ft", "torch", "timm"],
    }
    return {part: keys for part, keys in parts.items() if part in config}
