"""Factorised vocabularies: one token index as several smaller digits (HMA, Section 3.3: 2^18 as 2 x 512).

A token index in [0, prod(sizes)) is written in mixed radix, the first digit changing fastest, so that a
head predicts ``sum(sizes)`` logits and not ``prod(sizes)``. Finite scalar quantisation numbers its codes
in the same order: with ``sizes`` equal to its levels, digit k is the level of channel k.

Shape legend: F number of factors.
"""

from __future__ import annotations

import functools
import operator
from collections.abc import Sequence

import torch

from hma_gym.errors import InvalidArgument


def vocabulary_size(sizes: Sequence[int]) -> int:
    """The number of tokens: the product of the factor sizes. Raises InvalidArgument on an empty or bad tuple."""
    if len(sizes) == 0 or any(int(size) < 1 for size in sizes):
        raise InvalidArgument(f"vocabulary must be one or more factor sizes of at least 1, got {tuple(sizes)}")
    return functools.reduce(operator.mul, [int(size) for size in sizes])


def split_factors(tokens: torch.Tensor, sizes: Sequence[int]) -> torch.Tensor:
    """Digits (..., F) int64 of ``tokens`` (...) int64 in [0, prod(sizes)); the inverse of :func:`join_factors`."""
    vocabulary_size(sizes)
    digits = []
    rest = tokens
    for size in sizes:
        digits.append(rest % size)
        rest = torch.div(rest, size, rounding_mode="floor")
    return torch.stack(digits, dim=-1)


def join_factors(digits_F: torch.Tensor, sizes: Sequence[int]) -> torch.Tensor:
    """Token indices (...) int64 of digits (..., F) int64, digit k in [0, sizes[k])."""
    vocabulary_size(sizes)
    if digits_F.shape[-1] != len(sizes):
        raise InvalidArgument(
            f"digits must end in {len(sizes)} factors for the vocabulary {tuple(sizes)}, "
            f"got shape {tuple(digits_F.shape)}"
        )
    tokens = torch.zeros_like(digits_F[..., 0])
    for position in reversed(range(len(sizes))):
        tokens = tokens * sizes[position] + digits_F[..., position]
    return tokens
