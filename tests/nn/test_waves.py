"""Waves: numbers, then sines and cosines of each scale in turn."""

from __future__ import annotations

import math

import torch

from hma_gym.nn.waves import waves


def test_sines_and_cosines_of_each_octave_follow_the_numbers() -> None:
    position = torch.randn(2, 3, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    wanted = [position]
    for octave in range(3):
        angle = position * (math.pi / 2 * 2**octave)
        wanted += [torch.sin(angle), torch.cos(angle)]
    torch.testing.assert_close(waves(position, 3), torch.cat(wanted, dim=-1), rtol=0.0, atol=1e-12)
    assert waves(position.float(), 3).dtype == torch.float32
