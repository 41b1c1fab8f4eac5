"""Which tokens of a frame are hidden: the schedule in training, and the order of unmasking at inference.

Source: MaskGIT (Chang et al. 2022, Section 3.2) and HMA, Section 3.3.

Shape legend: B rows, T frames, N token positions of a frame.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor


def masked_after(step: int, steps: int, positions: int) -> int:
    """How many of ``positions`` stay masked after unmasking step ``step`` (0-based) of ``steps``: cosine schedule.

    The last step leaves none; every step unmasks at least one position.
    """
    left = math.floor(positions * math.cos(math.pi / 2 * (step + 1) / steps))
    return max(0, min(left, positions - step - 1)) if step + 1 < steps else 0


def training_mask(
    rows: int, frames: int, positions: int, full_probability: float, minimum_ratio: float, generator: torch.Generator
) -> Tensor:
    """(B, T, N) bool, True where the token is masked and must be predicted.

    A frame is wholly masked with ``full_probability`` (the condition of the first, and perhaps only, unmasking step);
    otherwise its ratio is cos(pi u / 2), u uniform, but at least ``minimum_ratio``.
    """
    device = generator.device
    u_BT = torch.rand(rows, frames, generator=generator, device=device)
    ratio_BT = torch.cos(math.pi / 2 * u_BT).clamp(min=minimum_ratio)
    full_BT = torch.rand(rows, frames, generator=generator, device=device) < full_probability
    ratio_BT = torch.where(full_BT, torch.ones_like(ratio_BT), ratio_BT)
    order_BTN = torch.rand(rows, frames, positions, generator=generator, device=device).argsort(dim=-1)
    count_BT = (ratio_BT * positions).ceil().clamp(min=1)
    return order_BTN < count_BT[..., None]


def unmask(masked_BN: Tensor, priority_BN: Tensor, left: int) -> Tensor:
    """The mask after unmasking the highest-priority masked positions until ``left`` stay masked, (B, N) bool.

    Positions that are already unmasked stay unmasked.
    """
    priority_BN = priority_BN.masked_fill(~masked_BN, float("inf"))
    rank_BN = priority_BN.argsort(dim=-1, descending=True, stable=True).argsort(dim=-1)
    return masked_BN & (rank_BN >= masked_BN.shape[-1] - left)
