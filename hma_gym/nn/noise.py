"""Counter-based randomness: numbers that depend on (seed, step, stream, index) and on nothing else.

A batched simulator must give environment i the same frames whoever its neighbours are, on any device, without a
generator object per environment. Each number here is a hash of its coordinates (SplitMix64, Steele et al. 2014), so
a whole batch is one vectorised call and a saved state needs only its seed and its step.

Shape legend: B rows.
"""

from __future__ import annotations

import functools
import math
import operator

import torch
from torch import Tensor

_GOLDEN = -7046029254386353131  # 0x9E3779B97F4A7C15 as a signed 64-bit integer
_MIX_1 = -4658895280553007687  # 0xBF58476D1CE4E5B9
_MIX_2 = -7723592293110705685  # 0x94D049BB133111EB


def _shift_right(x: Tensor, bits: int) -> Tensor:
    return (x >> bits) & ((1 << (64 - bits)) - 1)


def _mix(x: Tensor) -> Tensor:
    x = (x ^ _shift_right(x, 30)) * _MIX_1
    x = (x ^ _shift_right(x, 27)) * _MIX_2
    return x ^ _shift_right(x, 31)


def uniform(seed_B: Tensor, step_B: Tensor, stream: int, shape: tuple[int, ...]) -> Tensor:
    """Uniform numbers in (0, 1), never 0 or 1.

    Args:
        seed_B, step_B: int64, one pair a row.
        stream: tells apart the draws made for one step (unmasking order, flow noise ...).
        shape: what one row needs.

    Returns:
        (B, *shape) float32.
    """
    row = _mix(_mix(_mix(seed_B * _GOLDEN) + step_B) ^ stream)
    # 1, 2, 3 ... as sums: a compiler for GPUs reckons with an arange in 32 bits, which do not hold these factors.
    count = functools.reduce(operator.mul, shape, 1)
    index = torch.ones(count, dtype=torch.int64, device=seed_B.device).cumsum(0)
    bits = _shift_right(_mix(row[:, None] + index * _GOLDEN), 41)  # 23 bits: exact in float32, also after + 0.5
    return ((bits.float() + 0.5) / 2**23).view(-1, *shape)


def normal(seed_B: Tensor, step_B: Tensor, stream: int, shape: tuple[int, ...]) -> Tensor:
    """Standard normal numbers, (B, *shape) float32, by Box and Muller's transform."""
    u = uniform(seed_B, step_B, stream, (2, *shape))
    return (-2.0 * u[:, 0].log()).sqrt() * (2.0 * math.pi * u[:, 1]).cos()


def gumbel(seed_B: Tensor, step_B: Tensor, stream: int, shape: tuple[int, ...]) -> Tensor:
    """Standard Gumbel numbers, (B, *shape) float32: argmax(logits + gumbel) is a categorical sample."""
    return -(-uniform(seed_B, step_B, stream, shape).log()).log()
