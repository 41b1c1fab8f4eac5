"""Squares of neighbouring tokens that share one position of the trunk.

Shape legend: S tokens of a grid, row by row; N = S / patch**2 positions, row by row; C numbers of a token.
"""

from __future__ import annotations

from torch import Tensor


def to_patches(tokens: Tensor, grid: tuple[int, int], patch: int) -> Tensor:
    """(..., S, C) -> (..., N, patch**2 * C); the inverse of :func:`from_patches`."""
    h, w = grid[0] // patch, grid[1] // patch
    return tokens.unflatten(-2, (h, patch, w, patch)).transpose(-4, -3).flatten(-3).flatten(-3, -2)


def from_patches(patches: Tensor, grid: tuple[int, int], patch: int) -> Tensor:
    """(..., N, patch**2 * C) -> (..., S, C)."""
    h, w = grid[0] // patch, grid[1] // patch
    return patches.unflatten(-1, (patch, patch, -1)).unflatten(-4, (h, w)).transpose(-4, -3).flatten(-5, -2)
