"""Networks that clean a noisy action sequence, given a condition: a 1-D U-Net and a transformer.

After Diffusion Policy (Chi et al. 2023, arXiv 2303.04137, Section 3.1).

Shape legend: B samples, H steps of the sequence, A numbers of an action, C channels, G numbers of the condition.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional as F

_GROUPS = 8


class Denoiser(Protocol):
    """What both networks are."""

    def __call__(self, noisy_BHA: Tensor, timestep_B: Tensor, condition_BG: Tensor) -> Tensor:
        """(B, H, A) of noise level ``timestep_B`` (integers) to (B, H, A)."""
        ...


def sinusoids(positions_B: Tensor, size: int) -> Tensor:
    """Sines and cosines of ``size`` / 2 frequencies from 1 to 1 / 10000: (B, size)."""
    frequencies = torch.exp(torch.arange(size // 2, device=positions_B.device) * (-math.log(10_000) / (size // 2 - 1)))
    angles = positions_B.float()[:, None] * frequencies
    return torch.cat([angles.sin(), angles.cos()], dim=-1)


class _TimeEmbedding(nn.Module):
    def __init__(self, size: int) -> None:
        super().__init__()
        self.size = size
        self.mlp = nn.Sequential(nn.Linear(size, 4 * size), nn.Mish(), nn.Linear(4 * size, size))

    def forward(self, timestep_B: Tensor) -> Tensor:
        return torch.as_tensor(self.mlp(sinusoids(timestep_B, self.size)))


class _ConditionalBlock(nn.Module):
    """Two convolutions over time; the condition scales and shifts the channels between them (FiLM)."""

    def __init__(self, channels_in: int, channels: int, condition: int, kernel: int) -> None:
        super().__init__()
        self.first = nn.Conv1d(channels_in, channels, kernel, padding=kernel // 2)
        self.first_norm = nn.GroupNorm(_GROUPS, channels)
        self.second = nn.Conv1d(channels, channels, kernel, padding=kernel // 2)
        self.second_norm = nn.GroupNorm(_GROUPS, channels)
        self.modulation = nn.Linear(condition, 2 * channels)
        self.skip = nn.Conv1d(channels_in, channels, 1) if channels_in != channels else nn.Identity()

    def forward(self, x_BCH: Tensor, condition_BG: Tensor) -> Tensor:
        inner = F.mish(self.first_norm(self.first(x_BCH)))
        scale_BC, shift_BC = self.modulation(F.mish(condition_BG)).chunk(2, dim=-1)
        inner = inner * (1 + scale_BC[..., None]) + shift_BC[..., None]
        return torch.as_tensor(F.mish(self.second_norm(self.second(inner))) + self.skip(x_BCH))


class ConditionalUnet1d(nn.Module):
    """A U-Net over time. H must be a multiple of ``2 ** (len(channels) - 1)``.

    Args:
        action_dim: A.
        condition: G.
        channels: widths of the levels, the first at full length; multiples of 8.
        kernel: odd length of the convolutions.
        time_size: numbers of the embedding of the noise level; even.
    """

    def __init__(
        self, action_dim: int, condition: int, channels: Sequence[int], kernel: int = 5, time_size: int = 64
    ) -> None:
        super().__init__()
        self.time = _TimeEmbedding(time_size)
        total = condition + time_size
        widths = [action_dim, *channels]
        self.down = nn.ModuleList(
            nn.ModuleList([_ConditionalBlock(a, b, total, kernel), _ConditionalBlock(b, b, total, kernel)])
            for a, b in zip(widths[:-1], widths[1:], strict=True)
        )
        self.shrink = nn.ModuleList(nn.Conv1d(c, c, 3, stride=2, padding=1) for c in channels[:-1])
        self.middle = nn.ModuleList(_ConditionalBlock(channels[-1], channels[-1], total, kernel) for _ in range(2))
        self.grow = nn.ModuleList(nn.ConvTranspose1d(c, c, 4, stride=2, padding=1) for c in channels[:0:-1])
        self.up = nn.ModuleList(
            nn.ModuleList([_ConditionalBlock(a + b, b, total, kernel), _ConditionalBlock(b, b, total, kernel)])
            for a, b in zip(channels[:0:-1], channels[-2::-1], strict=True)
        )
        self.out = nn.Conv1d(channels[0], action_dim, 1)

    def forward(self, noisy_BHA: Tensor, timestep_B: Tensor, condition_BG: Tensor) -> Tensor:
        """See :class:`Denoiser`."""
        condition = torch.cat([self.time(timestep_B), condition_BG], dim=-1)
        x = noisy_BHA.transpose(1, 2)
        seen: list[Tensor] = []
        for level, blocks in enumerate(self.down):
            x = _through(blocks, x, condition)
            if level < len(self.shrink):
                seen.append(x)
                x = self.shrink[level](x)
        x = _through(self.middle, x, condition)
        for grow, blocks in zip(self.grow, self.up, strict=True):
            x = _through(blocks, torch.cat([grow(x), seen.pop()], dim=1), condition)
        return torch.as_tensor(self.out(x).transpose(1, 2))


def _through(blocks: nn.Module, x_BCH: Tensor, condition_BG: Tensor) -> Tensor:
    for block in blocks.children():
        x_BCH = block(x_BCH, condition_BG)
    return x_BCH


class ActionTransformer(nn.Module):
    """A decoder over the action sequence that attends to the condition and the noise level as memory.

    Each action attends to itself and the ones before it.

    Args:
        action_dim: A.
        condition: G, of all observations together.
        observations: into how many memory tokens the condition is cut; G must be a multiple of it.
        horizon: H.
        width, layers, heads: of the transformer.
    """

    def __init__(
        self, action_dim: int, condition: int, observations: int, horizon: int, width: int, layers: int, heads: int
    ) -> None:
        super().__init__()
        self.observations = observations
        self.time = _TimeEmbedding(width)
        self.action_in = nn.Linear(action_dim, width)
        self.observation_in = nn.Linear(condition // observations, width)
        self.place_HC = nn.Parameter(0.02 * torch.randn(horizon, width))
        self.memory_place_MC = nn.Parameter(0.02 * torch.randn(observations + 1, width))
        layer = nn.TransformerDecoderLayer(
            width, heads, 4 * width, dropout=0.0, activation="gelu", batch_first=True, norm_first=True
        )
        self.decoder = nn.TransformerDecoder(layer, layers, norm=nn.LayerNorm(width))
        self.out = nn.Linear(width, action_dim)
        self.register_buffer("mask_HH", torch.triu(torch.ones(horizon, horizon).bool(), 1), persistent=False)
        self.mask_HH: Tensor

    def forward(self, noisy_BHA: Tensor, timestep_B: Tensor, condition_BG: Tensor) -> Tensor:
        """See :class:`Denoiser`."""
        seen = self.observation_in(condition_BG.unflatten(1, (self.observations, -1)))
        memory = torch.cat([self.time(timestep_B)[:, None], seen], dim=1) + self.memory_place_MC
        x = self.action_in(noisy_BHA) + self.place_HC
        return torch.as_tensor(self.out(self.decoder(x, memory, tgt_mask=self.mask_HH)))
