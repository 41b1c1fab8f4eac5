"""Rotations as networks take them: six numbers, the first two columns of the matrix.

Source: Zhou et al. 2019 (arXiv 1812.07035). Unlike quaternions these have no two names for one rotation.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional as F

_TINY = 1e-6


def matrix_of_quaternion(quaternion: Tensor) -> Tensor:
    """(..., 4) xyzw of any length above 0 -> rotation matrices (..., 3, 3)."""
    unit = math.sqrt(2.0) * F.normalize(quaternion, dim=-1, eps=_TINY)
    twice = (unit[..., :, None] * unit[..., None, :]).flatten(-2).unbind(-1)  # twice the products of any two
    xx, xy, xz, xw, _, yy, yz, yw, _, _, zz, zw, *_ = twice
    rows = (1 - (yy + zz), xy - zw, xz + yw, xy + zw, 1 - (xx + zz), yz - xw, xz - yw, yz + xw, 1 - (xx + yy))
    return torch.stack(rows, dim=-1).unflatten(-1, (3, 3))


def matrix_of_columns(columns: Tensor) -> Tensor:
    """(..., 6), two columns that need not be orthonormal -> rotation matrices (..., 3, 3), by Gram and Schmidt."""
    first = F.normalize(columns[..., :3], dim=-1, eps=_TINY)
    second = columns[..., 3:] - (first * columns[..., 3:]).sum(dim=-1, keepdim=True) * first
    second = F.normalize(second, dim=-1, eps=_TINY)
    return torch.stack((first, second, torch.linalg.cross(first, second)), dim=-1)


def columns_of_matrix(matrix: Tensor) -> Tensor:
    """Rotation matrices (..., 3, 3) -> their first two columns, (..., 6)."""
    return torch.cat((matrix[..., 0], matrix[..., 1]), dim=-1)
