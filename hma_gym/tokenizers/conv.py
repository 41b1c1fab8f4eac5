"""The convolutional autoencoder that the soft and the vq tokenizer share.

- Encoder 8 times down with a receptive field of 32 pixels: a token sees its own 8 x 8 patch and 12 pixels
  around it, and nothing else (no norm across the frame). So what stands still keeps its code while the
  arm moves elsewhere.
- Decoder over a learned background: the output is ``background + mask * (colour - background)``, so that
  capacity goes to what moves. It starts as the median frame of the training data.
- Cheap where it counts: the decoder sits on the real-time path. Most of its work is at 1/8 and 1/4 of the
  resolution, then PixelShuffle; about 0.13 GFLOP for 64 x 64.

Shape legend: B batch, H W frame, h w token grid (H / 8, W / 8), C latent channels.
"""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

from hma_gym.errors import InvalidArgument
from hma_gym.nn.activations import gelu_between
from hma_gym.tokenizers.protocol import Tokenizer, TokenizerConfig, check_frames

DOWNSAMPLING = 8
_INPUT_SCALE = 4.0  # pixels in [0, 1] have a standard deviation of about a quarter

#: Bytes of the decoder's widest maps at once on a CPU. A C library gives the memory of much larger ones back to the
#: system whenever they are freed, and the system clears each of their pages when they are wanted again.
_WIDEST = 2**21


@dataclass(frozen=True)
class ConvConfig(TokenizerConfig):
    """Widths of the autoencoder.

    Attributes:
        encoder_widths: channels at 1/2, 1/4 and 1/8 of the resolution.
        decoder_widths: channels at 1/8, 1/4 and 1/2 of the resolution.
        decoder_blocks: residual 3 x 3 blocks of the decoder at 1/8, 1/4 and 1/2 of the resolution.
    """

    encoder_widths: tuple[int, int, int] = (32, 64, 128)
    decoder_widths: tuple[int, int, int] = (160, 64, 32)
    decoder_blocks: tuple[int, int, int] = (2, 1, 1)

    def __post_init__(self) -> None:
        super().__post_init__()
        for side in self.image_size:
            if side % DOWNSAMPLING:
                lower = side - side % DOWNSAMPLING
                raise InvalidArgument(
                    f"image_size must be divisible by {DOWNSAMPLING} in both sides, got {self.image_size}; "
                    f"resize the frames, e.g. {side} to {lower or DOWNSAMPLING} or {lower + DOWNSAMPLING}"
                )
        for name in ("encoder_widths", "decoder_widths", "decoder_blocks"):
            value = tuple(int(v) for v in getattr(self, name))
            object.__setattr__(self, name, value)
            if len(value) != 3 or min(value) < (0 if name == "decoder_blocks" else 1):
                raise InvalidArgument(f"{name} must be three positive numbers, got {value}")


