"""Squares of tokens: against einops, and back."""

from __future__ import annotations

import pytest
import torch
from einops import rearrange

from hma_gym.nn.patches import from_patches, to_patches


@pytest.mark.parametrize("leading", [(), (2,), (2, 3)])
@pytest.mark.parametrize("channels", [1, 5])
def test_patches_are_squares_row_by_row(leading: tuple[int, ...], channels: int) -> None:
    grid, patch = (4, 6), 2
    tokens = torch.arange(24 * channels).view(24, channels).expand(*leading, 24, channels)
    patches = to_patches(tokens, grid, patch)
    wanted = rearrange(tokens, "... (h p w q) c -> ... (h w) (p q c)", h=2, p=patch, w=3, q=patch)
    assert torch.equal(patches, wanted)
    assert torch.equal(from_patches(patches, grid, patch), tokens)
