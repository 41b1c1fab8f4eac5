"""What a tokenizer is: frames in, one grid of tokens out, and back.

>>> tokens = tokenizer.encode(frames_BHWC)      # (..., H, W, 3) uint8 -> (..., N, C) float or (..., N) int64
>>> frames_BHWC = tokenizer.decode(tokens)      # back to uint8; leading dims are free in both directions

Two kinds (HMA, arXiv 2502.04296, Section 3.3): ``soft`` tokens are continuous latents of C channels,
standardised to mean 0 and standard deviation 1 per channel over the training frames; ``vq`` tokens are
indices into a vocabulary of ``prod(vocabulary)`` codes.

Shape legend: B batch, H W frame, h w token grid, N = h * w tokens a frame, C token channels.
"""

from __future__ import annotations

import dataclasses
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, TypeVar

import torch
from torch import nn

from hma_gym.errors import CheckpointError, InvalidArgument, InvalidImage

ConfigT = TypeVar("ConfigT", bound="TokenizerConfig")


@dataclass(frozen=True)
class TokenizerConfig:
    """What every tokenizer's config has.

    Attributes:
        image_size: (height, width) of a frame in pixels.
    """

    kind: ClassVar[str] = ""

    image_size: tuple[int, int] = (64, 64)

    def __post_init__(self) -> None:
        size = tuple(int(side) for side in self.image_size)
        if len(size) != 2 or min(size) < 1:
            raise InvalidArgument(f"image_size must be (height, width) in pixels, got {self.image_size}")
        object.__setattr__(self, "image_size", size)

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values, with the key ``kind``; :meth:`from_dict` reads it back."""
        return {"kind": self.kind, **dataclasses.asdict(self)}

    @classmethod
    def from_dict(cls: type[ConfigT], values: Mapping[str, Any]) -> ConfigT:
        """The config that ``to_dict`` wrote. Raises CheckpointError for another kind, an unknown or a missing key."""
        values = dict(values)
        kind = values.pop("kind", None)
        if kind != cls.kind:
            raise CheckpointError(
                f"tokenizer config is of kind {kind!r} where {cls.kind!r} is expected: soft and vq tokens are not "
                f"interchangeable; load a checkpoint whose tokenizer is {cls.kind!r}"
            )
        known = {field.name for field in dataclasses.fields(cls)}
        if set(values) != known:
            raise CheckpointError(
                f"tokenizer config of kind {kind!r} must have exactly the keys {sorted(known)}; "
                f"unknown: {sorted(set(values) - known)}, missing: {sorted(known - set(values))}; "
                "it was written by another version of hma_gym, use that version or train again"
            )
        return cls(**{key: tuple(value) if isinstance(value, list) else value for key, value in values.items()})


class Tokenizer(nn.Module, ABC):
    """Turns frames into tokens and back; see the module's docstring for the contract.

    Device and dtype are those of the weights. ``encode`` and ``decode`` run without gradients and are
    deterministic; a frame's tokens do not depend on the rest of the batch.

    Attributes:
        kind: ``"soft"`` or ``"vq"``.
        config: the frozen config that built it.
        image_size: (H, W) in pixels.
        grid: (h, w) of the tokens, row by row from the top left.
        channels: C for soft tokens, 0 for vq.
        vocabulary: factor sizes of a vq token (their product is the number of codes), () for soft.
    """

    kind: ClassVar[str]
    config: TokenizerConfig
    grid: tuple[int, int]
    channels: int
    vocabulary: tuple[int, ...]

    @property
    def image_size(self) -> tuple[int, int]:
        return self.config.image_size

    @property
    def tokens_per_frame(self) -> int:
        """N = h * w."""
        return self.grid[0] * self.grid[1]

    @abstractmethod
    def encode(self, frames_BHWC: torch.Tensor) -> torch.Tensor:
        """Tokens of frames (..., H, W, 3) uint8: (..., N, C) float, or (..., N) int64. Raises InvalidImage."""

    @abstractmethod
    def decode(self, tokens: torch.Tensor) -> torch.Tensor:
        """Frames (..., H, W, 3) uint8 of tokens shaped as ``encode`` gives them. Raises InvalidArgument."""


def check_frames(frames_BHWC: torch.Tensor, image_size: tuple[int, int]) -> None:
    """Raises InvalidImage unless ``frames_BHWC`` is a uint8 tensor of shape (..., H, W, 3) of this size."""
    if not isinstance(frames_BHWC, torch.Tensor):
        raise InvalidImage(f"frames must be a torch tensor, got {type(frames_BHWC).__name__}; use torch.from_numpy")
    if frames_BHWC.dtype != torch.uint8:
        raise InvalidImage(f"frames must be uint8 in 0..255, got {frames_BHWC.dtype}; scale and convert them first")
    expected = (*image_size, 3)
    if frames_BHWC.ndim < 3 or tuple(frames_BHWC.shape[-3:]) != expected:
        raise InvalidImage(
            f"frames must have shape (..., {expected[0]}, {expected[1]}, 3), got {tuple(frames_BHWC.shape)}; "
            "resize them to the tokenizer's image_size and put the colour channels last"
        )


def check_soft_tokens(tokens_BNC: torch.Tensor, tokens_per_frame: int, channels: int) -> None:
    """Raises InvalidArgument unless the tokens are floating and of shape (..., N, C)."""
    if not tokens_BNC.is_floating_point():
        raise InvalidArgument(
            f"soft tokens must be floating point, got {tokens_BNC.dtype}; vq tokens need a vq tokenizer"
        )
    if tokens_BNC.ndim < 2 or tuple(tokens_BNC.shape[-2:]) != (tokens_per_frame, channels):
        raise InvalidArgument(
            f"soft tokens must have shape (..., {tokens_per_frame}, {channels}), got {tuple(tokens_BNC.shape)}"
        )


def check_vq_tokens(tokens_BN: torch.Tensor, tokens_per_frame: int) -> None:
    """Raises InvalidArgument unless the tokens are int64 and of shape (..., N).

    The range is the caller's promise: looking at the values would make the device wait.
    """
    if tokens_BN.dtype != torch.int64:
        raise InvalidArgument(
            f"vq tokens must be int64 indices, got {tokens_BN.dtype}; soft tokens need a soft tokenizer"
        )
    if tokens_BN.ndim < 1 or tokens_BN.shape[-1] != tokens_per_frame:
        raise InvalidArgument(f"vq tokens must have shape (..., {tokens_per_frame}), got {tuple(tokens_BN.shape)}")
