"""Learning-rate schedules: a multiplier in [0, 1] as a pure function of warm-up step and progress."""

from __future__ import annotations

import math
from typing import Literal

Decay = Literal["constant", "cosine", "linear", "wsd"]
DECAYS: tuple[Decay, ...] = ("constant", "cosine", "linear", "wsd")


def learning_rate_factor(
    step: int,
    progress: float,
    *,
    warmup_steps: int,
    decay: Decay,
    decay_fraction: float = 0.2,
    final: float = 0.0,
) -> float:
    """The factor on every group's learning rate at optimiser step ``step`` (0 is the first).

    The warm-up is linear in steps, ``(step + 1) / warmup_steps`` up to 1, and multiplies the decay, a function of
    ``progress`` in [0, 1], the share of the budget (steps or minutes) that is spent:

    - ``constant``: 1;
    - ``linear``: from 1 to ``final``;
    - ``cosine``: half a cosine from 1 to ``final``;
    - ``wsd`` (warm-up, stable, decay; Hu et al. 2024, arXiv 2404.06395, Section 4): 1 up to progress
      ``1 - decay_fraction``, then linear to ``final``. On its plateau a run may still be made longer.
    """
    progress = min(max(progress, 0.0), 1.0)
    if decay == "constant":
        shape = 1.0
    elif decay == "linear":
        shape = 1.0 - progress
    elif decay == "cosine":
        shape = 0.5 * (1.0 + math.cos(math.pi * progress))
    else:
        shape = min(1.0, (1.0 - progress) / decay_fraction) if decay_fraction > 0 else 1.0
    warmup = min(1.0, (step + 1) / warmup_steps) if warmup_steps > 0 else 1.0
    return warmup * (final + (1.0 - final) * shape)
