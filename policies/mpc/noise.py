"""Noise coloured in time: neighbouring steps of a plan go the same way, as a hand does.

Shape legend: N problems, K candidates, H steps, A action dims.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def coloured_noise(
    generators: Sequence[torch.Generator], samples: int, steps: int, dims: int, beta: float, like: Tensor
) -> Tensor:
    """Gaussian noise (N, K, H, A) of unit variance at each step, whose power falls as 1 / frequency ** beta over H.

    The lowest frequency that H steps can tell from a constant is given to the constant too (Timmer and Koenig 1995, as
    in iCEM, arXiv 2008.06389).

    Args:
        generators: one for each of the N problems.
        samples, steps, dims: K, H, A.
        beta: 0 white, 1 pink, 2 red.
        like: tensor whose dtype and device the noise has.
    """
    white = torch.stack(
        [torch.randn(samples, dims, steps, 2, generator=generator, dtype=torch.float64) for generator in generators]
    )
    if steps == 1 or beta == 0:
        return white[..., 0].transpose(2, 3).to(like)
    frequency = torch.fft.rfftfreq(steps, dtype=torch.float64)
    frequency[0] = frequency[1]
    amplitude = frequency ** (-beta / 2)
    real = white[..., : len(frequency), 0] * amplitude
    imaginary = white[..., : len(frequency), 1] * amplitude
    edge = torch.zeros(len(frequency), dtype=torch.bool)  # frequencies that are their own mirror image: real parts only
    edge[0], edge[-1] = True, bool(edge[-1]) or steps % 2 == 0
    real = torch.where(edge, real * 2**0.5, real)
    imaginary = torch.where(edge, 0.0, imaginary)
    # What each frequency adds to the variance at a step, times H squared.
    share = torch.where(edge, 2.0, 4.0) * amplitude.square()
    spectrum = torch.complex(real, imaginary)
    noise = torch.fft.irfft(spectrum, n=steps, dim=-1) * steps / share.sum().sqrt()
    return noise.transpose(2, 3).to(like)
