"""What all soft tokenizers share: latents of mean 0 and standard deviation 1 per channel, one token a grid cell.

The statistics are measured on data (:meth:`StandardisedTokenizer.set_statistics`) and stored with the weights.

Shape legend: B batch, H W frame, h w token grid, N = h * w tokens a frame, C channels.
"""

from __future__ import annotations

from abc import abstractmethod
from typing import ClassVar

import torch

from hma_gym.errors import InvalidArgument
from hma_gym.tokenizers.protocol import Tokenizer, check_frames, check_soft_tokens


class StandardisedTokenizer(Tokenizer):
    """Frames (..., H, W, 3) uint8 to tokens (..., N, C) float; a subclass maps frames to latents and back.

    Attributes:
        latent_mean_C, latent_std_C: buffers of the subclass.
    """

    kind: ClassVar[str] = "soft"
    latent_mean_C: torch.Tensor
    latent_std_C: torch.Tensor

    @abstractmethod
    def frames_to_latents(self, frames_BHWC: torch.Tensor) -> torch.Tensor:
        """Latents (B, C, h, w) of frames (B, H, W, 3) uint8."""

    @abstractmethod
    def latents_to_frames(self, latents_BChw: torch.Tensor) -> torch.Tensor:
        """Frames (B, H, W, 3) uint8 of latents (B, C, h, w), whatever their values."""

    def tokens_to_latents(self, tokens_BNC: torch.Tensor) -> torch.Tensor:
        """Latents (B, C, h, w) of tokens (B, N, C)."""
        latents_BNC = tokens_BNC.to(self.latent_std_C.dtype) * self.latent_std_C + self.latent_mean_C
        return latents_BNC.transpose(1, 2).unflatten(2, self.grid)

    @torch.no_grad()
    def encode(self, frames_BHWC: torch.Tensor) -> torch.Tensor:
        check_frames(frames_BHWC, self.image_size)
        latents_BChw = self.frames_to_latents(frames_BHWC.reshape(-1, *frames_BHWC.shape[-3:]))
        tokens_BNC = (latents_BChw.flatten(2).transpose(1, 2) - self.latent_mean_C) / self.latent_std_C
        return tokens_BNC.reshape(*frames_BHWC.shape[:-3], self.tokens_per_frame, self.channels)

    @torch.no_grad()
    def decode(self, tokens_BNC: torch.Tensor) -> torch.Tensor:
        check_soft_tokens(tokens_BNC, self.tokens_per_frame, self.channels)
        flat_BNC = tokens_BNC.reshape(-1, self.tokens_per_frame, self.channels)
        frames_BHWC = self.latents_to_frames(self.tokens_to_latents(flat_BNC))
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
            latents_BChw = self.frames_to_latents(part_BHWC).double().cpu()
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
