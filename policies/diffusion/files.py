"""A diffusion policy on disk: a folder with ``config.json`` and ``policy.safetensors``."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor

from hma_gym.data.robomimic_hdf5 import storage_errors, write_atomically
from hma_gym.errors import CheckpointError, InvalidArgument
from hma_gym.nn.parameters import misfits
from hma_gym.policies.diffusion.model import DiffusionConfig, DiffusionModel

KIND = "diffusion_policy"
FORMAT_VERSION = 1
CONFIG_FILE, WEIGHTS_FILE = "config.json", "policy.safetensors"


def save_diffusion(
    folder: str | Path, config: DiffusionConfig, weights: Mapping[str, Tensor], training: Mapping[str, Any]
) -> Path:
    """Write a checkpoint, the configuration last, so that a folder with one is whole.

    Args:
        folder: made if needed.
        config: the shape.
        weights: ``DiffusionModel.state_dict()``, or the averaged weights in its place.
        training: provenance, JSON values: data, steps, seed.

    Raises:
        StorageError: the folder cannot be written.
    """
    folder = Path(folder)
    with storage_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in weights.items()}
    write_atomically(folder / WEIGHTS_FILE, save(tensors))
    content = {"kind": KIND, "version": FORMAT_VERSION, "policy": config.to_json(), "training": dict(training)}
    write_atomically(folder / CONFIG_FILE, (json.dumps(content, indent=1) + "\n").encode())
    return folder


def load_diffusion(folder: str | Path) -> DiffusionModel:
    """The model of a checkpoint, on the CPU and in eval mode.

    Raises:
        CheckpointError: missing, damaged, of another kind or a newer version, or weights that do not fit.
        MissingExtra: diffusers is not installed.
    """
    folder = Path(folder)
    try:
        content = json.loads((folder / CONFIG_FILE).read_text())
        weights = load_file(folder / WEIGHTS_FILE)
    except (OSError, json.JSONDecodeError, SafetensorError) as error:
        raise CheckpointError(
            f"{str(folder)!r} cannot be read as a diffusion policy ({error}); it must hold {CONFIG_FILE} and "
            f"{WEIGHTS_FILE}, as hma-gym train policy writes them."
        ) from error
    if content.get("kind") != KIND or content.get("version") != FORMAT_VERSION:
        raise CheckpointError(
            f"{str(folder)!r} holds kind {content.get('kind')!r} version {content.get('version')!r}, and this hma_gym "
            f"reads {KIND!r} version {FORMAT_VERSION}; upgrade hma_gym or train the policy again."
        )
    try:
        model = DiffusionModel(DiffusionConfig(**content["policy"]))
    except (KeyError, TypeError, InvalidArgument) as error:
        raise CheckpointError(f"{str(folder / CONFIG_FILE)!r} is damaged: {error}; copy the folder again.") from error
    wrong = misfits(model, weights)
    if wrong:
        raise CheckpointError(
            f"{str(folder / WEIGHTS_FILE)!r} does not fit its {CONFIG_FILE}: {', '.join(wrong[:5])} are missing, "
            "foreign or of another shape; copy the folder again."
        )
    model.load_state_dict(weights)
    return model.eval()
