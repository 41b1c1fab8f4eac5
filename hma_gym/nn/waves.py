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
    angles = [position * (math.pi / 2 * 2.0**octave) for octave in range(octaves)]
    return torch.cat((position, *(wave for angle in angles for wave in (angle.sin(), angle.cos()))), dim=-1)
