"""Soft tokens: continuous, bounded, standardised latents (HMA, Section 3.3, the paper's MAR half).

The bottleneck is ``tanh``, with a little noise in training: neighbouring latents then decode to similar
frames, which a dynamics model needs, since its predictions are never exact. Standardisation is measured on
data after training and stored with the weights (:mod:`hma_gym.tokenizers.standardised`).

Shape legend: B batch, C channels, H W frame, h w token grid.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from hma_gym.errors import InvalidArgument
from hma_gym.tokenizers.conv import ConvConfig, ConvTokenizer
from hma_gym.tokenizers.standardised import StandardisedTokenizer


@dataclass(frozen=True)
class SoftConfig(ConvConfig):
    """Config of :class:`SoftTokenizer`.

    Attributes:
        channels: C, latent channels of a token.
        noise: standard deviation of the noise added in training to latents bounded to (-1, 1).
    """

    kind: ClassVar[str] = "soft"

    channels: int = 8
    noise: float = 0.05

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.channels < 1 or self.noise < 0.0:
            raise InvalidArgument(f"channels must be >= 1 and noise >= 0, got {self.channels} and {self.noise}")


class SoftTokenizer(StandardisedTokenizer, ConvTokenizer):
    """Frames (..., H, W, 3) uint8 to tokens (..., N, C) float of mean 0 and standard deviation 1 per channel."""

    config: SoftConfig

    def __init__(self, config: SoftConfig, background_HWC: torch.Tensor | None = None) -> None:
        super().__init__(config, config.channels, background_HWC)
        self.channels = config.channels
        self.vocabulary = ()
        self.register_buffer("latent_mean_C", torch.zeros(config.channels))
        self.register_buffer("latent_std_C", torch.ones(config.channels))

    def reconstruct(self, images_B3HW: torch.Tensor, generator: torch.Generator | None = None) -> torch.Tensor:
        latents_BChw = torch.tanh(self.to_latents(images_B3HW))
        if self.training and self.config.noise > 0.0:
            noise = torch.empty_like(latents_BChw).normal_(std=self.config.noise, generator=generator)
            latents_BChw = latents_BChw + noise
        return self.from_latents(latents_BChw)

    def frames_to_latents(self, frames_BHWC: torch.Tensor) -> torch.Tensor:
        return torch.tanh(self.to_latents(self.to_images(frames_BHWC)))

    def tokens_to_images(self, tokens_BNC: torch.Tensor) -> torch.Tensor:
        """Images (B, 3, H, W), about [0, 1], of tokens; differentiable, where ``decode`` is not."""
        return self.from_latents(self.tokens_to_latents(tokens_BNC).clamp(-1.0, 1.0))

    def latents_to_frames(self, latents_BChw: torch.Tensor) -> torch.Tensor:
        return self.shown(latents_BChw.clamp(-1.0, 1.0))
