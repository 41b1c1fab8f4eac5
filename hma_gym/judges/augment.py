"""Damage to real frames that resembles a generated video's: blur, noise, block compression, light, a stuck frame.

A judge learns on real frames and must read generated ones. Each function takes float frames in [-1, 1] of shape
(B, K, C, H, W) and a generator, and damages each window of the batch by its own random amount.

Shape legend: B windows, K frames of a window, C H W image.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor


def _strength(frames_BKCHW: Tensor, generator: torch.Generator, share: float) -> Tensor:
    """(B, 1, 1, 1, 1) in [0, 1], zero for all but ``share`` of the windows."""
    device = frames_BKCHW.device
    batch = len(frames_BKCHW)
    chosen = torch.rand(batch, generator=generator, device=device) < share
    amount = torch.rand(batch, generator=generator, device=device) * chosen
    return amount.view(-1, 1, 1, 1, 1)


def change_light(frames_BKCHW: Tensor, generator: torch.Generator, share: float = 0.5) -> Tensor:
    """Shift brightness by up to 0.06 and scale contrast by up to 6 percent."""
    device = frames_BKCHW.device
    amount = _strength(frames_BKCHW, generator, share)
    sign = torch.rand(len(frames_BKCHW), 2, generator=generator, device=device) * 2 - 1
    gain = 1 + 0.06 * amount * sign[:, 0].view(-1, 1, 1, 1, 1)
    return frames_BKCHW * gain + 0.06 * amount * sign[:, 1].view(-1, 1, 1, 1, 1)


def add_noise(frames_BKCHW: Tensor, generator: torch.Generator, share: float = 0.5, most: float = 0.06) -> Tensor:
    """Add grain of standard deviation up to ``most``, the same in all frames of a window."""
    grain_shape = (len(frames_BKCHW), 1, *frames_BKCHW.shape[2:])
    noise = torch.randn(grain_shape, generator=generator, device=frames_BKCHW.device)
    return frames_BKCHW + most * _strength(frames_BKCHW, generator, share) * noise


def blur(frames_BKCHW: Tensor, generator: torch.Generator, share: float = 0.5) -> Tensor:
    """Mix each frame with its 3 x 3 binomial blur."""
    wide = F.pad(frames_BKCHW.flatten(0, 1), (1, 1, 1, 1), mode="replicate")
    rows = (wide[..., :-2, :] + wide[..., 2:, :]) / 4 + wide[..., 1:-1, :] / 2
    soft = (rows[..., :-2] + rows[..., 2:]) / 4 + rows[..., 1:-1] / 2
    return torch.lerp(frames_BKCHW, soft.reshape(frames_BKCHW.shape), _strength(frames_BKCHW, generator, share))


def _dct_matrix(size: int, device: torch.device) -> Tensor:
    k = torch.arange(size, device=device, dtype=torch.float32)
    matrix = torch.cos(math.pi / size * (k[None, :] + 0.5) * k[:, None]) * math.sqrt(2 / size)
    matrix[0] /= math.sqrt(2)
    return matrix


def compress_blocks(frames_BKCHW: Tensor, generator: torch.Generator, share: float = 0.4) -> Tensor:
    """Round the 8 x 8 cosine coefficients to a random step of up to 0.5, as JPEG does: ringing and lost detail."""
    batch, window, channels, height, width = frames_BKCHW.shape
    line = _dct_matrix(8, frames_BKCHW.device)
    matrix = torch.kron(line, line)  # of a whole block, 64 x 64
    amount = _strength(frames_BKCHW, generator, share)
    step = (0.5 * amount).clamp_min(1e-3)[..., None]
    blocks = frames_BKCHW.reshape(batch, window, channels, height // 8, 8, width // 8, 8).transpose(4, 5).flatten(5)
    restored = ((blocks @ matrix.T / step).round() * step) @ matrix
    restored = restored.unflatten(5, (8, 8)).transpose(4, 5).reshape(frames_BKCHW.shape)
    return torch.where(amount > 0, restored, frames_BKCHW)


def repeat_frames(frames_BKCHW: Tensor, generator: torch.Generator, share: float = 0.15) -> Tensor:
    """Show the current frame in the whole window: a paused video, so that the verdict does not rest on motion."""
    chosen = torch.rand(len(frames_BKCHW), generator=generator, device=frames_BKCHW.device) < share
    return torch.where(chosen.view(-1, 1, 1, 1, 1), frames_BKCHW[:, -1:], frames_BKCHW)


def fade_red(
    frames_BKCHW: Tensor, background_CHW: Tensor, generator: torch.Generator, share: float = 0.25, gone: float = 0.75
) -> tuple[Tensor, Tensor]:
    """Let what is red (Lift's cube) fade into the empty scene, as it does in a generated video that forgets it.

    Args:
        frames_BKCHW: float frames in [-1, 1].
        background_CHW: the empty scene, same scale.
        generator: of the random choices.
        share: of the windows; each fades by its own amount, uniform in [0, 1].
        gone: from this amount on the object cannot be seen.

    Returns:
        The frames, and (B,) bool: where the object is gone. Success must be seen, so there is none there.
    """
    amount = _strength(frames_BKCHW, generator, share)
    redness = frames_BKCHW[:, :, 0] - torch.maximum(frames_BKCHW[:, :, 1], frames_BKCHW[:, :, 2])
    mask = F.max_pool2d((redness > 0.12).float(), 3, stride=1, padding=1)[:, :, None]
    return torch.lerp(frames_BKCHW, background_CHW.expand_as(frames_BKCHW), amount * mask), amount.flatten() >= gone


def augment(frames_BKCHW: Tensor, generator: torch.Generator) -> Tensor:
    """All damage that leaves the truth as it is, in the order in which a renderer, a decoder and a file would do it."""
    damaged = repeat_frames(frames_BKCHW, generator)
    damaged = change_light(damaged, generator)
    damaged = blur(blur(damaged, generator), generator)
    damaged = compress_blocks(damaged, generator)
    return add_noise(damaged, generator).clamp(-1.0, 1.0)
