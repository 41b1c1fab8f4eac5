"""Tokenizers: frames to tokens and back. :func:`build_tokenizer` makes one from a checkpoint's config."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from hma_gym.errors import CheckpointError
from hma_gym.tokenizers.protocol import Tokenizer, TokenizerConfig
from hma_gym.tokenizers.published import AutoencoderConfig, AutoencoderTokenizer
from hma_gym.tokenizers.soft import SoftConfig, SoftTokenizer
from hma_gym.tokenizers.vq import VQConfig, VQTokenizer

__all__ = ["SoftConfig", "SoftTokenizer", "Tokenizer", "TokenizerConfig", "VQConfig", "VQTokenizer", "build_tokenizer"]

_BUILDERS: Mapping[str, Callable[[Mapping[str, Any]], Tokenizer]] = {
    "diffusers": lambda values: AutoencoderTokenizer(AutoencoderConfig.from_dict(values)),
    "soft": lambda values: SoftTokenizer(SoftConfig.from_dict(values)),
    "vq": lambda values: VQTokenizer(VQConfig.from_dict(values)),
}


def build_tokenizer(config: Mapping[str, Any], expect: str | None = None) -> Tokenizer:
    """An untrained tokenizer of this config (``TokenizerConfig.to_dict``), ready for ``load_state_dict(strict=True)``.

    Args:
        config: with the key ``kind``: ``"soft"`` or ``"vq"`` for our own, ``"diffusers"`` for a published autoencoder.
        expect: the kind of token that the caller's model works on, ``"soft"`` or ``"vq"``, where it matters.

    Raises:
        CheckpointError: an unknown kind, another kind than expected, unknown or missing keys.
        InvalidArgument: values that break their rules.
    """
    kind = str(config.get("kind"))
    if kind not in _BUILDERS:
        raise CheckpointError(
            f"tokenizer config must have a kind among {sorted(_BUILDERS)}, got {kind!r}; "
            "the checkpoint is damaged or was written by a newer hma_gym: update hma_gym or fetch it again"
        )
    tokenizer = _BUILDERS[kind](config)
    if expect is not None and tokenizer.kind != expect:
        raise CheckpointError(
            f"the tokenizer makes {tokenizer.kind!r} tokens but its dynamics works on {expect!r} ones: soft "
            "and vq parts are not interchangeable; take both from the same checkpoint"
        )
    return tokenizer
