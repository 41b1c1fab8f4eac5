"""Numbers as a network is told them that must know them finely: beside their sines and cosines at several scales.

Shape legend: E numbers.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor


def waves(position: Tensor, octaves: int) -> Tensor:
    """(..., E) -> (..., E (1 + 2 octaves)): numbers, and their sines and cosines at so many scales, each twice as fine
    as the one before, which tell positions finer than half precision does."""
    scale = math.pi / 2 * 2.0 ** torch.arange(octaves, device=position.device, dtype=position.dtype)
    angles = position[..., None, :] * scale[:, None]
    return torch.cat((position, torch.stack((angles.sin(), angles.cos()), dim=-2).flatten(-3)), dim=-1)
