"""Soft tokens: continuous, bounded, standardised latents (HMA, Section 3.3, the paper's MAR half).

The bottleneck is ``tanh``, with a little noise in training: neighbouring latents then decode to similar
frames, which a dynamics model needs, since its predictions are never exact. Standardisation is measured on
data after training (:meth:`SoftTokenizer.set_statistics`) and stored with the weights.

Shape legend: B batch, N tokens a frame, C channels, h w token grid.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from hma_gym.errors import InvalidArgument
from hma_gym.tokenizers.conv import ConvConfig, ConvTokenizer
from hma_gym.tokenizers.protocol import check_frames, check_soft_tokens


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


class SoftTokenizer(ConvTokenizer):
    """Frames (..., H, W, 3) uint8 to tokens (..., N, C) float of mean 0 and standard deviation 1 per channel."""

    kind: ClassVar[str] = "soft"
    config: SoftConfig

    def __init__(self, config: SoftConfig, background_HWC: torch.Tensor | None = None) -> None:
        super().__init__(config, config.channels, background_HWC)
        self.channels = config.channels
        self.vocabulary = ()
        self.register_buffer("latent_mean_C", torch.zeros(config.channels))
        self.register_buffer("latent_std_C", torch.ones(config.channels))
        self.latent_mean_C: torch.Tensor
        self.latent_std_C: torch.Tensor

    def reconstruct(self, images_B3HW: torch.Tensor, generator: torch.Generator | None = None) -> torch.Tensor:
        latents_BChw = torch.tanh(self.to_latents(images_B3HW))
        if self.training and self.config.noise > 0.0:
            noise = torch.empty_like(latents_BChw).normal_(std=self.config.noise, generator=generator)
            latents_BChw = latents_BChw + noise
        return self.from_latents(latents_BChw)

    @torch.no_grad()
    def encode(self, frames_BHWC: torch.Tensor) -> torch.Tensor:
        check_frames(frames_BHWC, self.image_size)
        latents_BChw = torch.tanh(self.to_latents(self.to_images(frames_BHWC.reshape(-1, *frames_BHWC.shape[-3:]))))
        tokens_BNC = latents_BChw.flatten(2).transpose(1, 2)
        tokens_BNC = (tokens_BNC - self.latent_mean_C) / self.latent_std_C
        return tokens_BNC.reshape(*frames_BHWC.shape[:-3], self.tokens_per_frame, self.channels)

    @torch.no_grad()
    def decode(self, tokens_BNC: torch.Tensor) -> torch.Tensor:
        check_soft_tokens(tokens_BNC, self.tokens_per_frame, self.channels)
        latents_BNC = tokens_BNC.to(self.latent_std_C.dtype) * self.latent_std_C + self.latent_mean_C
        latents_BNC = latents_BNC.reshape(-1, self.tokens_per_frame, self.channels).clamp(-1.0, 1.0)
        latents_BChw = latents_BNC.transpose(1, 2).unflatten(2, self.grid)
        frames_BHWC = self.to_frames(self.from_latents(latents_BChw))
        return frames_BHWC.reshape(*tokens_BNC.shape[:-2], *self.image_size, 3)

    @torch.no_grad()
    def set_statistics(self, frames_BHWC: torch.Tensor, chunk: int = 512) -> None:
        """Measures mean and standard deviation per channel on frames (B, H, W, 3) uint8, and stores them.

        Afterwards ``encode`` of these frames has mean 0 and standard deviation 1 in each channel.
        Raises InvalidArgument where a channel is constant on them.
        """
        check_frames(frames_BHWC, self.image_size)
        total_C = torch.zeros(self.channels, dtype=torch.float64)
        square_C = torch.zeros(self.channels, dtype=torch.float64)
        for part_BHWC in frames_BHWC.split(chunk):
            latents_BChw = torch.tanh(self.to_latents(self.to_images(part_BHWC))).double().cpu()
            total_C += latents_BChw.sum((0, 2, 3))
            square_C += latents_BChw.square().sum((0, 2, 3))
        count = len(frames_BHWC) * self.tokens_per_frame
        mean_C = total_C / count
        std_C = (square_C / count - mean_C.square()).clamp(min=0.0).sqrt()
        if not bool((std_C > 1e-5).all()):
            raise InvalidArgument(
                f"frames must vary in every latent channel, got standard deviations {std_C.tolist()}; "
                "train the tokenizer first, or give more varied frames"
            )
        self.latent_mean_C.copy_(mean_C)
        self.latent_std_C.copy_(std_C)
