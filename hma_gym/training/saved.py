"""A run's saved states: one safetensors file per saved step, complete or absent, never half written.

Tensors are named ``model/<name>``, ``ema/<name>`` and ``optimizer/<parameter>/<state>``; the file's metadata holds, as
JSON under ``hma_gym_training``, the step, the minutes and the configuration that a resumed run must share.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from hma_gym.errors import ResumeError, StorageError

FORMAT_VERSION = 1
METADATA_KEY = "hma_gym_training"
SAVED_FOLDER = "saved"


@dataclass(frozen=True)
class SavedState:
    """What a file holds. ``tensors`` lie on CPU; ``config`` is the JSON form of the writing run's TrainConfig."""

    step: int
    minutes: float
    ema_updates: int
    config: Mapping[str, Any]
    tensors: Mapping[str, Tensor]

    def part(self, prefix: Literal["model", "ema", "optimizer"]) -> dict[str, Tensor]:
        """The tensors under ``prefix``, without it."""
        return {name[len(prefix) + 1 :]: t for name, t in self.tensors.items() if name.startswith(prefix + "/")}


def saved_files(out: Path) -> list[Path]:
    """The complete saved states of the run folder ``out``, oldest first."""
    return sorted((out / SAVED_FOLDER).glob("step-*.safetensors"))


def make_folder(out: Path) -> None:
    """Make a run's folder, or raise :class:`StorageError`."""
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise StorageError(f"`out` must be a folder that can be made and written, got {out}: {error}.") from error


def write_state(out: Path, state: SavedState, *, keep: int) -> None:
    """Write ``state`` so that a crash at any moment leaves the earlier files whole; keep the newest ``keep``.

    Raises:
        StorageError: the folder cannot be written or the disk is full.
    """
    folder = out / SAVED_FOLDER
    path = folder / f"step-{state.step:010d}.safetensors"
    partial = folder / f"{path.name}.partial"
    facts = {
        "version": FORMAT_VERSION,
        "step": state.step,
        "minutes": state.minutes,
        "ema_updates": state.ema_updates,
        "config": state.config,
    }
    # Cloned: safetensors refuses tensors that share memory (tied weights).
    tensors = {name: tensor.detach().cpu().clone().contiguous() for name, tensor in state.tensors.items()}
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for left_by_a_kill in folder.glob("*.partial"):
            left_by_a_kill.unlink()
        save_file(tensors, partial, metadata={METADATA_KEY: json.dumps(facts)})
        _sync(partial)
        os.replace(partial, path)
        _sync(folder)
        for old in saved_files(out)[:-keep]:
            old.unlink()
    except (OSError, SafetensorError) as error:
        partial.unlink(missing_ok=True)
        raise StorageError(
            f"cannot save the training state to {folder}: {error}; free some space or choose another `out`. "
            "Earlier saved states are untouched."
        ) from error


def read_state(path: Path) -> SavedState:
    """Read a saved state.

    Raises:
        ResumeError: the file is damaged, or was written by something else or by a newer version.
    """
    remedy = f"delete {path.name} to go on from the saved state before it, or train into another folder."
    try:
        with safe_open(path, framework="pt", device="cpu") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}
    except (OSError, SafetensorError) as error:
        raise ResumeError(f"{path} cannot be read ({error}); {remedy}") from error
    if METADATA_KEY not in metadata:
        raise ResumeError(f"{path} is not a training state of hma_gym; {remedy}")
    facts = json.loads(metadata[METADATA_KEY])
    if facts["version"] != FORMAT_VERSION:
        raise ResumeError(
            f"{path} has format version {facts['version']} and this hma_gym reads {FORMAT_VERSION}; upgrade hma_gym."
        )
    return SavedState(facts["step"], facts["minutes"], facts["ema_updates"], facts["config"], tensors)


def saved_weights(run: str | os.PathLike[str], which: Literal["ema", "model"] = "ema") -> dict[str, Tensor]:
    """A model's state dict out of a run folder (its newest saved state) or one saved file, also while the run goes on.

    Args:
        run: the run's folder (``TrainConfig.out``) or a ``step-*.safetensors`` file.
        which: ``"ema"`` for the averaged weights, which are the ones to use, or ``"model"`` for the trained ones.

    Raises:
        ResumeError: nothing saved there, or the file cannot be read.
    """
    path = Path(run)
    if path.is_dir():
        files = saved_files(path)
        if not files:
            raise ResumeError(f"{path} holds no saved training state; give the folder that TrainConfig.out named.")
        path = files[-1]
    state = read_state(path)
    weights = state.part("model")
    return weights if which == "model" else {**weights, **state.part("ema")}


def _sync(path: Path) -> None:
    """Have the disk hold what was written to ``path``; a folder is synced where the system can (not on Windows)."""
    if path.is_dir() and os.name == "nt":
        return
    handle = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
