"""An exponential moving average of a model's trainable parameters; evaluation and export use it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from hma_gym.errors import InvalidArgument


class EMA:
    """``average <- d average + (1 - d) parameter`` after every step, in the parameters' own dtype and device.

    ``d = min(decay, (1 + n) / (10 + n))`` at update n = 0, 1, ...: a short memory at first, so that the random initial
    weights leave the average as fast as training leaves them. ``decay`` 0 makes the average the parameters themselves.
    Frozen parameters and buffers are not averaged: they stay the model's own.
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        if not 0.0 <= decay < 1.0:
            raise InvalidArgument(
                f"ema_decay must be in [0, 1), got {decay}; 0 turns averaging off, 0.999 is a good start."
            )
        self.decay = decay
        self.updates = 0
        self.average: dict[str, Tensor] = {
            name: parameter.detach().clone() for name, parameter in model.named_parameters() if parameter.requires_grad
        }

    @torch.no_grad()
    def update(self, model: nn.Module) -> None:
        """Move the average one step towards the model's present parameters."""
        decay = min(self.decay, (1 + self.updates) / (10 + self.updates))
        current: list[Tensor] = [parameter for parameter in model.parameters() if parameter.requires_grad]
        torch._foreach_lerp_(list(self.average.values()), current, 1.0 - decay)
        self.updates += 1

    @contextmanager
    def applied_to(self, model: nn.Module) -> Iterator[None]:
        """Inside the block ``model`` carries the averaged weights; afterwards its own again, also after an error."""
        own = {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}
        _copy_into(model, self.average)
        try:
            yield
        finally:
            _copy_into(model, own)

    def state_dict(self, model: nn.Module) -> dict[str, Tensor]:
        """``model.state_dict()`` on CPU with the averaged weights in place of the trained ones: what to export."""
        with self.applied_to(model):
            return {name: value.detach().cpu().clone() for name, value in model.state_dict().items()}


@torch.no_grad()
def _copy_into(model: nn.Module, weights: Mapping[str, Tensor]) -> None:
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            parameter.copy_(weights[name])
