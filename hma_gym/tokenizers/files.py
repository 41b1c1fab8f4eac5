"""A tokenizer on disk: a folder with ``config.json`` and ``tokenizer.safetensors``."""

from __future__ import annotations

import json
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from hma_gym.errors import CheckpointError, StorageError
from hma_gym.nn.parameters import misfits
from hma_gym.tokenizers import build_tokenizer
from hma_gym.tokenizers.protocol import Tokenizer

CONFIG_FILE, WEIGHTS_FILE = "config.json", "tokenizer.safetensors"


def save_tokenizer(tokenizer: Tokenizer, folder: str | Path) -> Path:
    """Writes the tokenizer into ``folder`` (made if needed), replacing one that is there. Raises StorageError."""
    folder = Path(folder)
    tensors = {name: value.detach().cpu().contiguous() for name, value in tokenizer.state_dict().items()}
    try:
        folder.mkdir(parents=True, exist_ok=True)
        save_file(tensors, folder / WEIGHTS_FILE)
        (folder / CONFIG_FILE).write_text(json.dumps(tokenizer.config.to_dict(), indent=2) + "\n")
    except OSError as error:
        raise StorageError(
            f"folder {folder} must be writable to save the tokenizer: {error}; choose another"
        ) from error
    return folder


def load_tokenizer(folder: str | Path, expect: str | None = None) -> Tokenizer:
    """The tokenizer that :func:`save_tokenizer` wrote, on CPU, in eval mode.

    Raises:
        CheckpointError: a file is missing or damaged, or the tokenizer is not of the kind ``expect``.
    """
    folder = Path(folder)
    for name in (CONFIG_FILE, WEIGHTS_FILE):
        if not (folder / name).is_file():
            raise CheckpointError(f"folder {folder} must hold {CONFIG_FILE} and {WEIGHTS_FILE}, {name} is missing")
    try:
        config = json.loads((folder / CONFIG_FILE).read_text())
        tensors = load_file(folder / WEIGHTS_FILE)
    except (ValueError, SafetensorError) as error:
        raise CheckpointError(f"tokenizer in {folder} is damaged ({error}); fetch or train it again") from error
    tokenizer = build_tokenizer(config, expect)
    check_weights(tokenizer, tensors)
    tokenizer.load_state_dict(tensors)
    return tokenizer.eval()


def check_weights(tokenizer: Tokenizer, tensors: dict[str, Tensor]) -> None:
    """Raises CheckpointError unless the tensors are exactly the tokenizer's, by name and shape."""
    wrong = misfits(tokenizer, tensors)
    if wrong:
        first = wrong[0]
        expected, got = (
            None if value is None else tuple(value.shape)
            for value in (tokenizer.state_dict().get(first), tensors.get(first))
        )
        raise CheckpointError(
            f"{len(wrong)} tensors do not fit the {tokenizer.kind} tokenizer of the config, e.g. {first!r}: expected "
            f"shape {expected}, got {got}; config and weights come from different checkpoints"
        )