class PixelNorm(nn.Module):
    """Layer norm over the channels of each pixel, so that no pixel's value depends on another's."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(channels))
        self.bias = nn.Parameter(torch.zeros(channels))

    def forward(self, x_BCHW: torch.Tensor) -> torch.Tensor:
        x_BHWC = x_BCHW.permute(0, 2, 3, 1)
        return F.layer_norm(x_BHWC, (x_BHWC.shape[-1],), self.weight, self.bias).permute(0, 3, 1, 2)


class ResidualBlock(nn.Module):
    """x + conv1x1(GELU(conv_k(norm(x)))); k = 1 leaves the receptive field as it is."""

    def __init__(self, channels: int, kernel: int, expansion: int = 1) -> None:
        super().__init__()
        self.norm = PixelNorm(channels)
        self.inner = nn.Conv2d(channels, channels * expansion, kernel, padding=kernel // 2)
        self.outer = nn.Conv2d(channels * expansion, channels, 1)
        nn.init.normal_(self.outer.weight, std=0.1 / (channels * expansion) ** 0.5)

    def forward(self, x_BCHW: torch.Tensor) -> torch.Tensor:
        change = gelu_between(self.inner, self.norm(x_BCHW), self.outer)
        # In the memory of the change, unless autocast made that of a lower precision.
        return change.add_(x_BCHW) if change.dtype == x_BCHW.dtype else x_BCHW + change


class Encoder(nn.Module):
    """Six input channels (frame, and its difference from the background) to C maps at 1/8 of the resolution."""

    def __init__(self, config: ConvConfig, channels: int) -> None:
        super().__init__()
        half, quarter, eighth = config.encoder_widths
        self.layers = nn.Sequential(
            nn.PixelUnshuffle(2),
            nn.Conv2d(24, half, 3, padding=1),
            nn.GELU(),
            nn.Conv2d(half, quarter, 4, stride=2, padding=1),
            ResidualBlock(quarter, kernel=3),
            ResidualBlock(quarter, kernel=1, expansion=2),
            nn.Conv2d(quarter, eighth, 4, stride=2, padding=1),
            ResidualBlock(eighth, kernel=1, expansion=2),
            ResidualBlock(eighth, kernel=1, expansion=2),
            PixelNorm(eighth),
            nn.Conv2d(eighth, channels, 1),
        )

    def forward(self, x_BCHW: torch.Tensor) -> torch.Tensor:
        latents_BChw: torch.Tensor = self.layers(x_BCHW)
        return latents_BChw


class Decoder(nn.Module):
    """C maps at 1/8 of the resolution to colour (3) and mask logit (1) maps at full resolution."""

    def __init__(self, config: ConvConfig, channels: int) -> None:
        super().__init__()
        eighth, quarter, half = config.decoder_widths
        blocks = config.decoder_blocks
        height, width = config.image_size
        self.stem = nn.Conv2d(channels, eighth, 1)
        self.position = nn.Parameter(torch.zeros(1, eighth, height // DOWNSAMPLING, width // DOWNSAMPLING))
        self.layers = nn.Sequential(
            *(ResidualBlock(eighth, kernel=3) for _ in range(blocks[0])),
            nn.Conv2d(eighth, quarter * 4, 1),
            nn.PixelShuffle(2),
            *(ResidualBlock(quarter, kernel=3) for _ in range(blocks[1])),
            nn.Conv2d(quarter, half * 4, 1),
            nn.PixelShuffle(2),
            *(ResidualBlock(half, kernel=3) for _ in range(blocks[2])),
            nn.GELU(),
            nn.Conv2d(half, 4 * 4, 3, padding=1),
            nn.PixelShuffle(2),
        )

    def forward(self, latents_BChw: torch.Tensor) -> torch.Tensor:
        maps_B4HW: torch.Tensor = self.layers(self.stem(latents_BChw) + self.position)
        return maps_B4HW


class ConvTokenizer(Tokenizer):
    """Encoder, bottleneck, decoder; a subclass is the bottleneck.

    Args:
        config: sizes.
        channels: C, channels at the bottleneck.
        background_HWC: uint8 median frame of the training data; mid-grey when omitted (then the weights
            are about to be loaded, or there is no common background).
    """

    config: ConvConfig

    def __init__(self, config: ConvConfig, channels: int, background_HWC: torch.Tensor | None) -> None:
        super().__init__()
        self.config = config
        height, width = config.image_size
        self.grid = (height // DOWNSAMPLING, width // DOWNSAMPLING)
        self.encoder = Encoder(config, channels)
        self.decoder = Decoder(config, channels)
        if background_HWC is None:
            background_3HW = torch.full((3, height, width), 0.5)
        else:
            check_frames(background_HWC, config.image_size)
            background_3HW = background_HWC.permute(2, 0, 1).float() / 255.0
        self.background = nn.Parameter(background_3HW.clone())
        self.register_buffer("reference_3HW", background_3HW.clone())
        self.reference_3HW: torch.Tensor

    @abstractmethod
    def reconstruct(self, images_B3HW: torch.Tensor, generator: torch.Generator | None = None) -> torch.Tensor:
        """Differentiable reconstruction (B, 3, H, W) of images in [0, 1]; ``generator`` feeds training noise."""

    def to_images(self, frames_BHWC: torch.Tensor) -> torch.Tensor:
        """uint8 (B, H, W, 3) to (B, 3, H, W) in [0, 1], in the weights' dtype."""
        return frames_BHWC.permute(0, 3, 1, 2).to(self.background.dtype) / 255.0

    def to_latents(self, images_B3HW: torch.Tensor) -> torch.Tensor:
        """Unbounded bottleneck maps (B, C, h, w) of images in [0, 1]."""
        difference = images_B3HW - self.reference_3HW
        x_B6HW = torch.cat([images_B3HW - 0.5, difference], dim=1) * _INPUT_SCALE
        latents_BChw: torch.Tensor = self.encoder(x_B6HW)
        return latents_BChw

    def from_latents(self, latents_BChw: torch.Tensor) -> torch.Tensor:
        """Images (B, 3, H, W), about [0, 1], of bottleneck maps: the background, masked by what stands before it."""
        maps_B4HW = self.decoder(latents_BChw)
        mask_B1HW = torch.sigmoid(maps_B4HW[:, 3:])
        return torch.addcmul(self.background, mask_B1HW, maps_B4HW[:, :3] + (0.5 - self.background))

    def shown(self, latents_BChw: torch.Tensor) -> torch.Tensor:
        """Frames (B, H, W, 3) uint8 of bottleneck maps; on a CPU a few at a time, but inside compiled code."""
        whole = latents_BChw.is_cuda or torch.compiler.is_compiling()
        eighth, quarter, half = self.config.decoder_widths
        numbers = self.tokens_per_frame * max(eighth, 4 * quarter, 16 * half, 64 * 4)  # of a frame's widest maps
        rows = max(1, _WIDEST // (4 * numbers))
        if whole or len(latents_BChw) <= rows:
            return self.to_frames(self.from_latents(latents_BChw))
        return torch.cat([self.to_frames(self.from_latents(part)) for part in latents_BChw.split(rows)])

    def to_frames(self, images_B3HW: torch.Tensor) -> torch.Tensor:
        """(B, 3, H, W) in [0, 1] to uint8 (B, H, W, 3), rounded."""
        return (images_B3HW.clamp(0.0, 1.0) * 255.0).round().to(torch.uint8).permute(0, 2, 3, 1)
