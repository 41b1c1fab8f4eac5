"""VQ tokens: finite scalar quantisation (Mentzer et al. 2023), by the package vector-quantize-pytorch.

Each of the few bottleneck channels is rounded to one of ``levels`` values; their combinations are the codes.
There is no codebook to learn and none to collapse. A token is one index in [0, prod(levels)), which a head
may predict in factors (``vocabulary``, see :mod:`hma_gym.nn.vocabulary`).

Shape legend: B batch, N tokens a frame, h w token grid, L number of levels (bottleneck channels).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import nn

from hma_gym.errors import InvalidArgument
from hma_gym.extras import require
from hma_gym.nn.vocabulary import vocabulary_size
from hma_gym.tokenizers.conv import ConvConfig, ConvTokenizer
from hma_gym.tokenizers.protocol import check_frames, check_vq_tokens


@dataclass(frozen=True)
class VQConfig(ConvConfig):
    """Config of :class:`VQTokenizer`.

    Attributes:
        levels: values per bottleneck channel, each 3 or more; their product is the number of codes.
        vocabulary: factor sizes of a token, with the same product; e.g. (1000,) or (40, 25).
    """

    kind: ClassVar[str] = "vq"

    levels: tuple[int, ...] = (8, 5, 5, 5)
    vocabulary: tuple[int, ...] = (1000,)

    def __post_init__(self) -> None:
        super().__post_init__()
        if len(self.levels) == 0 or min(self.levels) < 3:
            raise InvalidArgument(f"levels must be one or more numbers of at least 3, got {self.levels}")
        if vocabulary_size(self.vocabulary) != math.prod(self.levels):
            raise InvalidArgument(
                f"vocabulary must multiply to the {math.prod(self.levels)} codes of levels {self.levels}, "
                f"got {self.vocabulary}"
            )


class VQTokenizer(ConvTokenizer):
    """Frames (..., H, W, 3) uint8 to tokens (..., N) int64 in [0, prod(vocabulary)).

    Raises MissingExtra where vector-quantize-pytorch is not installed.
    """

    kind: ClassVar[str] = "vq"
    config: VQConfig

    def __init__(self, config: VQConfig, background_HWC: torch.Tensor | None = None) -> None:
        super().__init__(config, len(config.levels), background_HWC)
        self.channels = 0
        self.vocabulary = config.vocabulary
        library = require("vector_quantize_pytorch", extra="vq", purpose="the VQ tokenizer")
        self.quantizer: nn.Module = library.FSQ(levels=list(config.levels))

    def _quantize(self, images_B3HW: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Codes (B, N, L) with straight-through gradients, and tokens (B, N) int64."""
        latents_BNL = self.to_latents(images_B3HW).flatten(2).transpose(1, 2)
        codes_BNL, tokens_BN = self.quantizer(latents_BNL.float())  # rounding in bf16 would misnumber codes
        return codes_BNL.to(latents_BNL.dtype), tokens_BN.long()

    def reconstruct(self, images_B3HW: torch.Tensor, generator: torch.Generator | None = None) -> torch.Tensor:
        codes_BNL, _ = self._quantize(images_B3HW)
        return self.from_latents(codes_BNL.transpose(1, 2).unflatten(2, self.grid))

    @torch.no_grad()
    def encode(self, frames_BHWC: torch.Tensor) -> torch.Tensor:
        check_frames(frames_BHWC, self.image_size)
        _, tokens_BN = self._quantize(self.to_images(frames_BHWC.reshape(-1, *frames_BHWC.shape[-3:])))
        return tokens_BN.reshape(*frames_BHWC.shape[:-3], self.tokens_per_frame)

    @torch.no_grad()
    def decode(self, tokens_BN: torch.Tensor) -> torch.Tensor:
        check_vq_tokens(tokens_BN, self.tokens_per_frame)
        codebook_KL = self.quantizer.get_buffer("implicit_codebook").to(self.background.dtype)
        codes_BNL = codebook_KL[tokens_BN.reshape(-1, self.tokens_per_frame)]
        frames_BHWC = self.shown(codes_BNL.transpose(1, 2).unflatten(2, self.grid))
        return frames_BHWC.reshape(*tokens_BN.shape[:-1], *self.image_size, 3)
